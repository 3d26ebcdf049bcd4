"""Every file of gin_configs/methods makes a method: it fits a base, and trains what its text says."""

import copy
import pathlib
import re

import gin
import jax
import numpy as np
import pytest
from flax import traverse_util

from modjax import adapters, initialize, launch
from modjax.features import FeatureSpace

METHODS = pathlib.Path(launch.CONFIGS) / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.gin") if "METHOD = " in path.read_text())
SPACE = FeatureSpace(
    (("task", ("parse", "tag")), ("language", ("en", "sw"))), ("parse_en", "tag_en", "tag_sw")
)
LENGTHS = {"inputs": 16, "targets": 8}

# Of testdata/tiny.gin: width 16, hidden width 32, one layer in each stack. So there are 12 layers 16 -> 16
# (attention), 4 layers 16 -> 32 and 2 layers 32 -> 16: 18 in all.
COLUMN, SITES, TASKS = 12 * (16 + 16) + 6 * (16 + 32), 18, 3
TRAINED = {
    "lora": 8 * COLUMN,
    "lora_wide": 14 * COLUMN,
    "lora_per_dataset": TASKS * 8 * COLUMN,
    "flix": (2 + 2) * 4 * COLUMN,
    "polytropon": 8 * 4 * COLUMN + SITES * TASKS * 8,
    "poly_s": 8 * 4 * COLUMN + SITES * TASKS * 8 * 8,
    "poly_z": SITES * TASKS * 8 * 8,
    "poly_mu": 8 * 4 * COLUMN,
    "adamix_lora": 6 * (8 * 4 * 16 + 4 * 16),
    "adamix_adapter": 2 * (4 * 16 * (16 + 1) + 16 * 16 + 16),
    "houlsby": 5 * (48 * (16 + 16 + 1) + 16),
    "pfeiffer": 2 * (48 * (16 + 16 + 1) + 16),
    "ia3": 6 * 16 + 2 * 32,
}


def configured(method, *bindings, base="tiny"):
    """(model, optimizer, layout) as train.py would make them for a tiny base of testdata."""
    extra = {"lora_wide": ("WIDE_RANK = 14",)}.get(method, ())
    flags = launch.Flags(
        (f"tests/testdata/{base}.gin", f"methods/{method}.gin", "runs/finetune.gin"),
        (
            "MIXTURE_OR_TASK_NAME = 'toy'",
            f"TASK_FEATURE_LENGTHS = {LENGTHS}",
            "TRAIN_STEPS = 10",
            "MODEL_DIR = 'none'",
            "BASE = 'none'",
            *extra,
            *bindings,
        ),
        (str(pathlib.Path(__file__).parents[1]),),
    )
    launch.load_gin(flags, "train")
    model, optimizer, name = (
        copy.deepcopy(gin.query_parameter(f"train.train.{key}"))  # makes what is referred to
        for key in ("model", "optimizer", "method")
    )
    assert name == method
    model = model.with_space(SPACE)
    batch = model.example_batch(LENGTHS, SPACE, segments=4 if model.PACKS else None)
    return model, optimizer, initialize.layout(model, batch, optimizer.groups)


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_file_fits_a_base_and_trains_something_but_not_the_base(name):
    model, optimizer, layout = configured(name)
    trained = traverse_util.flatten_dict(layout.trained, sep="/")
    frozen = traverse_util.flatten_dict(layout.frozen, sep="/")
    if name in TRAINED:
        assert adapters.count_moving(layout.trained, layout.rates) == TRAINED[name]
    if name == "full":
        assert not frozen
    elif name == "bitfit":
        assert all(re.search("(bias|scale|rel_embedding)$", path) for path in trained)
    else:
        assert not any(path.endswith(("kernel", "embedding")) for path in trained)
    transform = optimizer.build(layout.trained)
    jax.eval_shape(transform.init, layout.trained)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", ["tiny_decoder", "tiny_encoder"])
def test_a_methods_file_fits_the_other_kinds_of_bases_and_trains_their_head(name, base):
    _, _, layout = configured(name, base=base)
    trained = set(traverse_util.flatten_dict(layout.trained, sep="/"))
    frozen = set(traverse_util.flatten_dict(layout.frozen, sep="/"))
    head = {path for path in trained | frozen if path.startswith("classifier/")}
    assert head <= trained and len(head) == (2 if base == "tiny_encoder" else 0)
    if name == "full":
        assert not frozen
    elif name == "bitfit":
        assert all(re.search("(bias|scale)$", path) for path in trained - head)
        assert any("/query/bias" in path for path in trained)
    else:
        assert not any(path.endswith(("kernel", "embedding")) for path in trained - head)
        assert trained - head and frozen


def test_ia3_scales_keys_values_and_the_input_of_wo():
    _, _, layout = configured("ia3")
    shapes = {k: v.shape for k, v in traverse_util.flatten_dict(layout.trained, sep="/").items()}
    assert shapes.pop("encoder/layers_0/mlp/wo/ia3/scale") == (1, 32)
    assert shapes.pop("decoder/layers_0/mlp/wo/ia3/scale") == (1, 32)
    assert len(shapes) == 6 and all(re.search("(key|value)/ia3/scale$", path) for path in shapes)


def test_logits_have_their_own_rate_and_do_not_decay():
    _, optimizer, layout = configured(
        "polytropon",
        "LEARNING_RATE = 0.001",
        "WARMUP = 0",
        "optimizers.Optimizer.weight_decay = 0.5",
    )
    transform = optimizer.build(layout.trained)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), layout.trained)
    grads = jax.tree.map(np.ones_like, ones)
    updates, _ = transform.update(grads, transform.init(ones), ones)
    for path, update in traverse_util.flatten_dict(updates, sep="/").items():
        # Adam's first step is the rate; decay adds rate times decay times the value.
        expected = -0.1 if path.endswith("/logits") else -0.001 * 1.5
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_a_misspelt_router_or_method_is_named_with_the_nearest_one():
    with pytest.raises(launch.ConfigError, match="adapters.Skils.*Did you mean .*Skills"):
        configured("polytropon", "ROUTER = @adapters.Skils()")
    with pytest.raises(
        launch.ConfigError, match="methods/polytropo.gin.*Did you mean .*polytropon"
    ):
        configured("polytropo")


def test_a_group_that_freezes_adapters_is_refused_since_no_checkpoint_would_hold_them():
    with pytest.raises(ValueError, match=r"freezes adapters .*poly/a.* learning_rate 0 instead"):
        configured("polytropon", "skills/optimizers.Group.train = False")


def test_a_dataset_without_logits_of_its_own_is_refused_in_training():
    model, *_ = configured("polytropon", "adapters.Skills.by = 'language'")
    initialize.check_routed(model, {"parse_en": {"task": "parse", "language": "en"}})
    with pytest.raises(ValueError, match="'parse_yo' has no logits, for its language is 'yo'"):
        initialize.check_routed(model, {"parse_yo": {"task": "parse", "language": "yo"}})
    with pytest.raises(ValueError, match="'parse' has no logits, for its language is None"):
        initialize.check_routed(model, {"parse": {"task": "parse", "language": None}})


def test_a_router_and_a_module_mix_anew_on_the_command_line():
    model, _, layout = configured("houlsby", "ROUTER = @adapters.Features()")
    sizes = {k: v.shape for k, v in traverse_util.flatten_dict(layout.trained, sep="/").items()}
    assert sizes["encoder/layers_0/mlp/wo/adapter/down"] == (16, 4 * 48)  # 2 tasks and 2 languages

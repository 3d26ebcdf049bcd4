"""Few-shot adaptation from end to end: what starts from where, what moves, and what selection may see."""

import json
import pathlib
import sys

import gin
import jax
import numpy as np
import pytest
from flax import traverse_util

from modjax import adapters, checkpoints, fewshot, initialize, launch
from modjax.data import pipeline, registry, shots
from modjax.features import FeatureSpace

TESTDATA = pathlib.Path(__file__).parent / "testdata"
sys.path.insert(0, str(TESTDATA))
pytestmark = pytest.mark.usefixtures("compile_once")
SMALL = ("SKILLS = 2", "HEADS = 2", "adapters.LowRank.rank = 2", "WARMUP = 0")


def configure(entry, files, bindings, training=True):
    values = (
        "MIXTURE_OR_TASK_MODULE = 'toy_tasks'",
        "TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}",
        "BATCH_SIZE = 8",
    )
    if training:
        values += ("train.train.tensorboard = False", "optimizers.schedule.decay = 'constant'")
    launch.load_gin(launch.Flags(tuple(map(str, files)), (*values, *bindings), ()), entry)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(folder of a random base, MODEL_DIR of Poly-S trained on three of the four toy datasets)."""
    import train

    folder = tmp_path_factory.mktemp("many")
    configure(
        "train",
        (TESTDATA / "tiny.gin", "methods/full.gin", "runs/pretrain.gin"),
        (
            "MIXTURE_OR_TASK_NAME = 'toy'",
            "TRAIN_STEPS = 1",
            f"MODEL_DIR = '{folder / 'pretraining'}'",
            f"EXPORT_DIR = '{folder / 'base'}'",
            "WARMUP = 1",
        ),
    )
    gin.get_configurable(train.train)(operative_config=str)
    configure(
        "train",
        ("bases/folder.gin", "methods/poly_s.gin", "runs/finetune.gin"),
        (
            "MIXTURE_OR_TASK_NAME = 'toy_without_turn_sw'",
            "TRAIN_STEPS = 3",
            f"MODEL_DIR = '{folder / 'run'}'",
            f"BASE = '{folder / 'base'}'",
            *SMALL,
        ),
    )
    gin.get_configurable(train.train)(operative_config=str)
    return folder / "base", folder / "run"


def few_shot(many, tmp_path, method, *bindings):
    base, run = many
    files = ("bases/folder.gin", f"methods/{method}.gin", "runs/fewshot.gin")
    values = (
        "MIXTURE_OR_TASK_NAME = 'toy_turn_sw'",
        f"BASE = '{base}'",
        f"MODEL_DIR = '{tmp_path}'",
        f"INITIAL_CHECKPOINT_PATH = '{run}'",
        "TRAIN_STEPS = 2",
        "SHOTS = 8",
        "fewshot.Protocol.validate_every = 1",
        "fewshot.Protocol.validation_examples = 8",
        "fewshot.Protocol.seeds = (5,)",
        "WARMUP = 0",
    )
    configure("train", files, (*values, *bindings))
    rows = gin.get_configurable(fewshot.adapt)(operative_config=str)
    return rows, [trained(tmp_path / "seed_5", step) for step in (0, 2)]


def trained(folder, step=None):
    tree, _, _ = checkpoints.load_trained(checkpoints.locate(folder, step))
    return traverse_util.flatten_dict(tree, sep="/")


def test_the_best_step_is_the_first_of_the_best_whichever_way_better_is():
    assert fewshot._best({0: 1.0, 100: 7.0, 200: 7.0}, "exact_match") == 100
    assert fewshot._best({0: 9.0, 100: 2.0, 200: 2.0}, "malformed") == 100


def test_z_moves_the_new_tasks_logits_alone_and_reports_the_start_and_the_selected_step(
    many, tmp_path
):
    rows, (start, end) = few_shot(many, tmp_path, "poly_z", *SMALL)
    before = trained(many[1])
    for path, value in end.items():
        if path.endswith("logits"):
            assert value.shape[0] == 4 and before[path].shape[0] == 3
            np.testing.assert_array_equal(value[:3], before[path])
            assert (value[3] != start[path][3]).any()
        else:
            np.testing.assert_array_equal(value, before[path])
    selection = json.loads((tmp_path / "seed_5" / "selection.json").read_text())
    assert list(selection["validation"]) == ["0", "1", "2"]
    best = max(selection["validation"].values())
    assert selection["validation"][str(selection["selected"])] == best
    assert {row["method"] for row in rows} == {"poly_z_0shots", "poly_z_8shots"}
    assert {(row["n"], row["seed"]) for row in rows} == {(64, 5)}
    written = {path.name for path in (tmp_path / "seed_5" / "eval").iterdir()}
    # The test split was read for the start and for what validation had selected, and for nothing else.
    selected = f"test_{selection['selected']}"
    assert {name for name in written if name.startswith("test")} == {"test_0_before", selected}
    for folder, step, count in (("test_0_before", 0, 0), (selected, selection["selected"], 8)):
        run = json.loads((tmp_path / "seed_5" / "eval" / folder / "run.json").read_text())
        assert (run["split"], run["step"], run["method"]) == ("test", step, f"poly_z_{count}shots")
    # The start has seen "turn" and "sw", but not together.
    settings = {(row["method"], row["setting"]) for row in rows}
    assert settings == {("poly_z_0shots", "unseen_pair"), ("poly_z_8shots", "seen")}
    metadata = checkpoints.read_metadata(tmp_path / "seed_5")
    assert metadata["mixture"] == "toy_turn_sw" and "toy_turn_sw" in metadata["space"]["datasets"]


def test_a_second_call_repeats_no_training_and_gives_the_same_rows(many, tmp_path):
    first, (_, end) = few_shot(many, tmp_path, "poly_z", *SMALL)
    assert list(tmp_path.rglob("checkpoint_*"))
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint_*"))]
    again, (_, after) = few_shot(many, tmp_path, "poly_z", *SMALL)
    assert again == first
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("checkpoint_*"))] == written
    jax.tree.map(np.testing.assert_array_equal, end, after)


def test_eval_py_scores_a_few_shot_checkpoint_as_the_protocol_did(many, tmp_path):
    import eval as evaluation

    rows, _ = few_shot(many, tmp_path, "poly_s", *SMALL)
    configure(
        "eval",
        ("bases/folder.gin", "methods/poly_s.gin", "runs/eval.gin"),
        (
            "MIXTURE_OR_TASK_NAME = 'toy_turn_sw'",
            f"BASE = '{many[0]}'",
            f"CHECKPOINT_PATH = '{checkpoints.locate(tmp_path / 'seed_5', 0)}'",
            f"EVAL_OUTPUT_DIR = '{tmp_path / 'again'}'",
            *SMALL[:-1],
        ),
        training=False,
    )
    again = gin.get_configurable(evaluation.evaluate)(operative_config=str)
    assert [row["value"] for row in again] == [
        row["value"] for row in rows if row["method"] == "poly_s_0shots"
    ]


def test_another_protocol_or_start_in_the_same_folder_is_refused(many, tmp_path):
    fewshot._keep(fewshot.Protocol(steps=4), "runs/a", tmp_path)
    fewshot._keep(fewshot.Protocol(steps=4, seeds=(7,)), "runs/./a", tmp_path)
    with pytest.raises(ValueError, match="begun with Protocol.steps = 4, not 2"):
        fewshot._keep(fewshot.Protocol(steps=2), "runs/a", tmp_path)
    with pytest.raises(
        ValueError, match="begun with INITIAL_CHECKPOINT_PATH = '.*/runs/a', not None"
    ):
        fewshot._keep(fewshot.Protocol(steps=4), None, tmp_path)


def test_poly_s_starts_from_the_skills_with_fresh_logits_and_trains_all(many, tmp_path):
    _, (start, end) = few_shot(many, tmp_path, "poly_s", *SMALL)
    before = trained(many[1])
    for path, value in start.items():
        if path.endswith("logits"):
            assert np.abs(value[3]).max() <= 1e-3
        else:
            np.testing.assert_array_equal(value, before[path])
            assert (end[path] != value).any()


def test_mu_starts_as_one_lora_the_uniform_average_of_the_skills(many, tmp_path):
    _, (start, end) = few_shot(
        many, tmp_path, "lora", "adapters.LowRank.rank = 2", "initialize.Start.collapse = True"
    )
    for path, value in trained(many[1]).items():
        if path.endswith("poly/a"):
            np.testing.assert_allclose(
                start[path.replace("poly", "lora")], value.reshape(-1, 2, 2).mean(1), atol=1e-6
            )
        elif path.endswith("poly/b"):
            expected = value.reshape(2, 2, -1).mean(0) / 2  # alpha 1, rank 2
            np.testing.assert_allclose(start[path.replace("poly", "lora")], expected, atol=1e-6)
    assert any((end[path] != start[path]).any() for path in start)


def test_another_method_or_rank_is_refused(many, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="method"):
        few_shot(many, tmp_path / "flix", "flix")
    with pytest.raises(ValueError, match="give its method the rank"):
        few_shot(many, tmp_path / "mu", "lora", "initialize.Start.collapse = True")
    assert not (tmp_path / "mu" / "results.json").exists()


def test_a_baseline_starts_from_the_base(many, tmp_path):
    rows, (start, end) = few_shot(
        many, tmp_path, "lora", "INITIAL_CHECKPOINT_PATH = None", "adapters.LowRank.rank = 2"
    )
    assert not any(value.any() for path, value in start.items() if path.endswith("/b"))
    assert {row["method"] for row in rows} == {"lora_0shots", "lora_8shots"}


def test_the_base_may_be_named_as_the_start(many, tmp_path):
    """As INITIAL_CHECKPOINT_PATH, which T5X's users give; it has seen nothing."""
    base, _ = many
    rows, _ = few_shot(
        many, tmp_path, "lora", f"INITIAL_CHECKPOINT_PATH = '{base}/'", "adapters.LowRank.rank = 2"
    )
    assert {row["method"] for row in rows} == {"lora_0shots", "lora_8shots"}


def grow(*mixtures):
    """Adapters of a layer with one more language and dataset, the old ones carried over, and both methods."""
    import flax.linen as nn

    old_space = FeatureSpace((("task", ("copy",)), ("language", ("en", "sw"))), ("copy_en",))
    new_space = old_space.extend({"language": ["yo"]}, ["copy_yo"])
    rules = tuple(adapters.Rule(".*", mixture) for mixture in mixtures)
    trees, methods = [], []
    for space in (old_space, new_space):
        adapted = adapters.Adapted(nn.Dense(5, name="dense"), rules, space)
        ones = np.ones((1, 1, 2), np.int32)
        mix = adapters.Mix(features=ones, tasks=ones[..., 0])
        params = adapted.init(jax.random.key(len(trees)), np.ones((1, 3, 4)), mix=mix)["params"]
        tree, _ = adapters.split(params, adapted)
        noise = lambda x: x + np.random.default_rng(x.size).normal(size=x.shape)  # noqa: E731
        trees.append(tree if trees else jax.tree.map(noise, tree))
        methods.append(adapters.describe_method(adapted))
    return adapters.extend(trees[0], methods[0], trees[1], methods[1]), *methods


@pytest.fixture
def grown():
    """Those of a FLix."""
    return grow(adapters.Mixture("flix", adapters.LowRank(2), adapters.Features()))


def test_a_new_value_starts_at_nothing_or_as_the_mean_of_a_named_set(grown):
    tree, old, new = grown
    assert not tree["flix"]["b"][6:].any()  # columns 0-1 task, 2-3 en, 4-5 sw, 6-7 yo
    filled = adapters.fill(tree, old, new, {"language": ["en", "sw"]})["flix"]
    np.testing.assert_allclose(
        filled["a"][:, 6:], (tree["flix"]["a"][:, 2:4] + tree["flix"]["a"][:, 4:6]) / 2
    )
    np.testing.assert_allclose(
        filled["b"][6:], (tree["flix"]["b"][2:4] + tree["flix"]["b"][4:6]) / 2
    )
    np.testing.assert_array_equal(filled["b"][:6], tree["flix"]["b"][:6])
    with pytest.raises(ValueError, match="no 'language=swa' .* Did you mean 'language=sw'"):
        adapters.fill(tree, old, new, {"language": ["swa"]})
    with pytest.raises(ValueError, match="no new value of 'task'"):
        adapters.fill(tree, old, new, {"task": ["copy"]})


def test_each_copy_of_a_new_value_starts_as_the_mean_of_that_copy_of_a_named_set():
    router = adapters.Features("language", copies=2)
    tree, old, new = grow(adapters.Mixture("flix", adapters.LowRank(1), router))
    filled = adapters.fill(tree, old, new, {"language": ["en", "sw"]})["flix"]
    b = tree["flix"]["b"]  # rows en#0, en#1, sw#0, sw#1, yo#0, yo#1
    np.testing.assert_allclose(filled["b"][4:], (b[:2] + b[2:4]) / 2)
    np.testing.assert_array_equal(filled["b"][:4], b[:4])


def test_logits_start_from_others_of_what_routes_them_alone():
    tree, old, new = grow(
        adapters.Mixture("flix", adapters.LowRank(2), adapters.Features()),
        adapters.Mixture("poly", adapters.LowRank(2), adapters.Skills(2)),
    )
    filled = adapters.fill(tree, old, new, {"language": ["en", "sw"]})
    np.testing.assert_array_equal(filled["poly"]["logits"], tree["poly"]["logits"])
    filled = adapters.fill(tree, old, new, {"dataset": ["copy_en"]})
    known, fresh = filled["poly"]["logits"]
    np.testing.assert_array_equal(fresh, known)
    np.testing.assert_array_equal(filled["flix"]["b"], tree["flix"]["b"])


def test_freezing_what_is_known_leaves_only_the_new_values_columns(grown):
    tree, old, new = grown
    rates = adapters.known_rates(tree, old, new)
    assert rates["flix/a"].ravel().tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert rates["flix/b"].shape == (8, 1)


def test_shots_are_drawn_by_the_seed_and_other_splits_are_whole():
    import toy_tasks  # noqa: F401

    def targets(task, split):
        batches = pipeline.eval_batches(
            task, split, None, task_feature_lengths={"inputs": 16, "targets": 8}, batch_size=64
        )
        return [example["inputs_pretokenized"] for _, some in batches for example in some]

    first, other = (shots.few_shot_task("toy_turn_en", 6, seed) for seed in (1, 2))
    assert shots.few_shot_task("toy_turn_en", 6, 1) == first == "toy_turn_en_6shots_1"
    mine, whole = targets(first, "train"), targets("toy_turn_en", "train")
    assert len(mine) == 6 and set(mine) <= set(whole) and mine != targets(other, "train")
    assert targets(first, "validation") == targets("toy_turn_en", "validation")
    held = shots.few_shot_task("toy_turn_en", 6, 1, "validation")
    assert (
        set(targets(held, "train")) <= set(targets("toy_turn_en", "validation")) and held != first
    )


def test_impossible_protocols_are_refused(many, tmp_path):
    with pytest.raises(ValueError, match="has 64 examples in its split 'train', and 65 shots"):
        few_shot(many, tmp_path, "poly_z", *SMALL, "SHOTS = 65")
    with pytest.raises(ValueError, match="no metric 'exact'.* Did you mean 'exact_match'"):
        few_shot(many, tmp_path, "poly_z", *SMALL, "fewshot.Protocol.metric = 'exact'")
    with pytest.raises(ValueError, match="Protocol.shots must be an integer of at least 1, got 0"):
        fewshot.Protocol(shots=0)
    with pytest.raises(ValueError, match="need three splits"):
        fewshot.Protocol(validation_split="test")
    for seeds in ((), 3):
        with pytest.raises(ValueError, match="Protocol.seeds must list at least one seed"):
            fewshot.Protocol(seeds=seeds)
    with pytest.raises(ValueError, match="Protocol.seeds: each must be an integer"):
        fewshot.Protocol(seeds=("0",))
    with pytest.raises(ValueError, match="Protocol.validation_examples must be an integer of at l"):
        fewshot.Protocol(validation_examples=0)


def test_options_that_would_do_nothing_are_refused(many, tmp_path):
    none = "INITIAL_CHECKPOINT_PATH = None"
    with pytest.raises(ValueError, match="learning_rate 0 would stay .* at nothing"):
        few_shot(many, tmp_path, "poly_z", *SMALL, none)
    with pytest.raises(ValueError, match="freeze_known=True.* does not have an INITIAL_CHECKPOINT"):
        few_shot(many, tmp_path, "lora", none, "initialize.Start.freeze_known = True")
    with pytest.raises(ValueError, match="Start.collapse makes one module of all"):
        initialize.Start(collapse=True, freeze_known=True)


def test_what_is_frozen_is_counted_as_frozen_and_keeps_the_methods_own_rates(grown):
    tree, old, new = grown
    rates = {"flix/a": np.full((8,), 0.5, np.float32)}
    layout = initialize.Layout(tree, {}, {}, rates)
    before = {"method": old, "trained": {}}
    found = initialize.factors(layout, initialize.Start(freeze_known=True), new, before)
    assert found["flix/a"].ravel().tolist() == [0, 0, 0, 0, 0, 0, 0.5, 0.5]
    assert adapters.count_moving(tree, found) == 2 * (4 + 5)
    with pytest.raises(ValueError, match="nothing would train.* the checkpoint knows them all"):
        before["method"] = new
        initialize.factors(layout, initialize.Start(freeze_known=True), new, before)


def test_freezing_what_is_known_freezes_a_head_that_was_carried_over_and_no_new_one(grown):
    tree, old, new = grown
    head, of_base = "classifier/logits_dense/kernel", "encoder/layers_0/norm/scale"
    parts = {**tree, "classifier": {"logits_dense": {"kernel": np.ones((4, 3))}}}
    parts["encoder"] = {"layers_0": {"norm": {"scale": np.ones(4)}}}
    layout, start = initialize.Layout(parts, {}, {}), initialize.Start(freeze_known=True)
    for shape, factor in (("float32[4, 3]", 0.0), ("float32[4, 2]", 1.0)):
        before = {"method": old, "trained": {head: shape, of_base: "float32[4]"}}
        found = initialize.factors(layout, start, new, before)
        assert found.get(head, 1.0) == factor and found[of_base] == 0.0


def test_each_draw_of_shots_of_a_mixture_is_a_mixture_of_its_own():
    import toy_tasks  # noqa: F401

    found = {}
    for count, split in ((4, "validation"), (8, "validation"), (4, "train")):
        copies = {
            task: shots.few_shot_task(task, count, 0, split)
            for task in registry.tasks_of("toy_turn")
        }
        name = fewshot._mixture(registry, "toy_turn", copies)
        assert registry.tasks_of(name) == sorted(copies.values())
        assert name == fewshot._mixture(registry, "toy_turn", copies)
        found[count, split] = name
    assert len(set(found.values())) == 3


def test_a_mixture_is_adapted_to_as_one(many, tmp_path):
    rows, _ = few_shot(many, tmp_path, "poly_z", *SMALL, "MIXTURE_OR_TASK_NAME = 'toy_turn'")
    assert {(row["task"], row["language"]) for row in rows} == {("turn", "en"), ("turn", "sw")}
    copies = [f"toy_turn_{language}_8shots_5" for language in ("en", "sw")]
    assert registry.tasks_of("toy_turn_8shots_5") == copies


def test_flix_adapts_to_a_new_language_from_the_mean_of_others_with_the_rest_frozen(many, tmp_path):
    import train

    base, _ = many
    files = ("bases/folder.gin", "methods/flix.gin", "runs/finetune.gin")
    rank = "adapters.LowRank.rank = 2"
    places = (f"BASE = '{base}'", f"MODEL_DIR = '{tmp_path / 'many'}'", "TRAIN_STEPS = 3")
    configure("train", files, ("MIXTURE_OR_TASK_NAME = 'toy_copy'", rank, "WARMUP = 0", *places))
    gin.get_configurable(train.train)(operative_config=str)
    rows, (start, end) = few_shot(
        (base, tmp_path / "many"),
        tmp_path / "new",
        "flix",
        rank,
        "MIXTURE_OR_TASK_NAME = 'toy_copy_sw'",
        "initialize.Start.new_from = {'language': ['en']}",
        "initialize.Start.freeze_known = True",
    )
    before = trained(tmp_path / "many")
    for path, value in start.items():  # columns: copy, en, and now sw
        axis = -1 if path.endswith("/a") else -2
        task, english, new = np.split(value, 3, axis)
        np.testing.assert_array_equal(np.concatenate([task, english], axis), before[path])
        np.testing.assert_array_equal(new, english)
        parts = np.split(end[path], 3, axis)
        np.testing.assert_array_equal(np.concatenate(parts[:2], axis), before[path])
        assert (parts[2] != new).any()
    assert {row["setting"] for row in rows} == {"unseen_language", "seen"}
    for number, (sources, message) in enumerate(
        (
            ({"langauge": ["en"]}, "unknown feature 'langauge'. Did you mean 'language'"),
            ({"language": "swa"}, "has no language 'swa'"),
            ({"task": "cpoy"}, "has no task 'cpoy'. Did you mean 'copy'"),
        )
    ):
        with pytest.raises(ValueError, match=f"Start.new_from: .*{message}"):
            few_shot(
                (base, tmp_path / "many"),
                tmp_path / f"wrong_{number}",
                "flix",
                rank,
                "MIXTURE_OR_TASK_NAME = 'toy_copy_sw'",
                f"initialize.Start.new_from = {sources}",
            )

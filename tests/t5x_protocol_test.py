"""T5X's protocol, asked of our models as T5X asks: names, signatures, collections, metrics."""

import dataclasses
import inspect
import json
import os
import pathlib
import subprocess
import sys

import clu.metrics
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from flax.linen import partitioning as flax_partitioning

from modjax import initialize, models, optimizers, t5x_model
from modjax.adapters import Adapted, Features, LowRank, Mixture, Rule, Stochastic
from modjax.features import FeatureSpace, UnknownFeatureError
from modjax.hub import t5x as hub_t5x
from modjax.hub.kinds import KINDS
from modjax.hub.layers import flatten, unflatten
from modjax.provenance import CheckpointError

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT / "tests" / "testdata"
sys.path.insert(0, str(TESTDATA))
LENGTHS = {"inputs": 32, "targets": 16}
FLIX = Mixture("flix", LowRank({"task": 3, "language": 2}), Features())
RULES = (Rule(".*/(query|value|wo)", FLIX),)
ADAMW = optimizers.Optimizer(learning_rate=0.1, weight_decay=0.1, clip_norm=1.0)
# What T5X's standard_logical_axis_rules know, and what gin_configs/t5x adds.
AXES = {
    "batch",
    "vocab",
    "embed",
    "mlp",
    "heads",
    "kv",
    "joined_kv",
    "relpos_buckets",
    "length",
    "layers",
}
AXES |= {"rank", "module"}


def flat(tree):
    return traverse_util.flatten_dict(flax.core.unfreeze(tree), sep="/")


@pytest.fixture(scope="module")
def make(make_t5, make_decoder):
    """Builds our model as T5X's; keywords are of `t5x_model.Model`."""

    def make(kind="encoder_decoder", rules=RULES, network=None, mixture="toy", **options):
        sizes = {"vocab_size": 260}
        if kind == "decoder_only":
            module = make_decoder(token_offset=0, num_layers=1, **sizes, **(network or {}))
            model = models.DecoderOnlyModel(Adapted(module, rules) if rules else module)
        else:
            sizes |= {"num_encoder_layers": 1, "num_decoder_layers": 1, **(network or {})}
            module = make_t5(**sizes)
            model = models.EncoderDecoderModel(Adapted(module, rules) if rules else module)
        options = {"optimizer": ADAMW, "mixture_or_task_module": "toy_tasks", **options}
        return t5x_model.Model(model, mixture, **options)

    return make


@pytest.fixture(scope="module")
def flix(make):
    return make()


@pytest.fixture(scope="module", params=["encoder_decoder", "decoder_only"])
def kind(request, make):
    """(model, an unpacked batch, parameters) of each kind that writes."""
    model = make(request.param)
    _, batch = batch_of(model, pack=False, rows=3)
    return model, batch, start(model, batch)


def batch_of(model, pack=True, mixture="toy", rows=2, **lengths):
    """A batch as T5X gets it: SeqIO's, by the model's feature converter."""
    import seqio

    options = {"pack": True, "use_custom_packing_ops": False} if pack else {"pack": False}
    ds = seqio.get_dataset(
        mixture,
        {**LENGTHS, **lengths},
        dataset_split="train",
        shuffle=True,
        seed=0,
        feature_converter=model.FEATURE_CONVERTER_CLS(**options),
        batch_size=rows,
    )
    return ds.element_spec, next(ds.as_numpy_iterator())


def start(model, batch, seed=0):
    shapes = {name: x.shape for name, x in batch.items()}
    variables = jax.jit(lambda rng: model.get_initial_variables(rng, shapes))(jax.random.key(seed))
    return variables["params"]


# Without T5X.


def test_methods_have_the_names_and_parameters_that_t5x_calls(flix):
    assert flix.get_initial_variables.__self__ is flix  # it takes the model from the bound method
    expected = {
        "get_initial_variables": ["rng", "input_shapes", "input_types"],
        "loss_fn": ["params", "batch", "dropout_rng"],
        "eval_fn": ["params", "batch"],
        # It passes an rng where there is a parameter of that name.
        "predict_batch": ["params", "batch", "rng"],
        "predict_batch_with_aux": ["params", "batch", "rng"],
        "score_batch": ["params", "batch", "return_intermediates"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(flix, name)).parameters) == parameters, name
    assert inspect.signature(flix.get_initial_variables).parameters["input_types"].default is None
    # It would clone a module that says so with arguments of its own.
    assert not hasattr(flix.module, "scan_layers") and not hasattr(flix.module, "spmd_annotations")


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_variables_are_parameters_and_axes_and_nothing_else(make, name):
    model = make(name)
    spec, batch = batch_of(model)
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(
            rng=rng,
            input_shapes={name: x.shape for name, x in batch.items()},
            input_types={name: x.dtype.as_numpy_dtype for name, x in spec.items()},
        ),
        jax.random.PRNGKey(0),  # T5X's keys are of the old kind
    )
    assert isinstance(variables, flax.core.FrozenDict)
    assert set(variables) == {"params", "params_axes"}
    params = flat(variables["params"])
    axes = flat(flax_partitioning.get_axis_names(variables["params_axes"]))
    assert set(params) == set(axes)
    for path, leaf in params.items():
        assert leaf.dtype == jnp.float32 and len(axes[path]) == leaf.ndim, path
        assert set(axes[path]) - {None} <= AXES, path
    adapters = [path for path in params if "/flix/" in path]
    assert adapters and any("rank" in axes[path] for path in adapters)
    query = "decoder/layers_0/self_attention/query"
    assert axes[f"{query}/flix/a"][0] == axes[f"{query}/kernel"][0] == "embed"


def test_a_scanned_network_names_its_axis_of_layers(make):
    model = make(network={"scan_layers": True})
    _, batch = batch_of(model, pack=False)
    shapes = {name: x.shape for name, x in batch.items()}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    axes = flat(flax_partitioning.get_axis_names(variables["params_axes"]))
    kernel = tuple(axes["encoder/layers/attention/query/kernel"])
    assert kernel == ("layers", "embed", "joined_kv")
    assert axes["encoder/layers/attention/query/flix/a"][0] == "layers"


def test_types_may_be_missing_and_integers_may_come_as_floats(kind):
    """T5X's evaluation says no types, and then every feature counts as float32."""
    model, batch, params = kind
    shapes = {name: x.shape for name, x in batch.items()}
    floats = dict.fromkeys(shapes, jnp.float32)
    made = [
        jax.eval_shape(lambda t=types: model.get_initial_variables(jax.random.key(0), shapes, t))
        for types in (None, floats)
    ]
    assert jax.tree.map(str, made[0]["params"]) == jax.tree.map(str, made[1]["params"])
    as_floats = {name: x.astype(np.float32) for name, x in batch.items()}
    one, other = (jax.jit(model.eval_fn)(params, x) for x in (batch, as_floats))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_packed_rows_bring_their_features(flix):
    spec, batch = batch_of(flix)
    segments = batch["encoder_segment_ids"].max()
    assert segments > 1 and batch["features"].shape[1:] == (8, 2) and batch["tasks"].shape == (2, 8)
    assert all(x.dtype == np.int32 for x in batch.values()) and set(spec) == set(batch)
    there = np.arange(8) < batch["encoder_segment_ids"].max(1, keepdims=True)
    np.testing.assert_array_equal(batch["tasks"] > 0, there)
    np.testing.assert_array_equal(np.all(batch["features"] > 0, axis=-1), there)
    decoded = flix.space.decode(batch["features"][0, 0])
    name = flix.space.datasets[batch["tasks"][0, 0] - 1]
    assert name == f"toy_{decoded['task']}_{decoded['language']}"


def test_t5x_reads_the_batches_that_train_py_reads(flix):
    """It calls SeqIO's get_dataset with our converter; the same seed gives the same rows in the same order."""
    import seqio

    from modjax.data import pipeline

    ours = pipeline.train_iterator(
        "toy", "train", flix.space, task_feature_lengths=LENGTHS, batch_size=4, seed=3
    )
    theirs = seqio.get_dataset(
        "toy",
        LENGTHS,
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        feature_converter=flix.FEATURE_CONVERTER_CLS(pack=True, use_custom_packing_ops=False),
        seed=3,
        batch_size=4,
    ).as_numpy_iterator()
    for _ in range(3):
        one, other = next(ours), next(theirs)
        assert set(one) == set(other)
        for name, rows in one.items():
            np.testing.assert_array_equal(rows, other[name], err_msg=name)


def test_the_loss_comes_with_metrics_that_add_up(flix):
    _, batch = batch_of(flix)
    params = start(flix, batch)
    loss, metrics = jax.jit(flix.eval_fn)(params, batch)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(isinstance(metric, clu.metrics.Metric) for metric in metrics.values())
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    weight = (batch["decoder_loss_weights"] > 0).sum()
    np.testing.assert_allclose(values["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(values["loss_per_nonpadding_target_token"], loss / weight, rtol=1e-5)
    assert 0 <= values["accuracy"] <= 1
    examples = (batch["tasks"] > 0).sum()
    assert values["effective_batch_size"] == examples
    # Two steps: what is per token is weighed by tokens, what is per step by steps.
    other = {name: x[:1].repeat(2, 0) for name, x in batch.items()}
    loss2, metrics2 = jax.jit(flix.eval_fn)(params, other)
    merged = {
        name: float(metric.merge(metrics2[name]).compute()) for name, metric in metrics.items()
    }
    np.testing.assert_allclose(merged["loss"], (loss + loss2) / 2, rtol=1e-5)
    both = weight + (other["decoder_loss_weights"] > 0).sum()
    np.testing.assert_allclose(
        merged["loss_per_nonpadding_target_token"], (loss + loss2) / both, rtol=1e-5
    )


def test_no_rng_means_no_dropout_and_frozen_parameters_have_no_gradient(make):
    model = make(network={"dropout_rate": 0.5})
    _, batch = batch_of(model)
    params = start(model, batch)
    grad = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))
    (loss, _), grads = grad(params, batch, jax.random.key(0))
    (other, _), _ = grad(params, batch, jax.random.key(1))
    assert loss != other
    plain, without = (jax.jit(m.loss_fn) for m in (model, make(network={"dropout_rate": 0.0})))
    assert plain(params, batch, None)[0] == without(params, batch, None)[0]
    for name, g in flat(grads).items():
        # At the start `b` is zero, so that `a` has no gradient.
        assert bool(jnp.any(g != 0)) == name.endswith("/flix/b"), name


def test_predictions_and_scores_have_a_row_for_each_example(kind):
    model, batch, params = kind
    tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch, jax.random.key(0))
    np.testing.assert_array_equal(tokens, jax.jit(model.predict_batch)(params, batch))
    assert tokens.shape[0] == 3 and tokens.dtype == jnp.int32 and aux["scores"].shape == (3,)
    scores = jax.jit(model.score_batch)(params, batch)
    assert scores.shape == (3,) and scores.dtype == jnp.float32 and bool(jnp.all(scores < 0))


def test_the_optimizer_moves_what_trains_as_our_trainer_does(flix):
    _, batch = batch_of(flix)
    params = start(flix, batch)
    grads = jax.tree.map(jnp.ones_like, params)
    whole = t5x_model.transformation(ADAMW, flix.layout)
    state = whole.init(params)
    trained = {name: x for name, x in flat(params).items() if "/flix/" in name}
    mirrored = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert sorted(mirrored) == sorted([x.shape for x in trained.values()] * 2)  # Adam's two moments
    nested = traverse_util.unflatten_dict(trained, sep="/")
    part = ADAMW.build(flix.layout.trained, flix.layout.lazy)
    part_state = part.init(nested)
    for _ in range(2):
        updates, state = whole.update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        expected, part_state = part.update(jax.tree.map(jnp.ones_like, nested), part_state, nested)
        params = optax.apply_updates(params, updates)
        nested = optax.apply_updates(nested, expected)
        expected = flat(expected)
        for name, update in flat(updates).items():
            np.testing.assert_array_equal(
                update, expected.get(name, jnp.zeros_like(update)), err_msg=name
            )


def test_a_lazy_optimizer_is_refused(flix):
    with pytest.raises(ValueError, match="lazy works in train.py"):
        t5x_model.transformation(optimizers.Optimizer(lazy=True), flix.layout)


def test_rates_of_modules_multiply_their_updates(flix):
    layout = flix.layout
    path = next(name for name in flat(layout.trained) if name.endswith("/flix/b"))
    other = next(name for name in flat(layout.trained) if name.endswith("wo/flix/b"))
    rates = {path: np.float32(0), other: np.float32(0.5)}
    changed = initialize.Layout(layout.trained, layout.frozen, layout.axes, rates, layout.lazy)
    params = jax.tree.map(
        lambda x: jnp.ones(x.shape), optimizers.combine(layout.trained, layout.frozen)
    )
    grads = jax.tree.map(jnp.ones_like, params)
    sgd = optimizers.Optimizer(optax.identity(), learning_rate=1.0, clip_norm=1.0)
    plain, rated = (
        flat(t.update(grads, t.init(params), params)[0])
        for t in (t5x_model.transformation(sgd, x) for x in (layout, changed))
    )
    assert not np.any(rated[path])
    # What rests does not count for the norm that gradients are clipped to.
    number = sum(np.prod(x.shape) for name, x in flat(layout.trained).items())
    kept = number - np.prod(flat(layout.trained)[path].shape)
    np.testing.assert_allclose(plain[other], -1 / np.sqrt(number), rtol=1e-5)
    np.testing.assert_allclose(rated[other], -0.5 / np.sqrt(kept), rtol=1e-5)


# Where the names of features come from.


def space_file(folder, languages=("en", "sw"), tasks=("copy", "turn")):
    names = [f"toy_{t}_{c}" for t in ("copy", "turn") for c in ("en", "sw")]
    space = FeatureSpace((("language", languages), ("task", tasks)), datasets=names)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "feature_space.json").write_text(json.dumps(space.to_json()))
    return space


def test_a_stored_feature_space_keeps_its_ids(make, tmp_path):
    stored = space_file(tmp_path / "run", ("sw", "en"))
    model = make(directories=(str(tmp_path / "new"), str(tmp_path / "run" / "checkpoint_5")))
    assert model.space == stored != make().space
    _, batch = batch_of(model)
    name = stored.datasets[batch["tasks"][0, 0] - 1]
    decoded = stored.decode(batch["features"][0, 0])
    assert name == f"toy_{decoded['task']}_{decoded['language']}"


def test_training_what_the_feature_space_lacks_is_refused_and_evaluated_as_none(make, tmp_path):
    stored = space_file(tmp_path, ("en",))
    with pytest.raises(CheckpointError, match="'sw'"):
        make(directories=(str(tmp_path),))
    model = make(
        directories=(str(tmp_path),), optimizer=None, unknown="none", mixture="toy_turn_sw"
    )
    assert model.space == stored
    _, batch = batch_of(model, pack=False, mixture="toy_turn_sw")
    np.testing.assert_array_equal(batch["features"][:, 0], [[0, 2]] * 2)


def test_a_stored_feature_space_has_room_for_the_values_that_an_evaluated_dataset_has_at_once(
    make, tmp_path, monkeypatch
):
    from modjax.data import registry

    make()  # registers the tasks
    entry = registry._ENTRIES["toy_turn_sw"]
    both = dataclasses.replace(entry, metadata={**entry.metadata, "language": ["sw", "en"]})
    monkeypatch.setitem(registry._ENTRIES, "toy_turn_sw", both)
    space_file(tmp_path)
    model = make(
        directories=(str(tmp_path),), optimizer=None, unknown="none", mixture="toy_turn_sw"
    )
    _, batch = batch_of(model, pack=False, mixture="toy_turn_sw")
    np.testing.assert_array_equal(batch["features"][:, 0], [[2, 1, 2]] * 2)
    assert model.adapted.space == model.space


def test_evaluation_without_the_feature_space_is_refused_where_it_matters(make, tmp_path):
    options = {"directories": (str(tmp_path),), "optimizer": None, "unknown": "none"}
    with pytest.raises(ValueError, match="feature_space.json"):
        make(**options)
    lora = (Rule(".*/query", Mixture("lora", LowRank(2))),)
    make(rules=lora, **options)
    with pytest.raises(ValueError, match="no optimizer"):
        make(rules=lora, **options).optimizer_def  # noqa: B018


def test_tasks_of_seqio_alone_train_methods_that_need_no_features(make):
    import seqio

    from modjax.data.sources import ExamplesSource

    text = seqio.Feature(seqio.ByteVocabulary())
    name = "t5x_protocol_plain"
    seqio.TaskRegistry.add(
        name,
        source=ExamplesSource({"train": [{"inputs": "abc", "targets": "cba"}]}),
        shuffle_buffer_size=None,
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": text, "targets": text},
    )
    try:
        lora = (Rule(".*/query", Mixture("lora", LowRank(2))),)
        model = make(rules=lora, mixture=name, mixture_or_task_module=None)
        _, batch = batch_of(model, mixture=name, rows=1)
        assert model.space is None and "features" not in batch
        assert np.isfinite(model.eval_fn(start(model, batch), batch)[0])
        with pytest.raises(ValueError, match="registered with SeqIO alone"):
            make(mixture=name, mixture_or_task_module=None)
    finally:
        seqio.TaskRegistry.remove(name)


# What a run takes from the checkpoint of a base.


def test_a_base_brings_its_weights_and_neither_its_optimizer_nor_its_steps(flix):
    params = optimizers.combine(flix.layout.trained, flix.layout.frozen)
    state = {"target": params, "state": {"step": 0, "param_states": {}}}
    base = {"target": flix.layout.frozen, "state": {"step": 10**6, "param_states": {"decoder": {}}}}
    taken = t5x_model.take_base(base, state, model=flix)
    assert taken == {"target": flix.layout.frozen}
    assert t5x_model.take_base(base, state, model=flix, is_resuming=True) is base


def test_a_base_that_lacks_a_parameter_is_refused(flix):
    params = optimizers.combine(flix.layout.trained, flix.layout.frozen)
    state = {"target": params, "state": {}}
    frozen = flat(flix.layout.frozen)
    name = "encoder/encoder_norm/scale"
    frozen.pop(name)
    base = {"target": traverse_util.unflatten_dict(frozen, sep="/"), "state": {}}
    with pytest.raises(ValueError, match=f"lacks {name}"):
        t5x_model.take_base(base, state, model=flix)


def test_a_misspelt_value_of_a_task_is_an_error_in_training(make, tmp_path):
    space_file(tmp_path, ("en", "swa"))
    with pytest.raises((CheckpointError, UnknownFeatureError), match="'sw'"):
        make(directories=(str(tmp_path),))


# With T5X.


@pytest.fixture(scope="module")
def t5x():
    return pytest.importorskip("t5x", reason="T5X is not installed; it is not on the package index")


def adamix(name="adamix"):
    return (Rule(".*/(query|value)", Mixture(name, LowRank(2), Stochastic(num_modules=3))),)


@pytest.mark.parametrize(
    "rules, optimizer",
    [
        (RULES, ADAMW),
        (RULES, optimizers.Optimizer(optimizers.adafactor(min_dim_size_to_factor=8))),
        (adamix(), ADAMW),
        (
            None,
            optimizers.Optimizer(
                groups=(optimizers.Group(".*scale", multiplier=2), optimizers.Group(".*"))
            ),
        ),
    ],
    ids=["flix", "adafactor", "adamix", "full"],
)
def test_t5x_makes_a_state_takes_it_apart_and_puts_it_together(t5x, make, rules, optimizer):
    from t5x import partitioning, train_state, utils

    model = make(rules=rules, optimizer=optimizer)
    spec, batch = batch_of(model)
    rules = partitioning.standard_logical_axis_rules(
        additional_rules=[("rank", None), ("module", None)]
    )
    partitioner = partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in batch.items()},
        input_types={name: x.dtype.as_numpy_dtype for name, x in spec.items()},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    assert isinstance(state, train_state.FlaxOptimTrainState)
    grads = jax.tree.map(jnp.ones_like, state.params)
    state = state.apply_gradient(grads, learning_rate=0.1)
    again = initializer.global_train_state_shape.restore_state(state.state_dict())
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    changed = flat(
        jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, start(model, batch))
    )
    assert any(changed.values())


def test_t5x_trains_resumes_evaluates_and_infers_by_our_gin_files(t5x, make_t5, tmp_path):
    """Two steps at a stretch are one and, resumed, one more."""
    sizes = {
        "mlp_activations": ("gelu", "linear"),
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
    }
    config = make_t5(vocab_size=260, **sizes).config
    rng = np.random.default_rng(0)
    shapes = KINDS["t5"].shapes(config)
    params = {name: rng.normal(size=x, scale=0.1).astype(np.float32) for name, x in shapes.items()}
    base = hub_t5x.save_checkpoint(tmp_path / "base", unflatten(params), 1000)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{TESTDATA}:{os.environ.get('PYTHONPATH', '')}",
    }

    def run(program, **macros):
        files = (str(TESTDATA / "tiny.gin"), "methods/flix.gin", f"t5x/{program}.gin")
        values = {
            "MIXTURE_OR_TASK_NAME": "toy_copy",
            "MIXTURE_OR_TASK_MODULE": "toy_tasks",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            **macros,
        }
        command = [sys.executable, "-m", f"t5x.{'train' if program == 'finetune' else program}"]
        command += [
            f"--gin_search_paths={ROOT / 'gin_configs'}",
            *(f"--gin_file={f}" for f in files),
        ]
        command += [f"--gin.{name}={value!r}" for name, value in values.items()]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    def train(folder, steps):
        run(
            "finetune",
            INITIAL_CHECKPOINT_PATH=str(base),
            MODEL_DIR=str(tmp_path / folder),
            BATCH_SIZE=4,
            TRAIN_STEPS=steps,
            EVAL_STEPS=1,
            **{"optimizers.schedule.total_steps": 10, "optimizers.schedule.warmup": 1},
        )
        state = ocp.PyTreeCheckpointer().restore(
            tmp_path / folder / f"checkpoint_{steps}" / "state"
        )
        return flatten(state["target"])

    whole = train("whole", 2)
    one = train("parts", 1)
    assert any(np.any(one[name] != value) for name, value in whole.items())
    parts = train("parts", 2)
    assert set(whole) == set(parts) and any("/flix/" in name for name in whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
        if name in params:
            np.testing.assert_array_equal(value, params[name], err_msg=name)
    assert (tmp_path / "whole" / "feature_space.json").exists()
    checkpoint = str(tmp_path / "whole" / "checkpoint_2")
    run("eval", CHECKPOINT_PATH=checkpoint, EVAL_OUTPUT_DIR=str(tmp_path / "eval"))
    (metrics,) = (tmp_path / "eval").rglob("*metrics.jsonl")
    assert set(json.loads(metrics.read_text())) == {"step", "exact_match"}
    run("infer", CHECKPOINT_PATH=checkpoint, INFER_OUTPUT_DIR=str(tmp_path / "infer"))
    (lines,) = (tmp_path / "infer").rglob("toy_copy_en*-of-00001")
    assert len(lines.read_text().splitlines()) == 64

"""An int8 base: close to the float one, a quarter of its size, read by every method and written by none."""

import copy
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from benchmarks import quantized_base
from modjax import (
    adapters,
    checkpoints,
    hub,
    initialize,
    launch,
    models,
    optimizers,
    partitioning,
    quantization,
    trainer,
)
from modjax.features import FeatureSpace
from modjax.networks import decoder, encoder, t5
from modjax.quantization import Quantized
from tasks import babel_examples

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS / "testdata"))
SHIPPED = TESTS.parent / "tasks" / "assets" / "babel_base"


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def moved(tree, deviation=0.1):
    """Adapters away from their start, so that each of them matters."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: (x + deviation * rng.normal(size=x.shape)).astype(np.float32), tree
    )


def apart(found, expected):
    """The norm of the difference over the norm."""
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


# The numbers themselves.


def test_each_entry_is_within_a_quarter_of_its_own_channels_step():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 42, 24)).astype(np.float32)  # [layers, D, K], D no multiple of 8
    kernel *= 10.0 ** rng.uniform(-6, 6, (3, 1, 24)).astype(np.float32)
    kernel[1, :, 5] = 0.0
    table = rng.standard_t(3, (50, 16)).astype(np.float32)  # [V, D]
    tree = quantization.quantize({"layers": {"kernel": kernel}, "words": {"embedding": table}})
    found, words = tree["layers"]["kernel"], tree["words"]["embedding"]
    assert found.values.dtype == words.values.dtype == np.int8
    assert found.values.shape == kernel.shape and found.scale.shape == (3, 1, 24)
    assert found.rest.shape == (3, 6, 24) and words.rest.shape == (50, 2)
    assert words.values.shape == table.shape and words.scale.shape == (50, 1)
    back = quantization.dequantize(tree)
    channels = [
        (kernel[layer, :, k], back["layers"]["kernel"][layer, :, k], found.values[layer, :, k])
        for layer in range(3)
        for k in range(24)
    ] + [(table[v], back["words"]["embedding"][v], words.values[v]) for v in range(50)]
    for channel, rounded, values in channels:
        largest = float(np.abs(channel).max())
        assert np.abs(rounded - channel).max() <= largest / 509 * (1 + 1e-4)
        assert np.abs(values.astype(int)).max() == (127 if largest else 0)
    for ids in (np.array([[3, 49], [0, 3]]), np.zeros((2, 0), int), np.array([50])):
        expected = jnp.take(back["words"]["embedding"], ids, axis=0)  # 50 is none of the rows
        np.testing.assert_array_equal(quantization.rows(words, ids, "float32"), expected)


def test_weights_are_quantised_and_small_things_are_not(make_t5, make_encoder, batch):
    for network, args in (
        (make_t5(), (batch["encoder_input_tokens"], batch["decoder_input_tokens"])),
        (make_encoder(), (batch["encoder_input_tokens"],)),
    ):
        params = jax.jit(network.init)(jax.random.key(0), *args)["params"]
        for path, leaf in flat(quantization.quantize(params)).items():
            weight = path.endswith(("kernel", "/embedding"))
            assert isinstance(leaf, Quantized) == weight, path
            if not weight:
                assert leaf is flat(params)[path]
    heads = np.ones((16, 4, 32), np.float32)  # [D, H, head_dim]: a scale for every four
    kept = quantization.quantize({"heads": {"kernel": heads}, "out": {"kernel": np.ones((8, 3))}})
    assert kept["heads"]["kernel"] is heads and isinstance(kept["out"]["kernel"], Quantized)


def test_what_cannot_be_in_int8_is_said():
    with pytest.raises(ValueError, match="nothing is frozen: everything trains, as with methods/f"):
        initialize.to_dtype({}, "int8")
    with pytest.raises(ValueError, match="named kernel or embedding.* None is among .*: bias, w."):
        quantization.quantize({"a": {"w": np.ones((8, 8)), "bias": np.ones(8)}})
    with pytest.raises(ValueError, match="The base's a/kernel holds numbers that are not finite"):
        quantization.quantize({"a": {"kernel": np.full((8, 8), np.nan)}})
    assert size(initialize.to_dtype({"kernel": np.ones((8, 8))}, "int8")) == 64 + 8 + 4 * 8


# A network on them.


def shipped_batch():
    """Translations that the base of `make demo` was made for, three into each of six languages: tokens and targets."""
    babel = babel_examples.Babel()
    examples = [
        example
        for code in list(babel.languages)[::2]
        for example in itertools.islice(babel.pretrain_examples("translate", code, "test"), 3)
    ]

    def tokens(text):
        return np.array([byte + 3 for byte in text.encode()] + [1])

    inputs, targets = ([tokens(e[name]) for e in examples] for name in ("inputs", "targets"))
    inputs, targets = (
        np.stack([np.pad(row, (0, 80 - len(row))) for row in rows]) for rows in (inputs, targets)
    )
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return inputs, shifted, targets


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_trained_base_gives_logits_within_a_percent_in_less_than_a_third_of_the_memory(scan):
    overrides, params = hub.load_base(SHIPPED, scan_layers=scan)
    network = t5.Transformer(t5.T5Config(**overrides))
    inputs, shifted, targets = shipped_batch()
    small = quantization.quantize(params)
    assert size(small) <= 0.3 * size(params)  # all of it counted; norms do not weigh at width 128
    logits = jax.jit(lambda p: network.apply({"params": p}, inputs, shifted, targets))
    there = targets > 0
    expected, found = (np.asarray(logits(p))[there] for p in (params, small))
    assert (expected.argmax(-1) == targets[there]).mean() > 0.9  # a model that can do something
    assert 0.001 < apart(found, expected) < 0.01


NETWORKS = {
    "t5": lambda **o: t5.Transformer(
        t5.T5Config(40, 32, 2, 16, 64, 2, 2, logits_via_embedding=True, **o)
    ),
    "decoder": lambda **o: decoder.Transformer(
        decoder.DecoderConfig(
            40,
            emb_dim=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=64,
            num_layers=2,
            qkv_bias=True,
            logits_via_embedding=False,
            **o,
        )
    ),
    "encoder": lambda **o: encoder.Transformer(
        encoder.EncoderConfig(
            40,
            emb_dim=32,
            num_heads=2,
            head_dim=16,
            mlp_dim=64,
            num_layers=2,
            max_positions=20,
            head="pooled",
            num_outputs=3,
            **o,
        )
    ),
}
MODELS = {
    "t5": models.EncoderDecoderModel,
    "decoder": models.DecoderOnlyModel,
    "encoder": models.EncoderModel,
}
LORA = adapters.Mixture("lora", adapters.LowRank(2))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 40, (3, 9)).astype(np.int32)
    tokens[1, 6:] = 0
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": tokens,
        "labels": np.array([[1], [3], [2]], np.int32),
        "features": np.array([[[1, 2]], [[2, 0]], [[1, 3]]], np.int32),
        "tasks": np.array([[1], [2], [3]], np.int32),
    }
    without = {
        "t5": ("labels",),
        "decoder": ("labels", "encoder_input_tokens"),
        "encoder": ("decoder_input_tokens", "decoder_target_tokens"),
    }
    return {k: {n: v for n, v in batch.items() if n not in without[k]} for k in without}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_would_with_the_rounded_weights(name, batches):
    """Logits, and in a scanned network the adapters' gradients, beside those on a float base of the same values."""
    batch = batches[name]
    network = NETWORKS[name](scan_layers=True, remat_policy="minimal")
    model = MODELS[name](adapters.Adapted(network, (adapters.Rule(".*/(value|wo)", LORA),)))
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    added, base = jax.device_get(adapters.split(params, model.adapted))
    added, small = moved(added), quantization.quantize(base)

    @jax.jit
    def run(added, base):
        def loss(added):
            return model.loss_fn(adapters.join(added, base), batch, None)[0]

        return model.logits(adapters.join(added, base), batch), jax.grad(loss)(added)

    found, gradients = run(added, small)
    expected, wanted = run(added, quantization.dequantize(small))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for path, gradient in flat(gradients).items():
        np.testing.assert_allclose(gradient, flat(wanted)[path], atol=1e-4, rtol=1e-4)
        assert np.abs(gradient).max() > 1e-3, path
    # The base as it was; never trained, and narrow, so that it is as far off as a base can be.
    assert 0.001 < apart(found, run(added, base)[0]) < 0.015

    unrolled = MODELS[name](model.adapted.clone(network=NETWORKS[name]()))
    params = hub.unstack_layers(adapters.join(added, base))
    added, base = adapters.split(params, unrolled.adapted)
    small = adapters.join(added, quantization.quantize(base))
    np.testing.assert_allclose(unrolled.logits(small, batch), found, atol=2e-5)


def counting():
    """Rows that count in steps of 1 to 3: easily learned, as tokens, and their steps as classes."""
    rng = np.random.default_rng(0)
    step, start = rng.integers(1, 4, (16, 1)), rng.integers(0, 30, (16, 1))
    tokens = ((start + step * np.arange(12)) % 39 + 1).astype(np.int32)
    before = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return {
        "decoder": {"decoder_input_tokens": before, "decoder_target_tokens": tokens},
        "encoder": {"encoder_input_tokens": tokens, "labels": step.astype(np.int32)},
    }


@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_other_kinds_trained_for_a_moment_are_within_a_percent_too(name):
    batch = counting()[name]
    config = dataclasses.replace(
        NETWORKS[name]().config, emb_dim=128, head_dim=32, mlp_dim=256, num_heads=4
    )
    kind = {"decoder": decoder.Transformer, "encoder": encoder.Transformer}[name]
    model = MODELS[name](kind(config), loss_normalizing_factor="average_per_sequence")
    adam = optax.adam(1e-3)

    @jax.jit
    def learn(key):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: model.loss_fn(p, batch, None)[0])(params)
            updates, state = adam.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        params = model.init(key, batch)["params"]
        (params, _), losses = jax.lax.scan(step, (params, adam.init(params)), None, length=30)
        return params, losses

    params, losses = jax.device_get(learn(jax.random.key(0)))
    assert losses[-1] < 0.3 * losses[0]
    small = quantization.quantize(params)
    assert size(small) <= 0.3 * size(params)
    expected = np.asarray(model.logits(params, batch))
    assert apart(model.logits(small, batch), expected) < 0.01
    scanned = dataclasses.replace(model, module=kind(dataclasses.replace(config, scan_layers=True)))
    stacked = quantization.quantize(hub.stack_layers(params))
    assert apart(scanned.logits(stacked, batch), expected) < 0.01


def test_bfloat16_activations_lose_no_more_than_bfloat16_does():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(50, 64)), jnp.bfloat16)
    kernel = quantization.quantize({"kernel": rng.normal(size=(64, 32)).astype(np.float32)})
    y = quantization.product(x, kernel["kernel"], "bfloat16")
    assert y.dtype == jnp.bfloat16
    weight = np.asarray(kernel["kernel"].unbox(), np.float64)
    exact = np.asarray(x, np.float64) @ weight
    usual = x @ jnp.asarray(weight, jnp.bfloat16)
    assert apart(np.float64(y), exact) < 1.5 * apart(np.float64(usual), exact) < 0.006


class TheirLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = nn.DenseGeneral((8, 8), name="heads")(x)
        y = nn.DenseGeneral(16, axis=(-2, -1), name="out")(nn.relu(heads))
        return x + nn.Dense(16, name="dense")(y), None


class Theirs(nn.Module):
    """A network that knows nothing of int8, scanned and rematerialised."""

    @nn.compact
    def __call__(self, tokens):
        words = nn.Embed(30, 16, name="words")
        layers = nn.scan(
            nn.remat(TheirLayer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return words.attend(layers(name="layers")(words(tokens), None)[0])


def test_a_network_of_somebody_elses_runs_and_is_adapted_on_int8():
    tokens = np.random.default_rng(0).integers(0, 30, (2, 7))
    adapted = adapters.Adapted(Theirs(), (adapters.Rule("layers/(dense|heads|out)", LORA),))
    params = adapted.init(jax.random.key(0), tokens)["params"]
    added, base = adapters.split(params, adapted)
    small = quantization.quantize(base)
    weights = {path for path, leaf in flat(small).items() if isinstance(leaf, Quantized)}
    assert weights == {"words/embedding"} | {
        f"layers/{name}/kernel" for name in ("dense", "heads", "out")
    }

    def loss(added, base):
        logits = adapted.apply({"params": adapters.join(added, base)}, tokens)
        return jnp.square(logits).sum(), logits

    step = jax.jit(jax.grad(loss, has_aux=True))
    gradients, logits = step(added, small)
    wanted, expected = step(added, quantization.dequantize(small))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), gradients, wanted)


# What a program holds.


def test_a_step_on_a_scanned_network_holds_no_float_copy_of_the_base():
    model = quantized_base.model_of(256, 8, scan=True, remat="none", dtype="float32")
    floats, small = (
        quantized_base.measure(model, 1, 8, jax.devices()[:1], dtype)
        for dtype in ("float32", "int8")
    )
    assert small.base < 0.29 * floats.base
    assert small.temporary < floats.temporary + 0.05 * floats.base < 0.5 * floats.base


def test_two_devices_share_an_int8_base_and_train_as_one():
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(TESTS.parent))
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    script = TESTS / "testdata" / "quantized_on_two.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two, stored = (json.loads(line) for line in done.stdout.splitlines())
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(stored["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][2] < one["losses"][0]
    names = ("values", "rest", "scale", "rows")
    assert [one[n] for n in names] == [[2, 16, 32], [2, 2, 32], [2, 1, 32], [40, 1]]
    assert [two[n] for n in names] == [[2, 16, 16], [2, 2, 16], [2, 1, 16], [20, 1]]
    assert [stored[n] for n in names] == [[2, 8, 32], [2, 1, 32], [2, 1, 32], [40, 1]]


# Every method.


def tiny_job(method):
    """(model, optimizer, layout, shapes of a batch) of a method's file with a tiny base."""
    flags = launch.Flags(
        ("tests/testdata/tiny_decoder.gin", f"methods/{method}.gin", "runs/finetune.gin"),
        (
            "MIXTURE_OR_TASK_NAME = 'toy'",
            "TASK_FEATURE_LENGTHS = {'inputs': 6, 'targets': 5}",
            "TRAIN_STEPS = 10",
            "WARMUP = 0",
            "MODEL_DIR = 'none'",
            "BASE = 'none'",
            *(("WIDE_RANK = 4",) if method == "lora_wide" else ()),
        ),
        (str(TESTS.parent),),
    )
    launch.load_gin(flags, "train")
    model, optimizer = (
        copy.deepcopy(gin.query_parameter(f"train.train.{name}")) for name in ("model", "optimizer")
    )
    model = model.with_space(SPACE)
    batch = model.example_batch({"inputs": 6, "targets": 5}, SPACE, rows=3)
    return model, optimizer, initialize.layout(model, batch, optimizer.groups), batch


METHODS = sorted(
    path.stem
    for path in (pathlib.Path(launch.CONFIGS) / "methods").glob("*.gin")
    if "METHOD = " in path.read_text() and path.stem != "full"
)
SPACE = FeatureSpace((("task", ("parse", "tag")), ("language", ("en", "sw"))), ("a", "b", "c"))


@pytest.fixture(scope="module")
def tiny_base():
    """The parameters of its network, which are the same for all methods."""
    model, _, layout, batch = tiny_job("bitfit")
    return initialize.host_init(model, batch, optimizers.combine(layout.trained, layout.frozen), 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_a_method_moves_its_parameters_and_leaves_the_int8_base(method, tiny_base):
    model, optimizer, layout, shapes = tiny_job(method)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(1, 3, s.shape).astype(np.int32) for name, s in shapes.items()}
    base = flat(tiny_base)
    trained = {
        path: base.get(path, 0.1 * rng.normal(size=leaf.shape).astype(np.float32))
        for path, leaf in flat(layout.trained).items()
    }
    frozen = {path: base[path] for path in flat(layout.frozen)}
    trained, frozen = (traverse_util.unflatten_dict(t, sep="/") for t in (trained, frozen))
    frozen = initialize.to_dtype(frozen, "int8")
    before = jax.tree.map(np.copy, frozen)
    made = trainer.Trainer(
        model,
        optimizer,
        partitioning.make_mesh(1, jax.devices()[:1]),
        trained,
        frozen,
        layout.axes,
        rates=layout.rates,
        lazy=layout.lazy,
    )
    state, scalars = made.train_step(made.init_state(trained, 0), frozen, batch, np.zeros(1, int))
    assert np.isfinite(scalars["loss"]) and scalars["grad_norm"] > 0
    moving = [
        path for path in flat(trained) if np.any(np.asarray(layout.rates.get(path, 1.0)) != 0)
    ]
    after = flat(jax.device_get(state.trained))
    for path in moving:
        assert (after[path] != flat(trained)[path]).any(), path
    assert not any(isinstance(leaf, Quantized) for leaf in after.values())
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_merging_into_an_int8_base_is_refused_or_gives_a_float_one(space, batches):
    network = NETWORKS["decoder"](scan_layers=True)
    mixture = adapters.Mixture("flix", adapters.LowRank(2), adapters.Features())
    adapted = adapters.Adapted(network, (adapters.Rule(".*/(query|wo)", mixture),), space)
    model, batch = models.DecoderOnlyModel(adapted), batches["decoder"]
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    added, base = jax.device_get(adapters.split(params, adapted))
    added, small = moved(added, 0.3), quantization.quantize(base)
    dataset = dict(task="parse", language="sw")  # the first row's
    with pytest.raises(ValueError, match="int8, which would round the update away.*dequantize=Tr"):
        adapters.merge(adapted, added, small, **dataset)
    merged = adapters.merge(adapted, added, small, dequantize=True, **dataset)
    assert not quantization.is_quantized(merged)
    expected = adapters.merge(adapted, added, quantization.dequantize(small), **dataset)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)

    lora, pairs = adapters.compose(adapted, added, **dataset)
    mixed = model.logits(adapters.join(small, added), batch)[0]
    composed = models.DecoderOnlyModel(lora).logits(adapters.join(small, pairs), batch)[0]
    np.testing.assert_allclose(composed, mixed, atol=1e-5)
    plain = models.DecoderOnlyModel(network).logits(merged, batch)[0]
    np.testing.assert_allclose(plain, mixed, atol=2e-5)
    assert apart(mixed, models.DecoderOnlyModel(network).logits(small, batch)[0]) > 0.1


# The programs.


def run_entry(entry, name, *files, **macros):
    """`train.train` or `eval.evaluate` as gin files and macros say (underscores for dots in a macro's name)."""
    values = {
        "MIXTURE_OR_TASK_NAME": "toy",
        "MIXTURE_OR_TASK_MODULE": "toy_tasks",
        "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8},
        "BATCH_SIZE": 8,
    } | {key.replace("__", "."): value for key, value in macros.items()}
    values = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in values.items()}
    flags = [f"--gin_file={f}" for f in files] + [f"--gin.{k}={v!r}" for k, v in values.items()]
    launch.load_gin(launch.parse_flags(flags, "test"), name)
    try:
        return gin.get_configurable(entry)(operative_config=gin.operative_config_str)
    finally:
        gin.clear_config(clear_constants=True)


def train(*files, **macros):
    import train as entry

    options = {"train__train__tensorboard": False, "LEARNING_RATE": 0.02, "WARMUP": 0}
    options["optimizers.schedule.decay"] = "constant"
    files = ("runs/finetune.gin", "bases/folder.gin", *files)
    return run_entry(entry.train, "train", *files, **options | macros)


def evaluate(**macros):
    import eval as entry

    files = ("bases/folder.gin", "methods/flix.gin", "runs/eval.gin")
    options = {"SPLIT": "validation", "eval__evaluate__max_examples": 4}
    return run_entry(entry.evaluate, "eval", *files, **options | macros)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    network = t5.Transformer(t5.T5Config(260, 16, 2, 8, 32, 1, 1))
    tokens = jnp.ones((1, 4), int)
    params = jax.jit(network.init)(jax.random.key(0), tokens, tokens)["params"]
    hub.save_base(folder, network.config, params)
    return folder


@pytest.mark.usefixtures("compile_once")
def test_runs_on_int8_resume_and_are_evaluated_and_evaluate_those_on_float(folder, tmp_path):
    def run(where, steps, dtype):
        state = train(
            "methods/flix.gin",
            BASE=folder,
            MODEL_DIR=tmp_path / where,
            TRAIN_STEPS=steps,
            train__train__base_dtype=dtype,
        )
        return flat(jax.device_get(state.trained))

    whole = run("whole", 4, "int8")
    run("parts", 2, "int8")
    resumed = run("parts", 4, "int8")
    floats = run("float", 4, None)
    for path, leaf in resumed.items():
        np.testing.assert_array_equal(leaf, whole[path])
    assert any((floats[path] != whole[path]).any() for path in whole)
    # What identifies the base is the float one, so that each serves the other's checkpoints.
    fingerprints = [
        checkpoints.read_metadata(tmp_path / where)["base"]["digest"]
        for where in ("whole", "float")
    ]
    assert fingerprints[0] == fingerprints[1]
    for where, dtype in (("whole", "int8"), ("whole", None), ("float", "int8")):
        rows = evaluate(
            BASE=folder,
            CHECKPOINT_PATH=tmp_path / where,
            EVAL_OUTPUT_DIR=tmp_path / f"eval_{where}_{dtype}",
            eval__evaluate__base_dtype=dtype,
            eval__evaluate__write_report=False,
        )
        assert {row["n"] for row in rows} == {4} and len(rows) == 4


def test_a_run_that_freezes_nothing_or_exports_its_base_cannot_have_it_in_int8(folder, tmp_path):
    options = {
        "BASE": folder,
        "MODEL_DIR": tmp_path / "run",
        "TRAIN_STEPS": 1,
        "train__train__base_dtype": "int8",
    }
    with pytest.raises(ValueError, match="nothing is frozen: everything trains"):
        train("methods/full.gin", **options)
    with pytest.raises(ValueError, match="EXPORT_DIR would get weights that int8 has rounded"):
        train("methods/bitfit.gin", train__train__export_dir=str(tmp_path / "out"), **options)
    assert not checkpoints.steps(tmp_path / "run")


def test_a_wide_product_of_halves_is_that_of_their_float32_copies(monkeypatch):
    draw = np.random.default_rng(0)
    x, kernel = (jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in ((2, 3, 64), (64, 7)))
    weight = jnp.asarray(draw.normal(size=(2, 3, 7)), jnp.float32)

    def both(x, kernel):
        def total(x, kernel):
            return jnp.sum(weight * quantization.product(x, kernel, jnp.float32))

        return quantization.product(x, kernel, "float32"), *jax.grad(total, (0, 1))(x, kernel)

    expected = both(x, kernel)
    monkeypatch.setattr(quantization.partitioning, "platform", lambda: "gpu")
    traced = str(jax.make_jaxpr(both)(x, kernel))
    assert "preferred_element_type=float32" in traced and "f32[64,7]" not in traced
    out, *slopes = both(x, kernel)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
    for found, exact in zip(slopes, expected[1:], strict=True):
        assert found.dtype == exact.dtype == jnp.bfloat16
        off = np.linalg.norm(np.float32(found) - np.float32(exact)) / np.linalg.norm(
            np.float32(exact)
        )
        assert off < 2**-8

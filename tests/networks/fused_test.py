"""Attention as one kernel against attention written out, in whole networks.

The kernel is cuDNN's where jax has an NVIDIA GPU. Elsewhere jax's own form of the same function stands in for it, so
that what is handed over is tested everywhere.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import models, partitioning, profiling
from modjax.features import FeatureSpace
from modjax.networks import decoder, encoder, fused, t5

SMALL = dict(vocab_size=32, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=32)
LENGTH = 12
CONFIGS = {
    "t5": t5.T5Config(**SMALL, num_encoder_layers=2, num_decoder_layers=2),
    "t5_scanned": t5.T5Config(
        **SMALL,
        num_encoder_layers=2,
        num_decoder_layers=2,
        scan_layers=True,
        remat_policy="minimal",
    ),
    "umt5": t5.T5Config(**SMALL, num_encoder_layers=2, num_decoder_layers=2, relpos_per_layer=True),
    "decoder": decoder.DecoderConfig(**SMALL, num_kv_heads=2, num_layers=2, qk_norm=True),
    "decoder_windows": decoder.DecoderConfig(**SMALL, num_kv_heads=4, num_layers=2, windows=(4, 0)),
    "decoder_prefix": decoder.DecoderConfig(**SMALL, num_kv_heads=1, num_layers=2),
    "encoder": encoder.EncoderConfig(**SMALL, num_layers=2),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU, or what says that it is one."""
    if jax.default_backend() != "gpu":
        device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
        monkeypatch.setattr(partitioning, "device", lambda: device)
        monkeypatch.setattr(fused, "KERNEL", "xla")


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of the kernel."""
    found, attend = [], fused.attend

    def counted(*args, **kwargs):
        added = args[3]
        found.append((kwargs.get("causal", False), None if added is None else added.shape))
        return attend(*args, **kwargs)

    monkeypatch.setattr(fused, "attend", counted)
    return found


def network_and_batch(name, packed):
    config = CONFIGS[name]
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(2, 32, (3, LENGTH)), jnp.int32)
    lengths = np.array([[LENGTH], [7], [9]])
    tokens = jnp.where(jnp.arange(LENGTH) < lengths, tokens, 0)
    segments = jnp.where(tokens > 0, 1 + (jnp.arange(LENGTH) > 4), 0) if packed else None
    if isinstance(config, t5.T5Config):
        extra = (
            {} if not packed else dict(encoder_segment_ids=segments, decoder_segment_ids=segments)
        )
        return t5.Transformer, dict(
            encoder_input_tokens=tokens,
            decoder_input_tokens=tokens,
            decoder_target_tokens=tokens,
            **extra,
        )
    if isinstance(config, encoder.EncoderConfig):
        return encoder.Transformer, dict(encoder_input_tokens=tokens)
    extra = {} if not packed else dict(decoder_segment_ids=segments)
    if name == "decoder_prefix":
        extra["decoder_causal_attention"] = (jnp.arange(LENGTH) < 4).astype(jnp.int32) + 0 * tokens
    return decoder.Transformer, dict(
        decoder_input_tokens=tokens, decoder_target_tokens=tokens, **extra
    )


def loss_and_gradient(name, packed, params=None, **changes):
    """(params, mean square of the logits of real tokens, its gradient)."""
    made, batch = network_and_batch(name, packed)
    network = made(dataclasses.replace(CONFIGS[name], **changes))
    if params is None:
        params = jax.jit(network.init)(jax.random.key(0), **batch)["params"]
    real = next(iter(batch.values())) > 0

    def loss(params):
        out = network.apply({"params": params}, **batch)
        out = out[0] if isinstance(out, tuple) else out
        return jnp.mean(jnp.square(out.astype(jnp.float32)) * real[..., None])

    return params, *jax.jit(jax.value_and_grad(loss))(params)


def apart(one, other):
    """The distance of two trees over the norm of the second, in float64."""
    ones, others = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return np.linalg.norm(ones - others) / np.linalg.norm(others)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, False) for name in CONFIGS),
        *((name, True) for name in CONFIGS if name != "encoder"),
    ],
)
def test_the_kernel_is_as_near_to_float32_as_attention_written_out(name, packed, calls):
    params, loss, gradient = loss_and_gradient(name, packed)
    assert not calls  # float32 is written out
    found = {
        choice: loss_and_gradient(name, packed, params, dtype="bfloat16", attention=choice)[1:]
        for choice in ("plain", "auto")
    }
    rows, heads = (3, 1, LENGTH, LENGTH), (3, 4, LENGTH, LENGTH)
    if name.startswith("decoder"):
        assert set(calls) == {(name != "decoder_prefix", rows)}
    elif name == "encoder":
        assert set(calls) == {(False, rows)}
    else:  # encoder, decoder, and decoder to encoder
        assert set(calls) == {(False, heads), (True, heads), (False, rows)}
    for i, exact in enumerate((loss, gradient)):
        plain, fused_ = (apart(found[choice][i], exact) for choice in ("plain", "auto"))
        assert fused_ < max(1.5 * plain, 0.004)
        assert plain < 0.05
    if name in ("t5", "t5_scanned"):
        biases = [
            [tree[1][stack]["relpos_bias"] for stack in ("encoder", "decoder")]
            for tree in (found["auto"], found["plain"], (loss, gradient))
        ]
        assert apart(biases[0], biases[2]) < max(1.5 * apart(biases[1], biases[2]), 0.004)


@pytest.mark.parametrize("windows", [False, True])
def test_causal_attention_over_everything_needs_no_mask(windows, calls):
    name = "decoder_windows" if windows else "decoder"
    made, batch = network_and_batch(name, False)
    network = made(dataclasses.replace(CONFIGS[name], dtype="bfloat16"))
    plain = network.clone(config=dataclasses.replace(network.config, attention="plain"))
    tokens = batch["decoder_input_tokens"]
    params = jax.jit(network.init)(jax.random.key(0), tokens)["params"]
    assert {call[1] is None for call in calls} == {not windows}
    found, expected, exact = (
        jax.jit(one.apply)({"params": params}, tokens)
        for one in (network, plain, made(dataclasses.replace(plain.config, dtype="float32")))
    )
    assert apart(found, exact) < max(1.5 * apart(expected, exact), 0.004)


def test_a_model_whose_rows_are_examples_needs_no_mask_either(calls):
    network = decoder.Transformer(dataclasses.replace(CONFIGS["decoder"], dtype="bfloat16"))
    model, space = models.DecoderOnlyModel(network), FeatureSpace((), ())
    lengths = {"inputs": 8, "targets": 4}
    for segments, masked in ((None, False), (2, True)):
        calls.clear()
        batch = model.example_batch(lengths, space, segments, rows=2)
        jax.eval_shape(model.init, jax.random.key(0), batch)
        assert {call[1] is not None for call in calls} == {masked}


def test_what_a_row_sees_of_its_padding_does_not_change_its_loss():
    network = decoder.Transformer(CONFIGS["decoder"])
    model = models.DecoderOnlyModel(network)
    _, batch = network_and_batch("decoder", False)
    tokens = batch["decoder_input_tokens"]
    batch = dict(
        decoder_input_tokens=jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
        decoder_target_tokens=tokens,
        decoder_loss_weights=(tokens > 0).astype(jnp.int32),
    )
    params = jax.jit(network.init)(jax.random.key(0), tokens)["params"]
    loss = model.loss_fn(params, batch, None)[0]
    logits = network.apply({"params": params}, *[batch[name] for name in model.INPUTS])
    token = jnp.maximum(tokens - 1, 0)[..., None]
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), token, -1)[..., 0]
    np.testing.assert_allclose(loss, jnp.sum(expected * (tokens > 0)), rtol=1e-6)


@pytest.fixture
def traced_for_cudnn(monkeypatch):
    """cuDNN's kernel can be traced without a GPU, once jax believes that it is there."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused, "KERNEL", "cudnn")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def gradient_of(name, **changes):
    """The gradient of the sum of a network's logits, and that sum, traced."""
    made, batch = network_and_batch(name, False)
    network = made(dataclasses.replace(CONFIGS[name], dtype="bfloat16", **changes))
    params = jax.eval_shape(network.init, jax.random.key(0), **batch)["params"]

    def total(params):
        return jnp.sum(network.apply({"params": params}, **batch))

    return jax.make_jaxpr(jax.grad(total))(params), jax.make_jaxpr(total)(params)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("minimal", 1), ("full", 2)])
def test_what_the_kernel_made_is_kept_but_where_everything_is_made_again(
    policy, times, scan, traced_for_cudnn
):
    backward, _ = gradient_of("decoder", scan_layers=scan, remat_policy=policy)
    kernels = str(backward).count(f"{fused.FORWARD}["), str(backward).count(f"{fused.BACKWARD}[")
    layers = 1 if scan else 2
    assert kernels == (times * layers, layers)


@pytest.mark.parametrize("name", ["t5", "decoder"])
def test_the_kernels_operations_are_counted_as_if_it_were_written_out(name, traced_for_cudnn):
    fused_, forward = (profiling.product_flops(traced) for traced in gradient_of(name))
    plain, written = (
        profiling.product_flops(traced) for traced in gradient_of(name, attention="plain")
    )
    assert forward == written
    # Backward, the kernel makes the logits again.
    config = CONFIGS[name]
    attentions = 6 if name == "t5" else 2
    again = attentions * 2 * 3 * LENGTH * LENGTH * config.num_heads * config.head_dim
    assert fused_ == plain + again


@pytest.mark.parametrize(
    "changes",
    [
        dict(attention="plain", dtype="bfloat16"),
        dict(dtype="float32"),
        dict(attention_softcap=5.0, dtype="bfloat16"),
        dict(head_dim=12, dtype="bfloat16"),
    ],
)
def test_what_the_kernel_cannot_do_is_written_out(changes, calls):
    made, batch = network_and_batch("decoder", False)
    network = made(dataclasses.replace(CONFIGS["decoder"], **changes))
    jax.eval_shape(network.init, jax.random.key(0), **batch)
    assert not calls


def test_dropout_and_odd_lengths_are_written_out():
    assert fused.fits("auto", "bfloat16", 8, (4, 4))
    assert not fused.fits("auto", "bfloat16", 8, (4, 4), dropout=True)
    assert not fused.fits("auto", "bfloat16", 8, (4, 3))
    assert not fused.fits("auto", "bfloat16", 256, (4, 4))


@pytest.mark.parametrize("capability", [None, "7.5", "gfx90a"])
def test_other_devices_have_no_such_kernel(capability, monkeypatch):
    device = types.SimpleNamespace(platform="gpu")
    if capability is not None:
        device.compute_capability = capability
    monkeypatch.setattr(partitioning, "device", lambda: device)
    assert not fused.fits("auto", "bfloat16", 8, (4, 4))


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="Did you mean 'plain'"):
        t5.T5Config(**SMALL, attention="plane")

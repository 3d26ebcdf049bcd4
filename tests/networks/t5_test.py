"""The T5 family: scanned equals unrolled, cached equals uncached, packed equals unpacked, names and axes are T5X's."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from modjax import decoding

VARIANTS = {
    "t5_1_0": dict(mlp_activations=("relu",), logits_via_embedding=True),
    "t5_1_1": dict(),
    "umt5": dict(relpos_per_layer=True),
}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "t5_params.json"


def stacked(params):
    """The parameters of an unrolled T5 as those of a scanned one."""

    def stack(tree):
        layers = sorted(k for k in tree if k.startswith("layers_"))
        if not layers:
            return tree
        rest = {k: v for k, v in tree.items() if k not in layers}
        return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *(tree[k] for k in layers))}

    return {k: stack(v) for k, v in params.items()}


NAMES = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")


@functools.partial(jax.jit, static_argnums=0)
def call(network, params, batch):
    return network.apply({"params": params}, *(batch[n] for n in NAMES))


@functools.partial(jax.jit, static_argnums=0)
def init(network, batch):
    return network.init(jax.random.key(0), *(batch[n] for n in NAMES))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "enable_dropout"))
def apply(network, variables, *args, method="__call__", enable_dropout=False, rngs=None, **kwargs):
    return network.apply(
        variables, *args, method=method, enable_dropout=enable_dropout, rngs=rngs, **kwargs
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_decode_length")
def step(network, variables, *args, max_decode_length=8):
    return network.apply(
        variables,
        *args,
        decode=True,
        max_decode_length=max_decode_length,
        method="decode",
        mutable=["cache"],
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_scanned_rematerialised_layers_equal_unrolled_ones_in_value_and_gradient(
    variant, make_t5, batch
):
    unrolled = make_t5(**VARIANTS[variant])
    scanned = make_t5(**VARIANTS[variant], scan_layers=True, remat_policy="minimal")
    params = init(unrolled, batch)["params"]

    def loss(network, p):
        return jnp.mean(jnp.square(call(network, p, batch)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, gradient = grad(unrolled, params)
    value_s, gradient_s = grad(scanned, stacked(params))
    np.testing.assert_allclose(value, value_s, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        stacked(gradient),
        gradient_s,
    )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_uncached_whatever_the_pieces(variant, scan, make_t5, batch):
    network = make_t5(**VARIANTS[variant], scan_layers=scan)
    params = init(network, batch)["params"]
    tokens = batch["decoder_input_tokens"]
    encoder_tokens = batch["encoder_input_tokens"]
    encoded = apply(network, {"params": params}, encoder_tokens, method="encode")
    # The targets' padding plays no part in decoding.
    whole = apply(network, {"params": params}, encoded, encoder_tokens, tokens, method="decode")
    for pieces in ([0, 1, 1, 1, 1, 1, 1], [3, 1, 2]):
        cache, logits, start = {}, [], 0
        for i, length in enumerate(pieces):
            piece, cache = step(
                network,
                {"params": params, **cache},
                encoded if i == 0 else None,  # later calls live on the cache alone
                encoder_tokens,
                tokens[:, start : start + length],
            )
            logits.append(piece)
            start += length
        np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, atol=2e-5)


@pytest.mark.parametrize("variant, scan", [("t5_1_0", False), ("umt5", True)])
def test_beams_that_are_picked_go_on_from_their_own_history(variant, scan, make_t5, batch):
    network = make_t5(**VARIANTS[variant], scan_layers=scan)
    params = init(network, batch)["params"]
    inputs, prompt = batch["encoder_input_tokens"], batch["decoder_input_tokens"][:, :2]
    rows, beams, draw = len(inputs), 3, np.random.default_rng(0)
    encoded = apply(network, {"params": params}, inputs, method="encode")
    _, cache = step(network, {"params": params}, encoded, inputs, prompt)
    cache = decoding.expand_cache(cache["cache"], rows, beams, int(scan), picked=True)
    histories = np.repeat(prompt, beams, axis=0)
    inputs, encoded = (np.repeat(x, beams, axis=0) for x in (inputs, encoded))
    for _ in range(4):
        tokens = draw.integers(2, 30, (rows * beams, 1))
        variables = {"params": params, "cache": cache}
        logits, cache = step(network, variables, None, inputs, tokens)
        histories = np.concatenate([histories, tokens], axis=1)
        padded = np.pad(histories, ((0, 0), (0, 6 - histories.shape[1])))
        whole = apply(network, {"params": params}, encoded, inputs, padded, method="decode")
        np.testing.assert_allclose(logits[:, 0], whole[:, histories.shape[1] - 1], atol=2e-5)
        picked = draw.integers(0, beams, (rows, beams))
        cache = decoding.gather_cache(cache["cache"], picked, beams, int(scan))
        histories = histories[(np.arange(rows)[:, None] * beams + picked).reshape(-1)]


def test_packed_rows_equal_unpacked_ones(make_t5, batch):
    network = make_t5()
    params = init(network, batch)["params"]
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    alone = call(network, params, batch)
    row = {
        "encoder_input_tokens": jnp.concatenate([inputs[0], inputs[1, :5], inputs[2]])[None],
        "decoder_input_tokens": jnp.concatenate(
            [batch["decoder_input_tokens"][0], batch["decoder_input_tokens"][1, :4], jnp.zeros(3)]
        )[None].astype(int),
        "decoder_target_tokens": jnp.concatenate([targets[0], targets[1, :4], jnp.zeros(3)])[
            None
        ].astype(int),
    }
    logits = apply(
        network,
        {"params": params},
        *row.values(),
        encoder_segment_ids=jnp.array([[1] * 7 + [2] * 5 + [3] * 7]),
        decoder_segment_ids=jnp.array([[1] * 6 + [2] * 4 + [0] * 3]),
    )
    np.testing.assert_allclose(logits[0, :6], alone[0], atol=1e-5)
    np.testing.assert_allclose(logits[0, 6:10], alone[1, :4], atol=1e-5)


def test_padding_of_the_input_changes_nothing(make_t5, batch):
    network = make_t5()
    params = init(network, batch)["params"]
    padded = batch | {
        "encoder_input_tokens": jnp.pad(batch["encoder_input_tokens"], ((0, 0), (0, 5)))
    }
    np.testing.assert_allclose(
        call(network, params, batch), call(network, params, padded), atol=1e-5
    )


def test_bfloat16_activations_keep_float32_parameters_and_logits_and_stay_close(make_t5, batch):
    network = make_t5(dtype="bfloat16")
    params = init(network, batch)["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = call(network, params, batch)
    exact = call(make_t5(), params, batch)
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.max(jnp.abs(logits - exact))) < 0.05 * float(jnp.max(jnp.abs(exact)))


def test_dropout_draws_only_when_asked(make_t5, batch):
    network = make_t5(dropout_rate=0.5)
    params = init(network, batch)["params"]
    calm = call(network, params, batch)
    args = [batch[n] for n in ("encoder_input_tokens", "decoder_input_tokens")]
    drawn = [
        apply(
            network,
            {"params": params},
            *args,
            enable_dropout=True,
            rngs={"dropout": jax.random.key(seed)},
        )
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0], calm)


@pytest.mark.parametrize("scan", [False, True])
def test_names_shapes_and_axes_are_the_recorded_ones(scan, make_t5, batch):
    variables = jax.eval_shape(
        lambda: init(make_t5(scan_layers=scan, num_encoder_layers=1, num_decoder_layers=1), batch)
    )
    axes = flatten_dict(variables["params_axes"], sep="/")
    found = {
        path: [list(leaf.shape), list(axes[f"{path}_axes"].names)]
        for path, leaf in flatten_dict(variables["params"], sep="/").items()
    }
    assert found == json.loads(GOLDEN.read_text())["scanned" if scan else "unrolled"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remat_policy="minimum"), "Did you mean 'minimal'"),
        (dict(mlp_activations=("gelo", "linear")), "Did you mean 'gelu'"),
        (dict(num_heads=0), "num_heads must be at least 1"),
        (dict(dropout_rate=1.0), "dropout_rate"),
    ],
)
def test_impossible_configs_are_refused(options, message, make_t5):
    with pytest.raises(ValueError, match=message):
        make_t5(**options)


def test_decoding_refuses_packed_rows_and_a_cache_without_length(make_t5, batch):
    network = make_t5()
    params = init(network, batch)["params"]
    args = (jnp.zeros((3, 7, 16)), batch["encoder_input_tokens"], batch["decoder_input_tokens"])
    options = dict(method="decode", decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="max_decode_length"):
        network.apply({"params": params}, *args, **options)
    with pytest.raises(ValueError, match="segment ids"):
        ids = jnp.ones((3, 7), int)
        network.apply(
            {"params": params}, *args, encoder_segment_ids=ids, max_decode_length=8, **options
        )


@pytest.mark.parametrize("scan", [False, True])
def test_tokens_that_the_cache_has_no_slots_for_are_refused_where_that_is_known(
    scan, make_t5, batch
):
    network = make_t5(scan_layers=scan)
    variables = {"params": init(network, batch)["params"]}
    tokens = batch["decoder_input_tokens"]
    rest = (jnp.zeros((3, 7, 16)), batch["encoder_input_tokens"])
    length = tokens.shape[1]
    with pytest.raises(ValueError, match=f"{length - 1} slots, 0 of them taken: {length} more"):
        step(network, variables, *rest, tokens, max_decode_length=length - 1)  # also inside jit
    options = dict(method="decode", decode=True, mutable=["cache"], max_decode_length=length + 1)
    _, cache = network.apply(variables, *rest, tokens, **options)
    _, cache = network.apply(variables | cache, *rest, tokens[:, :1], **options)
    with pytest.raises(ValueError, match=f"{length + 1} slots, {length + 1} of them taken: 1 more"):
        network.apply(variables | cache, *rest, tokens[:, :1], **options)

"""Decoder-only networks: as the formulas say, whatever the padding, the packing, the cache and the stacking."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from modjax import decoding, hub
from modjax.networks import decoder
from modjax.networks.rope import Rope

VARIANTS = {
    "gpt2": dict(
        num_kv_heads=4,
        mlp_activations=("gelu",),
        norm="layer",
        norm_epsilon=1e-5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        positions="learned",
        max_positions=12,
    ),
    "llama": dict(rope=dict(theta=100.0), logits_via_embedding=False),
    "qwen": dict(qk_norm=True, qkv_bias=True, windows=(0, 3)),
    "gemma": dict(
        token_offset=0,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        rope=dict(theta=1000.0, kind="linear", factor=2.0),
        local_rope=dict(theta=20.0),
        windows=(3, 0),
        attention_softcap=2.0,
        logits_softcap=3.0,
        query_scale=0.7,
        embedding_scale=3.5,
    ),
}
VOCAB = 20
TOKENS = np.array([[5, 9, 2, 7, 1, 3, 8], [4, 8, 6, 11, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([7, 4, 2])
TIGHT = dict(atol=2e-5, rtol=1e-5)


def make(variant: str, **options) -> decoder.Transformer:
    sizes = dict(emb_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10, num_layers=2)
    config = dict(vocab_size=VOCAB) | sizes | VARIANTS[variant] | options
    return decoder.Transformer(decoder.DecoderConfig(**config))


@functools.cache
def params_of(variant: str) -> dict:
    """Parameters of the unrolled network, none of which is 0 or 1 throughout."""
    shapes = jax.eval_shape(make(variant).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        spread = 1.5 * leaf.shape[0] ** -0.5 if path.endswith("kernel") else 0.4
        flat[path] = (rng.normal(size=leaf.shape) * spread).astype(np.float32)
        if path.endswith("scale"):
            flat[path] += 1.0 - make(variant).config.norm_offset
    return unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=0, static_argnames="enable_dropout")
def call(network, params, *args, enable_dropout=False, rngs=None, **kwargs):
    return network.apply(
        {"params": params}, *args, enable_dropout=enable_dropout, rngs=rngs, **kwargs
    )


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames="max_decode_length")
def step(network, variables, tokens, max_decode_length=0, **kwargs):
    return network.apply(
        variables,
        tokens,
        decode=True,
        max_decode_length=max_decode_length,
        mutable=["cache"],
        **kwargs,
    )


# The network once more: one example, one layer, one head and one query at a time, in float64.


def softcap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def turned(x, position, rope: Rope):
    """A head, each of its pairs taken as a complex number and turned."""
    half = len(x) // 2
    step = 1.0 / rope.factor if rope.kind == "linear" else 1.0
    angles = position * step * rope.theta ** (-2.0 * np.arange(half) / len(x))
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag])


def reference(config: decoder.DecoderConfig, params, tokens, positions=None, both_ways=0):
    """Logits of one example without padding, whose first `both_ways` tokens see each other."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = range(len(tokens)) if positions is None else positions
    stack = params["decoder"]
    table = params["token_embedder"]["embedding"]

    def norm(p, x):
        if config.norm == "layer":
            x = x - x.mean()
        x = x / np.sqrt((x * x).mean() + config.norm_epsilon)
        return x * (config.norm_offset + p["scale"]) + p.get("bias", 0.0)

    def dense(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def act(name, x):
        if name == "gelu":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return {"silu": x / (1 + np.exp(-x)), "linear": x}[name]

    def attention(p, xs, window, rope):
        heads = {}
        for name, count in (("query", config.num_heads), ("key", config.num_kv_heads)):
            heads[name] = [dense(p[name], x).reshape(count, -1) for x in xs]
            if config.qk_norm:
                heads[name] = [[norm(p[f"{name}_norm"], h) for h in hs] for hs in heads[name]]
            if config.positions == "rope":
                heads[name] = [
                    [turned(h, at, rope) for h in hs]
                    for hs, at in zip(heads[name], positions, strict=True)
                ]
        values = [dense(p["value"], x).reshape(config.num_kv_heads, -1) for x in xs]
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        group = config.num_heads // config.num_kv_heads
        outs = []
        for q in range(len(xs)):
            seen = [
                k
                for k in range(len(xs))
                if (k <= q or max(k, q) < both_ways) and (not window or q - k < window)
            ]
            mixed = []
            for h in range(config.num_heads):
                logits = [heads["query"][q][h] @ heads["key"][k][h // group] for k in seen]
                logits = softcap(np.array(logits) * scale, config.attention_softcap)
                weights = np.exp(logits) / np.exp(logits).sum()
                mixed.append(sum(w * values[k][h // group] for w, k in zip(weights, seen)))  # noqa: B905
            outs.append(dense(p["out"], np.concatenate(mixed)))
        return outs

    def mlp(p, x):
        if "wi" in p:
            return dense(p["wo"], act(config.mlp_activations[0], dense(p["wi"], x)))
        units = [act(a, dense(p[f"wi_{i}"], x)) for i, a in enumerate(config.mlp_activations)]
        return dense(p["wo"], units[0] * units[1])

    xs = [table[t - config.token_offset] * config.embedding_scale for t in tokens]
    if config.positions == "learned":
        learned = stack["position_embedder"]["embedding"]
        xs = [x + learned[at] for x, at in zip(xs, positions, strict=True)]
    for i in range(config.num_layers):
        p, window = stack[f"layers_{i}"], config.windows[i % len(config.windows)]
        rope = config.local_rope if window and config.local_rope else config.rope
        ys = [norm(p["pre_self_attention_layer_norm"], x) for x in xs]
        added = attention(p["self_attention"], ys, window, rope)
        if config.post_norms:
            added = [norm(p["post_self_attention_layer_norm"], y) for y in added]
        xs = [x + y for x, y in zip(xs, added, strict=True)]
        added = [mlp(p["mlp"], norm(p["pre_mlp_layer_norm"], x)) for x in xs]
        if config.post_norms:
            added = [norm(p["post_mlp_layer_norm"], y) for y in added]
        xs = [x + y for x, y in zip(xs, added, strict=True)]
    xs = np.stack([norm(stack["decoder_norm"], x) for x in xs])
    head = table.T if config.logits_via_embedding else stack["logits_dense"]["kernel"]
    return softcap(xs @ head, config.logits_softcap)


@functools.cache
def alone(variant: str, row: int, both_ways: int = 0):
    network = make(variant)
    tokens = TOKENS[row, : LENGTHS[row]]
    return reference(network.config, params_of(variant), tokens, both_ways=both_ways)


def equal_alone(logits, variant, prefixes=(0, 0, 0)):
    """Each row's real tokens have the logits of the reference."""
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            logits[row, :length], alone(variant, row, prefixes[row]), **TIGHT
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_formulas_whatever_the_padding(variant):
    network, params = make(variant), params_of(variant)
    right = call(network, params, TOKENS)
    assert right.dtype == jnp.float32 and right.shape == (3, 7, VOCAB) and right.std() > 0.3
    equal_alone(right, variant)

    shifts = TOKENS.shape[1] - LENGTHS
    tokens = np.stack([np.roll(t, n) for t, n in zip(TOKENS, shifts, strict=True)])
    positions = np.maximum(np.arange(7)[None] - shifts[:, None], 0)
    ids = (tokens > 0).astype(np.int32)
    left = call(network, params, tokens, decoder_segment_ids=ids, decoder_positions=positions)
    left = np.stack([np.roll(x, -n, axis=0) for x, n in zip(left, shifts, strict=True)])
    equal_alone(left, variant)
    # Without segment ids, the targets tell where padding is.
    marked = call(network, params, tokens, decoder_target_tokens=ids, decoder_positions=positions)
    marked = np.stack([np.roll(x, -n, axis=0) for x, n in zip(marked, shifts, strict=True)])
    equal_alone(marked, variant)


@pytest.mark.parametrize("variant", ["gpt2", "gemma"])
def test_a_prefix_is_seen_in_both_directions_and_padding_is_no_part_of_it(variant):
    prefixes = np.array([4, 3, 2])
    prefix = (np.arange(7)[None] < prefixes[:, None]).astype(np.int32)
    logits = call(make(variant), params_of(variant), TOKENS, decoder_causal_attention=prefix)
    equal_alone(logits, variant, tuple(prefixes))
    assert not np.allclose(logits[0, 0], alone(variant, 0)[0])
    # A prefix that reaches into the padding, as when all inputs have one length.
    whole = call(
        make(variant),
        params_of(variant),
        TOKENS,
        decoder_target_tokens=TOKENS,
        decoder_causal_attention=np.ones_like(TOKENS),
    )
    equal_alone(whole, variant, tuple(LENGTHS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_equal_unpacked_ones(variant):
    prefixes = (0, 2, 1)
    row = np.concatenate([TOKENS[i, :n] for i, n in enumerate(LENGTHS)] + [np.zeros(2, np.int32)])
    packed = call(
        make(variant),
        params_of(variant),
        row[None],
        decoder_segment_ids=np.array([[1] * 7 + [2] * 4 + [3] * 2 + [0] * 2]),
        decoder_positions=np.array([[*range(7), *range(4), *range(2), 0, 0]]),
        decoder_causal_attention=np.array([[0] * 7 + [1, 1, 0, 0] + [1, 0] + [0, 0]]),
    )[0]
    split = np.zeros((3, 7, VOCAB), np.float32)
    for i, (start, length) in enumerate(zip((0, 7, 11), LENGTHS, strict=True)):
        split[i, :length] = packed[start : start + length]
    equal_alone(split, variant, prefixes)


@pytest.mark.parametrize("variant, scan", [(v, v in ("gpt2", "gemma")) for v in VARIANTS])
@pytest.mark.parametrize(
    "prompts, both_ways", [((4, 2, 0), False), ((0, 0, 0), False), ((3, 2, 1), True)]
)
def test_rows_decode_in_step_from_prompts_of_different_lengths(variant, scan, prompts, both_ways):
    network = make(variant, scan_layers=scan)
    params = hub.stack_layers(params_of(variant)) if scan else params_of(variant)
    lengths = np.array(prompts)
    there = np.arange(max(prompts))[None] < lengths[:, None]
    # What lies behind a prompt must not matter.
    first = np.where(there, TOKENS[:, : max(prompts)], 13)
    prefix = {"decoder_causal_attention": there.astype(np.int32)} if both_ways else {}
    logits = np.zeros((3, 7, VOCAB), np.float32)
    given, cache = step(
        network, {"params": params}, first, max_decode_length=7, prompt_lengths=lengths, **prefix
    )
    logits[:, : max(prompts)] = np.where(there[..., None], given, 0)
    rows = np.arange(3)
    for t in range(7 - max(prompts)):
        at = lengths + t
        given, cache = step(network, {"params": params, **cache}, TOKENS[rows, at][:, None])
        logits[rows, at] = given[:, 0]
    for row, length in enumerate(LENGTHS):
        end = min(length, 7 - max(prompts) + lengths[row])
        expected = alone(variant, row, prompts[row] if both_ways else 0)
        np.testing.assert_allclose(logits[row, :end], expected[:end], **TIGHT)


@pytest.mark.parametrize("variant", ["gpt2", "gemma"])
def test_the_last_token_of_a_prefix_is_seen_by_the_others_and_may_be_fed_by_the_next_call(variant):
    network, variables, prefixes = make(variant), {"params": params_of(variant)}, (4, 3, 2)
    prefix = (np.arange(4)[None] < np.array(prefixes)[:, None]).astype(np.int32)
    kept, rows = np.array(prefixes) - 1, np.arange(3)
    _, cache = step(
        network,
        variables,
        np.where(prefix > 0, TOKENS[:, :4], 13),
        max_decode_length=2,
        prompt_lengths=kept,
        decoder_causal_attention=prefix,
    )
    for t in range(2):
        logits, cache = step(network, variables | cache, TOKENS[rows, kept + t][:, None])
        for row in rows[kept + t < LENGTHS]:
            expected = alone(variant, row, prefixes[row])[kept[row] + t]
            np.testing.assert_allclose(logits[row, 0], expected, **TIGHT)


@pytest.mark.parametrize("pieces", [[0, 1, 1, 1, 1, 1, 1, 1], [3, 1, 3]])
def test_a_cached_call_may_bring_any_number_of_tokens(pieces):
    network, cache, logits = make("gemma"), {}, []
    variables = {"params": params_of("gemma")}
    for start, length in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        tokens = TOKENS[:, start : start + length]
        piece, cache = step(network, variables | cache, tokens, 7 - pieces[0])
        logits.append(piece)
    equal_alone(np.concatenate(logits, axis=1), "gemma")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", ["gemma", "gpt2"])
def test_beams_read_one_copy_of_their_prompt_and_what_they_wrote_themselves(variant, scan):
    network = make(variant, scan_layers=scan)
    params = hub.stack_layers(params_of(variant)) if scan else params_of(variant)
    variables, offset, lengths = {"params": params}, int(scan), np.array([3, 2, 1])
    _, cache = step(network, variables, TOKENS[:, :3], 4, prompt_lengths=lengths)
    cache = {"cache": decoding.beams.expand_cache(cache["cache"], 3, 2, offset, picked=True)}
    flat = flatten_dict(cache["cache"], sep="/")
    kept = {path: leaf.shape for path, leaf in flat.items() if path.endswith("_key")}
    rows = {path.rsplit("/")[-1]: shape[offset] for path, shape in kept.items()}
    assert rows == {"shared_key": 3, "joint_key": 3}
    written = [list(TOKENS[i // 2, : lengths[i // 2]]) for i in range(6)]
    # Which beam goes on in each place, an example having both from one beam at last.
    for number, places in enumerate(([[0, 1]] * 3, [[1, 0], [0, 1], [1, 0]], [[1, 1]] * 3)):
        new = (np.arange(6) * 5 + 7 * number) % 17 + 2
        logits, cache = step(network, variables | cache, new[:, None])
        for row, text in enumerate(written):
            text.append(new[row])
            whole = reference(network.config, params_of(variant), np.array(text))
            np.testing.assert_allclose(logits[row, 0], whole[-1], **TIGHT)
        picked = decoding.beams.gather_cache(cache["cache"], np.array(places), 2, offset)
        cache = {"cache": picked}
        written = [list(written[i // 2 * 2 + places[i // 2][i % 2]]) for i in range(6)]


def test_samples_of_a_prompt_read_its_one_copy():
    network, variables = make("gemma"), {"params": params_of("gemma")}
    _, cache = step(network, variables, TOKENS[:, :3], 4, prompt_lengths=np.array([3, 2, 1]))
    several = decoding.beams.expand_cache(cache["cache"], 3, 2)
    tokens = np.repeat(TOKENS[:, 3:5], 2, axis=0)
    tokens[1::2] = 9
    for at in range(2):
        alone, cache = step(network, variables | cache, TOKENS[:, 3 + at : 4 + at])
        both, several = step(network, variables | {"cache": several}, tokens[:, at : at + 1])
        np.testing.assert_allclose(both[::2], alone, **TIGHT)
        assert not np.allclose(both[1::2], alone, atol=1e-3)
        several = several["cache"]


@pytest.mark.parametrize(
    "variant, scan, policy",
    [("gemma", True, "minimal"), ("gpt2", True, "full"), ("qwen", False, "minimal")],
)
def test_scanned_and_rematerialised_layers_have_the_same_value_and_gradient(variant, scan, policy):
    params = params_of(variant)

    def loss(network, p):
        return jnp.mean(jnp.square(call(network, p, TOKENS)))

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, gradient = grad(make(variant), params)
    network = make(variant, scan_layers=scan, remat_policy=policy)
    again, slopes = grad(network, hub.stack_layers(params) if scan else params)
    np.testing.assert_allclose(value, again, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        hub.stack_layers(gradient) if scan else gradient,
        slopes,
    )
    moved = {k for k, v in flatten_dict(gradient, sep="/").items() if np.abs(v).max() > 1e-4}
    # A key's bias adds the same to all logits of a query, unless keys are turned or normed.
    still = {f"decoder/layers_{i}/self_attention/key/bias" for i in range(2)}
    assert flatten_dict(params, sep="/").keys() - moved == (still if variant == "gpt2" else set())


@pytest.mark.parametrize("variant", ["gpt2", "gemma"])
def test_bfloat16_activations_keep_float32_parameters_and_logits_and_stay_close(variant):
    network = make(variant, dtype="bfloat16")
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKENS)["params"]
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}
    logits, cache = step(network, {"params": params_of(variant)}, TOKENS, 1)
    exact = call(make(variant), params_of(variant), TOKENS)
    assert logits.dtype == jnp.float32
    kept = flatten_dict(cache["cache"]["decoder"], sep="/")
    assert {x.dtype.name for x in kept.values()} == {"bfloat16"}
    assert 0 < float(jnp.max(jnp.abs(logits - exact))) < 0.1 * float(jnp.max(jnp.abs(exact)))


def test_dropout_draws_only_when_asked():
    network, params = make("llama", dropout_rate=0.5), params_of("llama")
    calm = call(network, params, TOKENS)
    drawn = [
        call(network, params, TOKENS, enable_dropout=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(calm, call(make("llama"), params, TOKENS))
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0], calm)


@pytest.mark.parametrize("scan", [False, True])
def test_names_shapes_and_axes_are_the_recorded_ones(scan):
    options = dict(qk_norm=True, qkv_bias=True, logits_via_embedding=False, post_norms=True)
    network = make("gpt2", norm="rms", num_kv_heads=2, num_layers=1, scan_layers=scan, **options)
    variables = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    axes = flatten_dict(variables["params_axes"], sep="/")
    found = {
        path: (leaf.shape, axes[f"{path}_axes"].names)
        for path, leaf in flatten_dict(variables["params"], sep="/").items()
    }
    heads, keys = ("embed", "joined_kv"), ("joined_kv",)
    layer = {
        "self_attention/query/kernel": ((12, 24), heads),
        "self_attention/key/kernel": ((12, 12), heads),
        "self_attention/value/kernel": ((12, 12), heads),
        "self_attention/out/kernel": ((24, 12), ("joined_kv", "embed")),
        "self_attention/query/bias": ((24,), keys),
        "self_attention/key/bias": ((12,), keys),
        "self_attention/value/bias": ((12,), keys),
        "self_attention/out/bias": ((12,), ("embed",)),
        "self_attention/query_norm/scale": ((6,), ("kv",)),
        "self_attention/key_norm/scale": ((6,), ("kv",)),
        "mlp/wi/kernel": ((12, 10), ("embed", "mlp")),
        "mlp/wi/bias": ((10,), ("mlp",)),
        "mlp/wo/kernel": ((10, 12), ("mlp", "embed")),
        "mlp/wo/bias": ((12,), ("embed",)),
        **{
            f"{when}_{block}_layer_norm/scale": ((12,), ("embed",))
            for when in ("pre", "post")
            for block in ("self_attention", "mlp")
        },
    }
    expected = {
        "token_embedder/embedding": ((20, 12), ("vocab", "embed")),
        "decoder/position_embedder/embedding": ((12, 12), ("vocab", "embed")),
        "decoder/decoder_norm/scale": ((12,), ("embed",)),
        "decoder/logits_dense/kernel": ((12, 20), ("embed", "vocab")),
    }
    for path, (shape, names) in layer.items():
        if scan:
            expected[f"decoder/layers/{path}"] = ((1, *shape), ("layers", *names))
        else:
            expected[f"decoder/layers_0/{path}"] = (shape, names)
    assert found == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_survives_json(variant):
    config = make(variant).config
    again = decoder.DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(remat_policy="minimum"), "Did you mean 'minimal'"),
        (dict(mlp_activations=("silo", "linear")), "Did you mean 'silu'"),
        (dict(norm="rmsnorm"), "DecoderConfig.norm: unknown .* Did you mean 'rms'"),
        (dict(positions="rotary"), "Known: rope, learned"),
        (dict(num_heads=0), "num_heads must be at least 1"),
        (dict(num_kv_heads=3), "must divide num_heads 4"),
        (dict(head_dim=5), "must be even"),
        (dict(windows=(1, 2, 3)), "windows"),
        (dict(windows=(-1,)), "windows"),
        (dict(token_offset=2), "token_offset must be 0 or 1"),
        (dict(positions="learned"), "max_positions must be at least 1"),
        (dict(dropout_rate=1.0), "dropout_rate"),
        (dict(rope=dict(kind="yarn", factor=2.0)), "needs original_length"),
        (dict(rope=dict(kind="yarm")), "Did you mean 'yarn'"),
        (dict(rope=dict(theta=0.0)), "theta must be above 1"),
        (dict(rope=dict(factor=0.0)), "factor must be positive"),
        (
            dict(rope=dict(kind="llama3", original_length=8, low_freq_factor=5.0)),
            "low_freq_factor < high_freq_factor",
        ),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("llama", **options)


def test_tokens_that_the_cache_has_no_slots_for_are_refused_where_that_is_known():
    network, variables = make("llama"), {"params": params_of("llama")}
    length = TOKENS.shape[1]
    _, cache = step(network, variables, TOKENS, 2)
    with pytest.raises(ValueError, match=f"2 slots, 0 of them taken: {length + 3} more"):
        step(network, variables | cache, np.ones((len(TOKENS), length + 3), int))
    options = dict(decode=True, mutable=["cache"])
    _, cache = network.apply(variables | cache, TOKENS[:, :2], **options)
    with pytest.raises(ValueError, match="2 slots, 2 of them taken: 1 more"):
        network.apply(variables | cache, TOKENS[:, :1], **options)


def test_arguments_that_do_not_go_together_are_refused():
    network, variables = make("llama"), {"params": params_of("llama")}
    ids = np.ones_like(TOKENS)
    with pytest.raises(ValueError, match="max_decode_length >= 1"):
        step(network, variables, TOKENS)
    with pytest.raises(ValueError, match="leave segment ids and positions out"):
        step(network, variables, TOKENS, 1, decoder_segment_ids=ids)
    with pytest.raises(ValueError, match="for decode=True"):
        network.apply(variables, TOKENS, prompt_lengths=LENGTHS)
    _, cache = step(network, variables, TOKENS, 1, decoder_causal_attention=ids)
    with pytest.raises(ValueError, match="prompt_lengths belong to the first call"):
        step(network, variables | cache, TOKENS[:, :1], prompt_lengths=LENGTHS)
    with pytest.raises(ValueError, match="decoder_causal_attention belongs to the first call"):
        step(network, variables | cache, TOKENS[:, :1], decoder_causal_attention=ids[:, :1])


def test_more_positions_than_were_learned_are_refused():
    network, variables = make("gpt2"), {"params": params_of("gpt2")}
    with pytest.raises(ValueError, match="13 positions .* more than the 12"):
        network.apply(variables, np.ones((1, 13), np.int32))
    with pytest.raises(ValueError, match="13 positions .* more than the 12"):
        step(network, variables, TOKENS, 6)
    step(network, variables, TOKENS, 5)


def test_stretched_rotations_leave_short_wavelengths_and_divide_long_ones():
    plain = Rope(theta=500.0).frequencies(32)
    np.testing.assert_allclose(plain, 500.0 ** (-np.arange(16) / 16), rtol=1e-6)
    linear = Rope(theta=500.0, kind="linear", factor=4.0).frequencies(32)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    for kind, longest, shortest in (("llama3", 64 / 1.0, 64 / 4.0), ("yarn", 64 / 1.0, 64 / 32.0)):
        rope = Rope(theta=500.0, kind=kind, factor=4.0, original_length=64)
        share = rope.frequencies(32) / plain
        wavelength = 2 * np.pi / plain
        # Yarn rounds the bounds outwards to whole pairs, so that a blend may begin earlier and end later.
        np.testing.assert_allclose(
            share[wavelength < shortest * (1 if kind == "llama3" else 0.6)], 1.0
        )
        np.testing.assert_allclose(
            share[wavelength > longest * (1 if kind == "llama3" else 1.6)], 0.25
        )
        assert (np.diff(share) <= 0).all() and ((share > 0.26) & (share < 0.99)).any()
    table = Rope(kind="yarn", original_length=64, attention_factor=1.5).table(jnp.zeros((1, 2)), 8)
    np.testing.assert_array_equal(table, [np.full((1, 2, 4), 1.5), np.zeros((1, 2, 4))])

"""The model: its loss is the formula, packing changes nothing, and beams keep their example's features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.adapters import Adapted, Features, LowRank, Mixture, Rule, Stochastic
from modjax.losses import cross_entropy, symmetric_kl
from modjax.models import EncoderDecoderModel

RULES = (
    Rule(
        ".*/(query|key|value|out|wi_0|wo)",
        Mixture("flix", LowRank({"task": 3, "language": 2}), Features()),
    ),
)


@pytest.fixture(scope="module")
def flix(make_t5, space, batch, move_adapters):
    """(model, parameters): every attention and feed-forward layer adapted, cross-attention too."""
    model = EncoderDecoderModel(Adapted(make_t5(), RULES, space))
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    return model, move_adapters(params, size=0.3)


def pack(batch):
    """The three examples of `batch` in one row, in another order: 2, 0, 1; the last slot is empty."""
    row = {}
    order = (2, 0, 1)
    for stream, tokens in (
        ("encoder", "encoder_input_tokens"),
        ("decoder", "decoder_target_tokens"),
    ):
        lengths = [int((batch[tokens][i] > 0).sum()) for i in order]
        ids = np.repeat(np.arange(1, 4), lengths)
        row[f"{stream}_segment_ids"] = np.pad(ids, (0, 2))
        names = (
            ["encoder_input_tokens"] if stream == "encoder" else [tokens, "decoder_input_tokens"]
        )
        for name in names:
            parts = [np.asarray(batch[name][i][:n]) for i, n in zip(order, lengths, strict=True)]
            row[name] = np.pad(np.concatenate(parts), (0, 2))
    row["features"] = np.concatenate([np.asarray(batch["features"])[list(order), 0], [[0, 0]]])
    row["tasks"] = np.array([3, 1, 2, 0])
    return {k: jnp.asarray(v)[None] for k, v in row.items()}, order


def test_packed_examples_have_the_loss_they_have_alone_with_flix_on(flix, batch):
    model, params = flix
    packed, order = pack(batch)

    def per_token(batch):
        logits = jax.jit(model.logits)(params, batch)
        return cross_entropy(logits, batch["decoder_target_tokens"])[0]

    alone, together = per_token(batch), per_token(packed)[0]
    segments = np.asarray(packed["decoder_segment_ids"][0])
    for segment, i in enumerate(order, start=1):
        n = int((batch["decoder_target_tokens"][i] > 0).sum())
        np.testing.assert_allclose(together[segments == segment], alone[i, :n], atol=1e-5)
    # Each example's features matter: with those of another the loss is another.
    swapped = packed | {"features": packed["features"][:, ::-1]}
    assert np.abs(per_token(swapped)[0] - together)[segments == 1].max() > 1e-3


@pytest.mark.parametrize("stream", ["encoder", "decoder"])
def test_cross_attention_follows_the_encoders_segments(flix, batch, stream):
    """Only the adapters of cross-attention's keys and values: they must see the encoder's ids."""
    model, params = flix
    path = (
        ".*encoder_decoder_attention/(key|value)"
        if stream == "encoder"
        else ".*/self_attention/value"
    )
    rules = (Rule(path, RULES[0].mixture),)
    narrow = EncoderDecoderModel(Adapted(model.network, rules, model.module.space))
    packed, order = pack(batch)
    alone = jax.jit(narrow.logits)(params, batch)
    together = jax.jit(narrow.logits)(params, packed)[0]
    segments = np.asarray(packed["decoder_segment_ids"][0])
    for segment, i in enumerate(order, start=1):
        n = int((segments == segment).sum())
        np.testing.assert_allclose(together[segments == segment], alone[i, :n], atol=1e-5)


def numpy_loss(logits, targets, smoothing, z_loss):
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    vocabulary = logits.shape[-1]
    soft = np.full(logits.shape, smoothing / (vocabulary - 1))
    np.put_along_axis(soft, np.asarray(targets)[..., None], 1 - smoothing, axis=-1)
    loss = -(soft * (logits - log_z[..., None])).sum(-1)
    loss += (soft * np.log(np.maximum(soft, 1e-300))).sum(-1) if smoothing else 0
    return loss + z_loss * log_z**2


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.01)])
def test_cross_entropy_is_the_formula(smoothing, z_loss):
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 11))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    found, z = cross_entropy(logits, targets, smoothing, z_loss)
    np.testing.assert_allclose(found, numpy_loss(logits, targets, smoothing, z_loss), rtol=1e-5)
    plain, _ = cross_entropy(logits, targets, smoothing)
    np.testing.assert_allclose(found - plain, z, atol=1e-5)


@pytest.mark.parametrize(
    "factor, expected",
    [
        (None, lambda loss, w: (loss * w).sum()),
        (10.0, lambda loss, w: (loss * w).sum() / 10),
        ("num_real_target_tokens", lambda loss, w: (loss * w).sum() / w.sum()),
        ("NUM_TOTAL_TARGET_TOKENS", lambda loss, w: (loss * w).sum() / w.size),
        ("average_per_sequence", lambda loss, w: ((loss * w).sum(1) / w.sum(1)).mean()),
    ],
)
def test_losses_are_normalised_as_t5x_does(factor, expected, flix, batch):
    model, params = flix
    model = EncoderDecoderModel(model.module, loss_normalizing_factor=factor)
    targets = batch["decoder_target_tokens"]
    loss = numpy_loss(jax.jit(model.logits)(params, batch), targets, 0.0, 0.0)
    found, sums = jax.jit(lambda p: model.loss_fn(p, batch, None))(params)
    weights = np.asarray(targets > 0)
    np.testing.assert_allclose(found, expected(loss, weights), rtol=1e-5)
    assert int(sums["weight"]) == weights.sum() and int(sums["sequences"]) == 3
    assert int(sums["tokens"]) == weights.sum() + int((batch["encoder_input_tokens"] > 0).sum())


def test_average_per_sequence_is_the_same_packed(flix, batch):
    model, params = flix
    model = EncoderDecoderModel(model.module, loss_normalizing_factor="average_per_sequence")
    loss = jax.jit(lambda p, b: model.loss_fn(p, b, None)[0])
    np.testing.assert_allclose(loss(params, pack(batch)[0]), loss(params, batch), rtol=1e-5)


def argmax_loop(model, params, row, steps):
    """Greedy decoding of one example without a cache."""
    tokens = np.zeros((1, steps + 1), np.int32)
    logits = jax.jit(model.logits)
    for i in range(steps):
        piece = row | {
            "decoder_input_tokens": jnp.asarray(tokens[:, :-1]),
            "decoder_target_tokens": jnp.ones((1, steps), jnp.int32),
        }
        tokens[0, i + 1] = int(jnp.argmax(logits(params, piece)[0, i]))
        if tokens[0, i + 1] == model.eos_id:
            break
    return tokens[0, 1:]


def test_a_batch_that_mixes_datasets_decodes_as_its_examples_do_alone(flix, batch):
    model, params = flix
    greedy = jax.jit(model.predict_batch)(params, batch)
    beam = jax.jit(lambda p, b: model.predict_batch(p, b, decoder="beam", num_decodes=3))
    beams = beam(params, batch)
    for i in range(3):
        row = {k: v[i : i + 1] for k, v in batch.items()}
        np.testing.assert_array_equal(greedy[i], argmax_loop(model, params, row, 6))
        three = {k: jnp.repeat(v, 3, axis=0) for k, v in row.items()}
        np.testing.assert_array_equal(beam(params, three)[0], beams[i])
    # And the features decide: without them the predictions are others.
    without = jax.jit(model.predict_batch)(params, batch | {"features": 0 * batch["features"]})
    assert (np.asarray(without) != np.asarray(greedy)).any()


def test_beam_scores_are_the_scores_of_the_decoded_sequences(flix, batch):
    model, params = flix
    decodes, aux = jax.jit(
        lambda p: model.predict_batch_with_aux(
            p, batch, decoder="beam", num_decodes=4, alpha=0.0, return_all_decodes=True
        )
    )(params)
    assert decodes.shape == (3, 4, 6) and (np.diff(np.asarray(aux["scores"]), axis=1) >= 0).all()
    for k in range(4):
        targets = decodes[:, k]
        scored = batch | {
            "decoder_target_tokens": targets,
            "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        }
        scores = jax.jit(model.score_batch)(params, scored)
        ended = np.asarray((targets == model.eos_id).any(1))
        np.testing.assert_allclose(scores[ended], aux["scores"][ended, k], atol=1e-4)


def test_greedy_scores_are_the_networks_log_probabilities(flix, batch):
    model, params = flix
    tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch)
    # A random network may say token 0 before the end, so the targets here only mask nothing.
    forced = batch | {
        "decoder_target_tokens": jnp.ones_like(tokens),
        "decoder_input_tokens": jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    }
    log_probabilities = jax.nn.log_softmax(jax.jit(model.logits)(params, forced))
    chosen = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
    before_end = jnp.cumsum(tokens == model.eos_id, axis=1) - (tokens == model.eos_id) == 0
    np.testing.assert_allclose(aux["scores"], jnp.sum(chosen * before_end, axis=1), atol=1e-4)


def test_what_cannot_be_is_refused(flix, batch):
    model, params = flix
    with pytest.raises(ValueError, match="Did you mean 'greedy'"):
        EncoderDecoderModel(model.module, decoder="gredy")
    with pytest.raises(ValueError, match="Did you mean 'num_real_target_tokens'"):
        EncoderDecoderModel(model.module, loss_normalizing_factor="num_real_targets")
    for name, value in (
        ("label_smoothing", 1.0),
        ("label_smoothing", "0.1"),
        ("consistency", "1"),
        ("z_loss", -1.0),
        ("loss_normalizing_factor", 0),
        ("loss_normalizing_factor", True),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
            EncoderDecoderModel(model.module, **{name: value})
    with pytest.raises(ValueError, match="one example per row"):
        model.predict_batch(params, pack(batch)[0])
    with pytest.raises(ValueError, match="give an rng"):
        model.predict_batch(params, batch, decoder="sample")


def test_consistency_is_adamixs_formula_and_moves_each_side_towards_the_other():
    p, q = 2 * jax.random.normal(jax.random.key(0), (2, 3, 5, 11))
    soft_p, soft_q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in map(np.asarray, (p, q)))
    log_ratio = np.log(soft_p) - np.log(soft_q)
    expected = (soft_p * log_ratio).sum(-1) + (soft_q * -log_ratio).sum(-1)
    np.testing.assert_allclose(symmetric_kl(p, q), expected, rtol=1e-4, atol=1e-5)
    # Each divergence has its target stopped, so that a side's gradient is what parts it from the other.
    grads = jax.grad(lambda p, q: jnp.sum(symmetric_kl(p, q)), argnums=(0, 1))(p, q)
    np.testing.assert_allclose(grads[0], soft_p - soft_q, atol=1e-5)
    np.testing.assert_allclose(grads[1], soft_q - soft_p, atol=1e-5)


def test_a_consistent_model_adds_the_distance_of_two_draws_in_training_only(
    make_t5, batch, space, move_adapters
):
    mixture = Mixture("adamix", LowRank(2), Stochastic(3))
    adapted = Adapted(make_t5(), (Rule(".*/(query|wo)", mixture),), space)
    model = EncoderDecoderModel(adapted, consistency=4.0)
    alone = EncoderDecoderModel(adapted)
    params = move_adapters(jax.jit(model.init)(jax.random.key(0), batch)["params"], size=1.0)
    rng = jax.random.key(3)

    @jax.jit
    def figures(params):
        other = jax.random.fold_in(rng, 1)
        return (
            model.loss_fn(params, batch, rng),
            alone.loss_fn(params, batch, rng),
            symmetric_kl(alone.logits(params, batch, rng), alone.logits(params, batch, other)),
            model.loss_fn(params, batch, None)[0] - alone.loss_fn(params, batch, None)[0],
        )

    (loss, sums), (plain, _), distance, in_evaluation = figures(params)
    weights = np.asarray(batch["decoder_target_tokens"] > 0)
    expected = 2.0 * np.sum(np.asarray(distance) * weights)
    assert expected > 0.1 and in_evaluation == 0
    np.testing.assert_allclose(loss - plain, expected, rtol=1e-4)
    np.testing.assert_allclose(sums["consistency"], expected, rtol=1e-4)

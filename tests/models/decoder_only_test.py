"""Decoder-only models: the loss is on the targets, and cached decoding of unequal prompts is what the network says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.adapters import Adapted, Features, LowRank, Mixture, Rule
from modjax.models import DecoderOnlyModel

STEPS = 6


@pytest.fixture(scope="module")
def make(make_decoder, space, decoder_batch, move_adapters):
    """A function: options of the model -> (model with FLix at every layer, parameters)."""
    mixture = Mixture("flix", LowRank({"task": 3, "language": 2}), Features())
    rules = (Rule(".*/(query|key|value|out|wi_0|wi_1|wo)", mixture),)
    params = {}

    def make(scan_layers=False, **options):
        network = make_decoder(scan_layers=scan_layers, windows=(0, 5))
        model = DecoderOnlyModel(Adapted(network, rules, space), **options)
        if scan_layers not in params:
            fresh = jax.jit(model.init)(jax.random.key(0), decoder_batch)["params"]
            params[scan_layers] = move_adapters(fresh, size=0.3)
        return model, params[scan_layers]

    return make


def without_cache(model, params, batch, steps=STEPS):
    """Greedy continuations by running the network again on ever longer rows."""
    prompts = np.asarray(batch["decoder_prompt_tokens"])
    lengths = (prompts > 0).sum(1)
    rows = np.pad(prompts, ((0, 0), (0, steps)))
    columns = np.arange(rows.shape[1])
    logits = jax.jit(model.logits)
    for step in range(steps):
        asked = {
            "decoder_input_tokens": rows,
            "decoder_target_tokens": columns < lengths[:, None] + step,
            "decoder_causal_attention": columns < lengths[:, None],
            "features": batch["features"],
            "tasks": batch["tasks"],
        }
        last = np.asarray(logits(params, asked))[np.arange(3), lengths + step - 1]
        rows[np.arange(3), lengths + step] = last.argmax(-1) + model.token_offset
    return [row[n : n + steps].tolist() for row, n in zip(rows, lengths, strict=True)]


def test_the_loss_is_the_mean_over_targets_of_the_tokens_after_the_offset(make, decoder_batch):
    model, params = make(loss_normalizing_factor="num_real_target_tokens")
    loss, sums = model.loss_fn(params, decoder_batch, None)
    logits = np.asarray(model.logits(params, decoder_batch), np.float64)
    assert logits.shape[-1] == 49 and model.token_offset == 1
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    costs, right = [], []
    for row, weights, tokens in zip(
        log_probs,
        decoder_batch["decoder_loss_weights"],
        decoder_batch["decoder_target_tokens"],
        strict=True,
    ):
        for scores, weight, token in zip(row, weights, np.asarray(tokens), strict=True):
            if weight:
                costs.append(-scores[token - 1])
                right.append(scores.argmax() == token - 1)
    assert len(costs) == 16
    np.testing.assert_allclose(loss, np.mean(costs), rtol=1e-5)
    assert sums["correct"] == sum(right) and sums["weight"] == 16 and sums["sequences"] == 3
    assert sums["tokens"] == np.count_nonzero(decoder_batch["decoder_target_tokens"])
    scores = model.score_batch(params, decoder_batch)
    np.testing.assert_allclose(-np.sum(scores), np.sum(costs), rtol=1e-5)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_greedy_decoding_of_unequal_prompts_is_the_uncached_one(
    make, decoder_batch, scan_layers, prefix
):
    model, params = make(scan_layers, eos_id=-1, prefix=prefix)
    found = jax.jit(model.predict_batch)(params, decoder_batch)
    assert found.shape == (3, STEPS)
    assert found.tolist() == without_cache(model, params, decoder_batch)
    # The two ways to say where a prompt ends are the same.
    names = ("decoder_input_tokens", "decoder_causal_attention", "features", "tasks")
    other = {name: decoder_batch[name] for name in names}
    again = model.predict_batch(params, other, max_decode_len=STEPS)
    np.testing.assert_array_equal(again, found)


def test_a_prefix_changes_what_a_causal_model_says(make, decoder_batch):
    (causal, params), (prefix, _) = make(), make(prefix=True)
    apart = causal.logits(params, decoder_batch) - prefix.logits(params, decoder_batch)
    assert np.abs(apart).max() > 1e-3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_beams_have_the_scores_of_their_sequences(make, decoder_batch, scan_layers):
    model, params = make(scan_layers, eos_id=-1)
    decode = jax.jit(
        lambda batch: model.predict_batch_with_aux(
            params, batch, decoder="beam", num_decodes=3, alpha=0.0, return_all_decodes=True
        )
    )
    decodes, aux = decode(decoder_batch)
    greedy = model.score_batch(
        params, answered(decoder_batch, model.predict_batch(params, decoder_batch))
    )
    for beam in range(3):
        scores = model.score_batch(params, answered(decoder_batch, decodes[:, beam]))
        np.testing.assert_allclose(aux["scores"][:, beam], scores, atol=1e-4)
    assert (aux["scores"][:, -1] >= greedy - 1e-4).all()


def answered(batch, answers):
    """A batch for scoring: the prompts of another with these answers."""
    rows = []
    for prompt, answer in zip(
        np.asarray(batch["decoder_prompt_tokens"]), np.asarray(answers), strict=True
    ):
        asked = prompt[prompt > 0]
        tokens = np.concatenate([asked, answer])
        weights = np.arange(1, len(tokens)) >= len(asked)
        rows.append((tokens[:-1], tokens[1:], weights))
    width = max(len(row[0]) for row in rows)
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    made = {
        name: jnp.asarray([np.pad(row[i], (0, width - len(row[i]))) for row in rows])
        for i, name in enumerate(names)
    }
    return made | {name: batch[name] for name in ("features", "tasks")}


def test_sampling_never_draws_what_no_embedding_stands_for(make, decoder_batch):
    model, params = make(decoder="sample", temperature=100.0, eos_id=-1)
    draw = jax.jit(lambda key: model.predict_batch(params, decoder_batch, key))
    drawn = np.concatenate([draw(jax.random.key(k)).reshape(-1) for k in range(30)])
    assert drawn.min() >= 1 and drawn.max() <= 49 and len(set(drawn.tolist())) > 40


def test_learned_positions_serve_as_many_tokens_as_there_are_positions(
    make_decoder, decoder_batch, space
):
    """Eight of the prompt, its first token included, and six of the answer: the last one is never fed."""
    learned = dict(positions="learned", norm="layer")
    model = DecoderOnlyModel(make_decoder(max_positions=13, **learned), eos_id=-1)
    short = {k: v[:, :13] if k.startswith("decoder_") else v for k, v in decoder_batch.items()}
    params = jax.jit(model.init)(jax.random.key(0), short)["params"]
    found = jax.jit(model.predict_batch)(params, decoder_batch)
    longer = DecoderOnlyModel(make_decoder(max_positions=14, **learned), eos_id=-1)
    table = params["decoder"]["position_embedder"]["embedding"]
    assert table.shape[0] == 13
    padded = jax.tree.map(lambda x: x, params)
    padded["decoder"]["position_embedder"]["embedding"] = jnp.pad(table, ((0, 1), (0, 0)))
    assert found.tolist() == without_cache(longer, padded, decoder_batch)
    model.example_batch({"inputs": 7, "targets": 6}, space)
    with pytest.raises(ValueError, match="14 tokens together are more than the 13 positions"):
        model.example_batch({"inputs": 8, "targets": 6}, space)


def test_a_batch_without_an_end_of_the_prompt_is_refused(make, decoder_batch):
    model, params = make()
    batch = {name: decoder_batch[name] for name in ("decoder_input_tokens", "features", "tasks")}
    with pytest.raises(ValueError, match="decoder_causal_attention .*where does the prompt end"):
        model.predict_batch(params, batch)

"""A loss whose logits are made chunk by chunk: the same loss and gradients, in both kinds of models."""

import dataclasses

import jax
import numpy as np
import pytest

from modjax import quantization
from modjax.adapters import Adapted, Features, LowRank, Mixture, Rule, join, split
from modjax.models import DecoderOnlyModel, EncoderDecoderModel, EncoderModel

LAYERS = ".*/(query|key|value|out|wi_0|wi_1|wo)"
FLIX = Mixture("flix", LowRank({"task": 3, "language": 2}), Features())


# One layer is enough to have a gradient below the output layer.
SMALL_T5 = {"num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(scope="module", params=["t5 tied", "t5", "decoder tied", "decoder"])
def model(request, make_t5, make_decoder, space, move_adapters, batch, decoder_batch):
    """(model with FLix, parameters, batch) of each kind."""
    tied = request.param.endswith("tied")
    if request.param.startswith("t5"):
        network, kind, of = (
            make_t5(logits_via_embedding=tied, **SMALL_T5),
            EncoderDecoderModel,
            batch,
        )
    else:
        network = make_decoder(logits_via_embedding=tied, logits_softcap=5.0, num_layers=1)
        kind, of = DecoderOnlyModel, decoder_batch
    made = kind(Adapted(network, (Rule(LAYERS, FLIX),), space), z_loss=1e-3, label_smoothing=0.1)
    params = jax.jit(made.init)(jax.random.key(0), of)["params"]
    return made, move_adapters(params, size=0.3), of


def same(found, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
    )


def test_the_loss_and_all_gradients_are_those_of_the_whole(model):
    whole, params, batch = model

    def gradients(model):
        loss = jax.value_and_grad(
            lambda p: model.loss_fn(p, batch, jax.random.key(5)), has_aux=True
        )
        return jax.jit(loss)(params)

    expected = gradients(whole)
    same(gradients(dataclasses.replace(whole, loss_chunk=4)), expected)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 0.01


def test_an_evaluation_has_the_sums_of_the_whole(model):
    whole, params, batch = model
    for chunk in (3, 100):
        chunked = dataclasses.replace(whole, loss_chunk=chunk)
        same(*(jax.jit(each.loss_sums)(params, batch, None) for each in (chunked, whole)))


def test_a_quantised_output_layer_gives_the_adapters_their_gradient(
    make_t5, space, move_adapters, batch
):
    network = make_t5(logits_via_embedding=False, **SMALL_T5)
    whole = EncoderDecoderModel(Adapted(network, (Rule(LAYERS, FLIX),), space))
    params = move_adapters(jax.jit(whole.init)(jax.random.key(0), batch)["params"], size=0.3)
    added, base = split(params, whole.module)
    base = quantization.quantize(base)

    def gradient(model):
        return jax.jit(jax.grad(lambda a: model.loss_fn(join(base, a), batch, None)[0]))(added)

    expected = gradient(whole)
    found = gradient(dataclasses.replace(whole, loss_chunk=4))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected
    )


def test_a_training_step_holds_no_logits_of_all_positions(model):
    whole, params, batch = model
    added, base = split(params, whole.module)

    def largest(model):
        def loss(added):
            return model.loss_fn(join(base, added), batch, None)[0]

        text = jax.jit(jax.grad(loss)).lower(added).compile().as_text()
        length, vocab = batch["decoder_target_tokens"].shape[1], whole_vocab
        return any(f"[{shape},{vocab}]" in text for shape in (f"3,{length}", str(3 * length)))

    whole_vocab = whole.network.config.vocab_size
    assert largest(whole)
    assert not largest(dataclasses.replace(whole, loss_chunk=1))


def test_what_does_not_go_with_chunks_is_refused(make_t5, make_encoder, space):
    network = make_t5(logits_via_embedding=False)
    for chunk in (0, True, 2.5):
        with pytest.raises(ValueError, match="loss_chunk must be an integer of at least 1"):
            EncoderDecoderModel(network, loss_chunk=chunk)
    with pytest.raises(ValueError, match="loss_chunk=4 makes no two passes' logits"):
        EncoderDecoderModel(network, loss_chunk=4, consistency=1.0)
    rule = Rule(".*decoder/logits_dense", FLIX)
    with pytest.raises(ValueError, match="'flix' is at 'decoder/logits_dense'"):
        EncoderDecoderModel(Adapted(network, (rule,), space), loss_chunk=4)
    with pytest.raises(ValueError, match="Transformer has no method `project`"):
        EncoderModel(make_encoder(), loss_chunk=4)

"""Encoders with a head: losses are the formulas, predictions count classes from 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.models import EncoderModel


def made(network, batch):
    model = EncoderModel(network)
    return model, jax.jit(model.init)(jax.random.key(0), batch)["params"]


def test_classes_cost_their_cross_entropy_and_rows_of_padding_nothing(make_encoder, encoder_batch):
    model, params = made(make_encoder(), encoder_batch)
    logits = np.asarray(model.logits(params, encoder_batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = log_probs[np.arange(3), [1, 0, 2]]  # labels 2, 1, 3
    loss, sums = model.eval_fn(params, encoder_batch)
    np.testing.assert_allclose(loss, -expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(model.score_batch(params, encoder_batch), expected, rtol=1e-5)
    predicted, aux = model.predict_batch_with_aux(params, encoder_batch)
    np.testing.assert_array_equal(predicted[:, 0], logits.argmax(-1) + 1)
    np.testing.assert_allclose(aux["scores"], log_probs.max(-1), rtol=1e-5)
    assert sums["correct"] == np.sum(logits.argmax(-1) == [1, 0, 2]) and sums["sequences"] == 3

    padded = {
        name: jnp.concatenate([ids, jnp.zeros_like(ids[:1])]) for name, ids in encoder_batch.items()
    }
    again, sums = model.eval_fn(params, padded)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert sums["weight"] == 3


def test_one_output_costs_its_squared_error(make_encoder, encoder_batch):
    values = jnp.array([[0.5], [-2.0], [3.0]])
    batch = {**encoder_batch, "values": values}
    model, params = made(make_encoder(num_outputs=1), batch)
    predicted = model.predict_batch(params, batch)
    assert predicted.shape == (3, 1) and predicted.dtype == jnp.float32
    expected = np.square(np.asarray(predicted) - np.asarray(values)).sum()
    np.testing.assert_allclose(model.eval_fn(params, batch)[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="have no probability"):
        model.score_batch(params, batch)


def test_what_makes_no_sense_is_refused(make_encoder, encoder_batch, space):
    with pytest.raises(ValueError, match="label_smoothing and z_loss are of classes"):
        EncoderModel(make_encoder(num_outputs=1), z_loss=0.1)
    with pytest.raises(ValueError, match="consistency=1 compares .* Set --gin.CONSISTENCY=0.0"):
        EncoderModel(make_encoder(num_outputs=1), consistency=1.0)
    with pytest.raises(ValueError, match="no head: set --gin.NUM_OUTPUTS=N, the number"):
        EncoderModel(make_encoder(head="none", num_outputs=0))
    model, params = made(make_encoder(), encoder_batch)
    with pytest.raises(ValueError, match="takes no num_decodes"):
        model.predict_batch(params, encoder_batch, num_decodes=4)
    with pytest.raises(ValueError, match="more than the 20 positions that the base has learned"):
        model.example_batch({"inputs": 21, "targets": 1}, space)
    with pytest.raises(ValueError, match="set pack = False"):
        model.example_batch({"inputs": 4, "targets": 1}, space, segments=2)

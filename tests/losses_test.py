"""What is said of predictions is what argmax says. The losses themselves are tested with the models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import losses


def test_the_prediction_is_argmaxs_also_where_entries_are_alike():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.integers(0, 3, (200, 5)), jnp.float32)
    logits = logits.at[0].set(0.0)
    for target in range(5):
        targets = jnp.full((200,), target)
        found = losses.predicted(logits, targets)
        np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1) == targets)
    assert losses.predicted(jnp.full((1, 3), jnp.nan), jnp.array([0])) == 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-3)])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole(chunk, smoothing, z_loss):
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(2, 7, 5)), jnp.float32)
    params = {"kernel": jnp.asarray(draw.normal(size=(5, 11)), jnp.float32)}
    params["bias"] = jnp.asarray(draw.normal(size=11), jnp.float32)
    targets = jnp.asarray(draw.integers(0, 11, (2, 7)))
    weight = jnp.asarray(draw.uniform(size=(2, 7)), jnp.float32)

    def project(params, y):
        return jnp.tanh(y @ params["kernel"] + params["bias"])

    def whole(params, hidden):
        logits = project(params, hidden)
        loss, z = losses.cross_entropy(logits, targets, smoothing, z_loss)
        return jnp.sum(weight * loss), (loss, z, losses.predicted(logits, targets))

    def chunked(params, hidden):
        told = losses.chunked_cross_entropy(
            project, params, hidden, targets, chunk, smoothing, z_loss
        )
        return jnp.sum(weight * told[0]), told

    expected = jax.grad(whole, (0, 1), has_aux=True)(params, hidden)
    found = jax.jit(jax.grad(chunked, (0, 1), has_aux=True))(params, hidden)
    alone = jax.jit(chunked)(params, hidden)[1]
    for one, other in ((found, expected), (alone, expected[1])):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)


def test_no_array_of_all_logits_is_made():
    """The largest array of a training step with frozen embeddings has a chunk's logits."""
    draw = np.random.default_rng(0)
    table = jnp.asarray(draw.normal(size=(640, 8)), jnp.float32)
    hidden = jnp.asarray(draw.normal(size=(2, 32, 8)), jnp.float32)
    targets = jnp.zeros((2, 32), jnp.int32)

    def loss(hidden, table):
        told = losses.chunked_cross_entropy(lambda p, y: y @ p.T, table, hidden, targets, 4)
        return jnp.sum(told[0])

    def loops(text):
        """Scans; XLA may make loops of other operations, of a scatter for one."""
        return sum(" while(" in line and '/while"' in line for line in text.splitlines())

    text = jax.jit(jax.grad(loss)).lower(hidden, table).compile().as_text()
    assert "f32[2,4,640]" in text or "f32[8,640]" in text
    assert "f32[2,32,640]" not in text and "f32[64,640]" not in text
    # One loop: the other one, for a gradient of the table, is made where it is asked for.
    assert loops(text) == 1
    both = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().as_text()
    assert loops(both) == 2

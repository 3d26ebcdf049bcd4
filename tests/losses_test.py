"""What is said of predictions is what argmax says. The losses themselves are tested with the models."""

import jax.numpy as jnp
import numpy as np

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

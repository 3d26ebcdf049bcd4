"""A toy decoder whose logits depend on the whole history through its cache, and a plain Python
view of it.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

EOS = 1
WIDTH = 5


@dataclasses.dataclass(frozen=True)
class Toy:
    """`h <- h / 2 + embedding[token]`, `logits = h @ kernel + bias[position]`; eighths, so that
    all platforms agree.

    Its cache holds h `[B, WIDTH]` and a position: a scalar, or one per example when it is
    prefilled. With layers, both have a leading layer axis, as a scanned network's.
    """

    seed: int
    vocab: int = 6
    scale: float = 1.0
    layers: int = 0

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        draw = np.random.RandomState(self.seed).randint
        return {
            "embedding": draw(-8, 9, (self.vocab, WIDTH)).astype(np.float32) / 8,
            "kernel": self.scale * draw(-8, 9, (WIDTH, self.vocab)).astype(np.float32) / 8,
            "bias": draw(-8, 9, (40, self.vocab)).astype(np.float32) / 8,
        }

    def cache(self, history: np.ndarray, position) -> dict:
        """The cache with history `[B, WIDTH]` at a position."""
        values = {
            "cached_key": jnp.asarray(history, jnp.float32),
            "cache_index": jnp.asarray(position, jnp.int32),
        }
        if self.layers:
            values = {k: jnp.broadcast_to(x, (self.layers, *x.shape)) for k, x in values.items()}
        return {"decoder": {"self_attention": values}}

    def empty(self, batch_size: int) -> dict:
        return self.cache(np.zeros((batch_size, WIDTH)), 0)

    def prefilled(self, inputs: np.ndarray, index: np.ndarray) -> dict:
        """The cache after feeding `inputs[b, :index[b]]`."""
        history = np.stack([self.history(row[:n]) for row, n in zip(inputs, index, strict=True)])
        return self.cache(history, index)

    def step(self, state, tables=None):
        """`tokens_to_logits`; tables may be given as traced arrays."""
        tables = tables or self.tables
        values = state.cache["decoder"]["self_attention"]
        tokens = state.cur_token[:, 0]
        history = values["cached_key"] / 2 + jnp.asarray(tables["embedding"])[tokens]
        position = values["cache_index"]
        now, at = (history[-1], position[-1]) if self.layers else (history, position)
        logits = now @ jnp.asarray(tables["kernel"]) + jnp.asarray(tables["bias"])[at.reshape(-1)]
        new = {"cached_key": history, "cache_index": position + 1}
        return logits, {"decoder": {"self_attention": new}}

    def history(self, fed) -> np.ndarray:
        h = np.zeros(WIDTH, np.float32)
        for token in fed:
            h = h / 2 + self.tables["embedding"][token]
        return h

    def log_probs(self, fed) -> np.ndarray:
        """Log probabilities of the next token after feeding tokens (start token included),
        without any cache.
        """
        logits = self.history(fed) @ self.tables["kernel"] + self.tables["bias"][len(fed) - 1]
        return logits - np.log(np.sum(np.exp(logits)))

    def score(self, tokens, prompt_length: int = 0) -> float:
        """Log probability of a decode up to its end token, its prompt free."""
        fed, total = [0], 0.0
        for j, token in enumerate(tokens):
            if j >= prompt_length:
                total += self.log_probs(fed)[token]
                if token == EOS:
                    break
            fed.append(int(token))
        return total


@pytest.fixture(scope="session")
def make_toy():
    return Toy

"""What the tests of adapters share: packed rows, and adapters away from their start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def pack_rows():
    """Packs the examples of an unpacked batch: `rows` lists the examples of each row; segments not used are empty."""

    def pack(batch, rows):
        packed = {}
        slots = max(map(len, rows))
        for stream, tokens in (
            ("encoder", "encoder_input_tokens"),
            ("decoder", "decoder_target_tokens"),
        ):
            lengths = np.asarray((batch[tokens] > 0).sum(-1))
            width = max(int(lengths[list(row)].sum()) for row in rows)

            def together(parts, width=width):
                parts = np.concatenate(parts)
                return np.pad(parts, (0, width - len(parts)))

            names = {tokens, "decoder_input_tokens"} if stream == "decoder" else {tokens}
            for name in names:
                packed[name] = [
                    together([np.asarray(batch[name][i][: lengths[i]]) for i in row])
                    for row in rows
                ]
            packed[f"{stream}_segment_ids"] = [
                together([np.full(lengths[i], s) for s, i in enumerate(row, 1)]) for row in rows
            ]
        for name in ("features", "tasks"):
            ids = np.asarray(batch[name])[:, 0]
            empty = np.zeros_like(ids[:1])
            packed[name] = [
                np.concatenate([ids[list(row)], *[empty] * (slots - len(row))]) for row in rows
            ]
        return {name: jnp.asarray(np.stack(value)) for name, value in packed.items()}

    return pack


@pytest.fixture(scope="session")
def scatter():
    """Adds noise to every leaf of an adapters' tree, so that each of them matters."""

    def move(tree, seed: int = 1, size: float = 0.3):
        leaves, structure = jax.tree.flatten(tree)
        rng = np.random.default_rng(seed)
        moved = [x + size * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
        return jax.tree.unflatten(structure, moved)

    return move

"""What the tests of adapters share: kinds of networks, packed rows, and adapters away from their start."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import models


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of network under test.

    Attributes:
      model: the class of its models.
      make: builds a tiny network.
      batch: three examples, those of the fixture `batch`.
      shallow: options of a network with as few layers as there can be.
      sites: layers of which each can be told by what it adds. Keys of attention would not do where positions are added
        to the tokens: what is added to all keys alike cancels in the softmax, so that a bottleneck's bias would not
        move.
      pair: two of them, for one adapter.
    """

    model: type[models.Model]
    make: Callable[..., Any]
    batch: dict[str, Any]
    shallow: dict[str, int]
    sites: tuple[str, ...]
    pair: str


@pytest.fixture(scope="session")
def kinds(
    make_t5, make_decoder, make_encoder, batch, decoder_batch, encoder_batch
) -> dict[str, Kind]:
    return {
        "encoder_decoder": Kind(
            models.EncoderDecoderModel,
            make_t5,
            batch,
            {"num_encoder_layers": 1, "num_decoder_layers": 1},
            (
                "encoder/.*/attention/value",
                "encoder/.*/mlp/wi_0",
                "encoder/.*/mlp/wo",
                "decoder/.*/self_attention/out",
                "decoder/.*/encoder_decoder_attention/value",  # of the encoder's stream
                "decoder/.*/encoder_decoder_attention/out",
                "decoder/.*/mlp/wo",
                "decoder/.*/self_attention/value",
            ),
            "encoder/.*/wo|.*/encoder_decoder_attention/value",
        ),
        "decoder_only": Kind(
            models.DecoderOnlyModel,
            make_decoder,
            decoder_batch,
            {"num_layers": 1},
            (
                ".*/self_attention/query",
                ".*/self_attention/value",
                ".*/self_attention/out",
                ".*/mlp/wi_0",
                ".*/mlp/wi_1",
                ".*/mlp/wo",
            ),
            ".*/self_attention/value|.*/mlp/wo",
        ),
        "encoder": Kind(
            models.EncoderModel,
            make_encoder,
            encoder_batch,
            {"num_layers": 1},
            (
                ".*/attention/query",
                ".*/attention/value",
                ".*/attention/out",
                ".*/mlp/wi",
                ".*/mlp/wo",
            ),
            ".*/attention/value|.*/mlp/wo",
        ),
    }


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
            if tokens not in batch:
                continue
            lengths = np.asarray((batch[tokens] > 0).sum(-1))
            width = max(int(lengths[list(row)].sum()) for row in rows)

            def together(parts, width=width):
                parts = np.concatenate(parts)
                return np.pad(parts, (0, width - len(parts)))

            names = {tokens}
            if stream == "decoder":
                more = ("input_tokens", "loss_weights", "causal_attention")
                names |= {f"decoder_{name}" for name in more} & set(batch)
            for name in names:
                packed[name] = [
                    together([np.asarray(batch[name][i][: lengths[i]]) for i in row])
                    for row in rows
                ]
            packed[f"{stream}_segment_ids"] = [
                together([np.full(lengths[i], s) for s, i in enumerate(row, 1)]) for row in rows
            ]
            packed[f"{stream}_positions"] = [
                together([np.arange(lengths[i]) for i in row]) for row in rows
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

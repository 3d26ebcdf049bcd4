"""The kinds of networks whose weights are read and written here."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from modjax import memo
from modjax.hub import hf_decoder, hf_encoder, hf_t5
from modjax.hub.layers import flatten
from modjax.networks import decoder, encoder, t5

# What a run chooses; the same weights serve any choice, so a folder does not say it.
RUN_FIELDS = ("dropout_rate", "scan_layers", "remat_policy", "attention", "dtype")


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
      config: the class of its configurations.
      network: its class.
      inputs: how many arrays of tokens it takes.
      huggingface: the module that knows Hugging Face's names for it.
      gin: the file of a base of this kind.
    """

    config: type
    network: type
    inputs: int
    huggingface: Any
    gin: str

    @property
    def fields(self) -> list[str]:
        """The fields of a configuration that weights decide about."""
        return [f.name for f in dataclasses.fields(self.config) if f.name not in RUN_FIELDS]

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Every parameter of the network by name, told by the network itself."""
        return dict(_shapes(self.network(config), self.inputs))


@memo.keep(4)
def _shapes(network: Any, inputs: int) -> dict[str, tuple[int, ...]]:
    tokens = [jax.ShapeDtypeStruct((1, 1), np.int32)] * inputs
    variables = jax.eval_shape(network.init, jax.random.key(0), *tokens)
    return {name: tuple(leaf.shape) for name, leaf in flatten(variables["params"]).items()}


KINDS = {
    "t5": Kind(t5.T5Config, t5.Transformer, 3, hf_t5, "bases/folder.gin"),
    "decoder": Kind(
        decoder.DecoderConfig, decoder.Transformer, 1, hf_decoder, "bases/decoder_folder.gin"
    ),
    "encoder": Kind(
        encoder.EncoderConfig, encoder.Transformer, 1, hf_encoder, "bases/encoder_folder.gin"
    ),
}


def name_of(config: Any) -> str:
    """The name of the kind that a configuration is of."""
    for name, kind in KINDS.items():
        if isinstance(config, kind.config):
            return name
    raise TypeError(f"{type(config).__name__} is the configuration of no network of ours.")

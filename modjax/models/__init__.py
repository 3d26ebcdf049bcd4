"""Loss, prediction and scoring for a network, adapted or not: what lies between a batch and a number.

One class for each kind of network, with the names and shapes of T5X's model protocol: `EncoderDecoderModel`,
`DecoderOnlyModel`, `EncoderModel` (classes or a number).
"""

from modjax.models.base import Model, make_mix
from modjax.models.decoder_only import DecoderOnlyModel
from modjax.models.encoder import EncoderModel
from modjax.models.encoder_decoder import EncoderDecoderModel

__all__ = ["DecoderOnlyModel", "EncoderDecoderModel", "EncoderModel", "Model", "make_mix"]

"""Greedy decoding, sampling and beam search with a cache, callable as T5X's decoding module is.

One contract for all of them. The caller gives `tokens_to_logits`, which takes a `DecodingState`
of `B * num_decodes` rows and gives `(logits [B * num_decodes, vocabulary], new cache)`. The rows
of one example lie next to each other, so whatever else the network reads per example (the
encoder's output, its tokens, `features`) is expanded by the caller with
`flat_batch_beam_expand(x, num_decodes)`; the cache is expanded here.

Decodes come back as `[B, num_decodes, L]` with scores `[B, num_decodes]`, worst first: take
`[:, -1]` for the best.

Sequences and scores are T5X's (`t5x/decoding.py`, April 2026), with these exceptions, where T5X's
are of no use: behind a prompt that fills `inputs`, beam search goes on freely, where T5X repeats
the prompt's last token; with a temperature per example, the decodes of one example differ, where
T5X draws them all with the same noise; a `topp` of 0 that is traced means no limit, where T5X draws
uniformly. Logits of lower precision are computed on in float32, and may hold -inf.
"""

from modjax.decoding.beams import (
    DecodingState,
    add_beam_dim,
    expand_cache,
    flat_batch_beam_expand,
    flatten_beam_dim,
    gather_beams,
    gather_cache,
    unflatten_beam_dim,
)
from modjax.decoding.sampling import SamplingLoopState, greedy_decode, temperature_sample
from modjax.decoding.search import beam_search, brevity_penalty

__all__ = [
    "DecodingState",
    "SamplingLoopState",
    "add_beam_dim",
    "beam_search",
    "brevity_penalty",
    "expand_cache",
    "flat_batch_beam_expand",
    "flatten_beam_dim",
    "gather_beams",
    "gather_cache",
    "greedy_decode",
    "temperature_sample",
    "unflatten_beam_dim",
]

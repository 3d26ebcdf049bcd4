"""Sequences and scores equal those recorded from T5X's own module (tests/golden/decoding.json)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax import decoding

RECORD = json.loads((pathlib.Path(__file__).parents[1] / "golden/decoding.json").read_text())
# What changes between calls of one compiled decoder.
TRACED = ("alpha", "temperature", "decode_rng")


def _name(case: dict) -> str:
    arguments = "-".join(f"{k}={v}" for k, v in case["arguments"].items())
    return f"{case['decoder']}-{case['toy']['seed']}-{case['prompts']}-{arguments}"


@functools.cache
def _compiled(decoder: str, toy_class, layers: int, static: tuple):
    def decode(tables, inputs, cache, arguments):
        return getattr(decoding, decoder)(
            inputs,
            cache,
            lambda state: toy_class(0, layers=layers).step(state, tables),
            1,
            cache_offset=1 if layers else 0,
            **dict(static),
            **arguments,
        )

    return jax.jit(decode)


@pytest.mark.parametrize("case", RECORD["cases"], ids=_name)
def test_same_sequences_and_scores_as_t5x(case, make_toy):
    arguments = dict(case["arguments"])
    if "decode_rng" in arguments:
        draws = jax.random.categorical(
            jax.random.PRNGKey(7), jnp.zeros((4, 40)), axis=-1, shape=(8, 4)
        )
        if not np.array_equal(draws, RECORD["draws"]):
            pytest.skip("this jax draws other random numbers than the one recorded with")
        arguments["decode_rng"] = jax.random.PRNGKey(arguments["decode_rng"])
    traced = {k: jnp.asarray(arguments.pop(k)) for k in TRACED if k in arguments}
    toy = make_toy(**case["toy"])
    inputs = np.array(case["inputs"], np.int32)
    cache = toy.empty(len(inputs))
    if case["prompts"] == "prefilled":
        traced["initial_index"] = jnp.asarray(np.count_nonzero(inputs, axis=1))
        cache = toy.prefilled(inputs, traced["initial_index"])

    decode = _compiled(case["decoder"], make_toy, toy.layers, tuple(arguments.items()))
    sequences, scores = decode(toy.tables, inputs, cache, traced)
    np.testing.assert_array_equal(sequences, case["sequences"])
    np.testing.assert_allclose(scores, case["scores"], rtol=1e-5, atol=1e-4)

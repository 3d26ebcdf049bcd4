"""Refuses arguments that cannot be meant. What is known only inside jit is let through."""

import math
import operator
from typing import Any

import jax
import numpy as np


def is_dynamic(value: Any) -> bool:
    """Whether the value is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def at_least(name: str, value: Any, least: int, meaning: str) -> int:
    """A static integer of at least `least`, as a Python int."""
    try:
        integer = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = least - 1
    if integer < least:
        raise ValueError(f"{name} ({meaning}) must be an integer >= {least}; got {value!r}.")
    return integer


def number(name: str, value: Any, low: float, high: float, meaning: str) -> None:
    """A scalar, static or traced; a static one must be finite and within `[low, high]`."""
    if is_dynamic(value) and not value.shape:
        return
    if is_dynamic(value) or isinstance(value, (bool, str)) or np.ndim(value) or value is None:
        raise ValueError(f"{name} ({meaning}) must be one number; got {value!r}.")
    try:
        scalar = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} ({meaning}) must be one number; got {value!r}.") from None
    if not (math.isfinite(scalar) and low <= scalar <= high):
        allowed = "finite" if low == -math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} ({meaning}) must be {allowed}; got {value!r}.")


def temperatures(value: Any, batch_size: int) -> None:
    """One temperature for the batch or one for each of its examples, none negative."""
    if np.ndim(value) == 0:
        number("temperature", value, 0.0, math.inf, "0 is greedy")
        return
    if np.shape(value) != (batch_size,):
        raise ValueError(
            f"temperature must be one number or one per example, shape ({batch_size},); "
            f"got shape {np.shape(value)}."
        )
    if not is_dynamic(value):
        values = np.asarray(value, np.float32)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"temperature must be finite and >= 0 (0 is greedy); got {value!r}.")


def cutoffs(topk: Any, topp: Any) -> None:
    """At most one of top-k and top-p, each in its range."""
    if not is_dynamic(topk):
        at_least("topk", topk, 0, "how many tokens may be drawn; 0 for no limit")
    number("topp", topp, 0.0, 1.0, "the share of probability that may be drawn; 0 for no limit")
    if not is_dynamic(topk) and not is_dynamic(topp) and topk and topp:
        raise ValueError(
            f"topk and topp exclude each other; got topk={topk}, topp={topp}. "
            "topk is 1 unless given: pass topk=0 to sample by topp."
        )


def prompts(inputs: Any, initial_index: Any) -> None:
    """Inputs `[B, L]`, and the initial index, if there is one, `[B]`."""
    shape = np.shape(inputs)
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"inputs must be tokens [batch, length], length >= 1; got shape {shape}.")
    if initial_index is not None and np.shape(initial_index) != shape[:1]:
        raise ValueError(
            f"initial_index must hold one position per example, shape {shape[:1]}; "
            f"got shape {np.shape(initial_index)}."
        )


def logits_of(logits: Any, rows: int) -> None:
    """Logits as `tokens_to_logits` must return them."""
    if np.ndim(logits) != 2 or np.shape(logits)[0] != rows or np.shape(logits)[1] < 2:
        raise ValueError(
            "tokens_to_logits must return logits [rows, vocabulary] with rows = batch * "
            f"num_decodes = {rows} and a vocabulary of at least 2; got shape {np.shape(logits)}."
        )

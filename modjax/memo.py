"""Keeping what a function made, for the next call with equal arguments."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def keep(number: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`functools.lru_cache` that calls the function anew where an argument cannot be hashed.

    For what takes long to make from a model or a configuration of ours, which can be; a network that somebody else
    wrote may have fields that cannot, and is served as without it.

    Args:
      number: how many results are kept, those asked for last.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        kept = functools.lru_cache(number)(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                hash((args, tuple(kwargs.values())))
            except TypeError:
                return function(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        return call

    return wrap

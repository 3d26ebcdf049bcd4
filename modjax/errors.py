"""What our error messages share."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A flag, a gin file or a binding that cannot be used; the message names it."""


def is_number(value: Any) -> bool:
    """Whether a setting is a real number: neither text, as of a value in quotes, nor a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Raises ConfigError unless a setting is an integer of at least `least`."""
    if not is_number(value) or not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_not_negative(name: str, value: Any) -> None:
    """Raises ConfigError unless a setting is a finite number of at least 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a number of at least 0, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Raises ConfigError unless a setting is True or False; any text would count as True."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")


def nearest(name: str, known: Iterable[str], limit: int = 20) -> str:
    """A sentence for an error about an unknown `name`: the closest known name, then the known ones.

    Args:
      name: what was given.
      known: the names there are.
      limit: how many of them are listed.

    Returns:
      Text that starts with a space, to be appended to a message.
    """
    known = list(known)
    if not known:
        return " There are none."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    more = f", ... ({len(known)} in all)" if len(known) > limit else ""
    return f"{hint} Known: {', '.join(known[:limit])}{more}."

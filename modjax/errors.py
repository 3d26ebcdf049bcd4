"""What our error messages share."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A flag, a gin file or a binding that cannot be used; the message names it."""


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

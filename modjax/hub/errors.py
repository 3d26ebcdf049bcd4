"""The error of everything that reads or writes weights."""


class HubError(ValueError):
    """Weights that cannot be used as asked; the message names the file or the tensor."""


def listed(names: list[str], limit: int = 8) -> str:
    """Names for a message, sorted, cut after `limit`: 'a, b, ... (12 in all)'."""
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

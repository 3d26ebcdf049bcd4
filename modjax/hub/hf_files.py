"""What the readers of Hugging Face's families ask of a folder's tensors alike."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from modjax.hub.errors import HubError, listed
from modjax.hub.safetensors_io import TensorFiles


def by_name(files: TensorFiles, bare: Callable[[str], str]) -> dict[str, str]:
    """{today's name without prefix, as `bare` gives it: the name in the files}.

    Raises:
      HubError: two tensors of one name.
    """
    names: dict[str, str] = {}
    for tensor in files.shapes:
        name = bare(tensor)
        if name in names:
            raise HubError(
                f"{files.directory} holds {name} twice, as {names[name]} and as {tensor}: remove one."
            )
        names[name] = tensor
    return names


def vocab_rows(config: Mapping[str, Any], tensor: str, files: TensorFiles) -> int:
    """Rows of the token embedding, which may be padded beyond what config.json says (then a warning says so).

    Raises:
      HubError: fewer rows than config.json says.
    """
    rows = files.shapes[tensor][0]
    said = int(config.get("vocab_size") or rows)
    if said > rows:
        raise HubError(
            f"{files.directory}: config.json says vocab_size {said}, {tensor} has {rows} rows."
        )
    if said < rows:
        warnings.warn(
            f"{tensor} has {rows} rows, config.json says vocab_size {said}: the last {rows - said} are kept as padding "
            "of the vocabulary.",
            stacklevel=5,
        )
    return rows


def refuse_left(left: Collection[str], files: TensorFiles, what: str) -> None:
    """Raises HubError for tensors that a network has no place for; `what` they may be ends its message."""
    if left:
        raise HubError(
            f"{files.directory}: tensors that have no place in this network: {listed(list(left))}. Does config.json "
            f"belong to these weights? (An adapter, or a head {what}.)"
        )

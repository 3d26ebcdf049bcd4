"""Tags and labelled spans: the text form of tagging targets, and what is read from it.

The form is items separated by white space, one per word of the input, each `TAG` or `word|TAG`
(what follows the last `|` is the tag). Spans in it are read as `B-X I-X O`, with `E-`/`L-` (last)
and `S-`/`U-` (single) where they occur; a bare label counts as inside.
"""

import re
from collections.abc import Iterable


def read(text: str) -> list[str]:
    """The tags in a tagging target or prediction; see the module's text for the form."""
    return [item.rpartition("|")[2] for item in text.split()]


def spans(sequence: Iterable[str]) -> set[tuple[str, int, int]]:
    """The labelled spans `(label, first, last)` of a tag sequence, positions from 0."""
    found = set()
    label, first, last = "", 0, -1
    may_continue = False
    for i, tag in enumerate(sequence):
        match = re.fullmatch(r"([BIELSU])-(.+)", tag)
        kind, name = match.groups() if match else ("I", tag)
        if name == "O" or not name:
            may_continue = False
            continue
        if may_continue and name == label and kind not in "BSU":
            found.discard((label, first, last))
        else:
            label, first = name, i
        last = i
        found.add((label, first, last))
        may_continue = kind not in "ELSU"
    return found

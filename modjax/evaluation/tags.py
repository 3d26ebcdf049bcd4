"""Tags and labelled spans: the text forms of tagging targets, and what is read from them.

There are two forms:
- tags: items separated by white space, one per word of the input, each `TAG` or `word|TAG` (what
  follows the last `|` is the tag). Spans in them are read as `B-X I-X O`, with `E-`/`L-` (last) and
  `S-`/`U-` (single) where they occur; a bare label counts as inside.
- mentions: `PER: Ana Li $$ LOC: Oslo`, each labelled and with its text (XTREME-UP, 2305.11938).
"""

import re
from collections.abc import Callable, Hashable, Iterable

_MENTION = re.compile(r"\s*[^\s|:]+:\s*[^\s|]")


def reader(targets: Iterable[str]) -> Callable[[str], Iterable[Hashable]]:
    """What reads the spans of a text, in the form that the targets of a task are in."""
    if any(_MENTION.match(target) for target in targets):
        return mentions
    return lambda text: spans(read(text))


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


def mentions(text: str) -> list[tuple[str, str]]:
    """The `(label, words)` of a text of mentions; the label is "" where there is none."""
    found = []
    for item in text.split("$$"):
        label, colon, words = item.strip().partition(":")
        if label or colon:
            found.append((label, words) if colon else ("", label))
    return [(label.strip(), " ".join(words.split())) for label, words in found]

"""Bracketed semantic parses (TOP, MTOP): text to tree and back, and the forms in which two trees
are compared.

    [IN:CREATE_REMINDER [SL:TODO call home ] [SL:DATE_TIME at 5 ] ]

A node is an intent (`IN:`) or a slot (`SL:`) with words and nodes inside. Published files differ in
white space around brackets, and older ones put words inside intents too: both are read. A model's
output may be anything: what cannot be read gives a `Malformed` with the reason, never an exception.
(Format: Gupta et al. 2018, arXiv 1810.07942; MTOP: arXiv 2008.09335.)
"""

import dataclasses
import re

from modjax.evaluation.text import normalise

# Deeper than any annotation (MTOP's deepest is below 10), and far from Python's recursion limit.
MAX_DEPTH = 100

_PIECE = re.compile(r"\[\s*(?P<label>[^\s\[\]]*)|(?P<close>\])|(?P<words>[^\[\]]+)")
_LABEL = re.compile(r"(IN|SL):\S+", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Node:
    """An intent or a slot.

    Attributes:
      label: "IN:..." or "SL:...".
      children: words (white space collapsed) and nodes, in their order.
    """

    label: str
    children: tuple["Node | str", ...] = ()

    @property
    def nodes(self) -> tuple["Node", ...]:
        return tuple(c for c in self.children if isinstance(c, Node))

    @property
    def words(self) -> str:
        """The words directly inside this node, those of its nodes left out."""
        return " ".join(c for c in self.children if isinstance(c, str))


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A text that is no tree: why, and at which character."""

    reason: str
    position: int


def read(text: str) -> Node | Malformed:
    """Reads one bracketed parse.

    Read: exactly one tree, every bracket closed, every opening bracket followed by a label `IN:...`
      or `SL:...` (case is kept), at most `MAX_DEPTH` levels. Whether an intent may stand at that
      place is not judged.

    Args:
      text: anything.

    Returns:
      The tree, or a `Malformed`.
    """
    open_nodes: list[tuple[str, list[Node | str]]] = []
    root: Node | None = None
    for match in _PIECE.finditer(text):
        at = match.start()
        label, words = match["label"], match["words"]
        if words is not None:
            words = " ".join(words.split())
            if not words:
                continue
            if not open_nodes:
                return Malformed(f"words outside of the brackets: {words[:40]!r}", at)
            open_nodes[-1][1].append(words)
        elif label is not None:
            if root is not None:
                return Malformed("a second tree after the first", at)
            if not _LABEL.fullmatch(label):
                return Malformed(f"expected a label IN:... or SL:..., got {label[:40]!r}", at)
            if len(open_nodes) == MAX_DEPTH:
                return Malformed(f"nested deeper than {MAX_DEPTH} levels", at)
            open_nodes.append((label, []))
        else:
            if not open_nodes:
                return Malformed("a closing bracket without an opening one", at)
            label, children = open_nodes.pop()
            node = Node(label, tuple(children))
            if open_nodes:
                open_nodes[-1][1].append(node)
            else:
                root = node
    if open_nodes:
        return Malformed(f"{len(open_nodes)} brackets are not closed", len(text))
    return root if root is not None else Malformed("empty", 0)


def write(node: Node) -> str:
    """A tree in MTOP's published spacing; `read(write(node)) == node`."""
    inner = (write(c) if isinstance(c, Node) else c for c in node.children)
    return " ".join([f"[{node.label}", *inner, "]"])


def canonical(node: Node) -> str:
    """The form for `inexact_match`: equal for two trees that say the same.

    Labels are kept; words are normalised (`text.normalise`); sibling nodes are sorted, so their
    order does not count. Words of one node that stand before, between and after its child nodes are
    joined.
    """
    inner = sorted(canonical(c) for c in node.nodes)
    return "[" + "\n".join([node.label, normalise(node.words), *inner]) + "]"


def skeleton(node: Node) -> str:
    """The form for `structure_match`: labels only, siblings sorted."""
    return "[" + "\n".join([node.label, *sorted(skeleton(c) for c in node.nodes)]) + "]"

"""What a compiled program does, counted in its HLO text, with the bodies of loops as often as they run.

jax's `cost_analysis` counts a loop's body once, on every platform, and knows nothing of collectives; and its
`optimal_seconds` counts -1 s for each operation that it cannot price. So the text is read: floating point operations
of matrix products, bytes that collectives bring to a chip, and the cycles that the TPU compiler estimates for each
operation (`estimated_cycles` in its backend configuration; there are none for collectives).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES: dict[str, float] = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shapes opcode(operands), rest`."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    arguments: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(size_of(kind) * math.prod(dims) for kind, dims in self.shapes)

    def called(self, *names: str) -> list[str]:
        """The computations that an attribute names."""
        found = []
        for name in names:
            for match in re.finditer(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest):
                found += re.findall(r"[\w.\-]+", match[1] or match[2])
        return found


@dataclasses.dataclass
class Counts:
    """Of one run of a program on one chip.

    Attributes:
      flops: of matrix products.
      cycles: the compiler's estimate, without collectives.
      collectives: {kind: bytes that the chip receives}.
      calls: {kind: how many}.
      marked: bytes of the collectives that an operation of a given name asked for.
    """

    flops: float = 0.0
    cycles: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: dict[str, float] = dataclasses.field(default_factory=dict)
    marked: float = 0.0

    @property
    def collective_bytes(self) -> float:
        return sum(self.collectives.values())


def size_of(kind: str) -> float:
    """Bytes of an element."""
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0


def read(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, the entry's name) of a module's text."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" ") and " = " not in line.split("(")[0]:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            made = _instruction(match[1], match[2], line.lstrip().startswith("ROOT "))
            current[made.name] = made
    return computations, entry


def _instruction(name: str, body: str, root: bool) -> Instruction:
    # Types may be tuples with layouts that hold parentheses: the opcode is the word before the operands.
    types = _closing(body, 1) if body.startswith("(") else 0
    match = re.compile(r"\s([a-z][\w\-]*)\(").search(body, types)
    if match is None:
        return Instruction(name, (), "", (), body, "", root)
    end = _closing(body, match.end())
    arguments = body[match.end() : end - 1]
    shapes = tuple(
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in _ARRAY.findall(body[: match.start()])
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, shapes, match[1], operands, body[end:], arguments, root)


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one before `start`."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    return len(text)


def count(text: str, unknown_trips: int = 1, mark: str = "") -> Counts:
    """Counts a module.

    Args:
      text: of the compiled module, for one device.
      unknown_trips: how often a loop runs whose condition gives no bound.
      mark: a regular expression for the names of operations (`op_name`, which holds the path of the layer).
    """
    computations, entry = read(text)
    total = Counts(0.0, 0.0, collections.defaultdict(float), collections.defaultdict(float))

    def walk(name: str, times: float) -> None:
        body = computations.get(name, {})
        # A TPU's asynchronous collective stands where it starts, where it ends, and in each fusion on the way.
        again = name.startswith("async_collective_fusion") or any(
            '"AsyncCollectiveDone"' in i.rest for i in body.values()
        )
        for instruction in body.values():
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
                total.cycles += times * int(cycles[1])
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS and again:
                continue
            if kind in KINDS:
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # how a TPU's program writes it
                received = times * _received(kind, instruction, body)
                total.collectives[kind] += received
                origin = re.search(r'op_name="([^"]*)"', instruction.rest)
                if mark and origin and re.search(mark, origin[1]):
                    total.marked += received
                total.calls[kind] += times
            elif kind == "dot":
                total.flops += times * _dot(instruction, body)
            elif kind == "convolution":
                total.flops += times * _convolution(instruction, body)
            elif kind == "while":
                (inside,) = instruction.called("body")
                walk(inside, times * _trips(instruction, body, computations, unknown_trips))
            elif kind == "conditional":
                for branch in instruction.called("branch_computations", "true_computation"):
                    walk(branch, times)
            elif kind in ("fusion", "call", "async", "custom-call"):
                for callee in instruction.called("calls", "to_apply", "called_computations"):
                    walk(callee, times)

    walk(entry, 1.0)
    return dataclasses.replace(total, collectives=dict(total.collectives), calls=dict(total.calls))


def _received(kind: str, instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Bytes that one chip receives, by the algorithm that moves the fewest."""
    operands = sum(body[name].bytes for name in instruction.operands if name in body)
    if kind == "collective-permute":
        return operands
    group = group_size(instruction.rest)
    share = (group - 1) / group if group else 1.0
    if kind == "all-gather":
        return operands * (group - 1 if group else 1)
    return operands * share * (2 if kind == "all-reduce" else 1)


def group_size(rest: str) -> int:
    """How many devices take part in a collective; 0 if its attributes do not say.

    Raises:
      ValueError: they say it in a notation that is not known here.
    """
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        group = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            group *= int(part or sizes[axis])
        return group
    if match := re.search(r"replica_groups=(?!\{\})\S{,60}", rest):
        raise ValueError(f"a collective's devices in an unknown notation: {match[0]}")
    return 0


def _dot(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    left = body[instruction.operands[0]].shapes[0][1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    inner = math.prod(left[int(i)] for i in (contracted[1] if contracted else "").split(",") if i)
    return 2.0 * math.prod(instruction.shapes[0][1]) * inner


def _convolution(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Of a convolution, which is what a TPU's products are: batch axes are spatial ones that meet themselves."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0.0
    left, right = (body[name].shapes[0][1] for name in instruction.operands[:2])
    out = instruction.shapes[0][1]
    window = _window(instruction.rest)
    total = 2.0 * right[labels[2].index("i")] * out[labels[3].index("f")]
    total *= out[labels[3].index("b")]
    for axis, char in enumerate(sorted(c for c in labels[2] if c.isdigit())):
        taps = right[labels[2].index(char)]
        inputs, outputs = left[labels[1].index(char)], out[labels[3].index(char)]
        total *= _meetings(inputs, taps, outputs, {k: v[axis] for k, v in window.items()})
    return total


def _window(rest: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    pairs = re.findall(r"(\w+)=([\w\-]+)", found[1] if found else "")
    return {name: _axes(name, value) for name, value in pairs}


def _axes(name: str, value: str) -> list[str]:
    if name == "pad":
        return re.findall(r"(-?\d+)_-?\d+", value)
    return value.split("x")


def _meetings(inputs: int, taps: int, outputs: int, window: Mapping[str, str]) -> int:
    """How many pairs of an output and a tap meet an input."""
    stride, low = int(window.get("stride", 1)), int(window.get("pad", 0))
    spread, skip = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    last = (inputs - 1) * spread
    found = 0
    for tap in range(taps):
        # output * stride + tap * skip - low has to be an input's place: in 0..last, a multiple of spread.
        offset = tap * skip - low
        for output in range(outputs):
            place = output * stride + offset
            found += 0 <= place <= last and place % spread == 0
    return found


def _trips(
    loop: Instruction,
    outside: Mapping[str, Instruction],
    computations: Mapping[str, Mapping[str, Instruction]],
    unknown: int,
) -> int:
    """How often a loop runs: as it says itself, else by the limit of its counter and the counter's steps."""
    if known := re.search(r'known_trip_count"?:\s*\{"n":"?(\d+)', loop.rest):
        return int(known[1])
    (condition,), (inside,) = loop.called("condition"), loop.called("body")
    found = []
    for left, right in _comparisons(condition, computations):
        limit = _constant(right, loop, outside)
        if limit is None or limit <= 0:
            continue
        place = _place(left)
        start = None if place is None else _carried(place, loop, outside)
        begin = _constant(start, loop, outside) if start is not None else 0
        step = _step(place, computations[inside], loop, outside)
        found.append(math.ceil((limit - (begin or 0)) / step))
    return max(found, default=unknown)


def _comparisons(
    name: str, computations: Mapping[str, Mapping[str, Instruction]]
) -> list[tuple[Instruction, Instruction]]:
    """What a condition, or a fusion in it, tests to be less than what; a fusion's parameters are its operands."""
    body, found = computations.get(name, {}), []
    for instruction in body.values():
        if instruction.opcode == "compare" and "direction=LT" in instruction.rest:
            found.append((body[instruction.operands[0]], body[instruction.operands[1]]))
        for callee in instruction.called("calls", "to_apply"):
            given = [body[operand] for operand in instruction.operands if operand in body]
            for pair in _comparisons(callee, computations):
                left, right = (
                    given[int(one.arguments)]
                    if one.opcode == "parameter" and int(one.arguments) < len(given)
                    else one
                    for one in pair
                )
                found.append((left, right))
    return found


def _place(of: Instruction) -> str | None:
    """Which element of the loop's state an instruction reads."""
    index = re.search(r"index=(\d+)", of.rest)
    return index[1] if of.opcode == "get-tuple-element" and index else None


def _carried(
    place: str, loop: Instruction, outside: Mapping[str, Instruction]
) -> Instruction | None:
    """What an element of the loop's state is at its start."""
    state = outside.get(loop.operands[0]) if loop.operands else None
    if state is None or state.opcode != "tuple":
        return None
    start = outside.get(state.operands[int(place)])
    while start is not None and start.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        start = outside.get(start.operands[0])
    return start


def _constant(
    of: Instruction | None, loop: Instruction, outside: Mapping[str, Instruction]
) -> int | None:
    """The value of an integer constant, also one that the loop carries along."""
    if of is not None and (place := _place(of)) is not None:
        of = _carried(place, loop, outside)
    if of is None or of.opcode != "constant":
        return None
    number = re.fullmatch(r"-?\d+", of.arguments.strip())
    return int(number[0]) if number else None


def _step(
    place: str | None,
    body: Mapping[str, Instruction],
    loop: Instruction,
    outside: Mapping[str, Instruction],
) -> int:
    """By how much a loop's body advances its counter: the compiler may have unrolled it."""
    state = next((i for i in body.values() if i.root and i.opcode == "tuple"), None)
    total, at = 0, None if state is None or place is None else body.get(state.operands[int(place)])
    while at is not None and at.opcode in ("add", "copy", "bitcast"):
        operands = [body[name] for name in at.operands if name in body]
        if at.opcode == "add":
            values = [_constant(one, loop, outside) for one in operands]
            # The counter itself starts with a constant, too.
            counter = next((o for o, v in zip(operands, values, strict=True) if v is None), None)
            moving = [o for o in operands if _place(o) == place or o.opcode == "add"]
            counter = moving[0] if moving else counter
            total += sum(v or 0 for o, v in zip(operands, values, strict=True) if o is not counter)
            at = counter
        else:
            at = operands[0] if operands else None
    return max(total, 1)


def fits_error(message: str) -> Sequence[float] | None:
    """(bytes used, bytes there) of the TPU compiler's complaint that memory does not suffice, else None."""
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if match is None:
        return None
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    return [float(match[i]) * 1024 ** units[match[i + 1]] for i in (1, 3)]

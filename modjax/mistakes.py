"""A user's mistake or a bug: which of the two an error is, and what a user is told about theirs.

Gin is imported when it is used: the core does without.
"""

import contextlib
import dis
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from modjax.errors import nearest

# Top-level modules whose own raise statements are about what a user gave.
_OURS = ("modjax", "tasks", "train", "eval")
_CALL = "\n  In call to configurable "
_UNBOUND = re.compile(r"\n  No values supplied by Gin or caller for arguments: \[(.*)\]")


class Binding(NamedTuple):
    """One line of a gin configuration: `name = value`, as they are written, and where."""

    name: str
    value: str
    where: str


def is_users(error: BaseException) -> bool:
    """Whether an error is about what a user gave: a type of this package, a ValueError that this
    package raises, or an argument that no gin binding gives.

    What Python, numpy or jax raise is a bug, even where the last frame to be seen is ours: their
    frames may be in C, or hidden by jax.
    """
    if any(kind.__module__.startswith("modjax.") for kind in type(error).__mro__):
        return True
    if isinstance(error, ValueError):
        return _raised_by_us(error)
    return isinstance(error, TypeError) and bool(_lacking(str(error)))


def tell(error: BaseException, bindings: Iterable[Binding], entry: str = "") -> str:
    """What a user reads: the message without gin's additions, and the bindings that it is about.

    Args:
      error: the user's, see `is_users`.
      bindings: all that gin has read, in that order.
      entry: the entry point's function. It has so many arguments that a word of the message is no
        sign of one of them.
    """
    text, *calls = str(error).split(_CALL)
    places = [call.split("'")[1] for call in calls]
    if isinstance(error, TypeError):
        names = ", ".join(f"{places[0]}.{name}" for name in _lacking(text))
        return f"no binding sets {names}: set it in a gin file or by --gin.NAME=VALUE"
    last = {binding.name: binding for binding in bindings}
    told: dict[str, Binding] = {}
    for name, binding in last.items():
        owner, _, parameter = name.rpartition(".")
        owner = re.split("[./]", owner)[-1]
        sign = parameter if owner in places[:1] and owner != entry else f"{owner}.{parameter}"
        if owner and re.search(rf"\b{re.escape(sign)}\b", text):
            _follow(binding, last, told)
    where = "; ".join(f"{b.where}: {b.name} = {b.value}" for b in told.values())
    return f"{text} ({where})" if where else text


def _follow(binding: Binding, known: Mapping[str, Binding], into: dict[str, Binding]) -> None:
    """Puts a binding, and the macros that its value is made of, into a dictionary."""
    into[binding.name] = binding
    for macro in re.findall(r"%([\w./]+)", binding.value):
        if macro in known and macro not in into:
            _follow(known[macro], known, into)


def read_bindings(path: str, find: Callable[[str], str]) -> Iterator[Binding]:
    """The bindings of a gin file and of those that it includes, in the order in which gin reads them.

    Args:
      path: of a file that gin has parsed.
      find: gives the path of an included file, or raises a ValueError; the file is then left out.
    """
    from gin import config_parser

    names = types.SimpleNamespace(configurable_reference=lambda *_: None, macro=lambda _: None)
    with open(path, encoding="utf-8") as file:
        for statement in config_parser.ConfigParser(file, names):
            if isinstance(statement, config_parser.IncludeStatement):
                with contextlib.suppress(ValueError):  # gin alone finds files in Python packages
                    yield from read_bindings(find(statement.filename), find)
            elif isinstance(statement, config_parser.BindingStatement):
                scope, selector, parameter, _, place = statement
                name = "/".join(filter(None, (scope, selector)))
                name = ".".join(filter(None, (name, parameter)))
                value = place.line_content.partition("=")[2].strip()
                yield Binding(name, value, f"{path}, line {place.line_num}")


def explain_parse(error: Exception, folders: Sequence[str], imports: Mapping[str, str]) -> str:
    """gin's message about a configuration that it cannot read, with the nearest known name where one
    is unknown.

    Args:
      error: gin's.
      folders: where files were looked for.
      imports: alias -> import statement, of what a binding may name.
    """
    text = str(error)
    place = re.search(r"In (file|bindings string)[^\n]*", text)
    where = f" ({place[0].strip()})" if place and place[1] == "file" else ""
    if match := re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", text):
        target = _modules(imports).get(match[1].partition(".")[0])
        for name in match[1].split(".")[1:]:
            target = getattr(target, name, None)
        known = list(inspect.signature(target).parameters) if callable(target) else []
        return f"{match[1]} has no parameter {match[2]!r}{where}.{nearest(match[2], known)}"
    if match := re.search(r"(?:No configurable matching '|resolve selector )([\w./]+)", text):
        return f"{match[1]!r} does not exist{where}.{nearest(match[1], _names(imports), 8)}"
    if match := re.search(r"'([^']+)' was not provided by an import statement", text):
        return f"{match[1]!r} is not imported{where}.{nearest(match[1], imports)}"
    if match := re.search(r"(\w+)/macro\.value set to `%gin\.REQUIRED`", text):
        return f"{match[1]} must be set: --gin.{match[1]}=VALUE"
    if match := re.search(r"Unable to open file: (\S+?)\.? ", text + " "):
        return f"an included gin file is missing: {match[1]}, looked for in {', '.join(folders)}"
    if isinstance(error, SyntaxError):
        return _explain_syntax(error)
    return f"{type(error).__name__} in the gin configuration: {text}"


def _explain_syntax(error: SyntaxError) -> str:
    """What is wrong with a line that cannot be read; most often it is text without quotes."""
    token = re.search(r"Failed to parse token '(.*)'", error.msg)
    what = f"{token[1]!r} is not a value." if token else error.msg
    where = f"{error.filename}, line {error.lineno}" if error.filename else "the binding"
    line = (error.text or "").strip()
    name, _, value = line.partition("=")
    bare = token or re.match(r"[A-Za-z/~.][^'\"]*$", value.strip())
    hint = f" Text needs quotes: {name.strip()}='...'" if bare and value else ""
    return f"{what} In {where}: {line}.{hint}" if hint else f"{what} In {where}: {line}"


def _modules(imports: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for alias, line in imports.items():
        name = line.removeprefix("import ").removeprefix("from ").replace(" import ", ".")
        found[alias] = importlib.import_module(name)
    return found


def _names(imports: Mapping[str, str]) -> list[str]:
    """The names that bindings can be about, as written after the standard imports."""
    return [
        f"{alias}.{name}"
        for alias, module in _modules(imports).items()
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(("modjax", alias))
    ]


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is ours and stands at a raise statement, not at a call."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    frame = trace.tb_frame
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS and any(
        step.opname == "RAISE_VARARGS"
        and step.positions is not None
        and step.positions.lineno == trace.tb_lineno
        for step in dis.get_instructions(frame.f_code)
    )


def _lacking(text: str) -> list[str]:
    """The arguments without a value of which Python and gin tell."""
    match = _UNBOUND.search(text)
    if match is None or not re.match(r"\S+ missing \d+ required ", text):
        return []
    return re.findall(r"'(\w+)'", match[1])

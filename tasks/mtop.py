"""MTOP, task-oriented semantic parsing in six languages (arXiv 2008.09335), in its two layouts.

Published: a folder per language with `train.txt`, `eval.txt` and `test.txt` (or `.tsv`), one
utterance per line in eight tab-separated columns. Importing this module registers a task for each
language, `mtop_en` and so on, and the mixture `mtop_all`; their data is read when it is asked for.

Parallel: JSON files in which one entry holds an utterance and its parse in every language under
one id. It is what the zero-shot benchmark reads (`tasks/mtop6.py`).
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from modjax.data import registry
from modjax.evaluation import parses
from tasks import byte_tasks, files

LANGUAGES = ("en", "de", "es", "fr", "hi", "th")
COLUMNS = ("id", "intent", "slots", "utterance", "domain", "locale", "decoupled form", "tokens")
PUBLISHED_SOURCE = "https://fb.me/mtop_dataset (unpack mtop.zip)"
PARALLEL_SOURCE = "https://github.com/psunlpgroup/XSemPLR (its folder dataset/mtop)"
ENGLISH_SOURCE = "https://github.com/HKUNLP/SymGen (its MTOP data as JSON lines)"
PUBLISHED_FILES = {"train": "train", "validation": "eval", "test": "test"}


class Utterance(NamedTuple):
    """One utterance and its parse in the bracket form: `[IN:GET_WEATHER [SL:LOCATION Oslo ] ]`."""

    id: str
    text: str
    parse: str


def read_published(path: str) -> list[Utterance]:
    """Reads one published file of eight tab-separated columns (no header, no quoting).

    Raises:
      files.RowError: a wrong number of columns, an empty utterance, or a parse that is empty or
        cannot be read, with file and line; a file without rows.
    """
    rows = []
    for place, line in files.read_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != len(COLUMNS):
            raise files.RowError(
                f"{place}: {len(columns)} columns where MTOP has {len(COLUMNS)}, split by tabs: "
                f"{', '.join(COLUMNS)}."
            )
        rows.append(_utterance(place, columns[0], columns[3], columns[6]))
    return _not_empty(rows, path)


def read_parallel(path: str) -> dict[str, list[Utterance]]:
    """Reads the parallel JSON: for each language the same ids in the same order.

    The file is a list of `{"id": ..., "question": {language: text},
    "mr": {"slot_intent": {language: parse}}}`.

    Raises:
      files.RowError: not JSON, an entry without its fields, an id twice, a language that some
        entries lack, an empty utterance or unreadable parse, with file and entry (counted from 1).
    """
    entries = _json(path, files.read_text(path))
    if not isinstance(entries, list):
        raise files.RowError(f"{path}: a {type(entries).__name__} where a list of entries belongs.")
    rows: dict[str, list[Utterance]] = {}
    seen: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        place = f"{path}, entry {number}"
        try:
            name, texts = str(entry["id"]), dict(entry["question"])
            parses = dict(entry["mr"]["slot_intent"])
        except (KeyError, TypeError, ValueError) as error:
            raise files.RowError(
                f"{place}: needs `id`, `question` by language and `mr.slot_intent` by language "
                f"({error!r})."
            ) from error
        if name in seen:
            raise files.RowError(f"{place}: the id {name!r} occurs a second time.")
        seen.add(name)
        rows = rows or {language: [] for language in texts}
        if set(texts) != set(rows) or set(parses) != set(rows):
            raise files.RowError(
                f"{place} (id {name}): languages {sorted(texts)} with parses in {sorted(parses)}, "
                f"where the first entry has {sorted(rows)}."
            )
        for language, text in texts.items():
            rows[language].append(_utterance(f"{place}, {language}", name, text, parses[language]))
    _not_empty(entries, path)
    return rows


def read_english(path: str) -> list[Utterance]:
    """Reads the English file of JSON lines, `{"question": ..., "logical_form": ...}`.

    Raises:
      files.RowError: a line that is not such an object, with file and line.
    """
    rows = []
    for place, line in files.read_lines(path):
        if not line.strip():
            continue
        entry = _json(place, line)
        try:
            text, parse = entry["question"], entry["logical_form"]
        except (KeyError, TypeError) as error:
            raise files.RowError(
                f"{place}: needs `question` and `logical_form` ({error!r})."
            ) from error
        rows.append(_utterance(place, place.rpartition(":")[2], text, parse))
    return _not_empty(rows, path)


def without(rows: Sequence[Utterance], held_out: Sequence[Utterance]) -> list[Utterance]:
    """The rows whose utterance is none of `held_out`'s, compared by letters and digits alone.

    "Set alarm." and "set  alarm" are one utterance here: training on the one would give away the
    answer to the other.
    """
    taken = {_letters(row.text) for row in held_out}
    return [row for row in rows if _letters(row.text) not in taken]


def example(row: Utterance) -> dict[str, str]:
    """The model's input and target for one utterance."""
    return {"inputs": f"parse: {row.text}", "targets": row.parse}


def register(
    data_dir: str | None = None, languages: Sequence[str] = LANGUAGES, prefix: str = "mtop"
) -> list[str]:
    """Registers `{prefix}_{language}` for each language as published, and `{prefix}_all`.

    Args:
      data_dir: the folder that holds the folders of the languages; by default the folder `mtop` of
        `files.data_dir()`. It is read when a task's data is asked for, not now.
      languages: folder names, which are also the values of the feature `language`.
      prefix: begins every name.

    Returns:
      The names of the tasks.
    """
    names = []
    for language in languages:

        def read(split: str, language: str = language) -> list[dict[str, str]]:
            folder = data_dir or files.data_dir() + "/mtop"
            stem = f"{language}/{PUBLISHED_FILES[split]}"
            path = files.find(folder, f"{stem}.txt", f"{stem}.tsv", source=PUBLISHED_SOURCE)
            return [example(row) for row in read_published(path)]

        name = f"{prefix}_{language}"
        byte_tasks.add_task(
            name, read, PUBLISHED_FILES, {"task": "parse", "language": language}, byte_tasks.PARSE
        )
        names.append(name)
    registry.add_mixture(f"{prefix}_all", names)
    return names


def _utterance(place: str, name: str, text: Any, parse: Any) -> Utterance:
    for what, value in (("utterance", text), ("parse", parse)):
        if not isinstance(value, str) or not value.strip():
            raise files.RowError(f"{place}: the {what} is empty or no text: {value!r}.")
    text, parse = files.squeeze(text), files.squeeze(parse)
    tree = parses.read(parse)
    if isinstance(tree, parses.Malformed):
        raise files.RowError(
            f"{place}: not a bracketed parse: {tree.reason}, at character {tree.position} of "
            f"{parse[:80]!r}."
        )
    return Utterance(name, text, parse)


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise files.RowError(f"{place}:{error.lineno}: not JSON: {error.msg}.") from error


def _not_empty(rows: list[Any], path: str) -> list[Any]:
    if not rows:
        raise files.RowError(f"{path}: there is no row in it.")
    return rows


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


register()

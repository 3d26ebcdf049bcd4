"""Companions of the parsing task in the same languages: tagging, translation, question answering.

Tagging and translation come from the Parallel Universal Dependencies treebanks (PUD; CoNLL-U): the
same 1000 sentences in every language under one `sent_id`. Questions come from files in SQuAD's form
(MLQA, arXiv 1910.07475; XQuAD, arXiv 1910.11856).
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tasks import files

PUD_SOURCE = "https://github.com/UniversalDependencies (the repositories UD_*-PUD)"
MLQA_SOURCE = "https://github.com/facebookresearch/MLQA (the dev part)"
XQUAD_SOURCE = "https://github.com/google-deepmind/xquad"

# One word is not thrown away for a cut in its middle if it is longer than this: scripts without
# spaces would lose whole sentences.
_LONGEST_WORD = 24


class Sentence(NamedTuple):
    """A treebank sentence: its text as written, its syntactic words and their universal tags."""

    id: str
    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]


class Question(NamedTuple):
    """A question on a context; the answer is `context[start : start + len(answer)]`."""

    id: str
    question: str
    context: str
    answer: str
    start: int


def read_conllu(path: str) -> list[Sentence]:
    """Reads a CoNLL-U file: ten tab-separated columns per word, `#` comments, blank lines between.

    Words are the syntactic words: of French `au` the lines `à` and `le`, not the line `1-2 au`;
    words that are not in the text (ids like `8.1`) are left out. A space inside a word becomes `_`,
    so that words and tags correspond one to one when split at spaces.

    Raises:
      files.RowError: a wrong number of columns, an id that is none, a word without a form or tag,
        a sentence without `sent_id` or `text` or words, or an id twice, with file and line.
    """
    sentences: dict[str, Sentence] = {}
    comments: dict[str, str] = {}
    words: list[tuple[str, str]] = []
    place = path

    def finish() -> None:
        if not comments and not words:
            return
        name, text = comments.get("sent_id", ""), files.squeeze(comments.get("text", ""))
        if not name or not text or not words:
            raise files.RowError(
                f"{place}: a sentence (id {name!r}) ends here that lacks its `# sent_id = `, its "
                "`# text = ` or its words."
            )
        if name in sentences:
            raise files.RowError(f"{place}: the sentence {name!r} occurs a second time.")
        forms, tags = zip(*words, strict=True)
        sentences[name] = Sentence(name, text, forms, tags)
        comments.clear()
        words.clear()

    for place, line in files.read_lines(path):
        if not line.strip():
            finish()
        elif line.startswith("#"):
            key, _, value = line[1:].partition("=")
            comments.setdefault(key.strip(), value.strip())
        else:
            word = _word(place, line)
            if word:
                words.append(word)
    finish()
    if not sentences:
        raise files.RowError(f"{path}: there is no sentence in it.")
    return list(sentences.values())


def read_squad(path: str) -> list[Question]:
    """Reads questions in SQuAD's form; of several answers the first.

    Raises:
      files.RowError: not JSON, a missing field, an empty question or answer, or an answer that is
        not in the context where the file says, with file and question id.
    """
    text = files.read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise files.RowError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from error
    questions = []
    try:
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    questions.append(_question(path, entry, paragraph["context"]))
    except (KeyError, TypeError, IndexError) as error:
        raise files.RowError(
            f"{path}, after question {len(questions)}: not in SQuAD's form ({error!r})."
        ) from error
    if not questions:
        raise files.RowError(f"{path}: there is no question in it.")
    return questions


def split_of(sent_id: str) -> str:
    """The split of a treebank sentence: by its document, 70 / 10 / 20 % train, validation, test.

    The document is the id without its last three digits (`n01001011`: document `n01001`). A hash
    of the id decides, so that all languages agree whatever their files hold, neighbouring sentences
    stay together, and news and encyclopedia are in every split.
    """
    bucket = zlib.crc32(sent_id[:-3].encode()) % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


def tag_example(sentence: Sentence, input_limit: int, target_limit: int) -> dict[str, str] | None:
    """Words to universal part-of-speech tags, one per word, for as many words as fit.

    Args:
      sentence: the sentence.
      input_limit, target_limit: bytes of the input and of the target.

    Returns:
      The example with the sentence's first words, or None where not even one fits.
    """
    for count in range(len(sentence.words), 0, -1):
        words, tags = " ".join(sentence.words[:count]), " ".join(sentence.tags[:count])
        if len(words.encode()) + len("tag: ") <= input_limit and len(tags.encode()) <= target_limit:
            return {"inputs": f"tag: {words}", "targets": tags}
    return None


def translation_examples(
    language: str, english: Iterable[Sentence], other: Iterable[Sentence]
) -> list[dict[str, str]]:
    """English into `language` and back, for the sentences that both have, by id.

    The prompt names the language to write: a model could not know it otherwise.
    """
    texts = {sentence.id: sentence.text for sentence in other}
    examples = []
    for sentence in english:
        if sentence.id in texts:
            a, b = sentence.text, texts[sentence.id]
            examples.append({"inputs": f"translate to {language}: {a}", "targets": b})
            examples.append({"inputs": f"translate to en: {b}", "targets": a})
    return examples


def qa_example(question: Question, limit: int) -> dict[str, str] | None:
    """Question and as much of its context as fits, to the answer's text.

    Args:
      question: the question.
      limit: bytes of the whole input.

    Returns:
      The example, or None where question and answer alone are longer than the limit.
    """
    prompt = f"qa: {question.question} context: "
    context = window(question, limit - len(prompt.encode()))
    return context and {"inputs": prompt + context, "targets": files.squeeze(question.answer)}


def window(question: Question, limit: int) -> str | None:
    """A piece of the context of at most `limit` bytes of UTF-8 that holds the answer.

    Where the answer stands in it is drawn from the question's id: always in the middle would give
    it away. What one side does not need goes to the other. Cuts fall between characters, and
    between words where a space is near. None if the answer is longer than the limit.
    """
    end = question.start + len(question.answer)
    before, after = question.context[: question.start], question.context[end:]
    room = limit - len(question.answer.encode())
    if room < 0:
        return None
    long_before, long_after = len(before.encode()), len(after.encode())
    left = min(long_before, room * zlib.crc32(question.id.encode()) >> 32)
    right = min(long_after, room - left)
    left = min(long_before, room - right)
    return files.squeeze(last(before, left) + question.answer + first(after, right))


def first(text: str, limit: int) -> str:
    """The beginning of `text`, at most `limit` bytes, cut between characters or words."""
    kept = text.encode()[:limit].decode(errors="ignore")
    if len(kept) == len(text) or text[len(kept)].isspace():
        return kept
    space = max((i for i, c in enumerate(kept) if c.isspace()), default=-1)
    return kept[:space] if space >= 0 and len(kept) - space <= _LONGEST_WORD else kept


def last(text: str, limit: int) -> str:
    """The end of `text`, at most `limit` bytes, cut between characters or words."""
    data = text.encode()
    kept = data[max(0, len(data) - limit) :].decode(errors="ignore")
    if len(kept) == len(text) or text[len(text) - len(kept) - 1].isspace():
        return kept
    space = next((i for i, c in enumerate(kept) if c.isspace()), len(kept))
    return kept[space + 1 :] if space < min(len(kept), _LONGEST_WORD) else kept


def pieces(text: str, limit: int) -> list[str]:
    """`text` cut into consecutive pieces of at most `limit` bytes each (`limit` >= 4)."""
    parts, rest = [], files.squeeze(text)
    while rest:
        part = first(rest, limit)
        parts.append(part)
        rest = rest[len(part) :].lstrip()
    return parts


def _word(place: str, line: str) -> tuple[str, str] | None:
    columns = line.split("\t")
    if len(columns) != 10:
        raise files.RowError(
            f"{place}: {len(columns)} columns where CoNLL-U has 10, split by tabs."
        )
    number, form, tag = columns[0], files.squeeze(columns[1]).replace(" ", "_"), columns[3]
    if any(c not in "0123456789-." for c in number) or not number[:1].isdigit():
        raise files.RowError(
            f"{place}: the first column is {number!r}, where a word's number belongs."
        )
    if "-" in number or "." in number:
        return None
    if not form or not tag.strip() or tag == "_" or " " in tag:
        raise files.RowError(f"{place}: the word {form!r} has the tag {tag!r}; both are needed.")
    return form, tag


def _question(path: str, entry: Mapping[str, Any], context: str) -> Question:
    name = str(entry["id"])
    place = f"{path}, question {name}"
    question = files.squeeze(entry["question"])
    if not question or not entry["answers"] or not entry["answers"][0]["text"].strip():
        raise files.RowError(f"{place}: the question or its answer is empty.")
    text, start = entry["answers"][0]["text"], int(entry["answers"][0]["answer_start"])
    there = context[start : start + len(text)]
    if there != text:
        raise files.RowError(
            f"{place}: at character {start} the context has {there!r}, not the answer {text!r}."
        )
    start += len(text) - len(text.lstrip())
    return Question(name, question, context, text.strip(), start)

"""Text normalisation that the metrics share: Unicode, case, white space, punctuation, words.

Metrics compare what a model wrote with what was expected, in many scripts. Two things are easy to
get wrong there: an English rule applied to every language (articles, punctuation of ASCII only),
and white space taken for a word boundary in scripts that do not write one. Both are decided here,
once.
"""

import functools
import re
import string
import unicodedata

# Scripts that do not separate words by spaces (blocks of the Basic Multilingual Plane, and the CJK
# ideographs above it). There a space says nothing, and a "word" is taken to be one letter with its
# marks.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # CJK radicals
    (0x3005, 0x3007),  # iteration mark, closing mark, zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # CJK extension A
    (0x4E00, 0x9FFF),  # CJK ideographs
    (0xF900, 0xFAFF),  # CJK compatibility
    (0x20000, 0x3FFFF),  # CJK extensions B and later
)
_UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my"})

# Articles as separate words. Only languages where removing them is established practice (the
# published evaluations of SQuAD for en and of MLQA for de and es), and fr by analogy. Not here on
# purpose: Arabic, whose article is a prefix that cannot be told from a root letter without a
# lexicon, and Hindi, Thai, Chinese, ..., which have none.
_ARTICLES = {
    "en": frozenset("a an the".split()),
    "de": frozenset("ein eine einen einem eines einer der die das den dem des".split()),
    "es": frozenset("un una unos unas el la los las".split()),
    "fr": frozenset("un une des le la les".split()),
}
_ELIDED = {"fr": re.compile(r"\bl['\N{RIGHT SINGLE QUOTATION MARK}](?=\w)")}


def base_language(language: str | None) -> str:
    """The primary subtag of a language name: "zh_Hans", "zh-CN" -> "zh"; None -> ""."""
    return re.split(r"[-_]", language.lower(), maxsplit=1)[0] if language else ""


def writes_without_spaces(language: str | None) -> bool:
    """Whether words of this language are usually written without spaces between them."""
    return base_language(language) in _UNSPACED_LANGUAGES


@functools.lru_cache(maxsize=65536)
def is_punctuation(character: str) -> bool:
    """Unicode punctuation (categories P*), and what ASCII counts as such: `$+<=>^|~`, backtick."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


@functools.lru_cache(maxsize=65536)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that does not separate words by spaces."""
    code = ord(character)
    return any(low <= code <= high for low, high in _UNSPACED)


def fold(text: str) -> str:
    """NFKC and case folding, without format characters (joiners, direction marks, byte order)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", text)  # folding can undo composition
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def normalise(text: str) -> str:
    """The form in which the words of a slot are compared.

    NFKC, case folded, punctuation counts as white space, white space collapsed, and dropped beside
    letters of scripts that write no spaces (so that two segmentations of the same Thai text are
    equal).
    """
    out: list[str] = []
    for word in "".join(" " if is_punctuation(c) else c for c in fold(text)).split():
        if out and not (is_unspaced(out[-1][-1]) or is_unspaced(word[0])):
            out.append(" ")
        out.append(word)
    return "".join(out)


def words(text: str) -> list[str]:
    """The words of a text, for ROUGE-L: folded, split at white space and punctuation, and within scripts that write
    no spaces after each letter with its marks.
    """
    spaced = "".join(" " if is_punctuation(c) else c for c in fold(text)).split()
    return [piece for word in spaced for piece in _split_unspaced(word)]


def answer_words(text: str, language: str | None = None) -> list[str]:
    """The words of an answer, for token F1 and normalised exact match (SQuAD's steps, made
    multilingual).

    Folds case and Unicode, deletes punctuation, drops the language's articles (unless nothing would
    be left: a band may be called "The The"), splits at white space, and within scripts that write
    no spaces after each letter with its marks.

    Args:
      text: an answer.
      language: its language; without one no article is dropped.
    """
    name = base_language(language)
    text = fold(text)
    if name in _ELIDED:
        text = _ELIDED[name].sub("", text)
    found: list[str] = []
    for word in "".join(c for c in text if not is_punctuation(c)).split():
        found.extend(_split_unspaced(word))
    articles = _ARTICLES.get(name, frozenset())
    return [w for w in found if w not in articles] or found


def _split_unspaced(word: str) -> list[str]:
    pieces: list[str] = []
    for c in word:
        mark = unicodedata.category(c).startswith("M")
        joins = pieces and (mark or not (is_unspaced(c) or is_unspaced(pieces[-1][0])))
        if joins:
            pieces[-1] += c
        else:
            pieces.append(c)
    return pieces

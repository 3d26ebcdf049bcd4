"""Babel's world: concepts, families of invented languages, their lexicons and grammars.

Everything is derived from `BabelConfig` by the small generators below, in integer arithmetic, so
the same configuration gives the same bytes on every platform and Python version. Nothing is
downloaded.

How a language comes about:
  1. Every concept gets a proto-root of three or four letters (function words: two). A share of the
     concepts (`shared_roots`) has one root for all families, the common stock; the others have a
     root of their own in each family.
  2. A family's sound law turns the root into the family's form: `p t k` become `b d g` in one
     family, `f z h` in another.
  3. Each language applies a few regular sound changes of its own (`sound_changes`), and some drop a
     final vowel.
  4. The language spells the word in its script. Latin and "capitals" cost a byte a letter, Greek
     and Cyrillic two.
Roots that would make two concepts sound alike in any language are drawn again, so that translation
is a function.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

PERSONS = "father mother child king farmer smith singer doctor hunter baker sailor priest".split()
FOODS = "apple bread fish egg cheese honey bean nut".split()
TOOLS = "knife rope pot lamp basket hammer needle drum".split()
PLACES = "market house river field tower harbour forest well".split()
TIMES = "today tomorrow morning evening winter summer".split()
ADJECTIVES = "red white black big small old new heavy".split()
NUMBERS = "two three four seven".split()
ACTIONS = "buy sell see find hide give wash make break lose".split()
ATTITUDES = "want ask plan".split()
RELATIONS = "in to from".split()
QUESTIONS = "who what where when".split()
FUNCTION_WORDS = frozenset(RELATIONS + QUESTIONS)
THINGS = FOODS + TOOLS
CONCEPTS = tuple(
    PERSONS + THINGS + PLACES + TIMES + ADJECTIVES + NUMBERS + ACTIONS + ATTITUDES
) + tuple(RELATIONS + QUESTIONS)

TASKS = ("parse", "tag", "translate", "qa")

_VOWELS = "aeiou"
_CONSONANTS = "ptkmnslr"
_FAMILY_LETTERS = "tkmsn"
_FAMILY_LAWS = (
    (),
    (("p", "b"), ("t", "d"), ("k", "g")),
    (("p", "f"), ("t", "z"), ("k", "h")),
    (("s", "h"), ("l", "w"), ("k", "g")),
    (("m", "v"), ("t", "d"), ("p", "f")),
)
_VOWEL_CHANGES = (("a", "e"), ("e", "i"), ("o", "u"), ("i", "e"), ("u", "o"), ("a", "o"))
_CONSONANT_CHANGES = tuple(
    tuple(pair) for pair in "pf td kh sz lr rl mn bv dt gk fp zs hk nm st rw".split()
)
_ORDERS = (
    ("SVO", "SVO", "SVO", "VSO", "SOV"),
    ("SOV", "SOV", "SOV", "SVO", "SVO"),
    ("VSO", "VSO", "SVO", "SOV", "VOS"),
    ("SVO", "SOV", "SVO", "VSO", "VOS"),
    ("SOV", "VSO", "SOV", "SVO", "SVO"),
)
_SCRIPT_OF_THIRD = ("greek", "capitals", "cyrillic", "greek", "capitals")

_LETTERS = "ptkbdgmnslrfhvzwaeiou"
SCRIPTS = {
    "latin": {},
    "capitals": str.maketrans(_LETTERS, _LETTERS.upper()),
    "greek": str.maketrans(_LETTERS, "πτκβδγμνσλρφχψζωαειου"),
    "cyrillic": str.maketrans(_LETTERS, "пткбдгмнслрфхвзцаеиоу"),
}


class Draw:
    """SplitMix64 (Steele, Lea and Flood, 2014): a stream of 64-bit integers from one seed.

    Our own, because the standard library promises the same `random()` in every version but not the
    same `sample` or `shuffle`.
    """

    def __init__(self, *key: object):
        self._state = stable_hash(*key)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        return _scramble(self._state) % bound

    def chance(self, probability: float) -> bool:
        """True with this probability, to a millionth."""
        return self.below(1_000_000) < round(probability * 1_000_000)

    def pick(self, options: Sequence):
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, items: Sequence) -> list:
        """The items in a new order (Fisher-Yates)."""
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


def _scramble(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def stable_hash(*key: object) -> int:
    """A 64-bit hash of the key's text (FNV-1a, mixed): the same on every run, unlike `hash`."""
    value = 0xCBF29CE484222325
    for byte in "\x1f".join(str(part) for part in key).encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return _scramble(value)


@dataclasses.dataclass(frozen=True)
class BabelConfig:
    """The dials. The defaults are the benchmark; anything else is a study.

    World:
      seed: of everything.
      families, languages_per_family: at most 5 each; 3 x 4 languages by default.
      shared_roots: share of the concepts whose root all families have in common. 1 makes the
        families dialects; 0 leaves them nothing in common, and zero-shot across families rests on
        pretraining alone.
      sound_changes: regular changes that separate each language from its family.

    The base's cross-lingual strength (pretraining never sees a parse, a tag or an answer):
      pretrain_languages: how many languages it covers, families in turn; None is all.
      pretrain_pairs: share of the directed language pairs it translates; a language into itself is
        always among them.
      pretrain_examples: how many there are per target language; longer training repeats them.
      pretrain_fill: share of span corruption; the rest is translation.

    Crowding, and what is held out:
      tasks: of parse, tag, translate, qa.
      adapt_languages: how many languages the adapters' datasets cover, families in turn (unseen
        ones count, and stay); None is all.
      unseen_languages: no adapter sees anything of these.
      held_out: (task, language) pairs that training leaves out though it has the language in the
        other tasks.
      train_examples, eval_examples: per dataset.
    """

    seed: int = 2402
    families: int = 3
    languages_per_family: int = 4
    shared_roots: float = 0.5
    sound_changes: int = 2
    pretrain_languages: int | None = None
    pretrain_pairs: float = 1.0
    pretrain_examples: int = 20_000
    pretrain_fill: float = 0.1
    tasks: tuple[str, ...] = TASKS
    adapt_languages: int | None = None
    unseen_languages: tuple[str, ...] = ("mo",)
    held_out: tuple[tuple[str, str], ...] = (
        ("parse", "te"),
        ("parse", "to"),
        ("parse", "ki"),
        ("parse", "me"),
    )
    train_examples: int = 2000
    eval_examples: int = 100


class Language(NamedTuple):
    """One invented language.

    Attributes:
      code: two letters, the first names the family.
      order: of subject, verb, object.
      postposition: adpositions follow their noun.
      adjective_first, number_first: before the noun.
      time_first: the time opens the clause instead of closing it.
      question_first: the question word opens the question.
      script: a key of SCRIPTS.
      changes: the sound changes, in order.
      drops_final_vowel: of words with four letters.
      words: concept -> word, spelt.
    """

    code: str
    family: int
    order: str
    postposition: bool
    adjective_first: bool
    number_first: bool
    time_first: bool
    question_first: bool
    script: str
    changes: tuple[tuple[str, str], ...]
    drops_final_vowel: bool
    words: dict[str, str]

    def sound(self, root: str) -> str:
        """The proto-root's reflex in this language, in Latin letters."""
        for old, new in _FAMILY_LAWS[self.family] + self.changes:
            root = root.replace(old, new)
        if self.drops_final_vowel and len(root) > 3 and root[-1] in _VOWELS:
            root = root[:-1]
        return root


def make_languages(config: BabelConfig) -> dict[str, Language]:
    """The configuration's languages by code, families in turn (ta ka ma te ke me ...).

    Raises:
      ValueError: a count or share outside its range.
    """
    for field, top in (("families", 5), ("languages_per_family", 5)):
        if not 1 <= getattr(config, field) <= top:
            raise ValueError(f"{field} must lie in 1..{top}, got {getattr(config, field)}.")
    for field in ("shared_roots", "pretrain_pairs", "pretrain_fill"):
        if not 0 <= getattr(config, field) <= 1:
            raise ValueError(f"{field} is a share in 0..1, got {getattr(config, field)}.")
    languages = [
        _grammar(config, family, index)
        for index in range(config.languages_per_family)
        for family in range(config.families)
    ]
    _fill_lexicons(config, languages)
    return {language.code: language for language in languages}


def _grammar(config: BabelConfig, family: int, index: int) -> Language:
    draw = Draw(config.seed, "grammar", family, index)
    order = _ORDERS[family][index]
    verb_last = order == "SOV"
    # Only changes that have a letter to act on, and no letter changed twice.
    consonants = set(_CONSONANTS)
    for old, new in _FAMILY_LAWS[family]:
        consonants = (consonants - {old}) | {new}
    pools = (
        draw.shuffled(_VOWEL_CHANGES),
        draw.shuffled([change for change in _CONSONANT_CHANGES if change[0] in consonants]),
    )
    changes: list[tuple[str, str]] = []
    for i in range(config.sound_changes):
        used = {letter for change in changes for letter in change}
        free = [change for change in pools[i % 2] if not used & set(change)]
        if free:
            changes.append(free[0])
    return Language(
        code=_FAMILY_LETTERS[family] + _VOWELS[index],
        family=family,
        order=order,
        postposition=verb_last,
        adjective_first=verb_last or draw.chance(0.5),
        number_first=draw.chance(0.7),
        time_first=draw.chance(0.5),
        question_first=not verb_last,
        script=_SCRIPT_OF_THIRD[family] if index == 2 else "latin",
        changes=tuple(changes),
        drops_final_vowel=draw.chance(0.4),
        words={},
    )


def _root(draw: Draw, concept: str) -> str:
    shapes = ("CV", "VC") if concept in FUNCTION_WORDS else ("CVC", "CVC", "CVCV", "VCV")
    return "".join(draw.pick(_CONSONANTS if slot == "C" else _VOWELS) for slot in draw.pick(shapes))


def _fill_lexicons(config: BabelConfig, languages: Sequence[Language]) -> None:
    draw = Draw(config.seed, "roots")
    shuffled = draw.shuffled(CONCEPTS)
    shared = set(shuffled[: round(config.shared_roots * len(CONCEPTS))])
    taken: dict[str, set[str]] = {language.code: set() for language in languages}
    # Short words first: they have the fewest roots to choose from.
    for concept in sorted(CONCEPTS, key=lambda concept: concept not in FUNCTION_WORDS):
        by_family = [[x for x in languages if x.family == f] for f in range(config.families)]
        for group in [list(languages)] if concept in shared else by_family:
            while True:
                root = _root(draw, concept)
                forms = [language.sound(root) for language in group]
                if all(f not in taken[x.code] for f, x in zip(forms, group, strict=True)):
                    break
            for form, language in zip(forms, group, strict=True):
                taken[language.code].add(form)
                language.words[concept] = form.translate(SCRIPTS[language.script])

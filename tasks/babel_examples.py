"""Babel's texts: meanings, their rendering in a language, and the tasks' examples.

A meaning is a `Clause`: someone does something to something, perhaps somewhere or at some time, or
wants to do it. Meanings are sampled once and rendered in every language. Train, validation and test
are told apart by a hash of the meaning itself, so a meaning is in the same split in every language,
in every task, and in pretraining, which uses train alone.

The tasks, with English words in place of the invented ones:
  parse      `parse: king buy red apple market in`
             -> `[IN:BUY [SL:WHO king ] [SL:OBJ red apple ] [SL:IN market ] ]`
  tag        `tag: king buy red apple market in`
             -> `king|PER buy|O red|MOD apple|FOOD market|LOC in|O`
  translate  `>ta king buy apple` -> the same meaning in `ta`, the pivot language
  qa         `qa: king buy apple . child sell rope ? sell who` -> `child`
Slots and tags come in the order of the utterance, and their text is copied from it; labels are the
same everywhere. Pretraining has `>xx text` (translation into xx) and `fill: text with _` (spans of
words replaced by `_`, to be given back).

Every method gets the same text: the prompt says the task, because nothing else tells plain LoRA;
nothing says the language of the utterance. The features that FLix gets come from the dataset's
metadata and are not in the text.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

from modjax.errors import nearest
from tasks import babel_world as world

SPLITS = ("train", "validation", "test")
TAGS = {
    **dict.fromkeys(world.PERSONS, "PER"),
    **dict.fromkeys(world.FOODS, "FOOD"),
    **dict.fromkeys(world.TOOLS, "TOOL"),
    **dict.fromkeys(world.PLACES, "LOC"),
    **dict.fromkeys(world.TIMES, "TIME"),
    **dict.fromkeys(world.ADJECTIVES, "MOD"),
    **dict.fromkeys(world.NUMBERS, "NUM"),
}
Word = tuple[str, str]  # as spelt, and its concept


class Clause(NamedTuple):
    """A meaning, in concepts. None: not said."""

    action: str
    who: str
    obj: str
    who_mod: str | None = None
    obj_mod: str | None = None
    relation: str | None = None
    place: str | None = None
    time: str | None = None
    attitude: str | None = None


class Phrase(NamedTuple):
    """A part of a rendered clause.

    Attributes:
      role: WHO, OBJ, IN, TO, FROM, WHEN, or VERB (not a slot).
      words: in order, with an adposition.
      text: what a slot holds, without the adposition.
    """

    role: str
    words: tuple[Word, ...]
    text: str

    @property
    def surface(self) -> str:
        """The words as they stand in the clause."""
        return " ".join(word for word, _ in self.words)


def split_of(clause: Clause) -> str:
    """The meaning's split by a hash of its concepts: 90 % train, 5 % validation, 5 % test."""
    bucket = world.stable_hash("split", *clause) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def sample_clause(draw: world.Draw, kind: str = "any") -> Clause:
    """Draws a meaning.

    Args:
      draw: the stream it is drawn from.
      kind: "plain" has neither modifiers nor place, time or attitude; "any" may.
    """
    clause = Clause(draw.pick(world.ACTIONS), draw.pick(world.PERSONS), draw.pick(world.THINGS))
    if kind == "plain":
        return clause
    if draw.chance(0.35):
        clause = clause._replace(obj_mod=draw.pick(world.ADJECTIVES + world.NUMBERS))
    elif draw.chance(0.2):
        clause = clause._replace(who_mod=draw.pick(world.ADJECTIVES))
    extra = draw.below(10)
    if extra < 2:
        return clause._replace(attitude=draw.pick(world.ATTITUDES))
    if extra < 6:
        relation, place = draw.pick(world.RELATIONS), draw.pick(world.PLACES)
        return clause._replace(relation=relation, place=place)
    if extra < 8:
        return clause._replace(time=draw.pick(world.TIMES))
    return clause


def _phrase(language: world.Language, role: str, *concepts: str) -> Phrase:
    words = tuple((language.words[concept], concept) for concept in concepts)
    text = " ".join(word for word, concept in words if concept not in world.RELATIONS)
    return Phrase(role, words, text)


def _noun_phrase(language: world.Language, role: str, noun: str, mod: str | None) -> Phrase:
    if mod is None:
        return _phrase(language, role, noun)
    first = language.number_first if mod in world.NUMBERS else language.adjective_first
    return _phrase(language, role, *((mod, noun) if first else (noun, mod)))


def phrases(clause: Clause, language: world.Language) -> list[Phrase]:
    """The clause's phrases in the language's order.

    With an attitude, its verb governs the action and the action's object, which stay together.
    """
    subject = _noun_phrase(language, "WHO", clause.who, clause.who_mod)
    obj = _noun_phrase(language, "OBJ", clause.obj, clause.obj_mod)
    action = _phrase(language, "VERB", clause.action)
    verb_last = language.order == "SOV"
    if clause.attitude is not None:
        inner = [obj, action] if verb_last else [action, obj]
        parts = {"S": [subject], "V": [_phrase(language, "VERB", clause.attitude)], "O": inner}
    else:
        parts = {"S": [subject], "V": [action], "O": [obj]}
    core = [phrase for letter in language.order for phrase in parts[letter]]
    if clause.place is not None and clause.relation is not None:
        pair = (clause.relation, clause.place)
        place = _phrase(
            language, clause.relation.upper(), *(pair[::-1] if language.postposition else pair)
        )
        core.insert(1 if verb_last else len(core), place)
    if clause.time is not None:
        time = _phrase(language, "WHEN", clause.time)
        core.insert(0 if language.time_first else len(core), time)
    return core


def render(clause: Clause, language: world.Language) -> str:
    """The clause as text."""
    return " ".join(phrase.surface for phrase in phrases(clause, language))


def parse_of(clause: Clause, language: world.Language) -> str:
    """The clause's semantic parse in MTOP's bracket form."""
    slots = [phrase for phrase in phrases(clause, language) if phrase.role != "VERB"]
    action = f"[IN:{clause.action.upper()} "
    if clause.attitude is None:
        return action + "".join(f"[SL:{s.role} {s.text} ] " for s in slots) + "]"
    parts = []
    for slot in slots:
        text = f"[SL:{slot.role} {slot.text} ] "
        parts.append(f"[SL:DO {action}{text}] ] " if slot.role == "OBJ" else text)
    return f"[IN:{clause.attitude.upper()} " + "".join(parts) + "]"


def tags_of(clause: Clause, language: world.Language) -> str:
    """Every word of the clause with its tag, `word|TAG`; verbs and adpositions have `O`."""
    words = [pair for phrase in phrases(clause, language) for pair in phrase.words]
    return " ".join(f"{word}|{TAGS.get(concept, 'O')}" for word, concept in words)


_ASKS = {"WHO": "who", "OBJ": "what", "WHEN": "when", "IN": "where", "TO": "where", "FROM": "where"}


def question(draw: world.Draw, others: Iterator[Clause], clause: Clause):
    """Makes a reading exercise about the clause.

    Args:
      draw: picks the form.
      others: plain clauses of the same split, for a distractor.
      clause: what is asked about.

    Returns:
      (clauses in reading order, the clause asked about, the role asked for).
    """
    clauses = [clause]
    if clause == Clause(clause.action, clause.who, clause.obj):
        other = next(c for c in others if c.action != clause.action)
        clauses = draw.shuffled([clause, other])
    roles = ["WHO", "OBJ"]
    if clause.relation is not None:
        roles.append(clause.relation.upper())
    if clause.time is not None:
        roles.append("WHEN")
    return tuple(clauses), clause, draw.pick(roles)


def render_question(exercise: tuple, language: world.Language) -> tuple[str, str]:
    """The exercise as (text with the question after ` ? `, answer)."""
    clauses, asked, role = exercise
    text = " . ".join(render(clause, language) for clause in clauses)
    words = [language.words[_ASKS[role]], language.words[asked.attitude or asked.action]]
    if not language.question_first:
        words.reverse()
    answer = next(p.text for p in phrases(asked, language) if p.role == role)
    return f"{text} ? {' '.join(words)}", answer


def _name(phrase: Phrase) -> tuple[str, ...]:
    return (phrase.role, *sorted(concept for _, concept in phrase.words))


class Babel:
    """The benchmark of one configuration.

    Attributes:
      config, languages: languages by code, families in turn.
      pivot: what the adapters' translation task translates into (the first language).
    """

    def __init__(self, config: world.BabelConfig | None = None):
        self.config = config or world.BabelConfig()
        self.languages = world.make_languages(self.config)
        self.pivot = next(iter(self.languages))
        for task, code in self.config.held_out:
            self._check(task, self.config.tasks, "held_out", "task")
            self._check(code, self.languages, "held_out", "language")
        for code in self.config.unseen_languages:
            self._check(code, self.languages, "unseen_languages", "language")
        for task in self.config.tasks:
            self._check(task, world.TASKS, "tasks", "task")

    def _check(self, name, known, field, what):
        if name not in known:
            raise ValueError(f"{field} names the unknown {what} {name!r}.{nearest(name, known)}")

    def datasets(self) -> dict[tuple[str, str], str]:
        """Every dataset (task, language) -> seen, unseen_pair or unseen_language."""
        codes = list(self.languages)[: self.config.adapt_languages]
        settings = {}
        for task in self.config.tasks:
            for code in self.languages:
                if task == "translate" and code == self.pivot:
                    continue
                if code in self.config.unseen_languages:
                    settings[task, code] = "unseen_language"
                elif code in codes:
                    held_out = (task, code) in self.config.held_out
                    settings[task, code] = "unseen_pair" if held_out else "seen"
        return settings

    @cached_property
    def _meanings(self) -> dict[str, list[Clause]]:
        draw = world.Draw(self.config.seed, "meanings")
        wanted = {split: self.config.eval_examples for split in SPLITS}
        wanted["train"] = self.config.train_examples
        found: dict[str, dict[Clause, None]] = {split: {} for split in SPLITS}
        while any(len(found[split]) < wanted[split] for split in SPLITS):
            clause = sample_clause(draw)
            split = split_of(clause)
            if len(found[split]) < wanted[split]:
                found[split][clause] = None
        return {split: list(clauses) for split, clauses in found.items()}

    def meanings(self, split: str) -> list[Clause]:
        """The split's meanings, all different; the position is the meaning's id."""
        self._check(split, SPLITS, "split", "split")
        return self._meanings[split]

    def _plain(self, draw: world.Draw, split: str) -> Iterator[Clause]:
        while True:
            clause = sample_clause(draw, "plain")
            if split_of(clause) == split:
                yield clause

    def examples(self, task: str, code: str, split: str) -> Iterator[dict[str, str | int]]:
        """The dataset's examples: inputs, targets, task, language, meaning_id."""
        self._check(task, world.TASKS, "task", "task")
        self._check(code, self.languages, "language", "language")
        language = self.languages[code]
        for i, clause in enumerate(self.meanings(split)):
            text = render(clause, language)
            if task == "parse":
                pair = f"parse: {text}", parse_of(clause, language)
            elif task == "tag":
                pair = f"tag: {text}", tags_of(clause, language)
            elif task == "translate":
                pair = f">{self.pivot} {text}", render(clause, self.languages[self.pivot])
            else:
                draw = world.Draw(self.config.seed, "qa", split, i)
                exercise = question(draw, self._plain(draw, split), clause)
                text, answer = render_question(exercise, language)
                pair = f"qa: {text}", answer
            yield {
                "inputs": pair[0],
                "targets": pair[1],
                "task": task,
                "language": code,
                "meaning_id": i,
            }

    # Pretraining.

    def pretrain_pairs(self) -> dict[str, list[str]]:
        """Target language -> the languages it is translated from (itself among them)."""
        codes = list(self.languages)[: self.config.pretrain_languages]
        pairs = [(s, t) for t in codes for s in codes if s != t]
        draw = world.Draw(self.config.seed, "pairs")
        kept = draw.shuffled(pairs)[: round(self.config.pretrain_pairs * len(pairs))]
        return {t: [t] + sorted(s for s, other in kept if other == t) for t in codes}

    def _utterance(self, draw: world.Draw):
        """A train-split text as a function of the language: clause, reading exercise, phrase."""
        while split_of(clause := sample_clause(draw)) != "train":
            pass
        form = draw.below(100)
        if form < 60:
            return lambda language: render(clause, language)
        if form < 67:
            exercise = question(draw, self._plain(draw, "train"), clause)
            return lambda language: render_question(exercise, language)[0]
        # The concepts, not the place in the sentence, name the phrase: the same in every language.
        names = sorted({_name(p) for p in phrases(clause, self.languages[self.pivot])})
        wanted = draw.pick(names)
        return lambda language: next(
            p.surface for p in phrases(clause, language) if _name(p) == wanted
        )

    def pretrain_examples(self, kind: str, code: str, split: str) -> Iterator[dict[str, str]]:
        """The base's text in one language: inputs, targets, source.

        Validation and test are whole clauses of the adapters' evaluation meanings, translated from
        other languages: they say how multilingual the base is.

        Args:
          kind: "translate" into the language, or "fill".
          code: the language.
          split: train, validation or test.
        """
        self._check(kind, ("translate", "fill"), "kind", "kind")
        sources = self.pretrain_pairs()
        self._check(code, sources, "language", "pretraining language")
        language = self.languages[code]
        draw = world.Draw(self.config.seed, "pretrain", kind, code, split)
        if split == "train":
            share = self.config.pretrain_fill
            share = share if kind == "fill" else 1 - share
            texts = (
                self._utterance(draw) for _ in range(round(share * self.config.pretrain_examples))
            )
        else:
            texts = (partial(render, clause) for clause in self.meanings(split))
        for utterance in texts:
            source = code
            if kind == "translate":
                source = draw.pick(
                    sources[code] if split == "train" else sources[code][1:] or [code]
                )
                inputs = f">{code} {utterance(self.languages[source])}"
                targets = utterance(language)
            else:
                while " " not in (text := utterance(language)):
                    utterance = self._utterance(draw)
                inputs, targets = corrupt(draw, text)
            yield {"inputs": inputs, "targets": targets, "source": source}

    def copy_examples(self, split: str) -> Iterator[dict[str, str]]:
        """Words of random printable ASCII to be copied, so that the base has read and written every
        byte that a target may hold, brackets and capitals among them; nothing like a parse.

        Args:
          split: train (as many as one language has to translate), validation or test.
        """
        self._check(split, SPLITS, "split", "split")
        draw = world.Draw(self.config.seed, "copy", split)
        train = split == "train"
        for _ in range(self.config.pretrain_examples if train else self.config.eval_examples):
            words = (
                "".join(chr(33 + draw.below(94)) for _ in range(1 + draw.below(5)))
                for _ in range(2 + draw.below(6))
            )
            text = " ".join(words)
            yield {"inputs": f"= {text}", "targets": text, "source": "copy"}


def corrupt(draw: world.Draw, text: str, rate: float = 0.25) -> tuple[str, str]:
    """Span corruption over words: the text with hidden spans as `_`, and the spans."""
    words = text.split(" ")
    hidden = [draw.chance(rate) for _ in words]
    if not any(hidden) or all(hidden):
        hidden = [False] * len(words)
        hidden[draw.below(len(words))] = True
    shown: list[str] = []
    spans: list[list[str]] = []
    for i, word in enumerate(words):
        if not hidden[i]:
            shown.append(word)
        elif i and hidden[i - 1]:
            spans[-1].append(word)
        else:
            shown.append("_")
            spans.append([word])
    return "fill: " + " ".join(shown), " _ ".join(" ".join(span) for span in spans)

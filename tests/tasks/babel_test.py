"""Babel: the same bytes everywhere, no leak between splits, what is seen and unseen."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from modjax.evaluation.metrics import get
from tasks.babel_examples import (
    SPLITS,
    Babel,
    Clause,
    corrupt,
    parse_of,
    render,
    sample_clause,
    split_of,
    tags_of,
)
from tasks.babel_world import CONCEPTS, TASKS, BabelConfig, Draw, stable_hash

SMALL = BabelConfig(train_examples=60, eval_examples=20, pretrain_examples=50)


@pytest.fixture(scope="module")
def babel():
    return Babel(SMALL)


def everything(babel):
    rows = [
        row
        for task in TASKS
        for code in babel.languages
        for split in SPLITS
        for row in babel.examples(task, code, split)
    ]
    rows += [
        row
        for kind in ("translate", "fill")
        for code in babel.languages
        for split in SPLITS
        for row in babel.pretrain_examples(kind, code, split)
    ]
    return rows


def digest(babel):
    return hashlib.sha256(json.dumps(everything(babel), sort_keys=True).encode()).hexdigest()


def test_the_benchmark_is_the_same_bytes_on_every_machine(babel):
    assert digest(babel) == GOLDEN


def test_another_process_with_another_hash_seed_makes_the_same_bytes():
    code = (
        "import importlib.util as u, sys; sys.path.insert(0, '.');"
        f"s = u.spec_from_file_location('t', {__file__!r}); m = u.module_from_spec(s);"
        "s.loader.exec_module(m); print(m.digest(m.Babel(m.SMALL)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"},
    )
    assert run.stdout.strip() == GOLDEN


def test_another_seed_makes_another_world(babel):
    other = Babel(dataclasses.replace(SMALL, seed=1))
    assert other.languages["ta"].words != babel.languages["ta"].words


def test_draws_are_those_of_splitmix64():
    draw = Draw("x")
    draw._state = 0
    # The published generator's first outputs from state 0.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [draw.below(2**64) for _ in first] == first


def test_there_are_twelve_languages_in_three_families_with_several_orders_and_scripts(babel):
    languages = babel.languages.values()
    assert len(languages) == 12
    assert len({x.family for x in languages}) == 3
    assert {x.order for x in languages} == {"SVO", "SOV", "VSO"}
    assert {x.script for x in languages} == {"latin", "capitals", "greek", "cyrillic"}


def test_a_language_has_a_word_for_every_concept_and_no_homonyms(babel):
    for language in babel.languages.values():
        assert set(language.words) == set(CONCEPTS)
        assert len(set(language.words.values())) == len(CONCEPTS)


def same_skeleton(a, b):
    """Consonants and vowels in the same places, but for a dropped final vowel."""
    kind = ["".join("V" if c in "aeiou" else "C" for c in word) for word in (a, b)]
    return kind[0].startswith(kind[1]) or kind[1].startswith(kind[0])


def test_words_of_a_family_correspond_by_sound_and_common_stock_grows_with_its_dial():
    def related(shared, codes):
        languages = Babel(dataclasses.replace(SMALL, shared_roots=shared)).languages
        one, other = (languages[code].words for code in codes)
        return sum(same_skeleton(one[c], other[c]) for c in CONCEPTS) / len(CONCEPTS)

    assert related(0.0, ("ta", "te")) == 1
    assert related(1.0, ("ta", "ka")) == 1
    assert related(0.0, ("ta", "ka")) < 0.6


def test_word_order_adpositions_and_scripts_differ_but_the_meaning_does_not(babel):
    clause = Clause("buy", "king", "apple", obj_mod="red", relation="in", place="market")

    def glosses(code):
        language = babel.languages[code]
        back = {word: concept for concept, word in language.words.items()}
        return [back[word] for word in render(clause, language).split()]

    assert glosses("ta") == ["king", "buy", "red", "apple", "in", "market"]
    assert glosses("ka") == ["king", "market", "in", "red", "apple", "buy"]
    assert glosses("ma") == ["buy", "king", "apple", "red", "in", "market"]


def test_parses_are_well_formed_copy_their_slots_and_label_alike_in_all_languages(babel):
    structure, malformed = get("structure_match"), get("malformed")
    draw = Draw("parses")
    for _ in range(40):
        clause = sample_clause(draw)
        texts = {x.code: parse_of(clause, x) for x in babel.languages.values()}
        first = [texts["ta"]] * len(texts)
        assert malformed(first, list(texts.values())).value == 0
        assert structure(first, list(texts.values())).value == 100
        for code, text in texts.items():
            slots = [part for part in text.split() if not part.startswith("[") and part != "]"]
            utterance = render(clause, babel.languages[code]).split()
            function_words = [word for word in utterance if word not in slots]
            assert [word for word in utterance if word in slots] == slots
            assert len(function_words) == 1 + bool(clause.relation or clause.attitude)


def test_an_attitude_nests_the_action(babel):
    words = babel.languages["ta"].words
    text = parse_of(Clause("buy", "king", "apple", attitude="want"), babel.languages["ta"])
    assert text == (
        f"[IN:WANT [SL:WHO {words['king']} ] [SL:DO [IN:BUY [SL:OBJ {words['apple']} ] ] ] ]"
    )


def test_tags_cover_the_words_of_the_utterance_in_order(babel):
    clause = Clause("buy", "king", "apple", obj_mod="two", time="today")
    for language in babel.languages.values():
        pairs = [item.split("|") for item in tags_of(clause, language).split()]
        assert " ".join(word for word, _ in pairs) == render(clause, language)
        assert sorted(tag for _, tag in pairs) == ["FOOD", "NUM", "O", "PER", "TIME"]


def test_an_answer_is_a_span_of_the_text_before_its_question(babel):
    for code in babel.languages:
        for row in babel.examples("qa", code, "train"):
            text = row["inputs"].split(" ? ")[0]
            assert f" {row['targets']} " in f"{text} "


def test_a_meaning_is_in_one_split_in_every_language_and_task(babel):
    by_split = {split: set(babel.meanings(split)) for split in SPLITS}
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))
    for code, language in babel.languages.items():
        texts = {}
        for split in SPLITS:
            texts[split] = {render(clause, language) for clause in by_split[split]}
            for task in TASKS:
                rows = list(babel.examples(task, code, split))
                assert [row["meaning_id"] for row in rows] == list(range(len(rows)))
                if task != "qa":
                    assert {r["inputs"].split(maxsplit=1)[1] for r in rows} == texts[split]
        assert not texts["train"] & (texts["validation"] | texts["test"])


def test_no_evaluated_sentence_is_in_pretraining_or_in_a_training_question():
    babel = Babel(
        dataclasses.replace(SMALL, train_examples=800, eval_examples=200, pretrain_examples=800)
    )
    held = set(babel.meanings("validation")) | set(babel.meanings("test"))
    assert all(split_of(clause) != "train" for clause in held)
    for code in ("ta", "mi", "mo"):
        language = babel.languages[code]
        evaluated = {render(clause, language) for clause in held}
        seen = set()
        for row in babel.pretrain_examples("translate", code, "train"):
            seen |= set(row["targets"].split(" ? ")[0].split(" . "))
        for row in babel.examples("qa", code, "train"):
            seen |= set(row["inputs"].split(": ", 1)[1].split(" ? ")[0].split(" . "))
        assert len(seen) > 500
        assert not seen & evaluated


def test_pretraining_covers_every_pair_and_never_holds_a_parse():
    babel = Babel(dataclasses.replace(SMALL, pretrain_examples=400))
    for code in babel.languages:
        rows = list(babel.pretrain_examples("translate", code, "train"))
        assert {row["source"] for row in rows} == set(babel.languages)
        assert not any("[" in row["targets"] or "|" in row["targets"] for row in rows)


def test_pretraining_dials_cover_fewer_languages_and_pairs():
    config = dataclasses.replace(SMALL, pretrain_languages=6, pretrain_pairs=0.5)
    pairs = Babel(config).pretrain_pairs()
    assert list(pairs) == ["ta", "ka", "ma", "te", "ke", "me"]
    assert sum(len(sources) - 1 for sources in pairs.values()) == 15
    assert all(target in sources for target, sources in pairs.items())


def test_hidden_spans_put_back_give_the_text():
    draw = Draw("spans")
    for _ in range(50):
        inputs, targets = corrupt(draw, "one two three four five")
        spans = iter(targets.split(" _ "))
        words = [next(spans) if w == "_" else w for w in inputs.removeprefix("fill: ").split()]
        assert " ".join(words) == "one two three four five"


def test_held_out_pairs_and_unseen_languages_are_not_trained(babel):
    settings = babel.datasets()
    assert {d for d, s in settings.items() if s == "unseen_pair"} == set(SMALL.held_out)
    assert {code for (_, code), s in settings.items() if s == "unseen_language"} == {"mo"}
    trained = {(task, code) for (task, code), s in settings.items() if s == "seen"}
    for _, code in SMALL.held_out:
        assert {task for task, other in trained if other == code} == {"tag", "translate", "qa"}
    fewer = Babel(dataclasses.replace(SMALL, adapt_languages=6, tasks=("parse", "tag")))
    assert len([s for s in fewer.datasets().values() if s == "seen"]) == 10


def test_the_benchmark_is_small(babel):
    for row in everything(babel):
        assert len(row["inputs"].encode()) < 80
        assert len(row["targets"].encode()) < 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": (("parse", "tx"),)}, r"held_out names the unknown language 'tx'.*'t"),
        ({"tasks": ("parse", "tagg")}, r"unknown task 'tagg'\. Did you mean 'tag'"),
        ({"unseen_languages": ("mx",)}, "unseen_languages names the unknown language 'mx'"),
        ({"families": 6}, r"families must lie in 1\.\.5, got 6"),
        ({"shared_roots": 1.5}, r"shared_roots is a share in 0\.\.1, got 1\.5"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Babel(
            dataclasses.replace(SMALL, held_out=(), **change)
            if "held_out" not in change
            else dataclasses.replace(SMALL, **change)
        )


def test_unknown_names_are_refused_with_the_nearest(babel):
    with pytest.raises(ValueError, match="unknown task 'pars'. Did you mean 'parse'"):
        next(babel.examples("pars", "ta", "train"))
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        babel.meanings("dev")


def test_stable_hash_depends_on_every_part():
    assert stable_hash("a", "b") != stable_hash("ab") != stable_hash("b", "a")


GOLDEN = "ad6732f19f60bbc5b7c49a2e87a42f0945a9cdf99a25e9c20e5e384e2b573d6a"


def test_text_to_copy_covers_every_printable_byte_and_holds_no_parse():
    rows = list(Babel(dataclasses.replace(SMALL, pretrain_examples=400)).copy_examples("train"))
    assert len(rows) == 400 and all(row["inputs"] == f"= {row['targets']}" for row in rows)
    assert {chr(c) for c in range(33, 127)} <= set("".join(row["targets"] for row in rows))
    assert not any("[IN:" in row["targets"] or "[SL:" in row["targets"] for row in rows)
    assert max(len(row["inputs"]) for row in rows) <= 60

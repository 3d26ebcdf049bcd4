"""The six-language benchmark: who is trained in what, and that splits never share a meaning."""

import functools
import json
import os
import zlib

import pytest
import seqio

from modjax.data import registry
from tasks import byte_tasks, files, mtop6, mtop6_pieces, xling

VALIDATION_ENTRIES, TEST_ENTRIES = 3, 4


def entry(split, number):
    """A parallel MTOP entry whose texts name the split and number, as every language's do."""
    texts = {name: f"{split} {number} in {name}" for name in mtop6.LANGUAGES}
    parses = {name: f"[IN:X [SL:Y {text} ] ]" for name, text in texts.items()}
    return {"id": f"{split}{number}", "question": texts, "mr": {"slot_intent": parses}}


def treebank(language, documents):
    words = "1\tword\t_\tNOUN\t_\t_\t0\troot\t_\t_\n"
    name = "# sent_id = {}001\n# text = sentence {} in {}\n"
    return "".join(name.format(d, d, language) + words + "\n" for d in documents)


def questions(names, where):
    def make(name):
        answer = {"text": name, "answer_start": 0}
        context = f"{name} is in {where} and more is not said about it"
        return {"context": context, "qas": [{"id": name, "question": "?", "answers": [answer]}]}

    return {"data": [{"paragraphs": [make(name) for name in names]}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A whole data folder in the formats of the real one, with tiny texts."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")

    entries = mtop6.TRAIN_ENTRIES + VALIDATION_ENTRIES
    write("semantic_parsing/mtop/dev.json", [entry("dev", i) for i in range(entries)])
    write("semantic_parsing/mtop/test.json", [entry("test", i) for i in range(TEST_ENTRIES)])
    english = ["Test 1, in EN!", "dev 701 in en", "dev 3 in en", "something else"]
    rows = [json.dumps({"question": text, "logical_form": "[IN:X ]"}) for text in english]
    write("semantic_parsing/mtop_en/train.json", "\n".join(rows))
    for language in mtop6.LANGUAGES:
        documents = [f"n{i:05d}" for i in range(40)]
        if language == "th":
            documents = documents[5:][::-1]
        write(f"pos_mt/ud_pud/{language}_pud-ud-test.conllu", treebank(language, documents))
    names = [f"mlqa{i}" for i in range(40)]
    for language in mtop6.MLQA_LANGUAGES:
        name = f"qa/mlqa_dev/dev-context-{language}-question-{language}.json"
        write(name, questions(names, language))
    for language in mtop6.XQUAD_LANGUAGES:
        write(f"qa/xquad/xquad.{language}.json", questions(["xquad1"], language))
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    return tmp_path


def test_parsing_is_trained_in_three_languages_and_asked_in_six():
    settings = registry.seen_settings("mtop6_train", "mtop6_eval")
    unseen = {task for task, setting in settings.items() if setting == "unseen_pair"}
    assert unseen == {"mtop6_parse_es", "mtop6_parse_hi", "mtop6_parse_th", "mtop6_qa_th"}
    assert set(settings.values()) == {"seen", "unseen_pair"}
    trained = registry.tasks_of("mtop6_train")
    assert [t for t in trained if "parse" in t] == [
        f"mtop6_parse_{language}" for language in sorted(mtop6.PARSE_TRAINED)
    ]
    assert set(mtop6.PARSE_TRAINED) | set(mtop6.PARSE_HELD_OUT) == set(mtop6.LANGUAGES)


def test_features_and_metrics_are_those_of_the_grid():
    space = registry.feature_space("mtop6_train")
    assert set(space.values("language")) == set(mtop6.LANGUAGES)
    assert set(space.values("task")) == {"parse", "tag", "translate", "qa"}
    assert registry.metric_names_of("mtop6_parse_hi") == (
        "exact_match",
        "inexact_match",
        "structure_match",
        "malformed",
    )
    from modjax.evaluation import metrics

    for task in registry.tasks_of("mtop6_eval") + registry.tasks_of("mtop6_pretrain"):
        for name in registry.metric_names_of(task):
            metrics.get(name, task)


def test_pretraining_has_no_task_of_the_evaluation():
    kinds = {task.split("_")[1] for task in registry.tasks_of("mtop6_pretrain")}
    assert kinds == {"fill", "restore", "letters", "quote"}


def test_parses_split_by_entry_alike_in_all_languages(folder):
    for split, numbers in [
        ("train", range(0, 700)),
        ("validation", range(700, 703)),
        ("test", range(4)),
    ]:
        name = "test" if split == "test" else "dev"
        for language in mtop6.LANGUAGES:
            texts = [e["inputs"] for e in mtop6.parse_examples(language, split)]
            assert texts == [f"parse: {name} {i} in {language}" for i in numbers]


def test_sentences_and_questions_split_by_id_alike_in_all_languages(folder):
    seen = {}
    for language in mtop6.LANGUAGES:
        for split in mtop6.SPLITS:
            for sentence in mtop6._sentences(language, split):
                assert seen.setdefault(sentence.id, split) == split
    assert set(seen.values()) == set(mtop6.SPLITS)
    for language in mtop6.MLQA_LANGUAGES:
        for split in mtop6.SPLITS[:2]:
            for example in mtop6.qa_examples(language, split):
                name = example["targets"]
                assert (zlib.crc32(name.encode()) % 10 == 0) == (split == "validation")
        assert [e["targets"] for e in mtop6.qa_examples(language, "test")] == ["xquad1"]


def test_translation_has_both_directions_of_the_sentences_that_both_have(folder):
    thai = mtop6.translate_examples("th", "train")
    both = [s.id for s in mtop6._sentences("th", "train")]
    assert len(thai) == 2 * len(both) < 2 * len(mtop6._sentences("en", "train"))
    assert all("in th" in (e["inputs"] + e["targets"]) for e in thai)


def test_more_english_has_no_utterance_of_validation_or_test(folder):
    assert [e["inputs"] for e in mtop6.english_examples("train")] == [
        "parse: dev 3 in en",
        "parse: something else",
    ]


def test_pretraining_text_is_training_text_of_every_source_and_nothing_else(folder):
    for language in mtop6.LANGUAGES:
        texts = [e["targets"] for e in mtop6.text_examples(language, "train")]
        assert all(e["inputs"] == e["targets"] for e in mtop6.text_examples(language, "train"))
        assert f"dev 699 in {language}" in texts
        later = [e["targets"] for e in mtop6.text_examples(language, "validation")]
        assert f"dev 700 in {language}" in later and not set(texts) & set(later)
        assert not any("test" in text or "xquad" in text for text in texts + later)
        sentences = [text for text in texts if text.startswith("sentence")]
        assert len(sentences) == len(mtop6._sentences(language, "train"))
        assert any("mlqa" in text for text in texts) == (language in mtop6.MLQA_LANGUAGES)


def test_limits_leave_out_sentences_and_cut_contexts_but_keep_parses(folder):
    import gin

    whole = mtop6.qa_examples("en", "train")
    gin.bind_parameter("tasks.mtop6.limits.input_bytes", 34)
    try:
        short = mtop6.qa_examples("en", "train")
        assert len(short) == len(whole)
        assert all(len(e["inputs"].encode()) <= 34 for e in short)
        gin.bind_parameter("tasks.mtop6.limits.input_bytes", 8)
        assert mtop6.qa_examples("en", "train") == mtop6.tag_examples("en", "train") == []
        assert len(mtop6.parse_examples("en", "train")) == mtop6.TRAIN_ENTRIES
    finally:
        gin.clear_config()


@pytest.mark.parametrize("name, share", [("mtop6_train", 72 / 87), ("mtop6_train_more", 96 / 111)])
def test_more_than_half_of_the_training_examples_are_parses(name, share):
    mixture = seqio.MixtureRegistry.get(name)
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    parses = sum(rate for name, rate in rates.items() if "parse" in name)
    assert parses / sum(rates.values()) == pytest.approx(share)


def test_a_task_gives_bytes_with_an_end_mark(folder):
    task = seqio.TaskRegistry.get("mtop6_tag_hi")
    (first, *_) = task.get_dataset(None, "train", shuffle=False).as_numpy_iterator()
    text, tags = (list(first[name]) for name in ("inputs", "targets"))
    assert [i - 3 for i in text[:-1]] == list(b"tag: word") and text[-1] == tags[-1] == 1


def test_an_empty_split_is_an_error_that_names_task_and_split(folder):
    path = folder / "pos_mt/ud_pud/en_pud-ud-test.conllu"
    path.write_text(treebank("en", ["n00000"]))
    empty = next(s for s in mtop6.SPLITS if s != xling.split_of("n00000001"))
    read = functools.partial(mtop6.tag_examples, "en")
    byte_tasks.add_task("empty_split_test", read, [empty], {"task": "tag"}, byte_tasks.TAG)
    with pytest.raises(
        files.RowError, match=f"task 'empty_split_test', split '{empty}': no examples"
    ):
        seqio.TaskRegistry.get("empty_split_test").get_dataset(None, empty)


@pytest.mark.parametrize("example", [("tag: a", " "), ("", "X")])
def test_an_empty_input_or_target_is_an_error_that_names_task_split_and_example(example):
    rows = [{"inputs": "tag: a", "targets": "X"}, dict(inputs=example[0], targets=example[1])]
    with pytest.raises(files.RowError, match="task 't', example 2: `(inputs|targets)` is empty"):
        byte_tasks.check(rows, "task 't'")


def test_a_missing_file_is_named_when_its_data_is_asked_for(folder):
    (folder / "qa/xquad/xquad.th.json").unlink()
    with pytest.raises(files.MissingDataError, match=r"xquad\.th\.json.*google-deepmind/xquad"):
        mtop6.qa_examples("th", "test")


@pytest.mark.skipif(files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} is not set")
def test_the_real_data_has_the_documented_sizes():
    for language in mtop6.LANGUAGES:
        sizes = [len(mtop6.parse_examples(language, split)) for split in mtop6.SPLITS]
        assert sizes == [700, 159, 1237]
        assert sum(len(mtop6._sentences(language, split)) for split in mtop6.SPLITS) == 1000
    assert len(mtop6.english_examples("train")) == 15627


def test_the_second_split_trains_parses_of_other_languages():
    trained = registry.tasks_of("mtop6_train_second")
    parses = [task.rpartition("_")[2] for task in trained if "parse" in task]
    assert parses == sorted(mtop6.PARSE_TRAINED_SECOND) == ["en", "es", "hi"]
    assert set(registry.tasks_of("mtop6_train")) - set(trained) == {
        "mtop6_parse_de",
        "mtop6_parse_fr",
    }


@pytest.fixture
def pieces(folder, tmp_path):
    """The datasets in pieces of the tiny texts, registered until the test ends."""
    path = tmp_path / "spiece.model"
    # So few texts have no more pieces than this.
    mtop6_pieces.write_vocabulary(path, len(mtop6_pieces.symbols()) + 256 + 60)
    before = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
    mtop6_pieces.register(path)
    yield mtop6_pieces.vocabulary(path)
    for name in (set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())) - before:
        registry.remove(name)


def test_names_tags_and_prompts_are_one_piece_each(pieces):
    def spelt(text):
        return [pieces.tokenizer.IdToPiece(i) for i in pieces.encode(text)]

    parse = "[IN:X [SL:Y dev 1 in en ] ]"
    found = spelt(parse)
    assert found[:2] == ["▁[IN:X", "▁[SL:Y"] and found[-2:] == ["▁]", "▁]"]
    assert pieces.decode(pieces.encode(parse)) == parse
    assert spelt("NOUN PUNCT") == ["▁NOUN", "▁PUNCT"] and spelt("parse: ")[0] == "▁parse:"
    # What no text has is written in bytes, and comes back.
    assert pieces.decode(pieces.encode("Ω")) == "Ω" and len(spelt("Ω")) == 3


def test_pieces_have_the_datasets_of_bytes_and_their_lengths_are_fewer(pieces):
    for mixture in ("train", "train_second", "eval", "parse"):
        ours = registry.tasks_of(f"mtop6_pieces_{mixture}")
        assert [name.replace("_pieces", "") for name in ours] == registry.tasks_of(
            f"mtop6_{mixture}"
        )
    for name in ("parse_hi", "tag_th", "qa_en"):
        shorter, longer = (
            next(
                seqio.TaskRegistry.get(f"{prefix}_{name}")
                .get_dataset(None, "validation", shuffle=False)
                .as_numpy_iterator()
            )
            for prefix in ("mtop6_pieces", "mtop6")
        )
        assert shorter["targets_pretokenized"] == longer["targets_pretokenized"]
        assert len(shorter["inputs"]) < len(longer["inputs"])


def test_every_lesson_has_targets_whatever_the_text(pieces):
    for kind in ("fill", "restore", "copy", "quote"):
        task = seqio.TaskRegistry.get(f"mtop6_pieces_{kind}_en")
        rows = list(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
        assert rows and all(len(row["targets"]) > 1 for row in rows)

"""Treebanks and questions: reading, splits, windows."""

import json

import pytest

from tasks import files, xling

WORD = "{}\t{}\t_\t{}\t_\t_\t0\troot\t_\t_"


def sentence(name, *words, text="some text"):
    lines = [f"# sent_id = {name}", f"# text = {text}", "# text = later ones do not count"]
    lines += [WORD.format(number, form, tag) for number, form, tag in words]
    return "\n".join(lines) + "\n\n"


def conllu(tmp_path, *sentences):
    path = tmp_path / "x.conllu"
    path.write_text("".join(sentences), encoding="utf-8")
    return str(path)


def squad(tmp_path, context, *questions):
    qas = [
        {"id": name, "question": question, "answers": [{"text": answer, "answer_start": start}]}
        for name, question, answer, start in questions
    ]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    return str(path)


def test_words_are_the_syntactic_ones_and_correspond_to_tags(tmp_path):
    words = [("1-2", "au", "_"), (1, "à", "ADP"), (2, "le", "DET"), (3, "10 000", "NUM")]
    path = conllu(tmp_path, sentence("n01001011", *words, ("3.1", "x", "X"), text="au  10 000"))
    (read,) = xling.read_conllu(path)
    assert read == xling.Sentence(
        "n01001011", "au 10 000", ("à", "le", "10_000"), ("ADP", "DET", "NUM")
    )
    whole = {"inputs": "tag: à le 10_000", "targets": "ADP DET NUM"}
    assert xling.tag_example(read, len("tag: à le 10_000".encode()), 11) == whole
    start = {"inputs": "tag: à le", "targets": "ADP DET"}
    assert xling.tag_example(read, len("tag: à le 10_000".encode()) - 1, 11) == start
    assert xling.tag_example(read, 99, 10) == start
    assert xling.tag_example(read, 6, 99) is None


def test_a_last_sentence_without_a_blank_line_after_it_is_read(tmp_path):
    path = conllu(
        tmp_path, sentence("a001", (1, "x", "X")), sentence("b001", (1, "y", "X")).strip()
    )
    assert [s.id for s in xling.read_conllu(path)] == ["a001", "b001"]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            sentence("a001", (1, "x", "X")) + "1\tx\n",
            r"x\.conllu:6: 2 columns where CoNLL-U has 10",
        ),
        (sentence("a001", ("x", "x", "X")), r"x\.conllu:4: the first column is 'x'"),
        (sentence("a001", (1, "x", "_")), r"x\.conllu:4: the word 'x' has the tag '_'"),
        (sentence("a001", (1, " ", "X")), r"x\.conllu:4: the word '' has the tag 'X'"),
        (sentence("a001", (1, "x", "X")) * 2, r"x\.conllu:10: the sentence 'a001' occurs a second"),
        (sentence("", (1, "x", "X")), "lacks its `# sent_id"),
        (sentence("a001"), "lacks .* or its words"),
        ("", "there is no sentence"),
    ],
)
def test_malformed_treebanks_are_errors_with_file_and_line(tmp_path, text, message):
    with pytest.raises(files.RowError, match=message):
        xling.read_conllu(conllu(tmp_path, text))


def test_sentences_of_one_document_share_a_split_and_all_splits_occur():
    documents = [f"n{i:05d}" for i in range(400)]
    splits = [xling.split_of(f"{d}001") for d in documents]
    assert splits == [xling.split_of(f"{d}042") for d in documents]
    shares = [splits.count(s) / len(splits) for s in ("train", "validation", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.07)


def test_translation_pairs_by_id_in_both_directions_and_names_the_language_to_write():
    def make(name, text):
        return xling.Sentence(name, text, ("w",), ("X",))

    english = [make("1", "one"), make("2", "two")]
    assert xling.translation_examples("de", english, [make("3", "drei"), make("2", "zwei")]) == [
        {"inputs": "translate to de: two", "targets": "zwei"},
        {"inputs": "translate to en: zwei", "targets": "two"},
    ]


@pytest.mark.parametrize("language", ["en", "th"])
@pytest.mark.parametrize("limit", [8, 40, 100, 10_000])
def test_windows_hold_the_answer_within_the_limit_wherever_it_stands(language, limit):
    context = "the cat sat on the mat and slept " * 9 if language == "en" else "แมวนอนหลับ" * 9
    answer = {"en": "mat", "th": "อน"}[language]
    places = {}
    for start in (i for i in range(len(context)) if context.startswith(answer, i)):
        for name in ("a", "b", "c"):
            question = xling.Question(name, "?", context, answer, start)
            window = xling.window(question, limit)
            assert window == xling.window(question, limit)
            assert answer in window and window in context and len(window.encode()) <= limit
            # As full as cuts between words allow.
            assert len(window.encode()) >= min(limit, len(context.encode())) - 24
            places.setdefault(start, set()).add(window.find(answer))
    if limit == 100:
        assert max(len(p) for p in places.values()) == 3, "the place depends on the question's id"


def test_windows_are_cut_between_words():
    context = "alpha beta gamma delta epsilon zeta eta theta"
    question = xling.Question("id", "?", context, "delta", context.index("delta"))
    window = xling.window(question, 27)
    assert set(window.split()) < set(context.split()) and len(window.split()) >= 3


def test_an_answer_longer_than_the_limit_gives_no_example():
    question = xling.Question("id", "who?", "long answer here", "long answer", 0)
    assert xling.qa_example(question, len("qa: who? context: ") + 10) is None
    assert xling.qa_example(question, len("qa: who? context: ") + 11) == {
        "inputs": "qa: who? context: long answer",
        "targets": "long answer",
    }


def test_questions_are_read_and_the_answer_stripped(tmp_path):
    path = squad(tmp_path, "\ufeffin Oslo  today", ("1", " where? ", " Oslo ", 3))
    (question,) = xling.read_squad(path)
    assert question.answer == "Oslo" and question.question == "where?"
    assert question.context[question.start :].startswith("Oslo")
    assert xling.qa_example(question, 99)["inputs"] == "qa: where? context: in Oslo today"


@pytest.mark.parametrize(
    "question, message",
    [
        (("q7", "where?", "Oslo", 0), r"question q7: at character 0 the context has 'in O'"),
        (("q7", "where?", "", 0), "question q7: the question or its answer is empty"),
        (("q7", "", "Oslo", 3), "question q7: the question or its answer is empty"),
    ],
)
def test_bad_questions_are_errors_with_file_and_id(tmp_path, question, message):
    with pytest.raises(files.RowError, match="qa.json, " + message):
        xling.read_squad(squad(tmp_path, "in Oslo", ("q1", "where?", "Oslo", 3), question))


def test_files_in_another_form_are_errors(tmp_path):
    path = tmp_path / "qa.json"
    for text, message in [
        ('{"data": [{"title": "x"}]}', "not in SQuAD's form .*paragraphs"),
        ("{\n", r"qa\.json:2: not JSON"),
        ('{"data": []}', "there is no question"),
    ]:
        path.write_text(text)
        with pytest.raises(files.RowError, match=message):
            xling.read_squad(str(path))


def test_pieces_are_consecutive_and_lose_nothing_but_spaces():
    text = "one two three " * 5 + "หลับ" * 9
    parts = xling.pieces(text, 20)
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert all(0 < len(part.encode()) <= 20 for part in parts)

"""Reading MTOP in its published and its parallel layout."""

import json

import pytest

from modjax.data import registry
from tasks import files, mtop

PARSE = "[IN:GET_WEATHER [SL:LOCATION Oslo ] ]"


def row(number=0, text="weather in Oslo", parse=PARSE):
    """A line of the published files: eight columns."""
    tokens = json.dumps({"tokens": text.split(), "tokenType": "PLAIN"})
    cells = [str(number), "IN:GET_WEATHER", "11:15:SL:LOCATION", text, "weather", "en_XX"]
    return "\t".join([*cells, parse, tokens])


def entry(name, **texts):
    """An entry of the parallel JSON."""
    parses = dict.fromkeys(texts, PARSE)
    return {"id": name, "question": texts, "mr": {"slot_intent": parses}}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_published_rows_keep_id_utterance_and_decoupled_form(tmp_path):
    path = write(tmp_path / "train.txt", row(7, 'a "quoted  utterance'), "", row(8, "मौसम"))
    assert mtop.read_published(path) == [
        mtop.Utterance("7", 'a "quoted utterance', PARSE),
        mtop.Utterance("8", "मौसम", PARSE),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("a\tb\tc", r"train\.txt:2: 3 columns where MTOP has 8.*decoupled form"),
        (row() + "\tmore", r"train\.txt:2: 9 columns"),
        (row(text=" "), r"train\.txt:2: the utterance is empty"),
        (row(parse=""), r"train\.txt:2: the parse is empty"),
        (row(parse="[IN:X [SL:Y a ]"), r"train\.txt:2: not a bracketed parse: 1 brackets"),
    ],
)
def test_malformed_published_rows_are_errors_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "train.txt", row(), line)
    with pytest.raises(files.RowError, match=message):
        mtop.read_published(path)


def test_a_published_file_without_rows_is_an_error(tmp_path):
    with pytest.raises(files.RowError, match="train.txt: there is no row"):
        mtop.read_published(write(tmp_path / "train.txt", ""))


def test_published_tasks_read_their_folder_and_carry_features_and_metrics(tmp_path):
    write(tmp_path / "en" / "train.txt", row(1), row(2, "and tomorrow"))
    write(tmp_path / "en" / "eval.tsv", row(3, "eval row"))
    names = mtop.register(str(tmp_path), ["en", "fr"], prefix="mtop_published_test")
    assert registry.metadata_of(names[1]) == {"task": "parse", "language": "fr"}
    assert registry.metric_names_of(names[0])[:2] == ("exact_match", "inexact_match")
    import seqio

    task = seqio.TaskRegistry.get(names[0])
    data = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert [ex["inputs_pretokenized"].decode() for ex in data] == [
        "parse: weather in Oslo",
        "parse: and tomorrow",
    ]
    assert bytes(int(i) - 3 for i in data[0]["targets"][:-1]).decode() == PARSE
    assert data[0]["inputs"][-1] == data[0]["targets"][-1] == 1
    assert len(list(task.get_dataset(None, "validation", shuffle=False))) == 1
    with pytest.raises(files.MissingDataError, match=r"fr/train\.txt.*mtop_dataset"):
        seqio.TaskRegistry.get(names[1]).get_dataset(None, "train")


def test_parallel_entries_become_rows_per_language_in_the_same_order(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([entry("1", en="a", th="ก ข"), entry("2", th="ค", en="b")]))
    rows = mtop.read_parallel(str(path))
    assert [r.text for r in rows["th"]] == ["ก ข", "ค"]
    assert [r.id for r in rows["en"]] == [r.id for r in rows["th"]] == ["1", "2"]


@pytest.mark.parametrize(
    "entries, message",
    [
        ([entry("1", en="a"), {"id": "2"}], r"dev\.json, entry 2: needs `id`, `question`"),
        ([entry("1", en="a"), entry("1", en="b")], "entry 2: the id '1' occurs a second time"),
        ([entry("1", en="a", fr="b"), entry("2", en="b")], r"entry 2 \(id 2\): languages \['en'\]"),
        ([entry("1", en="  ")], "entry 1, en: the utterance is empty"),
        ([], "there is no row"),
        ({"data": []}, "a dict where a list"),
    ],
)
def test_malformed_parallel_files_are_errors_with_file_and_entry(tmp_path, entries, message):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(files.RowError, match=message):
        mtop.read_parallel(str(path))


def test_json_that_is_cut_off_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text('[\n{"id": "1",\n')
    with pytest.raises(files.RowError, match=r"dev\.json:3: not JSON"):
        mtop.read_parallel(str(path))


def test_english_lines_are_read_and_bad_ones_named(tmp_path):
    good = json.dumps({"question": "weather  in Oslo", "logical_form": PARSE})
    path = write(tmp_path / "train.json", good)
    assert mtop.read_english(path) == [mtop.Utterance("1", "weather in Oslo", PARSE)]
    with pytest.raises(files.RowError, match=r"bad\.json:2: needs `question`"):
        mtop.read_english(write(tmp_path / "bad.json", good, '{"question": "x"}'))
    with pytest.raises(files.RowError, match=r"broken\.json:2.*not JSON"):
        mtop.read_english(write(tmp_path / "broken.json", good, "{"))


def test_held_out_utterances_are_found_whatever_their_spaces_case_and_punctuation():
    rows = [mtop.Utterance(str(i), t, PARSE) for i, t in enumerate(["Set  alarm .", "Set alarms"])]
    held_out = [mtop.Utterance("9", "set alarm", PARSE)]
    assert [r.text for r in mtop.without(rows, held_out)] == ["Set alarms"]

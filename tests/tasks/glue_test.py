"""RTE and CoLA: what is read, refused, split and registered."""

import gzip

import numpy as np
import pytest
import seqio

from modjax.data import registry
from tasks import files, tokenizer
from tests.testdata import tokenizer_folders

HEADER = "index\tsentence1\tsentence2\tlabel"


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The module, with its tasks in the tokens of a small WordPiece."""
    folder = tokenizer_folders.make("word_piece", tmp_path_factory.mktemp("base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tokenizer.VARIABLE, str(folder))
        from tasks import glue

        glue.register(tokenizer.vocabulary())
        yield glue


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def rte(number, label="entailment"):
    return f"{number}\tThe premise {number // 2} is long.\tIt is {number}.\t{label}"


def cola(number, label=1):
    return f"gj04\t{label}\t{'' if label else '*'}\tSentence {number} stands here."


def test_rows_are_read_with_and_without_a_header(glue, tmp_path):
    rows = [rte(0), rte(1, "not_entailment")]
    found = glue.read_rte(write(tmp_path / "train.tsv", HEADER, *rows))
    assert found == glue.read_rte(write(tmp_path / "val.tsv.gz", *rows))
    assert found[1] == {
        "premise": "The premise 0 is long.",
        "hypothesis": "It is 1.",
        "targets": "not_entailment",
    }
    assert glue.read_cola(write(tmp_path / "cola.tsv", cola(0), cola(1, 0))) == [
        {"sentence": "Sentence 0 stands here.", "targets": "acceptable"},
        {"sentence": "Sentence 1 stands here.", "targets": "unacceptable"},
    ]


@pytest.mark.parametrize(
    "read, line, message",
    [
        (
            "read_rte",
            "0\ta\tentailment",
            r"f\.tsv:2: 3 columns where there are 4: index, sentence1",
        ),
        ("read_rte", rte(0, "neutral"), r"f\.tsv:2: the label is 'neutral', not one of \('entail"),
        ("read_rte", "0\t \tb\tentailment", r"f\.tsv:2: the premise is empty"),
        ("read_cola", cola(0, 2), r"f\.tsv:2: the label is '2', not 0 or 1"),
        ("read_cola", "gj04\t1\t\t", r"f\.tsv:2: the sentence is empty"),
    ],
)
def test_malformed_rows_are_errors_with_file_and_line(glue, tmp_path, read, line, message):
    good = {"read_rte": rte(7), "read_cola": cola(7)}[read]
    path = write(tmp_path / "f.tsv", good, line)
    with pytest.raises(files.RowError, match=message):
        getattr(glue, read)(path)


def test_a_file_without_rows_is_an_error(glue, tmp_path):
    with pytest.raises(files.RowError, match="f.tsv: there is no row"):
        glue.read_rte(write(tmp_path / "f.tsv", HEADER))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    folder = tmp_path / "glue"
    labels = ("entailment", "not_entailment")
    write(folder / "RTE/train.tsv", HEADER, *(rte(i, labels[i % 3 > 0]) for i in range(60)))
    write(folder / "RTE/dev.tsv.gz", HEADER, *(rte(i) for i in range(100, 107)))
    write(folder / "CoLA/train.tsv", *(cola(i, i % 2) for i in range(60)))
    write(folder / "CoLA/dev.tsv", *(cola(i, i % 2) for i in range(100, 105)))
    return folder


@pytest.mark.parametrize("folder, read", [("RTE", "read_rte"), ("CoLA", "read_cola")])
def test_splits_share_the_training_set_whichever_way_a_copy_has_cut_it(glue, data, folder, read):
    def splits():
        return {s: glue.examples(folder, getattr(glue, read), s) for s in glue.SPLITS}

    before = splits()
    texts = {s: {tuple(sorted(ex.items())) for ex in rows} for s, rows in before.items()}
    assert len(texts["train"] | texts["validation"]) == 60 and texts["validation"]
    assert not texts["train"] & texts["validation"]
    assert len(before["test"]) == {"RTE": 7, "CoLA": 5}[folder]
    first = {s: {ex.get("premise", ex.get("sentence")) for ex in before[s]} for s in before}
    assert not first["train"] & first["validation"]

    lines = (data / folder / "train.tsv").read_text().splitlines()
    write(data / folder / "train.tsv", *lines[:41])
    write(data / folder / "val.tsv.gz", *lines[41:])
    assert splits() == before


def test_a_missing_file_is_named_with_where_it_can_be_got(glue, data):
    (data / "RTE/train.tsv").unlink()
    with pytest.raises(files.MissingDataError, match=r"RTE/train\.tsv.*gluebenchmark"):
        glue.examples("RTE", glue.read_rte, "train")


@pytest.mark.parametrize("limit", [64, 24])
def test_rte_is_a_pair_in_the_template_and_a_long_premise_is_cut_first(glue, data, limit):
    glue.register(tokenizer.vocabulary())  # what was read before is forgotten
    assert registry.metadata_of("glue_rte") == {"task": "rte"}
    assert registry.metric_names_of("glue_rte") == ("exact_match", "matthews")
    task = seqio.TaskRegistry.get("glue_rte")
    vocabulary = task.output_features["inputs"].vocabulary
    lengths = {"inputs": limit, "targets": 1}
    (first, *_), read = task.get_dataset(lengths, "test", shuffle=False), glue.read_rte
    example = read(str(data / "RTE/dev.tsv.gz"))[0]
    parts = [vocabulary.encode(example[name]) for name in ("premise", "hypothesis")]
    tokens = first["inputs"].numpy()
    hypothesis = [*parts[1], vocabulary.sep_id]
    np.testing.assert_array_equal(tokens[-len(hypothesis) :], hypothesis)
    kept = tokens[1 : -len(hypothesis) - 1]
    np.testing.assert_array_equal(kept, parts[0][: len(kept)])
    assert len(tokens) == min(limit, len(parts[0]) + len(parts[1]) + 3)
    assert first["targets"].numpy().tolist() == [1]


def test_cola_is_one_sentence_and_its_label(glue, data):
    glue.register(tokenizer.vocabulary())
    task = seqio.TaskRegistry.get("glue_cola")
    rows = list(task.get_dataset({"inputs": 64, "targets": 1}, "test", shuffle=False))
    assert [int(row["targets"][0]) for row in rows] == [1, 2, 1, 2, 1]
    vocabulary = task.output_features["targets"].vocabulary
    assert vocabulary.decode([2]) == "acceptable"


def test_without_a_base_the_error_says_what_to_bind(monkeypatch):
    monkeypatch.delenv(tokenizer.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"tokenizer\.vocabulary\.path = %BASE.*MODJAX_BASE"):
        tokenizer.vocabulary()

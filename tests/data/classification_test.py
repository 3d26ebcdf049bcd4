"""Tasks for encoders: texts in the template, labels and numbers as targets, and back to text."""

import numpy as np
import pytest

from modjax.data import classification, converters, pipeline, registry, vocabularies
from modjax.data.sources import ExamplesSource
from modjax.features import FeatureSpace
from tests.testdata import tokenizer_folders

GREEK, KOREAN = tokenizer_folders.TEXTS["greek"], tokenizer_folders.TEXTS["hangul"]
ROWS = [
    {"one": GREEK, "two": KOREAN, "targets": "other"},
    {"one": KOREAN[:6], "two": KOREAN[:6], "targets": "same"},
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return vocabularies.vocabulary_of(
        tokenizer_folders.word_piece(tmp_path_factory.mktemp("words"))
    )


@pytest.fixture
def add(vocabulary):
    """Registers a task of two texts, or of one; forgets it afterwards."""
    names = []

    def add(name, rows, texts, labels):
        registry.add_task(
            name,
            ExamplesSource({"train": rows}),
            [classification.in_template(texts), classification.tokenize_target],
            classification.features(vocabulary, labels),
        )
        names.append(name)

    yield add
    for name in names:
        registry.remove(name)


def read(task, converter, inputs, **options):
    batches = pipeline.eval_batches(
        task,
        "train",
        FeatureSpace(()),
        task_feature_lengths={"inputs": inputs, "targets": 1},
        batch_size=2,
        converter=converter,
        **options,
    )
    return next(batches)


def test_the_example_of_the_documentation_registers_its_task(vocabulary):
    _, example = classification.__doc__.split("\n\n", 1)
    source = ExamplesSource({"train": ROWS})
    try:
        exec(example, {**globals(), "vocabulary": vocabulary, "source": source})
        assert registry.metric_names_of("rte") == ("exact_match",)
    finally:
        registry.remove("rte")


def test_pairs_are_joined_in_the_template_and_cut_inside_it(add, vocabulary):
    add("cls_pair", ROWS, ("one", "two"), ("same", "other"))
    sep = vocabulary.sep_id
    make = converters.ClassificationFeatureConverter.ending_with(sep)
    batch, texts = read("cls_pair", make, 200)
    for row, types, example in zip(
        batch["encoder_input_tokens"], batch["encoder_token_types"], ROWS, strict=True
    ):
        expected, kinds = vocabulary.encode_pair(example["one"], example["two"])
        assert row[row > 0].tolist() == expected and types[row > 0].tolist() == kinds
        assert not types[row == 0].any()
    assert batch["labels"].tolist() == [[2], [1]]
    assert texts[1]["inputs_pretokenized"] == f"{KOREAN[:6]}\n{KOREAN[:6]}"
    assert [text["targets_pretokenized"] for text in texts] == ["other", "same"]

    batch, _ = read("cls_pair", make, 16)
    row = batch["encoder_input_tokens"][0]
    assert (row > 0).all() and row[0] == vocabulary.cls_id and row[-1] == sep
    assert np.count_nonzero(row == sep) == 2
    # What was cut is said, and refused where that is asked for.
    _, texts = read("cls_pair", make, 16)
    assert [text.too_long for text in texts] == [["inputs"], []]
    with pytest.raises(ValueError, match="example 0: inputs over the limit of 16 tokens"):
        read("cls_pair", make, 16, on_too_long="error")


def test_numbers_are_float_targets(add):
    add("cls_number", [{"inputs": GREEK, "targets": "-1.25"}], ("inputs",), None)
    for text in ("3", " 0.5 ", "+.5e-1", "2."):
        assert classification.NumberVocabulary().encode_tf(text).numpy().tolist() == [
            np.float32(text)
        ]
    batch, _ = read("cls_number", converters.RegressionFeatureConverter.ending_with(None), 64)
    assert batch["values"].dtype == np.float32 and batch["values"][0].tolist() == [-1.25]
    assert not batch["encoder_token_types"].any()
    numbers = classification.NumberVocabulary()
    assert numbers.encode("2.5") == [2.5] and numbers.decode([2.5]) == "2.5"


def test_numbers_of_a_preprocessor_of_ones_own_are_read_back_whole(vocabulary):
    def keep(ds, output_features):
        return ds.map(lambda ex: {**ex, "targets": [ex["targets"]]})

    rows = [{"inputs": GREEK, "targets": value} for value in (3.5, 0.0, -0.25)]
    steps = [classification.in_template(("inputs",)), keep]
    source = ExamplesSource(
        {"train": [{**row, "targets": np.float32(row["targets"])} for row in rows]}
    )
    registry.add_task("cls_own", source, steps, classification.features(vocabulary, None))
    try:
        make = converters.RegressionFeatureConverter.ending_with(None)
        batch, texts = read("cls_own", make, 64)
        assert batch["values"][:, 0].tolist() == [3.5, 0.0]
        assert [text["targets_pretokenized"] for text in texts] == ["3.5", "0"]
    finally:
        registry.remove("cls_own")


def test_labels_go_there_and_back_and_others_are_refused(add):
    labels = classification.LabelVocabulary(("no", "yes"))
    assert labels.encode("yes") == [2] and labels.decode([2]) == "yes" and labels.vocab_size == 3
    assert labels == classification.LabelVocabulary(("no", "yes"))
    assert labels != classification.LabelVocabulary(("yes", "no"))
    with pytest.raises(ValueError, match="'yess' is no label. Did you mean 'yes'"):
        labels.encode("yess")
    with pytest.raises(ValueError, match="different texts, at least one"):
        classification.LabelVocabulary(("a", "a"))
    with pytest.raises(ValueError, match="name of one text or two"):
        classification.in_template(("a", "b", "c"))
    add("cls_odd", [{"inputs": GREEK, "targets": "maybe"}], ("inputs",), ("no", "yes"))
    make = converters.ClassificationFeatureConverter.ending_with(None)
    message = "task 'cls_odd': an example has the target 'maybe', which is no label; .* no, yes"
    with pytest.raises(ValueError, match=message):
        read("cls_odd", make, 64)


@pytest.mark.parametrize("text", ["maybe", "", "nan", "1,5", "1.5.2"])
def test_a_target_that_is_no_number_is_an_error_that_names_the_task(add, text):
    add("cls_odd", [{"inputs": GREEK, "targets": text}], ("inputs",), None)
    message = f"task 'cls_odd': an example has the target '{text}', which is no number"
    with pytest.raises(ValueError, match=message):
        read("cls_odd", converters.RegressionFeatureConverter.ending_with(None), 64)


def test_a_number_that_is_no_text_is_refused(add):
    add("cls_float", [{"inputs": GREEK, "targets": 1.5}], ("inputs",), None)
    with pytest.raises(ValueError, match="'targets' are float64; write .* as text"):
        read("cls_float", converters.RegressionFeatureConverter.ending_with(None), 64)

"""Evaluation batches: every example once and in order, its text beside it, shared by processes."""

import numpy as np
import pytest
import seqio

from modjax.data import pipeline, registry
from modjax.data.converters import EncDecFeatureConverter
from modjax.data.sources import ExamplesSource
from modjax.features import FeatureSpace, UnknownFeatureError

FEATURES = {k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")}
STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
LENGTHS = {"inputs": 8, "targets": 6}
ROWS = [{"inputs": f"é{i}", "targets": "x" * (i + 1), "note": i} for i in range(7)]


@pytest.fixture
def space():
    registry.add_task(
        "ev_task",
        ExamplesSource({"test": ROWS}),
        STEPS,
        FEATURES,
        metadata={"task": "copy", "language": "sw"},
    )
    yield registry.feature_space("ev_task")
    registry.remove("ev_task")


def batches(space, **kwargs):
    kwargs = {"batch_size": 4, "task_feature_lengths": LENGTHS, **kwargs}
    return list(pipeline.eval_batches("ev_task", "test", space, **kwargs))


def test_every_example_comes_once_in_order_with_its_text(space):
    found = batches(space)
    assert [b["valid"].tolist() for b, _ in found] == [[True] * 4, [True] * 3 + [False]]
    examples = [ex for _, part in found for ex in part]
    assert [ex.index for ex in examples] == list(range(7))
    for ex, row in zip(examples, ROWS, strict=True):
        assert ex.task == "ev_task" and ex["note"] == row["note"]
        assert ex["inputs_pretokenized"] == row["inputs"]
        assert ex["targets_pretokenized"] == row["targets"]
        assert ex.too_long == (["targets"] if len(row["targets"]) > 5 else [])
    last, _ = found[-1]
    assert not any(last[name][3].any() for name in last)
    assert last["features"].tolist() == [[[1, 1]]] * 3 + [[[0, 0]]]
    assert len(batches(space, max_examples=3)) == 1


def test_fields_of_an_examples_own_stay_what_they_are():
    own = {"task": "ev_other", "index": 7, "too_long": "no"}
    names = ("ev_own", "ev_other")
    for name in names:
        rows = [{"inputs": name[3:], "targets": "x", **own, "task": names[name == "ev_own"]}]
        registry.add_task(name, ExamplesSource({"test": rows}), STEPS, FEATURES)
    try:
        found = pipeline.eval_batches_of(
            names, "test", None, task_feature_lengths=LENGTHS, batch_size=1
        )
        examples = {ex.task: ex for _, (ex,) in found}
        for name in names:
            ex = examples[name]
            assert ex["inputs_pretokenized"] == name[3:] and ex["task"] != name
            assert (ex.index, ex["index"], ex.too_long, ex["too_long"]) == (0, 7, [], "no")
    finally:
        for name in names:
            registry.remove(name)


def test_arrays_are_those_of_the_feature_converter(space):
    converter = EncDecFeatureConverter.bind(space)(pack=False)
    ds = seqio.get_dataset("ev_task", LENGTHS, converter, dataset_split="test", verbose=False)
    expected = next(ds.batch(7).as_numpy_iterator())
    ((batch, _),) = batches(space, batch_size=7)
    assert set(batch) == {*expected, "valid"}
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)
        assert batch[name].dtype == value.dtype


def test_processes_get_equally_many_batches_that_add_up_to_the_whole(space):
    whole = batches(space)
    parts = [batches(space, rows=rows) for rows in ([0, 1], [2, 3])]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for (batch, examples), (one, first), (two, second) in zip(whole, *parts, strict=True):
        assert examples == first + second
        for name, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([one[name], two[name]]))


def test_values_that_were_never_trained_are_none_or_refused_as_asked(space):
    trained = FeatureSpace((("task", ("copy",)), ("language", ("en",))), ("other",))
    batch, _ = batches(trained)[0]
    assert batch["features"][0].tolist() == [[1, 0]] and batch["tasks"][0].tolist() == [0]
    with pytest.raises(UnknownFeatureError, match="'ev_task': unknown value 'sw'.*Known: en"):
        batches(trained, unknown="error")
    assert batches(None)[0][0]["features"].shape == (4, 1, 0)


def test_what_cannot_be_evaluated_is_refused_by_name(space):
    with pytest.raises(ValueError, match="'ev_task', example 5: targets over the limit of 6"):
        batches(space, on_too_long="error")
    with pytest.raises(ValueError, match="batch_size=0 must be a positive multiple"):
        batches(space, batch_size=0)
    registry.add_mixture("ev_mix", ["ev_task"])
    bad = [{"inputs": b"\xff\xfe", "targets": "x"}]
    registry.add_task("ev_bytes", ExamplesSource({"test": bad, "none": []}), STEPS, FEATURES)
    settings = {"task_feature_lengths": LENGTHS, "batch_size": 1}
    try:
        with pytest.raises(ValueError, match=r"'ev_mix' is a mixture; .*\['ev_task'\]"):
            pipeline.eval_batches("ev_mix", "test", space, **settings)
        with pytest.raises(ValueError, match="'ev_bytes' has no metadata"):
            pipeline.eval_batches("ev_bytes", "test", space, **settings)
        with pytest.raises(ValueError, match="'ev_bytes', split 'none': Split 'none' is empty"):
            pipeline.eval_batches("ev_bytes", "none", None, **settings)
        with pytest.raises(ValueError, match="'ev_bytes', example 0: inputs_pret.*not valid UTF-8"):
            next(pipeline.eval_batches("ev_bytes", "test", None, **settings))
    finally:
        registry.remove("ev_mix")
        registry.remove("ev_bytes")

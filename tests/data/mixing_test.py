"""Tasks that are read together: the same examples in the same order as SeqIO gives, and who is read alone."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from modjax.data import mixing, pipeline, registry
from modjax.data.sources import ExamplesSource
from modjax.evaluation import runner

FEATURES = {k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")}
TRIMMED = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
CACHED = [
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
]
LENGTHS = {"inputs": 16, "targets": 12}
SHARD = seqio.ShardInfo(0, 1)


def rows(name, number, **more):
    """Some are longer than the limit."""
    texts = [f"{name}{i}" + "." * (i % 14) for i in range(number)]
    return [{"inputs": text, "targets": text[::-1], **more} for text in texts]


@pytest.fixture
def add():
    """Registers a task or a mixture until the test ends."""
    added = []

    def add_one(name, examples, steps=TRIMMED, source=None, features=FEATURES, **kwargs):
        added.append(name)
        if isinstance(examples, list) and not isinstance(examples[0], dict):
            return registry.add_mixture(name, examples)
        source = source or ExamplesSource({"train": examples, "test": examples[:7]})
        metadata = {"task": "copy", "language": name}
        return registry.add_task(name, source, steps, features, metadata=metadata, **kwargs)

    yield add_one
    for name in reversed(added):
        registry.remove(name)


def batches(mixture, number, **options):
    options = {"batch_size": 4, "seed": 3, "task_feature_lengths": LENGTHS} | options
    space = registry.feature_space(mixture)
    iterator = pipeline.train_iterator(mixture, "train", space, **options)
    found = [batch for _, batch in zip(range(number), iterator, strict=False)]
    return found, iterator.stats


def same(one, two):
    return set(one) == set(two) and all(
        np.array_equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_shards": 2},
        {"num_epochs": 2},
        {"num_epochs": 1, "shuffle": False},
        {"pack": False},
    ],
)
@pytest.mark.parametrize("steps", [TRIMMED, CACHED])
def test_batches_are_seqios(add, monkeypatch, options, steps):
    for name, number in (("mx_a", 40), ("mx_b", 9), ("mx_c", 23)):
        add(name, rows(name[-1], number), steps)
    # A task without the split is left out, as SeqIO does.
    add("mx_d", rows("d", 5), steps, ExamplesSource({"test": rows("d", 5)}))
    add("mx", [("mx_a", 3.0), ("mx_b", 1.0), "mx_c", "mx_d"])
    calls = []
    joint = mixing.joint
    monkeypatch.setattr(mixing, "joint", lambda *a, **k: calls.append(joint(*a, **k)) or calls[-1])
    ours, counted = batches("mx", 40, **options)
    assert calls and all(isinstance(ds, tf.data.Dataset) for ds in calls)
    monkeypatch.setattr(mixing, "joint", lambda *a, **k: None)
    theirs, expected = batches("mx", 40, **options)
    assert len(ours) == len(theirs) and len(ours) > 5
    assert all(map(same, ours, theirs))
    assert counted == expected and counted["too_long"]["mx_a"]["inputs"] > 0


def test_a_joint_input_goes_on_exactly_where_it_was_saved(add, tmp_path):
    for name in ("mx_a", "mx_b"):
        add(name, rows(name[-1], 15))
    add("mx", ["mx_a", "mx_b"])
    options = {"batch_size": 2, "seed": 3, "task_feature_lengths": LENGTHS}
    space = registry.feature_space("mx")
    first = pipeline.train_iterator("mx", "train", space, **options)
    for _ in range(17):
        next(first)
    first.save(str(tmp_path))
    expected = [next(first) for _ in range(20)]
    again = pipeline.train_iterator("mx", "train", space, **options)
    assert again.restore(str(tmp_path)) == "exact"
    assert all(same(next(again), batch) for batch in expected)


def test_an_example_that_is_wrong_names_its_task_among_those_read_together(add):
    for name in ("mx_a", "mx_b"):
        add(name, rows(name[-1], 15) + [{"inputs": "x", "targets": ""}] * (name == "mx_b"))
    add("mx", ["mx_a", "mx_b"])
    with pytest.raises(ValueError, match="task 'mx_b': an example has empty targets.*It begins: x"):
        batches("mx", 40)


@seqio.map_over_dataset(num_seeds=1)
def _drawn(example, seed):
    return example | {"inputs": tf.random.experimental.stateless_shuffle(example["inputs"], seed)}


def _files():
    return seqio.FunctionDataSource(
        splits=["train"],
        dataset_fn=lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {k: [row[k] for row in rows("x", 9)] for k in ("inputs", "targets")}
        ),
    )


OTHER = {
    "other steps": {"steps": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]},
    "a draw": {"steps": [seqio.preprocessors.tokenize, _drawn, TRIMMED[1]]},
    "a source of another kind": {"source": _files()},
    "another end": {
        "features": FEATURES | {"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)}
    },
    "a shuffle buffer": {"shuffle_buffer_size": 10},
    "lessons without targets": {"empty_targets": "allow"},
    "tokens instead of text": {
        "source": ExamplesSource({"train": [{"inputs": [5, 6], "targets": [7]}] * 4})
    },
}


@pytest.mark.parametrize("other", OTHER)
def test_tasks_that_are_not_alike_are_left_to_seqio(add, other):
    add("mx_a", rows("a", 15))
    add("mx_b", rows("b", 15))
    add("mx_x", rows("x", 15), **OTHER[other])
    add("mx", ["mx_a", "mx_b"])
    add("mx_too", ["mx_a", "mx_x"])
    options = {"shuffle": True, "seed": 0, "shard_info": SHARD, "num_epochs": None}
    assert mixing.joint("mx", LENGTHS, "train", **options) is not None
    assert mixing.joint("mx_too", LENGTHS, "train", **options) is None
    assert mixing.joint("mx_a", LENGTHS, "train", **options) is None
    if other != "a shuffle buffer":  # nothing is shuffled in evaluation
        grouped = mixing.groups(["mx_a", "mx_x", "mx_b"], LENGTHS, "train")
        assert grouped == [["mx_a", "mx_b"], ["mx_x"]]


def test_an_evaluation_reads_the_same_examples_task_by_task(add, monkeypatch):
    for name in ("mx_b", "mx_a", "mx_c"):
        add(name, rows(name[-1], 15))
    add("mx_y", rows("y", 15, place="here"))
    add("mx_z", rows("z", 15, place="there"))
    add("mx", ["mx_a", "mx_y", "mx_b", "mx_c", "mx_z"])
    names = registry.tasks_of("mx")
    assert mixing.groups(names, LENGTHS, "test") == [["mx_a", "mx_b", "mx_c"], ["mx_y", "mx_z"]]

    def read(number):
        runner._read.cache_clear()
        space = registry.feature_space("mx")
        settings = {"task_feature_lengths": {"inputs": 6, "targets": 6}, "max_examples": number}
        return runner.read("mx", "test", space, **settings)

    ours = [read(None), read(3)]
    monkeypatch.setattr(mixing, "groups", lambda tasks, *args: [[task] for task in tasks])
    for one, other in zip(ours, [read(None), read(3)], strict=True):
        assert one.texts == other.texts and same(one.arrays, other.arrays)
    assert [text.index for text in ours[1].texts] == [0, 1, 2] * 5
    assert ours[0].texts[-1]["place"] == "there" and any(t.too_long for t in ours[0].texts)
    runner._read.cache_clear()


def test_an_evaluation_of_a_split_that_one_task_lacks_names_it(add):
    add("mx_a", rows("a", 15))
    add("mx_b", rows("b", 15), source=ExamplesSource({"train": rows("b", 15)}))
    space = registry.feature_space(["mx_a", "mx_b"])
    settings = {"task_feature_lengths": LENGTHS, "batch_size": 4}
    with pytest.raises(ValueError, match=r"No task of \['mx_b'\] has a split 'test'"):
        list(pipeline.eval_batches_of(["mx_a", "mx_b"], "test", space, **settings))

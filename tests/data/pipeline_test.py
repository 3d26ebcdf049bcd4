"""Training batches: determinism, exact resumption, shards, limits, and what is refused."""

import collections
import functools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from modjax.data import pipeline, registry
from modjax.data.sources import ExamplesSource

FEATURES = {k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets")}
STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
LENGTHS = {"inputs": 24, "targets": 16}
LETTERS = {"a": 1, "b": 2, "c": 3}


def rows(letter, number):
    """Examples of different lengths that say what they are in both streams."""
    return [
        {"inputs": f"{letter}{i}" + "." * (i % 5), "targets": f"{letter}{i}"} for i in range(number)
    ]


def add(name, splits, source=ExamplesSource, language=None, steps=STEPS, **kwargs):
    metadata = {"task": "copy", "language": language or name}
    return registry.add_task(name, source(splits), steps, FEATURES, metadata=metadata, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def tasks():
    """A mixture of two in-memory tasks and one read through a shuffle buffer."""
    files = functools.partial(
        seqio.FunctionDataSource,
        dataset_fn=lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {k: [r[k] for r in rows("c", 30)] for k in ("inputs", "targets")}
        ),
    )
    add("pl_a", {"train": rows("a", 40), "test": rows("a", 7)}, language="a")
    add("pl_b", {"train": rows("b", 20), "test": rows("b", 7)}, language="b")
    add("pl_c", ["train"], lambda splits: files(splits=splits), language="c")
    registry.add_mixture("pl_mix", [("pl_a", 3.0), ("pl_b", 1.0), ("pl_c", 1.0)])
    registry.add_mixture("pl_ab", ["pl_a", "pl_b"])
    yield
    for name in ("pl_ab", "pl_mix", "pl_a", "pl_b", "pl_c"):
        registry.remove(name)


@pytest.fixture
def temporary():
    """`add`, undone at the end of the test."""
    added = []

    def add_one(name, *args, **kwargs):
        added.append(name)
        return add(name, *args, **kwargs)

    yield add_one
    for name in added:
        registry.remove(name)


def iterate(mixture="pl_mix", space=None, **kwargs):
    kwargs = {"batch_size": 4, "seed": 0, "task_feature_lengths": LENGTHS, **kwargs}
    space = space or registry.feature_space(mixture)
    return pipeline.train_iterator(mixture, "train", space, **kwargs)


def same(one, two):
    return set(one) == set(two) and all(np.array_equal(one[k], two[k]) for k in one)


def texts(batch):
    """The targets of a batch, segment by segment, with the row and the segment."""
    found = []
    vocabulary = seqio.ByteVocabulary()
    tokens = batch["decoder_target_tokens"]
    segments = batch.get("decoder_segment_ids", (tokens != 0).astype(np.int32))
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            text = vocabulary.decode(tokens[row][segments[row] == segment].tolist())
            found.append((text, row, segment))
    return found


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    one, two, other = (iterate("pl_ab", seed=seed) for seed in (0, 0, 1))
    first = [next(one) for _ in range(6)]
    assert all(same(b, next(two)) for b in first)
    assert not all(same(b, next(other)) for b in first)


def test_each_segment_has_the_features_of_its_example_and_shapes_are_static():
    space = registry.feature_space("pl_mix")
    iterator = iterate(max_segments=3)
    seen = collections.Counter()
    for _ in range(20):
        batch = next(iterator)
        assert batch["features"].shape == (4, 3, 2) and batch["tasks"].shape == (4, 3)
        assert all(v.dtype == np.int32 for v in batch.values())
        for name in ("encoder_segment_ids", "decoder_segment_ids"):
            assert batch[name].max() <= 3
            used = batch[name].max(axis=1)[:, None] > np.arange(3)
            np.testing.assert_array_equal(batch["tasks"] != 0, used)
        for text, row, segment in texts(batch):
            seen[text[0]] += 1
            expected = {"task": "copy", "language": text[0]}
            assert space.decode(batch["features"][row, segment - 1]) == expected
            assert space.datasets[batch["tasks"][row, segment - 1] - 1] == f"pl_{text[0]}"
    # SeqIO's rates, 3 : 1 : 1, of some 200 examples.
    assert 0.5 < seen["a"] / seen.total() < 0.7
    assert iterator.stats["examples"] == {f"pl_{c}": seen[c] for c in "abc"}
    assert iterator.stats["full_rows"] > 0.5


def test_a_restored_input_goes_on_exactly_where_it_was_saved(tmp_path):
    one = iterate()
    for _ in range(9):
        next(one)
    one.save(str(tmp_path))
    stats = one.stats
    after = [next(one) for _ in range(12)]
    two = iterate()
    next(two)  # restoring does not depend on where the iterator is
    assert two.restore(str(tmp_path)) == "exact"
    assert two.position == 9 and two.stats == stats
    assert all(same(b, next(two)) for b in after)
    assert two.stats == one.stats


def generator_source(splits):
    """A source whose state tensorflow cannot store."""

    def dataset_fn(split, shuffle_files, seed=None):
        spec = {k: tf.TensorSpec((), tf.string) for k in ("inputs", "targets")}
        return tf.data.Dataset.from_generator(lambda: iter(splits[split]), output_signature=spec)

    return seqio.FunctionDataSource(dataset_fn, splits=list(splits))


def test_an_input_that_cannot_be_stored_is_read_again_to_the_same_place(tmp_path, temporary):
    temporary("pl_gen", {"train": rows("a", 30)}, generator_source)
    one = iterate("pl_gen", pack=False)
    for _ in range(4):
        next(one)
    one.save(str(tmp_path))
    after = [next(one) for _ in range(5)]
    two = iterate("pl_gen", pack=False)
    assert two.restore(str(tmp_path)) == "skipped"
    assert two.position == 4
    assert all(same(b, next(two)) for b in after)


def test_a_lost_state_is_made_up_for_and_a_damaged_or_foreign_position_refused(tmp_path):
    iterator = iterate("pl_b", pack=False)
    with pytest.raises(ValueError, match="no data position"):
        iterator.restore(str(tmp_path))
    next(iterator)
    iterator.save(str(tmp_path))
    after = next(iterator)
    for path in tmp_path.glob("*.iterator.data*"):
        path.write_bytes(path.read_bytes()[:100])
    assert iterator.restore(str(tmp_path)) == "skipped"
    assert same(next(iterator), after)

    position = tmp_path / "position_0_of_1.json"
    data = json.loads(position.read_text())
    changed = {**data["settings"], "seed": 5, "batch_size": 8}
    position.write_text(json.dumps({**data, "settings": changed}))
    with pytest.raises(ValueError, match="another input: batch_size was 8 and is 4; seed was 5"):
        iterator.restore(str(tmp_path))
    assert iterator.restore(str(tmp_path), strict=False) == "skipped"
    position.write_text(position.read_text()[:50])
    with pytest.raises(ValueError, match="position_0_of_1.json is damaged"):
        iterator.restore(str(tmp_path))


# Rows of each process: as meshes give them, in parts, and where two processes hold the same.
SHARES = {
    "one": [[0, 1, 2, 3]],
    "two": [[0, 1], [2, 3]],
    "four": [[0], [1], [2], [3]],
    "apart": [[0, 2], [1, 3]],
    "shared": [[0, 1], [0, 1], [2, 3], [2, 3]],
}


def job(shares, data_shards, mixture="pl_b"):
    """The iterators of all processes of a job."""
    options = {"shares": SHARES[shares], "data_shards": data_shards, "max_segments": 3}
    return [iterate(mixture, process=i, **options) for i in range(len(SHARES[shares]))]


def whole(iterators, shares):
    """The next batch of a job; processes that hold the same rows agree on them."""
    rows = SHARES[shares]
    parts = [next(iterator) for iterator in iterators]
    batch = {k: np.full((4, *v.shape[1:]), -1) for k, v in parts[0].items()}
    for mine, part in zip(rows, parts, strict=True):
        for name, value in part.items():
            there = batch[name][mine]
            np.testing.assert_array_equal(np.where(there == -1, value, there), value)
            batch[name][mine] = value
    return batch


@pytest.mark.parametrize(
    ("mixture", "data_shards", "jobs", "readers"),
    [
        ("pl_ab", 1, ("two", "apart"), [[0], [0]]),
        ("pl_b", 2, ("shared", "two"), [[0], [1]]),
        ("pl_b", 4, ("two",), [[0, 1], [2, 3]]),
    ],
)
def test_any_number_of_processes_makes_the_same_batches_and_resumes_any_other(
    tmp_path, mixture, data_shards, jobs, readers
):
    one = job("one", data_shards, mixture)
    expected = [whole(one, "one") for _ in range(6)]
    assert all((batch["tasks"][:, 0] > 0).all() for batch in expected)
    for number, shares in enumerate(jobs):
        iterators = job(shares, data_shards, mixture)
        if shares == "two":
            assert [it.streams for it in iterators] == readers
        if number:
            assert {it.restore(str(tmp_path / f"{number - 1}")) for it in iterators} == {"exact"}
            assert {it.position for it in iterators} == {2 * number}
        for batch in expected[2 * number :][:2]:
            assert same(whole(iterators, shares), batch)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for i, iterator in enumerate(iterators):
            iterator.save(str(tmp_path / f"{number}_{i}"))
            for path in (tmp_path / f"{number}_{i}").iterdir():
                assert not (folder / path.name).exists()  # one process writes a stream
                path.rename(folder / path.name)
        written = sorted(path.name for path in folder.glob("*.json"))
        assert written == [f"position_{v}_of_{data_shards}.json" for v in range(data_shards)]


def test_what_was_read_is_counted_by_stream_and_restored_with_it(tmp_path):
    two = job("two", 2)
    for _ in range(4):
        whole(two, "two")
    for iterator in two:
        iterator.save(str(tmp_path))
    (one,) = job("one", 2)
    one.restore(str(tmp_path))
    found, parts = one.stats, [it.stats for it in two]
    assert found["examples"]["pl_b"] == sum(part["examples"]["pl_b"] for part in parts) > 0
    assert found["batches"] == 4
    assert found["padding"] == pytest.approx(sum(part["padding"] for part in parts) / 2)


def test_positions_of_processes_with_a_shard_each_are_positions_of_streams(tmp_path):
    """As they were written before streams: a folder per process, and no `data_shards` in the settings."""
    (one,) = job("one", 2)
    for _ in range(3):
        next(one)
    one.save(str(tmp_path))
    for number in range(2):
        folder = tmp_path / f"process_{number}_of_2"
        folder.mkdir()
        for path in tmp_path.glob(f"position_{number}_of_2.*"):
            path.rename(folder / path.name)
        path = folder / f"position_{number}_of_2.json"
        data = json.loads(path.read_text())
        del data["settings"]["data_shards"]
        path.write_text(json.dumps(data))
    after = next(one)
    (again,) = job("one", 2)
    assert again.restore(str(tmp_path)) == "exact"
    assert same(next(again), after)
    with pytest.raises(ValueError, match="data_shards was 2 and is 1. A run keeps its data_shards"):
        job("one", 1)[0].restore(str(tmp_path))


def test_a_position_without_one_of_its_streams_is_refused(tmp_path):
    iterators = job("two", 2)
    for number, iterator in enumerate(iterators):
        next(iterator)
        iterator.save(str(tmp_path))
        if number == 0:
            with pytest.raises(ValueError, match="lacks stream 1 of 2"):
                iterators[1].restore(str(tmp_path))
    next(iterators[1])
    iterators[1].save(str(tmp_path))
    with pytest.raises(ValueError, match=r"damaged: their streams are at \[1, 2\]"):
        job("one", 2)[0].restore(str(tmp_path))


@pytest.mark.parametrize("task", ["pl_a", "pl_c"])
def test_two_processes_see_each_example_once_per_epoch(task):
    seen = collections.Counter()
    for index in range(2):
        iterator = iterate(
            task, shares=SHARES["two"], process=index, num_epochs=1, pack=False, shuffle=False
        )
        for batch in iterator:
            assert batch["encoder_input_tokens"].shape == (2, 24)
            seen.update(text for text, _, _ in texts(batch))
    number = {"pl_a": 40, "pl_c": 30}[task]
    assert seen == {f"{task[-1]}{i}": 1 for i in range(number)}


def test_streams_share_out_the_examples_of_an_epoch():
    iterator = iterate("pl_b", data_shards=2, pack=False)
    seen = collections.Counter()
    for _ in range(5):
        seen.update(text for text, _, _ in texts(next(iterator)))
    assert len(seen) == 20 and set(seen.values()) == {1}


def test_epochs_differ_in_order_and_not_in_content():
    iterator = iterate("pl_b", pack=False, batch_size=20)
    first, second = ([t for t, _, _ in texts(next(iterator))] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_the_last_batch_of_the_last_epoch_is_filled_with_padding():
    batches = list(iterate("pl_b", pack=False, batch_size=8, num_epochs=1, shuffle=False))
    assert [b["tasks"].astype(bool).sum() for b in batches] == [8, 8, 4]
    assert all(b["decoder_loss_weights"].shape == (8, 16) for b in batches)
    assert not batches[-1]["decoder_loss_weights"][4:].any()


def test_examples_over_the_limit_are_counted_or_refused_by_task(temporary):
    long = [
        *rows("x", 3),
        {"inputs": "x" * 40, "targets": "x"},
        {"inputs": "x", "targets": "y" * 16},
    ]
    temporary("pl_long", {"train": long}, language="a")
    space = registry.feature_space("pl_long")
    iterator = iterate("pl_long", space, pack=False, num_epochs=1)
    collections.deque(iterator, maxlen=0)
    assert iterator.stats["too_long"] == {"pl_long": {"inputs": 1, "targets": 1}}
    assert sum(iterator.stats["examples"].values()) == 5
    with pytest.raises(ValueError, match=r"inputs of 1 example.* 'pl_long' over the limit of 24"):
        list(iterate("pl_long", space, pack=False, num_epochs=1, on_too_long="error"))
    with pytest.raises(ValueError, match="Did you mean 'count'"):
        iterate("pl_long", space, on_too_long="counts")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"inputs": "question", "targets": ""}, "has empty targets. It begins: question"),
        ({"inputs": "", "targets": "answer"}, "has empty inputs"),
    ],
)
def test_an_example_without_tokens_is_an_error_that_names_its_task(temporary, row, problem):
    features = {**FEATURES, "inputs": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)}
    registry.add_task(
        "pl_empty", ExamplesSource({"train": [row]}), STEPS, features, metadata={"language": "a"}
    )
    try:
        with pytest.raises(ValueError, match=f"task 'pl_empty': an example {problem}"):
            next(iterate("pl_empty", pack=False))
    finally:
        registry.remove("pl_empty")


def test_empty_targets_are_lessons_where_the_task_allows_them(temporary):
    temporary("pl_silent", {"train": [{"inputs": "x", "targets": ""}]}, empty_targets="allow")
    batch = next(iterate("pl_silent", max_segments=2))
    np.testing.assert_array_equal(batch["decoder_target_tokens"][0, :3], [1, 1, 0])


def test_empty_and_missing_splits_are_errors_that_name_the_task(temporary):
    temporary("pl_none", {"train": []})
    temporary("pl_none2", {"train": []}, generator_source)
    temporary("pl_few", {"train": rows("x", 1)})
    nothing = [lambda ds: ds.filter(lambda ex: False), *STEPS]
    temporary("pl_filtered", {"train": rows("x", 3)}, steps=nothing)
    for name in ("pl_none", "pl_none2"):
        with pytest.raises(ValueError, match=f"task '{name}'.*[Ss]plit 'train' is empty"):
            iterate(name)
    with pytest.raises(ValueError, match="'pl_few': split 'train' has 1 example.*data_shards=2"):
        iterate("pl_few", data_shards=2)
    with pytest.raises(ValueError, match="'pl_filtered': split 'train' is empty: its preproc"):
        iterate("pl_filtered")
    with pytest.raises(ValueError, match="split 'tran'.*Did you mean 'train'"):
        pipeline.train_iterator(
            "pl_a", "tran", None, task_feature_lengths=LENGTHS, batch_size=1, seed=0
        )


def test_what_cannot_work_is_refused_before_anything_is_read(temporary):
    with pytest.raises(ValueError, match="batch_size=5.*data_shards=2"):
        iterate(batch_size=5, data_shards=2)
    with pytest.raises(ValueError, match="num_epochs=1 needs data_shards=1, not 2"):
        iterate(data_shards=2, num_epochs=1)
    for lengths in ({"inputs": 8}, {"inputs": 8, "targets": 0}, {"inputs": 8, "targets": 2.5}):
        with pytest.raises(ValueError, match="task_feature_lengths"):
            iterate(task_feature_lengths=lengths)
    with pytest.raises(ValueError, match="max_segments"):
        iterate(max_segments=0)
    with pytest.raises(ValueError, match="unknown value 'b' of feature 'language'"):
        iterate("pl_ab", registry.feature_space("pl_a"))
    registry.add_task("pl_bare", ExamplesSource({"train": rows("x", 2)}), STEPS, FEATURES)
    try:
        with pytest.raises(ValueError, match="'pl_bare' has no metadata"):
            iterate("pl_bare", registry.feature_space("pl_a"))
    finally:
        registry.remove("pl_bare")


def test_without_a_space_tasks_need_no_features():
    iterator = pipeline.train_iterator(
        "pl_a",
        "train",
        None,
        task_feature_lengths=LENGTHS,
        batch_size=2,
        seed=0,
        pack=False,
    )
    batch = next(iterator)
    assert batch["features"].shape == (2, 1, 0) and not batch["tasks"].any()


def test_examples_without_what_a_task_needs_are_an_error_that_names_it_and_what_there_is(temporary):
    temporary("pl_keys", {"train": [{"input": "a", "targets": "b"}]})
    registry.add_mixture("pl_keys_mix", ["pl_keys", "pl_a"])
    options = {"task_feature_lengths": LENGTHS, "batch_size": 2}
    message = "task 'pl_keys': .* no 'inputs'.*Did you mean 'input'.*Known: input, targets"
    try:
        for name in ("pl_keys", "pl_keys_mix"):
            with pytest.raises(ValueError, match=message):
                next(pipeline.train_iterator(name, "train", None, seed=0, **options))
        with pytest.raises(ValueError, match=message):
            next(pipeline.eval_batches("pl_keys", "train", None, **options))
    finally:
        registry.remove("pl_keys_mix")

"""Babel in the registries: mixtures, features, settings; what is evaluated cannot be trained."""

import pytest

from modjax.data import registry
from modjax.evaluation.metrics import get
from tasks import babel
from tasks.babel_world import BabelConfig

SMALL = BabelConfig(train_examples=12, eval_examples=5, pretrain_examples=20)


@pytest.fixture
def small():
    yield babel.register(SMALL, prefix="small")
    babel.unregister("small")


def test_the_benchmark_is_registered_on_import():
    assert len(registry.tasks_of("babel_train")) == 39
    assert len(registry.tasks_of("babel_pretrain")) == 24
    assert registry.metadata_of("babel_parse_ta") == {"task": "parse", "language": "ta"}


def test_evaluation_mixtures_are_what_their_names_say(small):
    for setting, count in (("seen", 39), ("unseen_pair", 4), ("unseen_language", 4)):
        settings = registry.seen_settings("small_train", f"small_eval_{setting}")
        assert list(settings.values()) == [setting] * count
    assert len(registry.tasks_of("small_eval")) == 47


def test_the_features_are_task_and_language_without_what_is_unseen(small):
    space = registry.feature_space("small_train")
    assert set(space.values("task")) == {"parse", "tag", "translate", "qa"}
    assert len(space.values("language")) == 11
    assert "mo" not in space.values("language")


def test_examples_come_as_bytes_with_an_end_and_say_their_meaning(small):
    task = babel.seqio.TaskRegistry.get("small_parse_mi")
    lengths = {"inputs": 80, "targets": 80}
    rows = list(task.get_dataset(lengths, "test", shuffle=False).as_numpy_iterator())
    assert [int(row["meaning_id"]) for row in rows] == list(range(SMALL.eval_examples))
    first = next(small.examples("parse", "mi", "test"))
    assert rows[0]["inputs"].tolist() == [b + 3 for b in first["inputs"].encode()] + [1]
    assert rows[0]["targets"].tolist() == [b + 3 for b in first["targets"].encode()] + [1]


def test_what_is_not_trained_has_no_train_split(small):
    trained = set(registry.tasks_of("small_train"))
    for name in registry.tasks_of("small_eval"):
        splits = babel.seqio.TaskRegistry.get(name).splits
        assert ("train" in splits) == (name in trained)


def test_every_metric_of_a_task_gives_full_marks_to_its_targets(small):
    for task in ("parse", "tag", "translate", "qa"):
        targets = [row["targets"] for row in small.examples(task, "me", "test")]
        for name in registry.metric_names_of(f"small_{task}_me"):
            best = 0 if name == "malformed" else 100
            assert get(name)(targets, targets).value == pytest.approx(best)


def test_empty_mixtures_are_left_out_and_a_taken_prefix_is_refused():
    babel.register(
        BabelConfig(tasks=("tag",), held_out=(), unseen_languages=(), pretrain_fill=0.0), "few"
    )
    try:
        assert len(registry.tasks_of("few_eval")) == 12
        assert len(registry.tasks_of("few_pretrain")) == 12
        with pytest.raises(ValueError, match="few_eval_unseen_pair"):
            registry.tasks_of("few_eval_unseen_pair")
        with pytest.raises(ValueError, match="already registered"):
            babel.register(prefix="few")
    finally:
        babel.unregister("few")

"""Tasks with features beside SeqIO's registry: what they carry, and what is refused."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import seqio

from modjax import models
from modjax.data import carry, checks, registry
from modjax.data.sources import ExamplesSource
from modjax.features import FeatureSpace

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {k: seqio.Feature(VOCABULARY) for k in ("inputs", "targets")}
STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
ROWS = [{"inputs": "abc", "targets": "de"}]


@pytest.fixture
def add(request):
    """Registers tasks and mixtures for one test."""
    added = []

    def task(name, rows=ROWS, steps=STEPS, **kwargs):
        added.append(name)
        return registry.add_task(name, ExamplesSource({"train": rows}), steps, FEATURES, **kwargs)

    def mixture(name, *args, **kwargs):
        added.append(name)
        return registry.add_mixture(name, *args, **kwargs)

    task.mixture = mixture
    yield task
    for name in added:
        registry.remove(name)


def grid(add, *pairs, prefix="reg"):
    names = []
    for task, language in pairs:
        names.append(f"{prefix}_{task}_{language}")
        add(names[-1], metadata={"task": task, "language": language})
    return names


def keys(name, lengths=None):
    ds = seqio.get_mixture_or_task(name).get_dataset(lengths, split="train", shuffle=False)
    return [int(ex[carry.DATASET_KEY][0]) for ex in ds]


def test_metadata_and_metrics_are_kept_beside_the_task(add):
    add("reg_a", metadata={"task": "parse", "language": ["sw", "en"]}, metric_names=["bleu"])
    add("reg_b")
    assert registry.metadata_of("reg_a") == {"task": "parse", "language": ("sw", "en")}
    assert registry.metric_names_of("reg_a") == ("bleu",)
    assert registry.metric_names_of("reg_b") == ("exact_match",)
    assert registry.has_metadata("reg_a") and not registry.has_metadata("reg_b")


def test_seqios_own_evaluator_computes_our_metrics_in_the_tasks_language(add):
    targets, predictions = ["a cat", "dog"], ["cat", "fox"]
    add("reg_en", metadata={"language": "en"}, metric_names=["exact_match", "qa_exact_match"])
    add("reg_sw", metadata={"language": "sw"}, metric_names=["qa_exact_match"])

    def computed(name):
        fns = seqio.TaskRegistry.get(name).predict_metric_fns
        return {k: v for fn in fns for k, v in fn(targets, predictions).items()}

    # English articles do not count, and Swahili has none.
    assert computed("reg_en") == {"exact_match": 0.0, "qa_exact_match": 50.0}
    assert computed("reg_sw") == {"qa_exact_match": 0.0}
    add("reg_own", metric_fns=[])
    assert seqio.TaskRegistry.get("reg_own").metric_fns == []


def test_an_unknown_metric_or_none_is_refused_where_the_task_is_registered(add):
    with pytest.raises(ValueError, match="task 'reg_a': unknown metric 'acuracy'.*Known: exact_"):
        add("reg_a", metric_names=["exact_match", "acuracy"])
    with pytest.raises(ValueError, match="task 'reg_a': metric_names is empty"):
        add("reg_a", metric_names=())
    add("reg_a")  # and nothing was left registered


def test_feature_space_of_a_mixture_and_of_some_of_its_features(add):
    names = grid(add, ("tag", "sw"), ("parse", "en"), ("parse", "sw"))
    add.mixture("reg_mix", names)
    space = registry.feature_space("reg_mix")
    assert space.features == (("task", ("parse", "tag")), ("language", ("en", "sw")))
    assert list(space.datasets) == registry.tasks_of("reg_mix") == sorted(names)
    assert registry.feature_space("reg_mix", ["language"]).names == ("language",)
    assert registry.feature_space("reg_mix", "language").names == ("language",)
    for some in ("langage", ["langage"]):
        with pytest.raises(ValueError, match="'reg_parse_en' has no feature 'langage'.*'language'"):
            registry.feature_space("reg_mix", some)


def test_a_task_without_metadata_is_an_error_that_names_it(add):
    add("reg_bare")
    add.mixture("reg_mix", ["reg_bare", *grid(add, ("parse", "en"))])
    with pytest.raises(ValueError, match="'reg_bare' has no metadata"):
        registry.feature_space("reg_mix")
    # A method that looks no feature up needs none.
    space = registry.feature_space("reg_mix", looked_up=False)
    assert space == FeatureSpace((), ("reg_bare", "reg_parse_en"))
    with pytest.raises(ValueError, match="'reg_bare' has no metadata"):
        registry.feature_space("reg_mix", ["task"], looked_up=False)
    seqio.TaskRegistry.add(
        "reg_seqio", ExamplesSource({"train": ROWS}), preprocessors=STEPS, output_features=FEATURES
    )
    try:
        with pytest.raises(ValueError, match="'reg_seqio' has no metadata"):
            registry.metadata_of("reg_seqio")
    finally:
        registry.remove("reg_seqio")


def test_two_tasks_of_a_mixture_with_different_features_are_refused_naming_both(add):
    add("reg_a", metadata={"task": "parse", "language": "en"})
    add("reg_b", metadata={"task": "parse"})
    add.mixture("reg_mix", ["reg_a", "reg_b"])
    with pytest.raises(ValueError, match="'reg_a' and 'reg_b'.*different features"):
        registry.feature_space("reg_mix")


@pytest.mark.parametrize(
    "metadata", [{}, "sw", {"language": 3}, {"language": ""}, {3: "sw"}, {"language": ["a", "a"]}]
)
def test_malformed_metadata_is_refused_naming_the_task(add, metadata):
    with pytest.raises(ValueError, match="task 'reg_bad'"):
        add("reg_bad", metadata=metadata)
    add("reg_bad")  # and nothing was left registered


@pytest.mark.parametrize("feature", ["dataset", "shared", "a=b", "a,b", "name", "pair"])
def test_a_feature_whose_name_means_something_else_is_refused(add, feature):
    with pytest.raises(ValueError, match=f"task 'reg_bad': .*'{feature}'.*rename it"):
        add("reg_bad", metadata={"task": "parse", feature: "red"})


def test_duplicate_and_unknown_names_are_refused(add):
    add("reg_a")
    add.mixture("reg_mix", ["reg_a"])
    for name in ("reg_a", "reg_mix"):
        with pytest.raises(ValueError, match=f"'{name}' is already registered"):
            registry.add_task(name, ExamplesSource({"train": ROWS}), STEPS, FEATURES)
        with pytest.raises(ValueError, match=f"'{name}' is already registered"):
            registry.add_mixture(name, ["reg_a"])
    with pytest.raises(ValueError, match="'reg_b'.*Did you mean 'reg_a'"):
        registry.add_mixture("reg_mix2", ["reg_b"])
    with pytest.raises(ValueError, match="'reg_a' twice"):
        registry.add_mixture("reg_mix2", ["reg_a", ("reg_a", 2.0)])
    with pytest.raises(ValueError, match="no tasks"):
        registry.add_mixture("reg_mix2", [])
    with pytest.raises(ValueError, match="'reg_mi'.*Did you mean 'reg_mix'"):
        registry.tasks_of("reg_mi")
    with pytest.raises(ValueError, match="'reg_aa'.*Did you mean 'reg_a'"):
        registry.metadata_of("reg_aa")


def test_settings_tell_seen_from_unseen_pairs_and_values(add):
    train = grid(add, ("parse", "en"), ("tag", "en"), ("tag", "sw"), prefix="tr")
    evaluated = grid(
        add, ("parse", "en"), ("parse", "sw"), ("tag", "yo"), ("qa", "en"), prefix="ev"
    )
    add.mixture("reg_train", train)
    add.mixture("reg_eval", evaluated)
    assert registry.seen_settings("reg_train", "reg_eval") == {
        "ev_parse_en": "seen",
        "ev_parse_sw": "unseen_pair",
        "ev_tag_yo": "unseen_language",
        "ev_qa_en": "unseen_task",
    }
    assert set(registry.seen_settings(train, ["tr_tag_sw"]).values()) == {"seen"}


def test_a_run_trains_the_tasks_that_have_something_to_train_on(add):
    names = grid(add, ("parse", "en"), ("parse", "sw"))
    registry.remove(names[1])
    source = ExamplesSource({"test": ROWS})
    registry.add_task(
        names[1], source, STEPS, FEATURES, metadata={"task": "parse", "language": "sw"}
    )
    add.mixture("reg_all", names)
    trained = registry.trained_by("reg_all")
    assert trained == registry.trained_by(names[0])
    assert trained == {names[0]: {"task": ["parse"], "language": ["en"]}}
    found = registry.seen_settings(trained, "reg_all")
    assert found == {names[0]: "seen", names[1]: "unseen_language"}


def test_what_was_trained_is_what_it_was_then(add):
    """Not what the mixture has become, nor what has a rate of 0; and what an earlier run trained."""
    names = grid(add, ("parse", "en"), ("tag", "sw"), ("parse", "sw"))
    add.mixture("reg_then", [(names[0], 1.0), (names[1], 0.0), (names[2], 2.0)])
    trained = registry.trained_by("reg_then")
    assert set(trained) == {names[0], names[2]}
    assert json.loads(json.dumps(trained)) == trained
    assert registry.seen_settings(trained, names) == {
        names[0]: "seen",
        names[1]: "unseen_task",  # tag was not trained
        names[2]: "seen",
    }
    both = registry.also_trained(registry.trained_by(names[1]), trained, "runs/a")
    assert set(registry.seen_settings(both, names).values()) == {"seen"}
    # An earlier run told apart more than this one does; its datasets are not this one's business.
    more = {"old": {"task": ["parse"], "language": ["en"], "domain": ["news"]}}
    assert registry.seen_settings({**more, **both}, names) == registry.seen_settings(both, names)
    with pytest.raises(ValueError, match="have different features"):
        registry.seen_settings(more, names)
    other = {names[0]: {"task": ["parse"], "language": ["sw"]}}
    with pytest.raises(ValueError, match="its language is .'en'. here, and was .'sw'. in runs/a"):
        registry.also_trained(other, trained, "runs/a")
    with pytest.raises(ValueError, match="its language is .'en'. here, and was .'sw'. in training"):
        registry.seen_settings(other, names)


def test_tasks_without_features_are_seen_if_they_were_trained(add):
    add("reg_plain")
    add("reg_other")
    copy = registry.add_copy("reg_plain", "reg_plain_copy", ExamplesSource({"train": ROWS}))
    try:
        found = registry.seen_settings([copy.name], ["reg_plain", "reg_other"])
    finally:
        registry.remove(copy.name)
    assert found == {"reg_plain": "seen", "reg_other": "unseen_task"}


def test_examples_without_the_name_of_a_split_are_refused_at_once():
    with pytest.raises(ValueError, match="takes {split: examples}.*not \\[{'inputs'"):
        ExamplesSource(ROWS)


def test_lists_of_any_lengths_come_out_as_they_went_in():
    rows = [{"options": ["a", "bcd"]}, {"options": ["e"]}, {"options": ["f", "g", "h"]}]
    numbers = [{"options": np.array(row)} for row in ([1, 2], [3], [4, 5, 6])]
    for examples in (rows, numbers):
        ds = ExamplesSource({"train": examples}).get_dataset("train", shuffle=False)
        found = [ex["options"].tolist() for ex in ds.as_numpy_iterator()]
        texts = [[v.decode() if isinstance(v, bytes) else v for v in row] for row in found]
        assert texts == [list(row["options"]) for row in examples]


def test_a_decoders_inputs_that_end_are_warned_of(make_decoder):
    text = seqio.ByteVocabulary()
    for add_eos in (False, True):
        features = {
            "inputs": seqio.Feature(text, add_eos=add_eos),
            "targets": seqio.Feature(text),
        }
        registry.add_task("reg_ends", ExamplesSource({"train": ROWS}), STEPS, features)
        model = models.DecoderOnlyModel(make_decoder(vocab_size=260, token_offset=0))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                checks.check_vocabularies("reg_ends", model)
        finally:
            registry.remove("reg_ends")
        assert any("add_eos=False" in str(one.message) for one in said) == add_eos


def test_every_example_carries_its_tasks_key_through_a_mixture(add):
    names = grid(add, ("parse", "en"), ("parse", "sw"))
    add.mixture("reg_mix", names)
    for name in names:
        assert keys(name) == [carry.key_of(name) << carry.FLAG_BITS]
    ds = seqio.get_mixture_or_task("reg_mix").get_dataset(
        {"inputs": 8, "targets": 8}, split="train", shuffle=False, num_epochs=4, seed=0
    )
    seen = {int(ex[carry.DATASET_KEY][0]) >> carry.FLAG_BITS for ex in ds}
    assert seen == {carry.key_of(n) for n in names}


@pytest.mark.parametrize("trims", [False, True])
def test_examples_over_the_limit_are_marked_even_if_a_preprocessor_trims_them(add, trims):
    last = seqio.preprocessors.append_eos_after_trim if trims else STEPS[-1]
    rows = [{"inputs": "i" * n, "targets": "t" * m} for n, m in [(3, 3), (4, 3), (3, 4), (9, 9)]]
    add("reg_long", rows, [STEPS[0], last])
    flags = [k & 3 for k in keys("reg_long", {"inputs": 4, "targets": 4})]
    assert flags == [0, carry.INPUTS_TOO_LONG, carry.TARGETS_TOO_LONG, 3]
    assert {k & 3 for k in keys("reg_long", {"inputs": 10, "targets": 10})} == {0}


def test_importing_is_quiet_and_needs_no_accelerator():
    code = (
        "import modjax.data, tensorflow as tf; import modjax.data.registry;"
        "assert not tf.config.get_visible_devices('GPU')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == ""

"""An evaluation predicts every example of every dataset once and scores it in the right place."""

import functools
import json

import jax
import numpy as np
import pytest
import seqio

from modjax.data import carry, registry
from modjax.data.sources import ExamplesSource
from modjax.evaluation import predict, results, runner
from modjax.features import FeatureSpace, UnknownFeatureError

VOCABULARY = seqio.ByteVocabulary()
LENGTHS = {"inputs": 24, "targets": 12}
FEATURES = {k: seqio.Feature(VOCABULARY, add_eos=True) for k in ("inputs", "targets")}
SPACE = FeatureSpace(
    (("task", ("copy", "qa")), ("language", ("en", "sw"))), datasets=("run_copy_en", "run_copy_sw")
)
SETTINGS = {
    "run_copy_en": "seen",
    "run_copy_sw": "unseen_pair",
    "run_copy_yo": "unseen_language",
    "run_qa_en": "seen",
}


def rows(language, count):
    words = [language + "abcdefghij"[: i % 9] for i in range(count)]
    return [{"inputs": w, "targets": w} for w in words]


def best_answers(text, example, is_target):
    return [text, "xyz"] if is_target else text


@pytest.fixture(scope="module", autouse=True)
def mixture():
    """Datasets that a model that copies its input solves; one of them counts "xyz" as right too."""
    data = {
        "run_copy_en": (rows("en", 7), {"task": "copy", "language": "en"}, ("exact_match", "chrf")),
        "run_copy_sw": (rows("sw", 5), {"task": "copy", "language": "sw"}, ("exact_match",)),
        "run_copy_yo": (rows("yo", 4), {"task": "copy", "language": "yo"}, ("exact_match",)),
        "run_qa_en": (
            [{"inputs": "xyz", "targets": "abc"}, {"inputs": "q" * 40, "targets": "no"}],
            {"task": "qa", "language": "en"},
            ("token_f1",),
        ),
    }
    for name, (examples, metadata, metrics) in data.items():
        registry.add_task(
            name,
            ExamplesSource({"test": examples}),
            [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            FEATURES,
            metadata=metadata,
            metric_names=metrics,
            postprocess_fn=best_answers if name == "run_qa_en" else None,
        )
    registry.add_mixture("run_all", list(data))
    yield
    for name in ("run_all", *data):
        registry.remove(name)


def test_postprocessing_sees_an_example_as_seqio_shows_it():
    """What `seqio.Evaluator` passes: each example of the dataset as numpy."""
    seen = []

    def keep(text, example, is_target):
        seen.append((text, example, is_target))
        return text

    name = "run_seen_en"
    registry.add_task(
        name,
        ExamplesSource({"test": [{"inputs": "ab", "targets": "c", "id": "7", "n": 3}]}),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        FEATURES,
        metadata={"task": "copy", "language": "en"},
        metric_names=("exact_match",),
        postprocess_fn=keep,
    )
    try:
        found = runner.read(name, "test", SPACE, task_feature_lengths=LENGTHS)
        runner._texts(name, found.texts, ["d"])
        dataset = seqio.TaskRegistry.get(name).get_dataset(LENGTHS, "test", shuffle=False)
        (expected,) = dataset.as_numpy_iterator()
    finally:
        registry.remove(name)
    assert [(text, is_target) for text, _, is_target in seen] == [("c", True), ("d", False)]
    del expected[carry.DATASET_KEY]
    for _, example, _ in seen:
        assert set(example) == set(expected) >= {"inputs", "targets", "targets_pretokenized", "id"}
        for field, value in expected.items():
            np.testing.assert_array_equal(example[field], value)
            assert type(example[field]) is type(value)


@pytest.fixture(scope="module")
def examples(mixture):
    return runner.read("run_all", "test", SPACE, task_feature_lengths=LENGTHS)


class Copier:
    """Predicts the input, wrongly for Swahili unless its language is switched off."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        inputs = np.pad(batch["encoder_input_tokens"], ((0, 0), (0, 24)))[:, :12]
        swahili = batch["features"][:, 0, 1] == SPACE.id("language", "sw")
        junk = np.array(VOCABULARY.encode("junk") + [1, 9, 9, 9, 9, 9, 9, 9])
        return np.where(swahili[:, None], junk, inputs)


def evaluate(examples, model=None, **options):
    options = {"method": "flix", "seed": 3, "batch_size": 4, **options}
    return runner.evaluate(model or Copier(), examples, SETTINGS, **options)


def test_each_dataset_gets_a_row_per_metric_with_its_names_setting_and_size(examples):
    found = evaluate(examples)
    common = {"method": "flix", "seed": 3}
    copy = {**common, "task": "copy", "metric": "exact_match"}
    assert found.rows == [
        {**copy, "language": "en", "setting": "seen", "value": 100.0, "n": 7},
        {**copy, "language": "en", "setting": "seen", "value": 100.0, "n": 7, "metric": "chrf"},
        {**copy, "language": "sw", "setting": "unseen_pair", "value": 0.0, "n": 5},
        {**copy, "language": "yo", "setting": "unseen_language", "value": 100.0, "n": 4},
        {
            **common,
            "task": "qa",
            "metric": "token_f1",
            "language": "en",
            "setting": "seen",
            "value": 50.0,
            "n": 2,
        },
    ]
    assert results.check(found.rows, "rows")


def test_predictions_stand_beside_their_inputs_in_the_order_of_the_split(examples):
    found = evaluate(examples).predictions
    assert [p["input"] for p in found["run_copy_en"]] == [r["inputs"] for r in rows("en", 7)]
    assert all(p["prediction"] == p["target"] == p["input"] for p in found["run_copy_en"])
    assert [p["prediction"] for p in found["run_copy_sw"]] == ["junk"] * 5  # cut at the end mark
    assert found["run_qa_en"][0] == {
        "index": 0,
        "input": "xyz",
        "target": ["abc", "xyz"],
        "prediction": "xyz",
        "metrics": {"token_f1": 100.0},
    }


def test_examples_over_the_limit_are_told(examples):
    found = evaluate(examples)
    assert found.trimmed == {"run_copy_en": 0, "run_copy_sw": 0, "run_copy_yo": 0, "run_qa_en": 1}
    assert found.predictions["run_qa_en"][1]["too_long"] == ["inputs"]


def test_batches_mix_datasets_in_few_shapes_and_unknown_values_are_none(examples):
    model = Copier()
    evaluate(examples, model, padded_lengths=2)
    assert len({b["encoder_input_tokens"].shape for b in model.batches}) == 2
    assert {len(b["features"]) for b in model.batches} == {4}
    assert any(len(np.unique(b["features"], axis=0)) > 1 for b in model.batches)
    assert len(model.batches) == 5  # 18 examples
    features = examples.arrays["features"][:, 0]
    languages = [SPACE.id("language", "en"), SPACE.id("language", "sw"), 0]
    assert [int(x) for x in dict.fromkeys(features[:, 1])] == languages


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("shapes", [1, 3])
def test_batches_do_not_change_results(examples, size, shapes):
    one, other = evaluate(examples), evaluate(examples, batch_size=size, padded_lengths=shapes)
    assert (one.rows, one.predictions) == (other.rows, other.predictions)


def test_a_feature_can_be_switched_off_in_a_setting_and_nowhere_else(examples):
    model = Copier()
    found = evaluate(examples, model, switch_off={"unseen_pair": "language"})
    values = {(r["language"], r["metric"]): r["value"] for r in found.rows}
    assert values["sw", "exact_match"] == 100.0
    seen = np.concatenate([b["features"][:, 0] for b in model.batches])
    assert SPACE.id("language", "en") in seen[:, 1] and SPACE.id("language", "sw") not in seen[:, 1]
    assert (seen[:, 0] > 0).all()
    assert SPACE.id("language", "sw") in examples.arrays["features"][:, 0, 1]  # left as it was


@pytest.mark.parametrize(
    ("switch_off", "message"),
    [
        (
            {"unseen_pear": ("language",)},
            "unknown setting 'unseen_pear'. Did you mean 'unseen_pair'",
        ),
        ({"seen": ("langage",)}, "unknown feature 'langage'. Did you mean 'language'"),
        ({"seen": "langage"}, "unknown feature 'langage'. Did you mean 'language'"),
    ],
)
def test_switching_off_what_there_is_not_is_an_error(examples, switch_off, message):
    with pytest.raises(ValueError, match=message):
        evaluate(examples, switch_off=switch_off)


def test_a_dataset_without_a_setting_is_an_error(examples):
    with pytest.raises(ValueError, match="no setting for dataset 'run_qa_en'"):
        settings = {k: v for k, v in SETTINGS.items() if k != "run_qa_en"}
        runner.evaluate(Copier(), examples, settings, method="m", seed=0, batch_size=4)


def test_reading_can_be_limited_and_strict():
    few = runner.read("run_all", "test", SPACE, task_feature_lengths=LENGTHS, max_examples=2)
    assert [t.index for t in few.texts] == [0, 1] * 4
    with pytest.raises(UnknownFeatureError, match="run_copy_yo.*'yo'"):
        runner.read("run_all", "test", SPACE, task_feature_lengths=LENGTHS, unknown="error")


def test_examples_are_read_once_for_all_runs_of_a_process_but_anew_for_another_task():
    def register(word):
        registry.remove("run_again")
        registry.add_task(
            "run_again",
            ExamplesSource({"test": [{"inputs": word, "targets": word}]}),
            [seqio.preprocessors.tokenize],
            FEATURES,
            metadata={"task": "copy", "language": "en"},
        )

    def read(**options):
        options = {"task_feature_lengths": LENGTHS, **options}
        return runner.read("run_again", "test", SPACE, **options)

    try:
        register("one")
        first = read()
        assert read(task_feature_lengths=dict(LENGTHS)) is first
        assert read(task_feature_lengths={"inputs": 2, "targets": 12}) is not first
        register("two")
        assert [t["inputs_pretokenized"] for t in read().texts] == ["two"]
        with pytest.raises(ValueError, match="read-only"):
            first.arrays["features"][0] = 0
    finally:
        registry.remove("run_again")


def test_datasets_of_the_same_task_and_language_keep_their_own_names():
    registry.add_task(
        "run_copy_en_2",
        ExamplesSource({"test": rows("en", 2)}),
        [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        FEATURES,
        metadata={"task": "copy", "language": "en"},
        postprocess_fn=lambda text, example, is_target: len(text) if is_target else text,
    )
    try:
        names = runner._names(["run_copy_en", "run_copy_en_2", "run_copy_sw"])
        assert names == {
            "run_copy_en": ("run_copy_en", "en"),
            "run_copy_en_2": ("run_copy_en_2", "en"),
            "run_copy_sw": ("copy", "sw"),
        }
        examples = runner.read("run_copy_en_2", "test", SPACE, task_feature_lengths=LENGTHS)
        with pytest.raises(ValueError, match="'run_copy_en_2': postprocess_fn made 2 of a target"):
            runner.evaluate(
                Copier(), examples, {"run_copy_en_2": "seen"}, method="m", seed=0, batch_size=4
            )
    finally:
        registry.remove("run_copy_en_2")


def test_what_is_written_can_be_read_and_only_the_first_process_writes(
    examples, tmp_path, monkeypatch
):
    found = evaluate(examples)
    runner.write(tmp_path / "one", found)
    assert results.read(tmp_path / "one" / "results.json") == found.rows
    lines = (tmp_path / "one" / "predictions" / "run_copy_sw.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.predictions["run_copy_sw"]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    runner.write(tmp_path / "two", found)
    assert not (tmp_path / "two").exists()


def test_progress_counts_examples_once(examples):
    told = []
    evaluate(examples, progress=lambda *args: told.append(args))
    assert told == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]


def test_tokens_are_counted_to_the_last_that_is_no_padding():
    tokens = np.array([[5, 6, 0, 0], [0, 0, 0, 0], [5, 0, 6, 0], [5, 6, 7, 8]])
    assert predict.token_counts(tokens).tolist() == [2, 0, 3, 4]


def test_a_model_predicts_in_shared_batches_what_it_predicts_in_one(make_t5, examples):
    from modjax import models, partitioning

    network = make_t5(vocab_size=VOCABULARY.vocab_size, num_encoder_layers=1, num_decoder_layers=1)
    model = models.EncoderDecoderModel(network)
    few = {k: v[:8] for k, v in examples.arrays.items()}
    params = jax.jit(model.init)(jax.random.key(0), few)["params"]
    together = jax.jit(model.predict_batch)(params, few)
    predict_fn = predict.predictor(model, params, partitioning.make_mesh(), decoder="greedy")
    tokens = predict.predict_all(predict_fn, few, batch_size=4)
    np.testing.assert_array_equal(np.stack(tokens), together)
    assert len(np.unique(together, axis=0)) > 1


def test_checkpoints_of_one_model_share_what_is_compiled_and_not_their_answers(make_t5, examples):
    from modjax import models

    few = {k: v[:4] for k, v in examples.arrays.items()}

    def predictions(seed, alpha=0.6):
        # Made anew each time, as gin does.
        network = make_t5(vocab_size=VOCABULARY.vocab_size, num_encoder_layers=1)
        model = Traced(network, alpha=alpha)
        params = jax.jit(model.init)(jax.random.key(seed), few)["params"]
        found = predict.predictor(model, params, decoder="greedy")(few)
        plain = jax.jit(functools.partial(model.predict_batch, decoder="greedy"))(params, few)
        np.testing.assert_array_equal(found, plain)
        return np.asarray(found), params, model

    class Traced(models.EncoderDecoderModel):
        count = 0

        def predict_batch(self, params, batch, rng=None, **options):
            Traced.count += rng is not None  # the compiled calls have one
            return super().predict_batch(params, batch, rng, **options)

    one, params, _ = predictions(0)
    two, *_ = predictions(1)
    assert Traced.count == 1 and (one != two).any()
    *_, other = predictions(0, alpha=0.7)
    assert Traced.count == 2
    # Other options and another method are other programs.
    predict.predictor(other, params, decoder="beam", num_decodes=2)(few)
    assert Traced.count == 3
    scores = predict.scorer(other, params)(few)
    np.testing.assert_allclose(scores, other.score_batch(params, few), rtol=1e-5)

"""The evaluation's entry point: from a checkpoint to predictions, results and one report of methods."""

import dataclasses
import json
import pathlib
import shutil
import sys

import gin
import jax
import numpy as np
import pytest

from modjax import checkpoints, hub, initialize, launch
from modjax.data import registry, vocabularies
from modjax.evaluation import results
from modjax.networks import t5
from tests.testdata import tokenizer_folders

TESTDATA = pathlib.Path(__file__).parent / "testdata"
sys.path.insert(0, str(TESTDATA))
LENGTHS = {"inputs": 16, "targets": 8}
BASE_FILES = ("bases/folder.gin", "methods/flix.gin")


def argv(*files, **macros):
    values = {
        "MIXTURE_OR_TASK_NAME": "toy",
        "MIXTURE_OR_TASK_MODULE": "toy_tasks",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": 8,
    } | {name.replace("__", "."): value for name, value in macros.items()}
    texts = {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in values.items()}
    return [f"--gin_file={f}" for f in files] + [f"--gin.{k}={v!r}" for k, v in texts.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder with a random base and a short FLix run that never saw `turn` in sw)."""
    folder = tmp_path_factory.mktemp("run")
    config = t5.T5Config(260, 16, 2, 8, 32, 1, 1)
    tokens = jax.numpy.ones((1, 4), int)
    init = jax.jit(t5.Transformer(config).init)
    hub.save_base(folder / "base", config, init(jax.random.key(0), tokens, tokens)["params"])
    train_run(folder, "flix")
    return folder


def train_run(folder, method, model_dir=None):
    import train

    flags = argv(
        "bases/folder.gin",
        f"methods/{method}.gin",
        "runs/finetune.gin",
        MIXTURE_OR_TASK_NAME="toy_without_turn_sw",
        TRAIN_STEPS=4,
        LEARNING_RATE=0.02,
        BASE=folder / "base",
        MODEL_DIR=model_dir or folder / method,
        RANDOM_SEED=3,
        train__train__tensorboard=False,
        train__train__log_period=2,
    )
    launch.load_gin(launch.parse_flags(flags, "test"), "train")
    gin.get_configurable(train.train)(operative_config=gin.operative_config_str)


def evaluate(run, out, *files, **macros):
    import eval as entry

    options = {
        "BASE": run / "base",
        "CHECKPOINT_PATH": run / "flix",
        "EVAL_OUTPUT_DIR": out,
        "SPLIT": "validation",
        "eval__evaluate__max_examples": 12,
    }
    flags = argv(*(files or BASE_FILES), "runs/eval.gin", **(options | macros))
    return entry.main(flags)


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    assert evaluate(run, out) == 0
    return out


def test_results_have_a_row_for_each_dataset_and_metric_with_its_setting(evaluated):
    rows = results.read(evaluated / "results.json")
    assert {(r["task"], r["language"]): r["setting"] for r in rows} == {
        ("copy", "en"): "seen",
        ("copy", "sw"): "seen",
        ("turn", "en"): "seen",
        ("turn", "sw"): "unseen_pair",
    }
    assert {(r["method"], r["seed"], r["n"], r["metric"]) for r in rows} == {
        ("flix", 3, 12, "exact_match")
    }


def test_predictions_are_the_models_own(evaluated, run):
    """Decoded again by hand from the checkpoint, with the features of the dataset."""
    from modjax.data import pipeline, seqio

    lines = (evaluated / "predictions" / "toy_turn_sw.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 12
    flags = argv(
        *BASE_FILES, "runs/eval.gin", BASE=run / "base", CHECKPOINT_PATH="x", EVAL_OUTPUT_DIR="x"
    )
    launch.load_gin(launch.parse_flags(flags, "test"), "eval")
    model = gin.query_parameter("eval.evaluate.model").scoped_configurable_fn()
    base = hub.load_base(run / "base")[1]
    model, params, _, step = initialize.restore(model, run / "flix", base)
    assert step == 4
    batch, examples = next(
        pipeline.eval_batches(
            "toy_turn_sw",
            "validation",
            model.module.space,
            task_feature_lengths=LENGTHS,
            batch_size=12,
        )
    )
    assert batch["features"].tolist() == [[[2, 2]]] * 12
    batch.pop("valid")
    tokens = np.asarray(jax.jit(model.predict_batch)(params, batch))
    vocabulary = seqio.ByteVocabulary()
    for row, example, line in zip(tokens, examples, found, strict=True):
        assert line["input"] == example["inputs_pretokenized"]
        assert line["target"] == example["targets_pretokenized"]
        assert line["prediction"] == vocabulary.decode(row.tolist())


def test_the_run_is_described_and_the_report_stands_alone(evaluated, run):
    facts = json.loads((evaluated / "run.json").read_text())
    assert facts["step"] == 4 and facts["mixture"] == "toy" and facts["split"] == "validation"
    html = (evaluated / "report.html").read_text()
    assert "flix" in html and "unseen pair" in html and "<svg" in html  # the learning curve
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html
    assert "CHECKPOINT_PATH" in (evaluated / "config.gin").read_text()


def test_methods_stand_side_by_side_in_one_report(evaluated, run, tmp_path):
    macros = dict(METHOD="flix_without_language", COMPARE_WITH=[str(evaluated)])
    off = {"seen": ["language"], "unseen_pair": ["language"]}
    assert evaluate(run, tmp_path, eval__evaluate__switch_off=off, **macros) == 0
    text = (tmp_path / "report.md").read_text()
    assert "flix_without_language" in text and "| flix |" in text
    assert {r["method"] for r in results.read(tmp_path / "results.json")} == {
        "flix_without_language"
    }


def test_evaluations_to_compare_with_are_looked_for_before_anything_is_predicted(
    run, evaluated, tmp_path, capsys
):
    for missing in ("nowhere", [str(evaluated), "nowhere"]):
        assert evaluate(run, tmp_path / "out", COMPARE_WITH=missing) == 2
        assert "there is no results.json in 'nowhere'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    # One folder needs no list.
    assert evaluate(run, tmp_path, METHOD="again", COMPARE_WITH=str(evaluated)) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| again |" in text and "| flix |" in text


def test_a_checkpoint_of_another_method_is_refused_and_nothing_is_written(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(run, out, "bases/folder.gin", "methods/lora.gin") == 2
    said = capsys.readouterr().err
    assert "was made with another method" in said and "'flix' in the checkpoint" in said
    assert not (out / "results.json").exists()


def renamed(monkeypatch, language):
    """Swahili's tasks under another name of the language."""
    for name in ("toy_copy_sw", "toy_turn_sw"):
        entry = registry._ENTRIES[name]
        metadata = {**entry.metadata, "language": language}
        monkeypatch.setitem(registry._ENTRIES, name, dataclasses.replace(entry, metadata=metadata))


def test_a_value_renamed_since_training_is_refused_and_not_scored_as_seen(
    run, tmp_path, monkeypatch, capsys
):
    renamed(monkeypatch, "SWH")
    assert evaluate(run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "'toy_copy_sw': its language is ['SWH'] here, and was ['sw'] in training" in said
    # Where a mixture says what was trained, by its tasks as they are registered now.
    assert evaluate(run, tmp_path / "out", eval__evaluate__train_mixture="toy") == 2
    said = capsys.readouterr().err
    assert "task 'toy_copy_sw': language 'SWH' is unknown to the checkpoint" in said
    assert "'seen'" in said and "Known: en, sw." in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_value_that_nothing_was_learned_for_is_told_and_kept(run, tmp_path, monkeypatch, capsys):
    renamed(monkeypatch, "swh")
    seen = {"eval__evaluate__train_mixture": "toy_copy_en", "eval__evaluate__max_examples": 1}
    assert evaluate(run, tmp_path, **seen) == 0
    sentence = "task 'toy_turn_sw': language 'swh' is unknown to the checkpoint"
    assert sentence in capsys.readouterr().out
    kept = json.loads((tmp_path / "run.json").read_text())["unknown to the checkpoint"]
    assert len(kept) == 2 and kept[1].startswith(sentence)


def test_a_dataset_of_more_values_at_once_than_any_trained_one_is_evaluated_with_all_of_them(
    run, tmp_path, monkeypatch
):
    from modjax.evaluation import runner

    renamed(monkeypatch, ["sw", "en"])
    read, seen = runner.read, []
    monkeypatch.setattr(runner, "read", lambda *a, **k: seen.append(read(*a, **k)) or seen[-1])
    options = {"MIXTURE_OR_TASK_NAME": "toy_turn_sw", "eval__evaluate__max_examples": 1}
    assert evaluate(run, tmp_path, **options) == 0
    assert seen[0].arrays["features"].tolist() == [[[2, 2, 1]]]
    assert {row["language"] for row in results.read(tmp_path / "results.json")} == {"sw+en"}


def test_a_method_without_features_needs_none_of_the_tasks_that_it_is_evaluated_on(
    run, tmp_path, monkeypatch, capsys
):
    train_run(run, "lora")
    files = ("bases/folder.gin", "methods/lora.gin")
    lora = {"CHECKPOINT_PATH": run / "lora"}
    assert evaluate(run, tmp_path / "with", *files, **lora) == 0
    entry = registry._ENTRIES["toy_turn_sw"]
    bare = dataclasses.replace(entry, metadata=None)
    monkeypatch.setitem(registry._ENTRIES, "toy_turn_sw", bare)
    lora["eval__evaluate__max_examples"] = 5  # examples that were read already are kept
    assert evaluate(run, tmp_path / "without", *files, **lora) == 0
    path = pathlib.Path("predictions", "toy_turn_sw.jsonl")
    found = [(tmp_path / name / path).read_text().splitlines() for name in ("with", "without")]
    assert found[1] == found[0][:5]
    # FLix looks them up.
    assert evaluate(run, tmp_path / "out", eval__evaluate__max_examples=2) == 2
    assert "task 'toy_turn_sw' has no metadata" in capsys.readouterr().err


def test_a_method_without_features_needs_none_of_the_tasks_that_it_trains_on(
    run, tmp_path, monkeypatch, capsys
):
    entry = registry._ENTRIES["toy_copy_en"]
    monkeypatch.setitem(registry._ENTRIES, "toy_copy_en", dataclasses.replace(entry, metadata=None))
    train_run(run, "lora", tmp_path / "lora")
    assert checkpoints.read_metadata(tmp_path / "lora")["space"]["features"] == []
    with pytest.raises(ValueError, match="task 'toy_copy_en' has no metadata"):
        train_run(run, "flix", tmp_path / "flix")


def test_tasks_in_another_vocabulary_than_the_bases_own_are_refused(run, tmp_path, capsys):
    shutil.copytree(run / "base", tmp_path / "base")
    other = vocabularies.vocabulary_of(tokenizer_folders.make("unigram", tmp_path / "tokenizer"))
    vocabularies.save(other, tmp_path / "base")
    said = "task 'toy_copy_en' is in another vocabulary than its base"
    with pytest.raises(ValueError, match=said):
        train_run(tmp_path, "flix")
    assert not checkpoints.steps(tmp_path / "flix")
    assert evaluate(run, tmp_path / "out", BASE=tmp_path / "base") == 2
    assert said in capsys.readouterr().err


def test_the_base_alone_needs_the_plain_network(run, tmp_path, capsys):
    assert evaluate(run, tmp_path, CHECKPOINT_PATH=None) == 2
    assert "use methods/full.gin" in capsys.readouterr().err
    random = ("bases/t5_small.gin", "methods/flix.gin")
    assert evaluate(run, tmp_path, *random, BASE="random") == 2
    assert "'random' is for training alone" in capsys.readouterr().err
    files = ("bases/folder.gin", "methods/full.gin")
    assert evaluate(run, tmp_path, *files, CHECKPOINT_PATH=None) == 0
    assert {r["method"] for r in results.read(tmp_path / "results.json")} == {"full"}


def test_tokens_without_an_embedding_are_refused_before_anything_is_predicted(
    run, tmp_path, monkeypatch, capsys
):
    from modjax.evaluation import runner

    read = runner.read

    def with_another(*args, **kwargs):
        examples = read(*args, **kwargs)
        tokens = examples.arrays["encoder_input_tokens"].copy()
        tokens[3, 1] = 260
        return dataclasses.replace(
            examples, arrays={**examples.arrays, "encoder_input_tokens": tokens}
        )

    monkeypatch.setattr(runner, "read", with_another)
    assert evaluate(run, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "encoder_input_tokens holds token 260 in a row of toy_" in error
    assert not (tmp_path / "out" / "results.json").exists()

"""The study of real data: what each cell runs, how a rate is chosen, and what is reported."""

import numpy as np
import pytest

from benchmarks import cells, study, trainings
from benchmarks.mtop6 import run
from modjax.evaluation import results
from tasks import mtop6

RUN = [f"{name} = 'some'" for name in ("MIXTURE_OR_TASK_NAME", "BASE", "MODEL_DIR")]


@pytest.fixture
def gin():
    import gin

    yield gin
    gin.clear_config(clear_constants=True)


@pytest.fixture
def settings(tmp_path):
    return trainings.Settings(tmp_path)


def plan(settings, methods=("lora_16", "flix"), splits=("first",), seeds=(0, 1)):
    store = study.Store(settings.output / "cells.jsonl")
    return run.Plan(splits, methods, seeds, store, settings), store


def done(store, settings, cell, score=50.0, **more):
    test = {metric: dict.fromkeys(mtop6.LANGUAGES, score) for metric in run.METRICS}
    found = {"validation": {"en": score}, "test": test, **more}
    store.add({"name": cell.name, "config": cell.config(settings), **found})


def with_base(store, settings):
    for folder in (settings.output / "bases" / base for base in (run.WORDS, run.BASE)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    done(store, settings, run.Cell("", run.BASE))


@pytest.mark.parametrize("name", run.METHODS)
def test_the_bindings_of_every_method_are_read(name, gin):
    method = run.METHODS[name]
    files = ("bases/folder.gin", f"methods/{method.file}.gin", str(run.HERE / "adapt.gin"))
    cells.configure("train", files, [*RUN, *method.bindings])
    assert gin.query_parameter("%METHOD")


def test_a_base_begins_with_the_layers_of_words_and_a_row_for_every_piece(settings):
    import jax

    from modjax import hub
    from modjax.networks import t5
    from tasks import mtop6_pieces

    config = t5.T5Config(
        vocab_size=20,
        emb_dim=8,
        num_heads=1,
        head_dim=8,
        mlp_dim=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        logits_via_embedding=True,
    )
    tokens = np.ones((1, 2), np.int32)
    params = t5.Transformer(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
    hub.save_base(settings.base(run.WORDS), config, params)
    _, begun = hub.load_base(run.begin(settings))
    rows = begun["token_embedder"].pop("embedding")
    known = params["token_embedder"].pop("embedding")
    assert rows.shape == (mtop6_pieces.SIZE + mtop6_pieces.SENTINELS, 8)
    assert float(rows.std()) == pytest.approx(float(known.std()), rel=0.05)
    jax.tree.map(np.testing.assert_array_equal, begun, params)


def test_an_example_of_every_method_but_the_other_loras_computes_rank_16():
    for name, method in run.METHODS.items():
        ranks = [b for b in method.bindings if b.startswith("adapters.LowRank.rank")]
        if name in ("lora_4", "lora_64", "full"):
            continue
        (binding,) = ranks
        rank = eval(binding.partition("= ")[2])
        active = 2 if name in ("flix", "flix_slow_language") else 1
        assert (sum(rank.values()) if isinstance(rank, dict) else rank * active) == 16


def test_the_base_comes_first_and_then_the_rates_of_the_first_split(settings):
    first, store = plan(settings, methods=("flix",), splits=("second",))
    assert [cell.name for cell in first.open()] == ["base_all"]
    with_base(store, settings)
    assert [(c.split, c.rate, c.seed) for c in first.open()] == [
        ("first", rate, 0) for rate in run.RATES
    ]
    for rate, score in zip(run.RATES, (60.0, 40.0), strict=True):
        done(store, settings, run.Cell("first", "flix", rate, 0), score)
    assert first.open() == [run.Cell("second", "flix", run.RATES[0], s) for s in (0, 1)]


def test_the_rate_is_the_best_on_validation_and_the_smaller_of_equals(settings):
    first, store = plan(settings)
    for rate in run.RATES:
        assert first.rate("lora_16") is None
        done(store, settings, run.Cell("first", "lora_16", rate, 0))
        done(store, settings, run.Cell("first", "flix", rate, 0), 1000 * rate)
    assert first.rate("lora_16") == run.RATES[0]
    assert first.rate("flix") == run.RATES[1]


def test_results_have_the_policy_only_where_parsing_was_not_trained(settings):
    first, store = plan(settings, methods=("flix",), seeds=(0,))
    off = {metric: dict.fromkeys(mtop6.LANGUAGES, 20.0) for metric in run.METRICS}
    for rate in run.RATES:
        done(store, settings, run.Cell("first", "flix", rate, 0), language_off=off)
    rows = run.rows(first)
    assert len(rows) == 2 * len(run.METRICS) * len(mtop6.LANGUAGES)
    values = {(r["method"], r["language"], r["metric"]): (r["setting"], r["value"]) for r in rows}
    assert values["flix", "th", "exact_match"] == ("unseen_pair", 50.0)
    assert values["flix" + run.POLICY, "th", "exact_match"] == ("unseen_pair", 20.0)
    assert values["flix" + run.POLICY, "fr", "exact_match"] == ("seen", 50.0)
    results.check([{k: v for k, v in row.items() if k != "point"} for row in rows], "rows")
    assert {row["point"] for row in rows} == {"first"}


def test_a_second_split_holds_out_other_languages():
    assert set(run.trained("first")) & set(run.trained("second")) == {"en"}
    held_out = [set(mtop6.LANGUAGES) - set(run.trained(split)) for split in run.SPLITS]
    assert held_out == [{"es", "hi", "th"}, {"de", "fr", "th"}]


def test_a_vocabulary_is_written_once(settings, monkeypatch):
    from tasks import mtop6_pieces

    written, registered = [], []
    monkeypatch.setattr(
        mtop6_pieces, "write_vocabulary", lambda p: (written.append(p), p.write_bytes(b"model"))
    )
    monkeypatch.setattr(mtop6_pieces, "register", registered.append)
    for _ in range(2):
        run.register.__wrapped__(settings.output)
    assert len(written) == 1 and registered == [settings.output / "spiece.model"] * 2
    assert [path.name for path in settings.output.iterdir()] == ["spiece.model"]


def test_datasets_are_registered_before_any_base_uses_a_configuration(settings, monkeypatch):
    """A process that has used one cannot import what gin configures, and a process does one base after the other."""
    done = []
    monkeypatch.setattr(run, "register", lambda output: done.append("registered"))
    monkeypatch.setattr(run.words, "pretrain", lambda base, settings: done.append(base) or {})
    run.pretrain(run.WORDS, settings)
    assert done == ["registered", run.WORDS]

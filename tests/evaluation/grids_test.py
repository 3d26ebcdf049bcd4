"""What a report claims follows from the rows: who is best, what is averaged, what is missing."""

import pytest

from modjax.evaluation import grids
from modjax.evaluation.results import ResultsError


def row(method, value, task="parse", language="sw", setting="seen", metric="exact_match", seed=0):
    return {
        "method": method,
        "task": task,
        "language": language,
        "setting": setting,
        "metric": metric,
        "value": float(value),
        "n": 10,
        "seed": seed,
    }


def test_a_grid_has_a_cell_per_dataset_and_method_and_marks_the_best():
    tables = grids.build([row("lora", 40), row("flix", 60), row("flix", 80, language="en")])
    (grid,) = tables.grids
    lora, flix = grid.blocks["parse"]
    assert grid.languages == ("sw", "en")
    assert {x: (c.summary.mean, c.best) for x, c in flix.cells.items()} == {
        "sw": (60.0, True),
        "en": (80.0, False),  # nobody to compare with
    }
    assert not lora.cells["sw"].best
    assert (lora.best, flix.best) == (frozenset(), {"seen"})


def test_one_of_three_is_best():
    (grid,) = grids.build([row("a", 40), row("b", 50), row("c", 60)]).grids
    assert [line.cells["sw"].best for line in grid.blocks["parse"]] == [False, False, True]
    assert [bool(line.best) for line in grid.blocks["parse"]] == [False, False, True]


def test_the_best_is_the_lowest_where_lower_is_better():
    tables = grids.build([row("a", 40, metric="malformed"), row("b", 60, metric="malformed")])
    (grid,) = tables.grids
    one, two = grid.blocks["parse"]
    assert one.cells["sw"].best and not two.cells["sw"].best
    assert one.best == {"seen"} and not two.best
    assert grids.findings(tables)[0].endswith("a 40.0, b 60.0.")
    assert "Lower is better" in grids.describe(grid)


def test_tasks_together_are_a_block_of_averages_only():
    rows = [
        row("a", 10),
        row("a", 30, task="tag"),
        row("a", 70, language="en", setting="unseen_pair"),
    ]
    (grid,) = grids.build(rows).grids
    assert list(grid.blocks) == ["parse", "tag", grids.ALL_TASKS]
    (line,) = grid.blocks[grids.ALL_TASKS]
    assert not line.cells
    assert {s: a.summary.mean for s, a in line.averages.items()} == {"seen": 20, "unseen_pair": 70}


def test_the_headline_is_each_tasks_first_metric_and_all_tasks_where_it_is_one():
    same = [row("a", 1), row("a", 2, metric="structure_match"), row("a", 3, task="tag")]
    assert grids.build(same).headline == (
        ("parse", "exact_match"),
        ("tag", "exact_match"),
        (grids.ALL_TASKS, "exact_match"),
    )
    other = [row("a", 1), row("a", 3, task="tag", metric="span_f1")]
    assert grids.build(other).headline == (("parse", "exact_match"), ("tag", "span_f1"))


def test_settings_go_from_near_to_far():
    settings = ["unseen_domain", "unseen_language", "unseen_pair", "seen"]
    rows = [row("a", i, language=f"l{i}", setting=s) for i, s in enumerate(settings)]
    assert grids.build(rows).settings == ("seen", "unseen_pair", "unseen_language", "unseen_domain")


def test_findings_rank_methods_and_say_whether_ranges_over_seeds_overlap():
    apart = [row("a", v, seed=s) for s, v in enumerate((40, 44))]
    apart += [row("b", v, seed=s) for s, v in enumerate((50, 60))]
    assert grids.findings(grids.build(apart)) == [
        "Seen, exact_match of parse (1 dataset): b 55.0 (50.0–60.0), a 42.0 (40.0–44.0). "
        "The ranges of the first two do not overlap."
    ]
    meeting = [*apart[:3], row("b", 44, seed=1)]
    assert grids.findings(grids.build(meeting))[0].endswith("The ranges of the first two overlap.")


def test_reading_instructions_tell_seeds_and_settings():
    single = grids.how_to_read(grids.build([row("a", 1)]))
    assert "one seed, so nothing here says which differences are chance" in single
    assert "Compare" not in single and "◇" not in single
    rows = [row(m, 1, setting="unseen_pair", seed=s) for m in "ab" for s in (0, 1, 2)]
    several = grids.how_to_read(grids.build(rows))
    assert "the mean over 3 seeds" in several and "ranges overlap" in several
    assert "◇ unseen pair: training had this task and this language, but never together." in several


def test_missing_datasets_are_told():
    rows = [row("a", 1), row("b", 2), row("a", 3, language="en")]
    (told,) = grids.missing(grids.build(rows).grids[0])
    assert told.startswith("b has no result, or not for every seed, for: parse en.")
    rows = [row("a", 1), row("b", 2, language="en")]
    assert grids.missing(grids.build(rows).grids[0]) == [
        "No dataset that is seen has results of all methods."
    ]


def test_no_rows_and_two_settings_of_one_cell_are_errors():
    with pytest.raises(ResultsError, match="no results to report"):
        grids.build([])
    rows = [row("a", 1), row("a", 1, setting="unseen_pair", seed=1)]
    with pytest.raises(ResultsError, match="'sw' under two settings, 'seen' and 'unseen_pair'"):
        grids.build(rows)

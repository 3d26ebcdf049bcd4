"""Studies: what is done is kept, and not done again."""

import functools
import json
import time

import pytest

from benchmarks import study


def cell(name="one", **config):
    return {"name": name, "config": config, "value": 1.0}


def test_what_is_kept_is_found_by_the_next_sitting(tmp_path):
    path = tmp_path / "cells.jsonl"
    study.Store(path).add(cell("b", rate=0.1))
    study.Store(path).add(cell("a", sizes=(1, 2)))
    again = study.Store(path)
    assert again.get("b", {"rate": 0.1})["value"] == 1.0
    assert again.get("a", {"sizes": (1, 2)})["value"] == 1.0  # a tuple, where JSON has a list
    assert again.get("c", {}) is None
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_cell_of_another_configuration_is_refused(tmp_path):
    store = study.Store(tmp_path / "cells.jsonl")
    store.add(cell(rate=0.1, seed=0))
    with pytest.raises(SystemExit, match=r"'one' .*rate was 0\.1 and is 0\.2"):
        store.get("one", {"rate": 0.2, "seed": 0})


@pytest.mark.parametrize("line", ["{", "[]", '{"value": 1}'])
def test_a_line_that_is_no_cell_is_named(tmp_path, line):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps(cell()) + "\n" + line + "\n")
    with pytest.raises(SystemExit, match=r"cells\.jsonl, line 2"):
        study.Store(path)


def test_a_cell_says_what_it_was_and_what_it_cost(tmp_path, capsys):
    log = tmp_path / "logs" / "one"

    def job():
        print("trained")
        return {"value": 3}

    found = study.do("one", {"rate": 0.1}, job, log)
    assert found["name"] == "one" and found["config"] == {"rate": 0.1} and found["value"] == 3
    assert found["seconds"] >= 0 and found["commit"] and found["date"]
    assert log.read_text() == "trained\n" and capsys.readouterr().out == ""


def test_a_cell_that_fails_says_where_its_trace_is(tmp_path):
    def job():
        raise KeyError("no such rate")

    with pytest.raises(study.CellError, match="one failed, see .*log: .*no such rate"):
        study.do("one", {}, job, tmp_path / "log")
    assert "KeyError" in (tmp_path / "log").read_text()


def double(number, limit=100):
    """A job, at the top of a module so that it is found in another process."""
    if number > limit:
        raise ValueError(f"{number} is too much")
    return 2 * number


def test_cells_may_open_others(tmp_path):
    done = {}

    def ready():
        return [n for n in (1, 2, *(4 for _ in done.get(2, ()))) if n not in done]

    def keep(number, found):
        done[number] = [found]

    assert study.work(ready, double, keep, 1, tmp_path)
    assert done == {1: [2], 2: [4], 4: [8]}


def test_no_cell_is_begun_when_time_is_up(tmp_path):
    assert not study.work(lambda: [1], double, print, 1, tmp_path, until=time.monotonic() - 1)


def test_a_cell_that_fails_is_told_when_the_others_are_done(tmp_path):
    kept = {}
    with pytest.raises(ValueError, match="7 is too much"):
        job = functools.partial(double, limit=5)
        study.work(
            lambda: [n for n in (7, 3, 4) if n not in kept], job, kept.__setitem__, 1, tmp_path
        )
    assert kept == {3: 6, 4: 8}


def test_mean_and_standard_error():
    assert study.mean([]) == ""
    assert study.mean([3.0]) == "3.0"
    assert study.mean([1.0, 3.0]) == "2.0 ± 1.0"

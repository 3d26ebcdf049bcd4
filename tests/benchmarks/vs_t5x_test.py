"""What the comparison with T5X needs and refuses; the comparison itself needs T5X."""

import pytest

from benchmarks import vs_t5x


def test_sides_that_lose_differently_are_named():
    vs_t5x.check({"ours": 10.0, "bare": 10.0005}, 3)
    with pytest.raises(SystemExit, match="step 3.*'bare': 10.1"):
        vs_t5x.check({"ours": 10.0, "bare": 10.1}, 3)


def test_without_t5x_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vs_t5x.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .*\[t5x\]"):
        vs_t5x.main([])

"""Looked up columns have the gradient of one device on every mesh, and no device adds up more of it than its slice."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
# And how many parts a bank's width has on each.
LAYOUTS = {"8x1x1": 1, "1x8x1": 8, "1x1x8": 8, "2x4x1": 4, "4x1x2": 1, "1x4x2": 4, "2x2x2": 2}


# As in testdata/lookups.py.
WIDTH, FEATURES, ROWS, ACTIVE = 16, 32, 16, 6


@pytest.fixture(scope="module")
def results():
    """What testdata/lookups.py printed for `LAYOUTS`, in a process of eight devices."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(TESTDATA.parents[1]))
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(TESTDATA / "lookups.py"), *LAYOUTS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return dict(zip(LAYOUTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_one_device(results, layout):
    assert max(results[layout]["off"]) < 1e-5


@pytest.mark.parametrize("layout", ["2x4x1", "2x2x2"])
def test_devices_add_up_their_slices_of_the_gradient_only(results, layout):
    # Of both banks at once, one of which is twice as wide as the other.
    assert results[layout]["added"] <= 3 / LAYOUTS[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_device_is_sent_its_columns_once_and_their_gradient_once_though_layers_are_recomputed(
    results, layout
):
    data, fsdp, model = map(int, layout.split("x"))
    entries = ROWS * ACTIVE * (WIDTH + FEATURES / model) / (data * fsdp)
    assert results[layout]["sent"] == (2 * entries if fsdp > 1 else 0)

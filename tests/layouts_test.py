"""The same results on every layout of the mesh, for each family of networks and all methods at once."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

TESTDATA = pathlib.Path(__file__).parent / "testdata"
LAYOUTS = (
    "t5:1x1x1:lazy",
    "t5:1x4x2:lazy",
    "decoder:1x1x1:save:decode",
    "decoder:2x2x2:resume:decode",
    "encoder:1x1x1",
    "encoder:2x1x4:replicated:sequence",
    # The embeddings' gradients, too, of which a constraint on the looked up rows once lost a part.
    "t5:1x1x1:full",
    "t5:2x2x2:full",
)
CHUNKED = "t5:2x2x2:full:chunk"


@pytest.fixture(scope="module")
def results():
    """What testdata/layouts.py printed for `LAYOUTS` and `CHUNKED`, in a process of eight devices."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(TESTDATA.parents[1]))
    env["XLA_FLAGS"] = env.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(TESTDATA / "layouts.py"), *LAYOUTS, CHUNKED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return {line["layout"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(("one", "many"), zip(LAYOUTS[::2], LAYOUTS[1::2], strict=True))
def test_every_layout_trains_and_predicts_as_one_device(results, one, many):
    one, many = results[one], results[many]
    # A resumed run is compared with the end of the other.
    losses = one["losses"][-len(many["losses"]) :]
    np.testing.assert_allclose(many["losses"], losses, rtol=1e-5)
    assert np.ptp([loss for loss, _ in one["losses"]]) > 1e-3 * losses[0][0]
    assert many.get("decoded") == one.get("decoded")


def test_a_loss_in_chunks_is_that_of_the_whole_also_on_a_mesh(results):
    losses = results["t5:1x1x1:full"]["losses"]
    np.testing.assert_allclose(results[CHUNKED]["losses"], losses, rtol=1e-5)


def test_base_and_adapters_lie_as_the_layout_says(results):
    t5, decoder, encoder = (results[name] for name in LAYOUTS[1:6:2])
    assert [t5["kernel"], decoder["kernel"], encoder["kernel"]] == [8, 4, 4]
    assert (t5["a"], t5["b"]) == (["fsdp", None], [None, "model"])
    assert encoder["a"] == encoder["b"] == [None, None]
    assert len(decoder["losses"]) == 1

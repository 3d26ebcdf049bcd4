"""The same training on several devices and in several processes."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

TESTDATA = pathlib.Path(__file__).parent / "testdata"
ROOT = TESTDATA.parent.parent


def launch(folder, *args, devices=1, process=(0, 1), port=None):
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=f"{ROOT}:{TESTDATA}")
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(TESTDATA / "worker.py"), str(folder), *args]
    if port is not None:
        command += [f"localhost:{port}", *map(str, process)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*workers):
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return outputs


def test_devices_and_processes_give_the_adapters_of_one(tmp_path):
    port = _free_port()
    finish(
        launch(tmp_path / "one", "plain"),
        launch(tmp_path / "eight", "model_parallel", devices=8),
        *(
            launch(tmp_path / "two", "asked_to_stop", devices=2, process=(i, 2), port=port)
            for i in range(2)
        ),
    )
    one = np.load(tmp_path / "one.npz")
    eight = np.load(tmp_path / "eight.npz")
    assert list(one) == ["3/adapter/bias", "3/adapter/kernel", "9/adapter/bias", "9/adapter/kernel"]
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-6)
    # The two processes agreed on a step to stop at, though only one was asked, and resumed from it.
    for index in range(2):
        two = np.load(tmp_path / f"two_{index}.npz")
        assert int(two["stopped_at"]) == int(two["saved"]) < 9
        for name in ("9/adapter/bias", "9/adapter/kernel"):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6)


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]

"""The scripts of launch/: what they would run, with every command but bash replaced by one that notes its arguments."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from modjax import launch, processes

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "launch"
SCRIPTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
GIVEN = {
    "job.sh": {"BASE": "b", "MODEL_DIR": "m"},
    "tpu_pod.sh": {"PROJECT": "p", "TPU": "flix", "NFS": "host:/share"},
    "tpu_xpk.sh": {"PROJECT": "p", "CLUSTER": "c", "IMAGE": "i", "STORAGE": "s"},
    "slurm.sbatch": {"SLURM_SUBMIT_DIR": str(ROOT)},
    "gke.sh": {"IMAGE": "i", "KUBECTL": "cat"},
}
FLAG = "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"


@pytest.fixture
def call(tmp_path):
    """Runs a script; gives its exit status, what it wrote, and the commands that it called."""
    note = f"import json, sys; open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))"
    for name in ("gcloud", "xpk", "srun", "python", "git"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{note}" {name} "$@"\n')
        stub.chmod(0o755)

    def run(name, *args, **changes):
        path = f"{tmp_path}:/usr/bin:/bin"
        environ = {"PATH": path, "PYTHON": "python", **GIVEN[name], **changes}
        environ = {key: value for key, value in environ.items() if value is not None}
        command = ["bash", str(FOLDER / name), *args]
        done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
        log = tmp_path / "calls"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return done.returncode, done.stdout + done.stderr, calls

    return run


def manifest(call, *args, **changes):
    status, text, _ = call("gke.sh", *args, **changes)
    assert status == 0, text
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return text, job, container, {item["name"]: item["value"] for item in container["env"]}


def test_every_script_is_bash_and_is_known_here():
    assert set(SCRIPTS) == set(GIVEN)
    for name in SCRIPTS:
        subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
        assert "set -euo pipefail" in (FOLDER / name).read_text()


def test_the_job_is_one_that_train_understands(call):
    status, said, ((python, script, *flags),) = call("job.sh", FLAG, DATA_SHARDS="4")
    assert (status, python, script) == (0, "python", "train.py"), said
    read = launch.parse_flags(flags, "test")
    assert read.bindings[-1] == FLAG.removeprefix("--gin.").replace("=", " = ", 1)
    # Which process it is, is found.
    assert (read.coordinator_address, read.process_count, read.process_index) == (None,) * 3
    launch.load_gin(read, "train")  # all files and names exist, and nothing is left to be set
    import gin

    assert gin.query_parameter("DATA_SHARDS/gin.macro.value") == 4
    assert gin.query_parameter("BASE/gin.macro.value") == "b"


@pytest.mark.parametrize(
    ("name", "args", "lacking"),
    [
        ("job.sh", (), "BASE"),
        ("job.sh", (), "MODEL_DIR"),
        ("tpu_pod.sh", ("create",), "PROJECT"),
        ("tpu_pod.sh", ("train",), "NFS"),
        ("tpu_xpk.sh", ("flix-1",), "STORAGE"),
        ("slurm.sbatch", (), "SLURM_SUBMIT_DIR"),
        ("gke.sh", ("tpu", "flix-1"), "IMAGE"),
    ],
)
def test_what_is_not_set_is_named_before_anything_is_done(call, name, args, lacking):
    status, said, calls = call(name, *args, **{lacking: None})
    assert status != 0 and f"{lacking}: " in said and not calls


def test_a_tpu_pod_is_made_used_stopped_and_deleted(call):
    asked = {action: call("tpu_pod.sh", action, FLAG) for action in ("create", "train", "stop")}
    assert all(status == 0 for status, _, _ in asked.values()), asked
    done = [words[4] if words[0] == "gcloud" else words[1] for words in asked["create"][2]]
    assert done == ["create", "ssh", "archive", "scp", "ssh", "ssh"]
    for _, said, calls in asked.values():
        for words in calls:
            assert words[0] == "git" or {"--project=p", "--zone=us-west4-a"} <= set(words), said
    (command,) = asked["train"][2]
    assert (
        command[1:6] == ["compute", "tpus", "tpu-vm", "ssh", "flix"] and "--worker=all" in command
    )
    # The host's shell reads the command once more.
    (line,) = [w.removeprefix("--command=") for w in command if w.startswith("--command=")]
    assert shlex.split(line)[-2:] == ["launch/job.sh", FLAG]
    assert "MODEL_DIR=/share/runs/flix" in shlex.split(line)
    status, said, calls = call("tpu_pod.sh", "destroy")
    assert status == 2 and "create, train, stop or delete" in said and not calls


def test_xpk_gets_the_job(call):
    status, said, (words,) = call("tpu_xpk.sh", "flix-1", FLAG, SLICES="2")
    assert status == 0 and words[:3] == ["xpk", "workload", "create"], said
    assert {"--workload=flix-1", "--num-slices=2", "--env=MODEL_DIR=/share/runs/flix-1"} <= set(
        words
    )
    (line,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    assert shlex.split(line) == ["launch/job.sh", FLAG]


def test_slurm_starts_a_task_for_each_gpu(call):
    status, said, (words,) = call("slurm.sbatch", FLAG)
    assert status == 0 and words[0] == "srun" and words[-2:] == ["launch/job.sh", FLAG], said
    text = (FOLDER / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    # sbatch reads no further than the first command.
    assert text.rindex("#SBATCH") < text.index("\nset -euo")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_jobset_is_whole(call, kind):
    text, job, container, environ = manifest(call, kind, "flix-1", FLAG, "--gin.METHOD='it''s'")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"\$[{(\w]", code)
    assert container["command"] == ["launch/job.sh"]
    assert container["args"] == [FLAG, "--gin.METHOD='it''s'"]
    assert (environ["BASE"], environ["MODEL_DIR"]) == ("/share/bases/byt5-xl", "/share/runs/flix-1")
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    limits = {"tpu": {"google.com/tpu": 4}, "gpu": {"nvidia.com/gpu": 8}}
    assert container["resources"]["limits"] == limits[kind]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert manifest(call, kind, "flix-1")[2]["args"] == []


def test_the_pods_of_a_gpu_jobset_find_each_other(call):
    _, _, _, environ = manifest(call, "gpu", "flix-1", HOSTS="3")
    job = processes.find(environ | {"JOB_COMPLETION_INDEX": "2"})
    assert (job.process_count, job.process_index) == (3, 2)
    assert job.coordinator_address == "flix-1-node-0-0.flix-1:1234"
    assert call("gke.sh", "cpu", "flix-1")[0] == 2


def test_readme_and_docs_name_every_script():
    text = (ROOT / "docs" / "multihost.md").read_text()
    for path in FOLDER.iterdir():
        assert f"launch/{path.name}" in text, path.name
    assert "docs/multihost.md" in (ROOT / "README.md").read_text()

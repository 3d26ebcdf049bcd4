"""What the README shows runs."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_python_of_the_readme_runs_from_top_to_bottom():
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == (2, 5, 8)
    assert set(names["params"]["hidden"]["flix"]) == {"a", "b"}
    assert names["merged"]["hidden"]["kernel"].shape == (16, 32)
    assert names["registry"].feature_space("greetings").values("language") == ("sw",)


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?((?:bases|methods|runs)/\w+\.gin)", text))
    assert len(named) > 6
    missing = [name for name in named if not (ROOT / "gin_configs" / name).exists()]
    paths = set(re.findall(r"\b((?:modjax|tasks|gin_configs)/[\w/]+\.py)", text))
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_job_of_the_readme_fits_together_as_far_as_it_goes_without_its_weights(tmp_path):
    """Each command in a process of its own, as a user's is: nothing imports its tasks before gin has read all."""
    text = (ROOT / "README.md").read_text()
    job = re.search(r"```\n(python train\.py.*?)```", text, re.DOTALL)
    assert job is not None
    commands = job[1].replace("\\\n", " ").replace("python ", "").splitlines()
    assert [command.split()[0] for command in commands] == ["train.py", "eval.py"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for command in commands:
        script, *flags = shlex.split(command)
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: weights/byt5-small does not exist"), done.stderr
        assert done.returncode == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

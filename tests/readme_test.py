"""What the README shows runs."""

import pathlib
import re

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

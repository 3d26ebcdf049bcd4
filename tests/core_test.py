"""The core stands alone: it imports neither tensorflow, SeqIO nor gin, and `import modjax` is light."""

import pathlib
import pkgutil
import subprocess
import sys

import modjax

ROOT = pathlib.Path(modjax.__file__).parent
APART = ("modjax.data", "modjax.evaluation")


def test_no_module_of_the_core_imports_tensorflow_seqio_gin_or_torch():
    names = [
        m.name
        for m in pkgutil.walk_packages([str(ROOT)], "modjax.")
        if not m.name.startswith(APART)
    ]
    assert "modjax.adapters.adapted" in names and "modjax.trainer" in names
    code = (
        "import importlib, sys\n"
        "for name in ('tensorflow', 'seqio', 'gin', 'torch', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None  # any import of it fails\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_modjax_imports_nothing_heavy():
    code = "import sys, modjax; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_run_downward_only():
    """networks/ knows nothing of adapters/, adapters/ of networks/, and the hub serves nobody below."""
    forbidden = {
        "networks": ("modjax.adapters", "modjax.models", "modjax.data", "modjax.hub"),
        "adapters": ("modjax.networks", "modjax.models", "modjax.data", "modjax.hub"),
        "features.py": ("modjax.data", "modjax.adapters", "jax"),
        "models": ("modjax.hub", "modjax.trainer", "modjax.evaluation"),
        "trainer.py": ("modjax.hub", "modjax.evaluation"),
    }
    for part, names in forbidden.items():
        path = ROOT / part
        files = [path] if path.suffix else sorted(path.rglob("*.py"))
        assert files
        for file in files:
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]) and not line.startswith(" "):
                    bad = [n for n in names if words[1] == n or words[1].startswith(n + ".")]
                    assert not bad, f"{file.name}: {line}"

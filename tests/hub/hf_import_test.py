"""import_hf: a base directory of ours from a Hugging Face folder, a parameter at a time, whole or not at all."""

import fnmatch
import json
import shutil
import sys
import tracemalloc
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from modjax import hub
from modjax.hub.__main__ import main


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def source(hf):
    folder = hf.write(hf.tensors(), hf.config())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder


def test_what_is_imported_is_what_was_there(source, tmp_path, capsys):
    assert main(["import_hf", str(source), str(tmp_path / "base")]) == 0
    assert "bases/folder.gin" in capsys.readouterr().out
    assert hub.load_config(tmp_path / "base") == hub.load_config(source)
    for scan_layers in (False, True):
        equal(
            hub.load_base(tmp_path / "base", scan_layers=scan_layers)[1],
            hub.load_base(source, scan_layers=scan_layers)[1],
        )
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    assert written["huggingface"] == json.loads((source / "config.json").read_text())
    vocabulary = json.loads((tmp_path / "base" / "vocabulary.json").read_text())
    assert (vocabulary["kind"], vocabulary["eos_id"]) == ("bytes", 1)
    assert main(["verify", str(tmp_path / "base")]) == 0
    # The importer's own result may be imported again, into another precision.
    hub.import_hf(str(tmp_path / "base"), tmp_path / "half", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(hub.load_base(tmp_path / "half")[1])} == {
        "bfloat16"
    }


def test_a_changed_weight_is_found_by_the_fingerprint(source, tmp_path, capsys):
    hub.import_hf(str(source), tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["encoder/encoder_norm/scale"][3] += 1e-3
    safetensors.numpy.save_file(tensors, path)
    assert main(["verify", str(tmp_path / "base")]) == 2
    assert "not as it was written: encoder/encoder_norm/scale" in capsys.readouterr().err
    assert main(["verify", str(source)]) == 2
    assert "has no fingerprint.json" in capsys.readouterr().err


def test_what_is_there_is_only_replaced_when_asked(source, tmp_path, capsys):
    taken = tmp_path / "base"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    assert main(["import_hf", str(source), str(taken)]) == 2
    assert "is not empty; --force writes over it" in capsys.readouterr().err
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    assert main(["import_hf", str(source), str(taken), "--force"]) == 0
    assert (taken / "mine.txt").read_text() == "kept"
    equal(hub.load_base(taken)[1], hub.load_base(source)[1])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_importing_and_loading_hold_little_beside_the_weights(hf, tmp_path, dtype):
    """An embedding that is most of the model is the worst case: read in float32, written in half of it."""
    tensors = hf.tensors()
    rng = np.random.default_rng(0)
    width = tensors["shared.weight"].shape[1]
    for name in ("shared.weight", "lm_head.weight"):
        tensors[name] = rng.normal(size=(2_000_000, width)).astype(np.float32)
    config = hf.config(vocab_size=2_000_000, tie_word_embeddings=False)
    folder = hf.write(tensors, config)
    weights = sum(x.size for x in tensors.values()) * (2 if dtype else 4)
    del tensors

    def peak(function):
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    imported = peak(lambda: hub.import_hf(str(folder), tmp_path / "base", dtype=dtype))
    loaded = peak(lambda: hub.load_base(folder, dtype=dtype))
    print(f"{weights:,} bytes: import {imported / weights:.2f}, load {loaded / weights:.2f}")
    assert imported < 1.3 * weights
    assert weights < loaded < 1.3 * weights


def test_a_base_is_not_imported_onto_itself(source, tmp_path, capsys):
    hub.import_hf(str(source), tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    again = [str(tmp_path / "base"), str(tmp_path / "base" / ""), "--force", "--dtype=bfloat16"]
    assert main(["import_hf", *again]) == 2
    assert "would be written over while it is read" in capsys.readouterr().err
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_a_failed_import_leaves_no_base(source, tmp_path, capsys):
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    tensors[name][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    assert main(["import_hf", str(source), str(tmp_path / "base")]) == 2
    assert f"tensor {name} holds values that are not finite" in capsys.readouterr().err
    assert not hub.is_base(tmp_path / "base") and not list((tmp_path / "base").glob("*.saf*"))


def test_what_cannot_be_read_says_what_to_do(hf, tmp_path, capsys, monkeypatch):
    assert main(["import_hf", "somebody/no-such-folder-here", str(tmp_path / "base")]) == 2
    error = capsys.readouterr().err
    assert "is no folder here" in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["import_hf", "google/mt5-small", str(tmp_path / "base")]) == 2
    assert "install the extra: pip install 'modjax[hf]'" in capsys.readouterr().err
    lacking = hf.tensors()
    lacking.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    lacking["adapter.weight"] = np.zeros((2, 2), np.float32)
    folder = hf.write(lacking, hf.config(), "lacking")
    assert main(["import_hf", str(folder), str(tmp_path / "base")]) == 2
    assert "no place in this network: adapter.weight" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


@pytest.fixture
def pickled(source):
    """A folder whose weights are in pytorch_model.bin, if what is in it were weights."""
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"not weights")
    return source


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """A function: folder -> the patterns that its files are asked for by, as owner/name on a hub of its own."""

    def put(folder):
        asked = []

        def snapshot_download(name, *, revision, allow_patterns):
            assert (name, revision) == ("owner/name", "main")
            asked.append(allow_patterns)
            cache = tmp_path / "cache"
            cache.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                    shutil.copyfile(path, cache / path.name)
            return str(cache)

        module = types.SimpleNamespace(snapshot_download=snapshot_download)
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return asked

    return put


FETCH = ["import_hf", "owner/name", "--revision=main"]


def test_pickled_weights_are_not_fetched_where_there_are_safetensors(source, on_hub, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"not weights")
    asked = on_hub(source)
    assert main([*FETCH, str(tmp_path / "base")]) == 0
    assert len(asked) == 1 and not (tmp_path / "cache" / "pytorch_model.bin").exists()
    equal(hub.load_base(tmp_path / "base")[1], hub.load_base(source)[1])


def test_pickled_weights_are_fetched_where_there_is_nothing_else(
    pickled, on_hub, tmp_path, monkeypatch, capsys
):
    def load(path, **options):
        assert options["weights_only"] is True
        raise RuntimeError("no weights. Read them without weights_only.")

    fake = types.SimpleNamespace(__version__="2.10.0+cpu", load=load)
    monkeypatch.setitem(sys.modules, "torch", fake)
    asked = on_hub(pickled)
    assert main([*FETCH, str(tmp_path / "base")]) == 2
    file = tmp_path / "cache" / "pytorch_model.bin"
    assert f"{file} cannot be read as weights of torch: no weights. It" in capsys.readouterr().err
    assert len(asked) == 2 and "pytorch_model*.bin" in asked[1]
    assert not (tmp_path / "base").exists()


def test_pickled_weights_without_torch_say_what_to_do_before_they_are_fetched(
    pickled, on_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["import_hf", str(pickled), str(tmp_path / "base")]) == 2
    error = capsys.readouterr().err
    assert f"{pickled} has no safetensors but pytorch_model.bin" in error
    assert "pip install torch (a CPU build is enough)" in error
    assert "weights_only=True" in error and "save_file" in error
    asked = on_hub(pickled)
    assert main([*FETCH, str(tmp_path / "base")]) == 2
    assert "owner/name has no model.safetensors on the hub" in capsys.readouterr().err
    assert len(asked) == 1 and not (tmp_path / "base").exists()


def test_a_torch_whose_reader_can_be_made_to_run_code_is_refused(
    pickled, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1"))
    assert main(["import_hf", str(pickled), str(tmp_path / "base")]) == 2
    assert "Torch 2.9.1 can be made to run code" in capsys.readouterr().err

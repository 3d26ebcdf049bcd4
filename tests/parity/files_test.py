"""Folders as transformers writes them: shards, bfloat16, and pickled weights, read by `import_hf` or by our recipe."""

import copy
import json
import os
import re
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.hub.hf_import import verify  # noqa: E402
from modjax.hub.layers import flatten  # noqa: E402


def _equal(ours, expected):
    ours, expected = flatten(ours), flatten(expected)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_shards_written_by_transformers_load_as_one_file_does(hf_t5, tmp_path):
    model, folder = hf_t5("mt5")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    _equal(hub.load_base(tmp_path)[1], hub.load_base(folder)[1])


def test_bfloat16_written_by_transformers_is_read_bit_by_bit(hf_t5, tmp_path):
    model = copy.deepcopy(hf_t5("t5")[0]).to(torch.bfloat16)  # other tests use the original
    model.save_pretrained(tmp_path)
    query = model.encoder.block[1].layer[0].SelfAttention.q.weight.detach().float().numpy()
    ours = hub.load_base(tmp_path)[1]["encoder"]["layers_1"]["attention"]["query"]["kernel"]
    assert ours.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(ours.astype(np.float32), query.T)


def _pickle(state, config, folder, shards=1, **options):
    """Writes a folder with pytorch_model.bin, or with two shards of it and their index."""
    folder.mkdir()
    shutil.copyfile(config / "config.json", folder / "config.json")
    files = ["pytorch_model.bin"]
    if shards == 2:
        files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        index = {"weight_map": {name: files[i % 2] for i, name in enumerate(state)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        part = {name: w for j, (name, w) in enumerate(state.items()) if j % shards == i}
        torch.save(part, folder / file, **options)
    return folder


@pytest.fixture(params=["mt5", "gpt2"])
def model(request, hf_t5, hf_decoder):
    """(Weights by name, the folder with them in safetensors), with buffers of integers as old files have."""
    model, folder = (hf_decoder if request.param == "gpt2" else hf_t5)(request.param)
    state = dict(model.state_dict())  # holds mT5's embedding under three names, in one memory
    if request.param == "gpt2":
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        state["transformer.h.1.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    return state, folder


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_imported_as_safetensors_are(model, tmp_path, shards):
    state, folder = model
    pickled = _pickle(state, folder, tmp_path / "pickled", shards)
    before = sorted(pickled.iterdir())
    for dtype in (None, "bfloat16"):
        hub.import_hf(str(pickled), tmp_path / "ours", dtype=dtype, force=True)
        hub.import_hf(str(folder), tmp_path / "theirs", dtype=dtype, force=True)
        for name in ("model.safetensors", "config.json", "fingerprint.json"):
            ours, theirs = (tmp_path / which / name for which in ("ours", "theirs"))
            assert ours.read_bytes() == theirs.read_bytes(), name
        verify(tmp_path / "ours")
    assert sorted(pickled.iterdir()) == before


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_bit_by_bit_from_new_and_old_files(
    hf_decoder, tmp_path, dtype, options
):
    network, folder = hf_decoder("qwen3")
    model = copy.deepcopy(network).to(dtype)
    model.save_pretrained(tmp_path / "half")
    pickled = _pickle(model.state_dict(), folder, tmp_path / "pickled", **options)
    hub.import_hf(str(pickled), tmp_path / "ours")
    ours, theirs = hub.load_base(tmp_path / "ours")[1], hub.load_base(tmp_path / "half")[1]
    _equal(ours, theirs)
    assert {x.dtype.name for x in flatten(ours).values()} == {str(dtype).removeprefix("torch.")}


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(hf_t5, tmp_path, new):
    model, folder = hf_t5("mt5")
    state = {**model.state_dict(), "code": _Malicious(tmp_path / "ran")}
    options = {"_use_new_zipfile_serialization": new}
    pickled = _pickle(state, folder, tmp_path / "pickled", **options)
    with pytest.raises(hub.HubError, match=r"pytorch_model.bin asks for \w+.mkdir: .*not read"):
        hub.import_hf(str(pickled), tmp_path / "base")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "base").exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # it was one


def test_damaged_pickles_and_what_is_no_weights_are_named(hf_t5, tmp_path):
    model, folder = hf_t5("mt5")
    pickled = _pickle(model.state_dict(), folder, tmp_path / "pickled")
    file = pickled / "pytorch_model.bin"
    whole = file.read_bytes()

    def refused(match):
        with pytest.raises(hub.HubError, match=f"{file}.*{match}"):
            hub.import_hf(str(pickled), tmp_path / "base")

    for content in (b"", whole[:100], whole[: len(whole) // 2], b"version https://git-lfs"):
        file.write_bytes(content)
        refused(f"cannot be read as weights of torch: .+ {len(content)} bytes.*fetch it again")
    for content, match in (
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({"model": {"shared.weight": torch.ones(2)}}, "holds a dict under 'model'"),
        ({"shared.weight": torch.ones(2, dtype=torch.complex64)}, "has dtype complex64; readable"),
    ):
        torch.save(content, file)
        refused(match)
    torch.save({**model.state_dict(), "shared.weight": torch.ones(67, 24).int()}, file)
    with pytest.raises(hub.HubError, match="shared.weight has dtype I32.*Quantised"):
        hub.import_hf(str(pickled), tmp_path / "base")
    (pickled / "pytorch_model.bin").unlink()
    index = {"weight_map": {"shared.weight": "pytorch_model-00001-of-00002.bin"}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(
        hub.HubError, match="00001-of-00002.bin is missing; pytorch_model.bin.index"
    ):
        hub.import_hf(str(pickled), tmp_path / "base")


@pytest.mark.parametrize("shards", [1, 2])
def test_the_recipe_for_pickled_weights_works_as_printed(hf_t5, tmp_path, monkeypatch, shards):
    model, folder = hf_t5("mt5")
    pickled = _pickle(model.state_dict(), folder, tmp_path / "pickled", shards)
    with monkeypatch.context() as patch, pytest.raises(hub.HubError, match="pip inst") as error:
        patch.setitem(sys.modules, "torch", None)
        hub.import_hf(str(pickled), tmp_path / "base")
    recipe = re.search(r"\n((    .*\n?)+)", str(error.value))[1]
    monkeypatch.chdir(pickled)
    exec("\n".join(line[4:] for line in recipe.splitlines()), {})
    _equal(hub.load_base(pickled)[1], hub.load_base(folder)[1])


def test_our_own_folder_holds_what_was_loaded_from_transformers(hf_t5, tmp_path):
    from modjax.networks import t5

    _, folder = hf_t5("umt5_tied")
    overrides, params = hub.load_base(folder)
    hub.save_base(tmp_path, t5.T5Config(**overrides), params)
    ours, again = hub.load_base(tmp_path)
    assert ours == overrides
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "modjax"
    _equal(again, params)

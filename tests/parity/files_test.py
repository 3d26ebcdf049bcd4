"""Folders as transformers writes them: shards, bfloat16, and pickled weights by our recipe."""

import copy
import json
import re

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
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


@pytest.mark.parametrize("shards", [1, 2])
def test_the_recipe_for_pickled_weights_works_as_printed(hf_t5, tmp_path, monkeypatch, shards):
    model, folder = hf_t5("mt5")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = model.state_dict()  # holds the embedding under three names, in one memory
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {k: v for j, (k, v) in enumerate(state.items()) if j % shards == i}
        torch.save(part, tmp_path / name)
    with pytest.raises(hub.HubError, match="has no model.safetensors") as error:
        hub.load_base(tmp_path)
    recipe = re.search(r"\n((    .*\n?)+)", str(error.value))[1]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in recipe.splitlines()), {})
    _equal(hub.load_base(tmp_path)[1], hub.load_base(folder)[1])


def test_our_own_folder_holds_what_was_loaded_from_transformers(hf_t5, tmp_path):
    from modjax.networks import t5

    _, folder = hf_t5("umt5_tied")
    overrides, params = hub.load_base(folder)
    hub.save_base(tmp_path, t5.T5Config(**overrides), params)
    ours, again = hub.load_base(tmp_path)
    assert ours == overrides
    assert json.loads((tmp_path / "config.json").read_text())["format"] == "modjax"
    _equal(again, params)

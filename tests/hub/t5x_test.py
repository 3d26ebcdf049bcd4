"""T5X checkpoints, written here in T5X's two formats by hand, come in whole and go out as T5X reads them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import serialization

from modjax import adapters, checkpoints, hub, initialize, models, provenance
from modjax.features import FeatureSpace
from modjax.hub import hf_import, peft, run, t5x, t5x_files
from modjax.hub.__main__ import main
from modjax.hub.errors import HubError
from modjax.hub.kinds import KINDS
from modjax.hub.layers import flatten, unflatten
from modjax.networks.t5 import T5Config, Transformer
from modjax.trainer import TrainState

WIDTH, HEADS, HEAD_DIM, LAYERS = 6, 3, 2, 2
FAMILIES = {
    "t5": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "mt5": {},
    "byt5": {"num_encoder_layers": 3},
    "umt5": {"relpos_per_layer": True},
}


def config_of(family, **changes):
    sizes = {
        "vocab_size": 11,
        "emb_dim": WIDTH,
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "mlp_dim": 10,
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "relpos_buckets": 8,
    }
    return T5Config(**{**sizes, **FAMILIES[family], **changes})


def params_of(config, seed=0):
    """Random weights by our names, which are those of T5X's minimal T5."""
    rng = np.random.default_rng(seed)
    shapes = KINDS["t5"].shapes(config)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def scalable(params, depths):
    """The same as T5X's scalable T5 has it: layers along the second axis, heads along axes of their own."""
    out = {}
    for name, value in params.items():
        stack, _, rest = name.partition("/layers_0/")
        if "/layers_" not in name:
            out[name] = value
        if not rest:
            continue
        layers = [params[f"{stack}/layers_{i}/{rest}"] for i in range(depths[stack])]
        if rest.endswith(("query/kernel", "key/kernel", "value/kernel")):
            layers = [x.reshape(WIDTH, HEADS, HEAD_DIM) for x in layers]
        elif rest.endswith("out/kernel"):
            layers = [x.reshape(HEADS, HEAD_DIM, WIDTH) for x in layers]
        out[f"{stack}/{stack}/{rest}"] = np.stack(layers, axis=1)
    return out


def write_legacy(folder, params, step=7, version=3, chunk=None, inline=("scale",)):
    """`checkpoint_<step>/checkpoint`, a msgpack, and a zarr folder for each tensor but those that end as `inline`."""
    where = pathlib.Path(folder) / f"checkpoint_{step}"
    where.mkdir(parents=True)
    target, states = {}, {}
    for name, value in params.items():
        states[name] = {"v_row": np.zeros(1, np.float32)}
        if name.endswith(inline):
            target[name] = value
            continue
        kind = "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str
        chunks = [min(n, chunk or n) for n in value.shape]
        metadata = {
            "chunks": chunks,
            "compressor": {"id": "gzip", "level": 1},
            "dtype": kind,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": list(value.shape),
            "zarr_format": 2,
        }
        path = f"target.{name.replace('/', '.')}/"
        store = {"driver": "file", "path": str(where / path)}
        spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
        tensorstore.open(spec, create=True, open=True).result().write(value).result()
        stored = {"driver": "gfile", "path": path}
        target[name] = {
            "driver": "zarr",
            "dtype": str(value.dtype),
            "kvstore": stored,
            "metadata": metadata,
        }
    state = {"step": np.int32(step), "param_states": unflatten(states)}
    content = {"version": version, "optimizer": {"target": unflatten(target), "state": state}}
    (where / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return where


def write_orbax(folder, params, step=7):
    """`checkpoint_<step>/state`, as T5X's manager writes it with its optimizer's state."""
    where = pathlib.Path(folder) / f"checkpoint_{step}"
    states = {name: {"m": np.zeros(1, np.float32)} for name in params}
    state = {"step": jnp.int32(step), "param_states": unflatten(states)}
    ocp.PyTreeCheckpointer(use_ocdbt=True).save(
        where.absolute() / "state", {"target": unflatten(params), "state": state}
    )
    return where


WRITERS = {"legacy": write_legacy, "orbax": write_orbax}


def assert_same(files, params):
    assert set(files.shapes) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(files.read(name), value, err_msg=name)


@pytest.mark.parametrize("written", WRITERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_shapes_say_its_network_and_its_values_are_read(tmp_path, written, family):
    config = config_of(family)
    params = params_of(config)
    WRITERS[written](tmp_path, params)
    base = t5x.open_t5x(tmp_path)
    assert KINDS["t5"].config(**base.fields) == config
    assert base.files.step == 7
    assert_same(base.files, params)


@pytest.mark.parametrize("written", WRITERS)
def test_a_scanned_checkpoint_is_the_unrolled_one(tmp_path, written):
    # As many layers as the network is wide, so that only convention tells the axes apart.
    depth = WIDTH
    config = config_of("umt5", num_encoder_layers=depth)
    params = params_of(config)
    stacked = scalable(params, {"encoder": depth, "decoder": LAYERS})
    query = stacked["encoder/encoder/attention/query/kernel"]
    assert query.shape == (WIDTH, depth, HEADS, HEAD_DIM)
    WRITERS[written](tmp_path, stacked)
    base = t5x.open_t5x(tmp_path)
    assert KINDS["t5"].config(**base.fields) == config
    assert_same(base.files, params)


def test_the_axis_of_layers_is_told_from_the_width(tmp_path):
    """T5X's `param_scan_axis` may be 0, and our own scanned networks stack along axis 0."""
    config = config_of("umt5")
    params = params_of(config)
    stacked = scalable(params, {"encoder": LAYERS, "decoder": LAYERS})
    for stack in ("encoder", "decoder"):
        for name in [name for name in stacked if name.startswith(f"{stack}/{stack}/")]:
            stacked[name] = np.moveaxis(stacked[name], 1, 0)
    write_legacy(tmp_path / "theirs", stacked)
    assert_same(t5x.open_t5x(tmp_path / "theirs").files, params)
    ours = {name.replace("encoder/encoder/", "encoder/layers/"): x for name, x in stacked.items()}
    ours = {name.replace("decoder/decoder/", "decoder/layers/"): x for name, x in ours.items()}
    write_orbax(tmp_path / "ours", ours)
    assert_same(t5x.open_t5x(tmp_path / "ours").files, params)


def test_opening_reads_headers_and_a_stack_is_read_once(tmp_path, monkeypatch):
    params = params_of(config_of("umt5"))
    write_legacy(tmp_path, scalable(params, {"encoder": LAYERS, "decoder": LAYERS}), inline=())
    reads = []
    read = t5x_files._read_zarr
    monkeypatch.setattr(
        t5x_files, "_read_zarr", lambda name, *args: (reads.append(name), read(name, *args))[1]
    )
    files = t5x.open_t5x(tmp_path).files
    assert reads == []
    for name in sorted(files.shapes):
        files.read(name)
    assert len(files.shapes) > len(reads) == len(set(reads))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_an_imported_checkpoint_is_a_base_of_ours(tmp_path, stored, dtype):
    config = config_of("mt5")
    params = {name: x.astype(stored) for name, x in params_of(config).items()}
    write_legacy(tmp_path / "theirs", params, chunk=4)
    t5x.import_t5x(tmp_path / "theirs", tmp_path / "ours", dtype=dtype)
    overrides, loaded = hub.load_base(tmp_path / "ours")
    assert T5Config(**overrides) == config
    for name, value in flatten(loaded).items():
        assert value.dtype.name == (dtype or stored)
        np.testing.assert_array_equal(value, params[name].astype(dtype or stored))
    assert hf_import.verify(tmp_path / "ours") == len(params)
    with pytest.raises(HubError, match="--force"):
        t5x.import_t5x(tmp_path / "theirs", tmp_path / "ours")


def test_what_shapes_do_not_say_the_caller_says(tmp_path):
    write_orbax(tmp_path, params_of(config_of("mt5")))
    fields = {"mlp_activations": ("silu", "linear"), "relpos_max_distance": 64}
    assert t5x.open_t5x(tmp_path, **fields).fields.items() >= fields.items()


def test_a_folder_of_checkpoints_gives_the_last_one_or_the_one_asked_for(tmp_path):
    params = params_of(config_of("mt5"))
    write_legacy(tmp_path, params, step=9)
    write_orbax(tmp_path, params, step=10)
    assert t5x.T5XFiles(tmp_path).step == 10
    assert t5x.T5XFiles(tmp_path, step=9).step == 9
    assert t5x.T5XFiles(tmp_path / "checkpoint_9" / "checkpoint").step == 9
    with pytest.raises(HubError, match=r"step 8, only of \[9, 10\]"):
        t5x.T5XFiles(tmp_path, step=8)


# What is wrong is named.


@pytest.mark.parametrize("written", WRITERS)
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p.pop("encoder/encoder_norm/scale"), "lacks encoder/encoder_norm/scale"),
        (
            lambda p: p.update({"encoder/extra/kernel": np.ones((2, 2), np.float32)}),
            "encoder/extra/kernel",
        ),
        (
            lambda p: p.update({"decoder/decoder_norm/scale": np.ones(5, np.float32)}),
            r"decoder/decoder_norm/scale is \[5\], the network has \[6\]",
        ),
        (lambda p: p.pop("token_embedder/embedding"), "token_embedder/embedding"),
        (lambda p: p.pop("encoder/relpos_bias/rel_embedding"), "rel_embedding"),
        (
            lambda p: p.update({"encoder/encoder_norm/scale": np.full(6, np.nan, np.float32)}),
            "not finite",
        ),
    ],
)
def test_a_checkpoint_that_is_not_this_network_is_refused_by_name(tmp_path, written, change, said):
    params = params_of(config_of("mt5"))
    change(params)
    WRITERS[written](tmp_path, params)
    with pytest.raises(HubError, match=said):
        t5x.import_t5x(tmp_path, tmp_path / "ours")


def test_a_truncated_legacy_checkpoint_is_refused(tmp_path):
    where = write_legacy(tmp_path, params_of(config_of("mt5")), chunk=4)
    file = where / "checkpoint"
    whole = file.read_bytes()
    for cut in (b"", whole[:100], whole[:-3]):
        file.write_bytes(cut)
        with pytest.raises(HubError, match=f"checkpoint \\({len(cut)} bytes\\).*cut short"):
            t5x.open_t5x(where)
    file.write_bytes(whole)
    name = "encoder/layers_0/mlp/wo/kernel"
    chunk = where / f"target.{name.replace('/', '.')}" / "1.0"
    half = chunk.read_bytes()[:10]
    chunk.write_bytes(half)
    with pytest.raises(HubError, match=name):
        t5x.open_t5x(where).files.read(name)
    # A chunk that is not there is not a chunk of zeros.
    chunk.unlink()
    with pytest.raises(HubError, match=f"lacks 1.0, of {name}"):
        t5x.open_t5x(where).files.read(name)
    (chunk.parent / ".zarray").unlink()
    with pytest.raises(HubError, match=name):
        t5x.open_t5x(where).files.read(name)


def test_a_truncated_orbax_checkpoint_is_refused(tmp_path):
    where = write_orbax(tmp_path, params_of(config_of("mt5")))
    metadata = where / "state" / "_METADATA"
    whole = metadata.read_text()
    metadata.write_text(whole[:100])
    with pytest.raises(HubError, match="cannot be read"):
        t5x.open_t5x(where)
    metadata.write_text(whole)
    for file in (where / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(HubError, match="cannot be read"):
        t5x.import_t5x(where, tmp_path / "ours")
    assert not (tmp_path / "ours" / "config.json").exists()


def test_what_is_no_checkpoint_of_t5x_is_said_so(tmp_path):
    with pytest.raises(HubError, match="does not exist"):
        t5x.open_t5x(tmp_path / "nowhere")
    (tmp_path / "model.ckpt-5.index").write_text("")
    with pytest.raises(HubError, match="TensorFlow"):
        t5x.open_t5x(tmp_path / "model.ckpt-5")
    with pytest.raises(HubError, match="TensorFlow"):
        t5x.open_t5x(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("")
    with pytest.raises(HubError, match="holds notes.txt"):
        t5x.open_t5x(other)
    (other / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-5"')
    with pytest.raises(HubError, match="TensorFlow"):
        t5x.open_t5x(other)


def test_a_leaf_that_cannot_be_trusted_is_refused(tmp_path):
    params = params_of(config_of("mt5"))

    def rewritten(**changes):
        where = write_legacy(tmp_path / str(len(list(tmp_path.iterdir()))), params)
        file = where / "checkpoint"
        content = serialization.msgpack_restore(file.read_bytes())
        content["optimizer"]["target"]["token_embedder"]["embedding"].update(changes)
        file.write_bytes(serialization.msgpack_serialize(content))
        return where

    spec = {"driver": "gfile", "path": "../../elsewhere"}
    with pytest.raises(HubError, match="not in this folder"):
        t5x.open_t5x(rewritten(kvstore=spec))
    with pytest.raises(HubError, match="bfloat16"):
        t5x.open_t5x(rewritten(metadata={"dtype": "<u2", "shape": [11, 6], "chunks": [11, 6]}))
    with pytest.raises(HubError, match="neither an array nor a zarr"):
        t5x.open_t5x(rewritten(driver="n5"))
    # The zarr beside it is of another shape than the checkpoint says.
    metadata = {"dtype": "<f4", "shape": [12, 6], "chunks": [12, 6]}
    where = rewritten(metadata=metadata)
    with pytest.raises(HubError, match=r"token_embedder/embedding is \[12, 6\]"):
        t5x.T5XFiles(where).read("token_embedder/embedding")


# The way out.


@pytest.mark.parametrize("scan_layers", [False, True])
def test_an_exported_base_is_a_checkpoint_as_t5x_lays_it_out(tmp_path, scan_layers):
    config = config_of("mt5")
    params = params_of(config)
    hub.save_base(tmp_path / "ours", config, unflatten(params))
    where = t5x.export_t5x(tmp_path / "ours", tmp_path / "theirs", step=3, scan_layers=scan_layers)
    assert where == tmp_path / "theirs" / "checkpoint_3"
    stored = ocp.PyTreeCheckpointer().restore(where / "state")
    assert set(stored) == {"target", "state"} and int(stored["state"]["step"]) == 3
    if scan_layers:
        query = stored["target"]["encoder"]["layers"]["attention"]["query"]["kernel"]
        assert query.shape == (LAYERS, WIDTH, HEADS * HEAD_DIM)
    else:
        assert set(flatten(stored["target"])) == set(params)
    assert_same(t5x.open_t5x(where).files, params)


def test_a_checkpoint_that_is_there_stays_unless_forced(tmp_path):
    config = config_of("mt5")
    for name, seed in (("one", 1), ("two", 2)):
        hub.save_base(tmp_path / name, config, unflatten(params_of(config, seed)))
    t5x.export_t5x(tmp_path / "one", tmp_path / "theirs")
    with pytest.raises(HubError, match="checkpoint_0 is there already; .*--force"):
        t5x.export_t5x(tmp_path / "two", tmp_path / "theirs")
    assert_same(t5x.T5XFiles(tmp_path / "theirs"), params_of(config, 1))
    t5x.export_t5x(tmp_path / "two", tmp_path / "theirs", force=True)
    assert_same(t5x.T5XFiles(tmp_path / "theirs"), params_of(config, 2))
    # Checkpoints of other steps stay in any case.
    t5x.export_t5x(tmp_path / "one", tmp_path / "theirs", step=1)
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir()) == [
        "checkpoint_0",
        "checkpoint_1",
    ]


def test_both_ways_by_the_command_line(tmp_path, capsys):
    config = config_of("mt5", relpos_max_distance=20)
    hub.save_base(tmp_path / "ours", config, unflatten(params_of(config)))
    theirs = str(tmp_path / "theirs")
    assert main(["export_t5x", str(tmp_path / "ours"), theirs, "--scan_layers", "--step=4"]) == 0
    assert capsys.readouterr().out.strip().endswith("theirs/checkpoint_4")
    assert main(["import_t5x", theirs, str(tmp_path / "assumed")]) == 0
    assert "does not say: relpos_max_distance 128, mlp_act" in capsys.readouterr().out
    back = str(tmp_path / "back")
    assert main(["import_t5x", theirs, back, "--relpos_max_distance=20", "--step=4"]) == 0
    assert hub.load_config(back) == hub.load_config(tmp_path / "ours")
    jax.tree.map(
        np.testing.assert_array_equal,
        hub.load_base(back)[1],
        hub.load_base(tmp_path / "ours")[1],
    )
    assert main(["import_t5x", theirs, back]) == 2
    assert "--force writes over it" in capsys.readouterr().err


class Nothing:
    def save(self, directory):
        pathlib.Path(directory, "position").write_text("")

    def restore(self, directory):
        pass


def test_a_run_is_exported_with_its_base_and_its_feature_space(tmp_path):
    config = config_of("mt5")
    hub.save_base(tmp_path / "base", config, unflatten(params_of(config)))
    space = FeatureSpace((("language", ("sw", "yo")),), datasets=("one",))
    rules = (
        adapters.Rule(
            ".*/query", adapters.Mixture("flix", adapters.LowRank(2), adapters.Features())
        ),
    )
    model = models.EncoderDecoderModel(adapters.Adapted(Transformer(config), rules, space))
    batch = model.example_batch({"inputs": 2, "targets": 2}, space)
    layout = initialize.layout(model, batch)
    base = flatten(hub.load_base(tmp_path / "base")[1])
    trained = {
        name: np.full(leaf.shape, 0.5, np.float32) for name, leaf in flatten(layout.trained).items()
    }
    metadata = {
        "method": adapters.describe_method(model.adapted),
        "space": space.to_json(),
        "base": provenance.fingerprint(unflatten(base)),
        "gin": f"BASE = {str(tmp_path / 'base')!r}\n",
    }
    state = TrainState(
        step=jnp.int32(5),
        trained=jax.tree.map(jnp.asarray, unflatten(trained)),
        opt_state=(),
        rng=jnp.zeros(2),
    )
    writer = checkpoints.Checkpointer(tmp_path / "run", metadata)
    writer.save(5, state, Nothing())
    writer.close()
    where = t5x.export_t5x(tmp_path / "run", tmp_path / "theirs", dtype="bfloat16")
    assert where.name == "checkpoint_5"
    stored = flatten(ocp.PyTreeCheckpointer().restore(where / "state")["target"])
    expected = {**{name: x.astype("bfloat16") for name, x in base.items()}, **trained}
    assert set(stored) == set(expected) and any("/flix/" in name for name in stored)
    for name, value in expected.items():
        assert stored[name].dtype == value.dtype
        np.testing.assert_array_equal(stored[name], value)
    written = json.loads((tmp_path / "theirs" / "feature_space.json").read_text())
    assert FeatureSpace.from_json(written) == space
    # The base may be a checkpoint of T5X itself: the run is built again, and goes out, as well.
    t5x.export_t5x(tmp_path / "base", tmp_path / "as_t5x")
    found = run.open_run(tmp_path / "run", tmp_path / "as_t5x")
    assert set(flatten(found.params)) == set(expected)
    written = peft.export_peft(
        tmp_path / "run", tmp_path / "peft", {"language": "sw"}, base=tmp_path / "as_t5x"
    )
    assert written["peft_type"] == "LORA"
    # Another base is not what it was trained on.
    hub.save_base(tmp_path / "other", config, unflatten(params_of(config, seed=1)))
    with pytest.raises(provenance.CheckpointError, match="base"):
        t5x.export_t5x(tmp_path / "run", tmp_path / "elsewhere", base=tmp_path / "other")


def test_a_checkpoint_of_t5x_is_a_base_as_it_is(tmp_path):
    config = config_of("umt5")
    params = params_of(config)
    write_legacy(tmp_path, scalable(params, {"encoder": LAYERS, "decoder": LAYERS}))
    overrides, loaded = hub.load_base(tmp_path, scan_layers=True)
    assert T5Config(**overrides) == config_of("umt5", scan_layers=True)
    query = loaded["encoder"]["layers"]["attention"]["query"]["kernel"]
    for i in range(LAYERS):
        np.testing.assert_array_equal(
            query[i], params[f"encoder/layers_{i}/attention/query/kernel"]
        )
    where = t5x.export_t5x(tmp_path, tmp_path / "orbax")
    assert_same(t5x.open_t5x(where).files, params)

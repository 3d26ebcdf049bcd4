"""Names of dimensions become places on a mesh."""

import collections
import types

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.linen.partitioning import AxisMetadata
from jax.sharding import AbstractMesh, PartitionSpec

from modjax import adapters, initialize, models, partitioning

MESH = AbstractMesh((2, 2, 2), partitioning.MESH_AXES)
FakeDevice = collections.namedtuple("FakeDevice", "process_index row column")


def test_parameters_are_divided_by_the_names_of_their_dimensions():
    spec = partitioning.spec
    assert spec(("embed", "mlp"), (8, 16), MESH) == PartitionSpec("fsdp", "model")
    assert spec((None, "rank"), (8, 16), MESH) == PartitionSpec(None, None)
    # One mesh axis divides one dimension only, and only evenly.
    assert spec(("vocab", "mlp"), (8, 16), MESH) == PartitionSpec("model", None)
    assert spec(("vocab", "mlp"), (7, 16), MESH) == PartitionSpec(None, "model")
    # Rows take both axes that divide them, so that an activation's width keeps none.
    activation = (("batch", "length", "embed"), (8, 3, 16))
    assert spec(*activation, MESH) == PartitionSpec(("data", "fsdp"), None, None)
    # A vector is not worth a gather.
    assert spec(("layers", "embed"), (3, 16), MESH) == PartitionSpec(None, None)
    assert spec(("mlp",), (16,), MESH) == PartitionSpec("model")


def test_a_jobs_own_rules_come_before_the_usual_ones():
    rules = [["length", "model"], ["embed", ["fsdp", "model"]], ["embed", "model"], ["mlp", None]]
    partitioner = partitioning.Partitioner(2, 2, rules=rules)
    names = ("batch", "length", "embed")

    def spec(names, shape):
        return partitioning.spec(names, shape, MESH, partitioner.all_rules)

    assert spec(names, (8, 4, 16)) == PartitionSpec(("data", "fsdp"), "model", None)
    assert spec(names, (8, 3, 16)) == PartitionSpec(("data", "fsdp"), None, "model")
    assert spec(("embed", "mlp"), (8, 16)) == PartitionSpec(("fsdp", "model"), None)
    assert spec(("embed", "mlp"), (6, 16)) == PartitionSpec("model", None)
    partitioner.check({"kernel": ("embed", "mlp")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": "replicate"}, "adapters: unknown 'replicate'. Did you mean 'replicated'"),
        ({"rules": ["embed"]}, "rules: 'embed' is no pair"),
        ({"rules": [("embed", "fdsp")]}, "names no axis of the mesh. Did you mean 'fsdp'"),
        ({"rules": [("embd", None)]}, "nothing has the logical axis 'embd'. Did you mean 'embed'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        partitioning.Partitioner(**settings).check({"kernel": ("embed", "mlp")})


@pytest.mark.parametrize(
    ("names", "message"),
    [(("embed", "mpl"), "'mpl' .*may add one.*Did you mean 'mlp'"), (("embed",), "1 axis names")],
)
def test_unknown_axis_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        partitioning.spec(names, (8, 16), MESH)


def test_a_networks_axes_are_read_by_path():
    collection = {"encoder": {"query": {"kernel_axes": AxisMetadata(("embed", "joined_kv"))}}}
    axes = partitioning.flat_axes(collection)
    assert axes == {"encoder/query/kernel": ("embed", "joined_kv")}
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    tree = {"encoder": {"query": {"kernel": np.ones((4, 6)), "bias": np.ones(6)}}}
    homes = partitioning.shardings(tree, axes, mesh)
    assert homes["encoder"]["query"]["kernel"].spec == PartitionSpec("fsdp", "model")
    assert homes["encoder"]["query"]["bias"].spec == PartitionSpec()
    with pytest.raises(ValueError, match="parameter encoder/query/kernel: 3 axis names"):
        partitioning.shardings(tree, {"encoder/query/kernel": ("a", "b", "c")}, mesh)


def test_devices_that_do_not_divide_are_refused():
    six = [jax.devices()[0]] * 6
    with pytest.raises(ValueError, match="6 devices cannot be .* fsdp=3 times model=4: their prod"):
        partitioning.Partitioner(fsdp=3, model=4).mesh(six)
    for wrong in ({"fsdp": "2"}, {"model": 1.5}, {"model": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"Partitioner.{name} must be an integer of at least"):
            partitioning.Partitioner(**wrong)
    with pytest.raises(ValueError, match="fsdp=1 times model=0"):
        partitioning.make_mesh(0)
    with pytest.raises(ValueError, match="fsdp=-1 times model=1"):
        partitioning.make_mesh(1, six, fsdp=-1)


@pytest.mark.parametrize(
    ("batch", "microbatches", "fits"),
    [(8, 1, True), (8, 2, True), (6, 1, False), (8, 4, False)],
)
def test_a_batch_must_divide_over_devices_and_microbatches(batch, microbatches, fits):
    if fits:
        partitioning.check_batch(batch, MESH, microbatches)
    else:
        with pytest.raises(ValueError, match=f"the batch of {batch} does not divide"):
            partitioning.check_batch(batch, MESH, microbatches)


@pytest.mark.parametrize("value", [0, 8.0, "8", True])
def test_a_batch_and_its_microbatches_are_counted_in_whole_numbers(value):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got"):
        partitioning.check_batch(value, MESH)
    with pytest.raises(ValueError, match="microbatches must be an integer of at least 1, got"):
        partitioning.check_batch(8, MESH, value)


def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch):
    """Eight rows on a grid of devices: two of each process, in this order along the batch."""

    def shares(*processes):
        devices = {
            FakeDevice(p, row, column): (slice(row * 2, row * 2 + 2),)
            for row, line in enumerate(processes)
            for column, p in enumerate(line)
        }
        held = types.SimpleNamespace(devices_indices_map=lambda shape: devices)
        monkeypatch.setattr(partitioning, "rows", lambda mesh: held)
        monkeypatch.setattr(jax, "process_count", lambda: 1 + max(map(max, processes)))
        return [rows.tolist() for rows in partitioning.shares(8, MESH)]

    assert shares([0], [0], [1], [1]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shares([1], [0], [0], [1]) == [[2, 3, 4, 5], [0, 1, 6, 7]]
    # The model divided over two processes each: they read the same.
    assert shares([0, 1], [0, 1], [2, 3], [2, 3]) == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_one_process_reads_all_rows_and_places_them():
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    assert [rows.tolist() for rows in partitioning.shares(4, mesh)] == [[0, 1, 2, 3]]
    placed = partitioning.place_whole_batch({"x": np.arange(4)}, mesh)
    np.testing.assert_array_equal(placed["x"], np.arange(4))


def test_every_parameter_of_every_kind_of_network_has_a_place(
    make_t5, make_decoder, make_encoder, space
):
    everything = dict(qk_norm=True, post_norms=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    low_rank = adapters.Mixture("flix", adapters.LowRank(2), adapters.Features())
    rules = (adapters.Rule(".*/(query|value|out|wi|wi_0|wo)", low_rank),)
    mesh = partitioning.make_mesh(1, jax.devices()[:1])
    for make, options in (
        (models.EncoderDecoderModel, make_t5(relpos_per_layer=True)),
        (models.DecoderOnlyModel, make_decoder(**everything)),
        (
            models.DecoderOnlyModel,
            make_decoder(norm="layer", positions="learned", max_positions=9, scan_layers=True),
        ),
        (models.DecoderOnlyModel, make_decoder(logits_via_embedding=False)),
        (models.EncoderModel, make_encoder(head="dense", scan_layers=True)),
    ):
        model = make(adapters.Adapted(options, rules, space))
        layout = initialize.layout(model, model.example_batch({"inputs": 4, "targets": 4}, space))
        for tree in (layout.trained, layout.frozen):
            places = partitioning.shardings(tree, layout.axes, mesh)
            flat = traverse_util.flatten_dict(places, sep="/")
            assert set(flat) <= set(layout.axes), set(flat) - set(layout.axes)
            assert any("model" in place.spec for place in flat.values())


def test_the_platform_is_that_of_the_mesh_in_force():
    assert partitioning.platform() == jax.default_backend()
    # Of chips that are not here, as when a job is compiled for a pod.
    device = types.SimpleNamespace(platform="tpu")
    with partitioning.in_force(types.SimpleNamespace(devices=np.array([[device]]))):
        assert partitioning.platform() == "tpu"
    assert partitioning.platform() == jax.default_backend()

"""The mesh, its presets, and the table from logical axes to mesh axes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax import sharding


def test_mesh_fills_the_free_axis_in_order():
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2, devices=jax.devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert [d.id for d in np.ravel(mesh.devices)] == list(range(8))
    assert sharding.Layout(mesh).data_parallel_degree == 4


@pytest.mark.parametrize(
    ("axes", "message"),
    [((3, -1, 1), "8 devices are not divisible by 3"), ((2, 2, 1), "needs 4 devices, 8 are present")],
)
def test_mesh_that_does_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2], devices=jax.devices())


def test_experts_are_cut_along_an_axis_that_the_other_weights_and_the_rows_share():
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=-1, tensor=1, devices=jax.devices())
    shapes = {"up": (3, 8, 16, 5), "query": (3, 16, 4, 5)}
    axes = {"up": ("layers", "experts", "expert_embed", "mlp"), "query": ("layers", "embed", "heads", "head_dim")}
    abstract = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    placed = sharding.param_shardings(axes, abstract, mesh=mesh)
    assert placed["up"].shard_shape(shapes["up"]) == (3, 2, 8, 5)
    assert placed["query"].shard_shape(shapes["query"]) == (3, 2, 4, 5)
    assert sharding.Layout(mesh).data_parallel_degree == 8
    assert sharding.described(mesh) == "data 1, fsdp 2, expert 4, tensor 1"
    with pytest.raises(ValueError, match="mesh data=1 fsdp=1 expert=3 tensor=1 needs 3 devices, 8 are present"):
        sharding.make_mesh(data=1, fsdp=1, expert=3, tensor=1, devices=jax.devices())


def test_rows_go_over_data_and_fsdp_and_weights_by_the_table():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices())
    rows = jax.device_put(np.arange(8), sharding.batch_sharding(mesh, stacked=False))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}
    placed = sharding.param_shardings(
        {"a": ("layers", "embed", "heads", "head_dim")}, {"a": jax.ShapeDtypeStruct((3, 8, 4, 5), "float32")}, mesh=mesh
    )
    assert placed["a"].shard_shape((3, 8, 4, 5)) == (3, 4, 2, 5)


def test_indivisible_parameters_are_all_named():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1, devices=jax.devices())
    abstract = {"a": jax.ShapeDtypeStruct((12,), "float32"), "b": jax.ShapeDtypeStruct((9,), "float32")}
    with pytest.raises(ValueError, match=r"(?s)\['a'\]: embed has 12 .*\['b'\]: embed has 9"):
        sharding.param_shardings({"a": ("embed",), "b": ("embed",)}, abstract, mesh=mesh)


def test_few_key_value_heads_stay_whole_and_query_heads_must_divide():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4, devices=jax.devices())
    shape = {"a": jax.ShapeDtypeStruct((8, 2), "float32")}
    placed = sharding.param_shardings({"a": ("embed", "kv_heads")}, shape, mesh=mesh)
    assert placed["a"].spec == PartitionSpec(("fsdp", "expert"), None)
    with pytest.raises(ValueError, match=r"heads has 2 entries, mesh axis tensor has 4 devices; choose a divisor of 2"):
        sharding.param_shardings({"a": ("embed", "heads")}, shape, mesh=mesh)


def test_unknown_logical_axis_is_an_error():
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, devices=jax.devices())
    with pytest.raises(KeyError, match="depth"):
        sharding.param_shardings({"a": ("depth",)}, {"a": jax.ShapeDtypeStruct((8,), "float32")}, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the mesh asks of a device that is not here."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"


def hosts(count, *, each, **facts):
    return [Device(i, i // each, **facts) for i in range(count * each)]


@pytest.mark.parametrize(
    ("preset", "axes", "expected", "gather"),
    [
        ("fsdp", {}, (1, 8, 1, 1), "layer"),
        ("zero3", {}, (1, 8, 1, 1), "layer"),
        ("zero2", {}, (1, 8, 1, 1), "step"),
        ("multi_gpu", {}, (8, 1, 1, 1), "layer"),
        ("hybrid", {}, (2, 4, 1, 1), "layer"),  # two hosts of four
        ("fsdp", {"tensor": 4}, (1, 2, 1, 4), "layer"),
        ("zero2", {"tensor": 2}, (1, 4, 1, 2), "step"),
        ("hybrid", {"tensor": 2}, (2, 2, 1, 2), "layer"),
        ("fsdp", {"data": -1}, (8, 1, 1, 1), "layer"),  # who asks for the rest gets it
        ("fsdp", {"data": 4}, (4, 2, 1, 1), "layer"),
        ("multi_gpu", {"fsdp": 2}, (4, 2, 1, 1), "layer"),
        ("fsdp", {"expert": 4}, (1, 2, 4, 1), "layer"),
        ("fsdp", {"expert": -1}, (1, 1, 8, 1), "layer"),
        ("multi_gpu", {"fsdp": -1}, (1, 8, 1, 1), "layer"),
    ],
)
def test_presets_and_the_axes_that_replace_theirs(preset, axes, expected, gather):
    axes = {"data": None, "fsdp": None, "expert": None, "tensor": None} | axes
    layout = sharding.make_layout(preset=preset, **axes, devices=hosts(2, each=4))
    assert layout.gather == gather
    assert layout.mesh is not None and tuple(layout.mesh.shape.values()) == expected


def test_neighbours_along_tensor_are_on_one_host():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4, devices=hosts(2, each=4))
    assert [[device.process_index for device in row] for row in mesh.devices[0, :, 0]] == [[0] * 4, [1] * 4]


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"mesh.preset='zero1' is not one of fsdp, zero3, zero2, multi_gpu, hybrid"):
        sharding.make_layout(preset="zero1", data=None, fsdp=None, tensor=None, devices=jax.devices())


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("rows", "stream", "width"), (8, 6, 5), (("data", "fsdp", "expert"), "tensor", None)),
        (("rows", "positions", "heads", "head_dim"), (4, 6, 2, 3), (("data", "fsdp", "expert"), None, "tensor", None)),
        (("rows", "positions", "mlp"), (4, 5, 6), (("data", "fsdp", "expert"), None, "tensor")),
        (
            ("rows", "stream", "width"),
            (4, 5, 8),
            (("data", "fsdp", "expert"), None, None),
        ),  # odd rows
        (("rows", "stream", "width"), (3, 6, 8), (None, "tensor", None)),  # rows that the mesh does not divide
    ],
)
def test_activations_live_where_the_table_says(axes, shape, expected):
    layout = sharding.Layout(sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()))
    (equation,) = jax.make_jaxpr(lambda x: layout.constrain(x, *axes))(np.zeros(shape)).eqns
    assert equation.params["sharding"] == NamedSharding(layout.mesh, PartitionSpec(*expected))


def test_one_device_pins_nothing():
    x = jax.numpy.zeros((2, 3))
    assert sharding.ONE_DEVICE.constrain(x, "rows", "width") is x and sharding.ONE_DEVICE.head is None

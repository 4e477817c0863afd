import jax
import numpy as np
import pytest

from fpo_jax import sharding


def test_mesh_fills_the_free_axis_in_order():
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2, devices=jax.devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [d.id for d in np.ravel(mesh.devices)] == list(range(8))
    assert sharding.Layout(mesh).row_ways == 4


@pytest.mark.parametrize(
    ("axes", "message"),
    [((3, -1, 1), "8 devices are not divisible by 3"), ((2, 2, 1), "needs 4 devices, 8 are present")],
)
def test_mesh_that_does_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2], devices=jax.devices())


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


def test_unknown_logical_axis_is_an_error():
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, devices=jax.devices())
    with pytest.raises(KeyError, match="depth"):
        sharding.param_shardings({"a": ("depth",)}, {"a": jax.ShapeDtypeStruct((8,), "float32")}, mesh=mesh)

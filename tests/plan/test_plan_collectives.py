"""Collectives read from compiled text: literal excerpts of three compilers, and programs compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fpo_jax.plan import collectives as module

MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))


def found(text, mesh=MESH):
    return {(row.kind, row.axes): row[2:5] for row in module.collectives(text, mesh=mesh)}


def entry(*lines):
    return "\n".join(["ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("[2,4]<=[2,2,2]T(2,0,1)", ("data", "fsdp")),
        ("[2,4]<=[8]", ("fsdp", "tensor")),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("{}", ("data", "fsdp", "tensor")),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data'}", ("data",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),
    ],
)
def test_groups_name_the_axes_of_the_mesh(groups, axes):
    text = entry(f"%all-gather.1 = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}")
    assert [row.axes for row in module.collectives(text, mesh=MESH)] == [axes]


def test_payload_and_what_each_device_sends():
    groups = "replica_groups=[2,4]<=[8]"
    rows = found(
        entry(
            f"%a = f32[100]{{0}} all-gather(%p), {groups}, dimensions={{0}}",
            f"%b = bf16[100]{{0}} reduce-scatter(%p), {groups}, to_apply=%add",
            f"%c = (f32[50]{{0}}, pred[7]{{0}}) all-reduce(%p, %q), {groups}, to_apply=%add",
            f"%d = s32[3,5]{{1,0}} all-to-all(%p), {groups}",
            "%e = f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}",
        )
    )
    axes = ("fsdp", "tensor")
    assert rows == {
        ("all-gather", axes): (1, 400, 300),
        ("reduce-scatter", axes): (1, 800, 600),  # 200 bytes come out on each of four devices
        ("all-reduce", axes): (1, 207, round(207 * 1.5)),
        ("all-to-all", axes): (1, 60, 45),
        ("collective-permute", ("tensor",)): (1, 40, 40),
    }


def test_a_group_of_one_moves_nothing():
    assert (
        found(entry("%a = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%s"))
        == {}
    )


def test_what_a_start_returns_beside_its_result_does_not_count():
    rows = found(
        entry(
            "%a = ((bf16[2,8]{1,0}, f32[4]{0}), (bf16[4,8]{1,0}, f32[8]{0})) all-gather-start(%p, %q),"
            " replica_groups=[4,2]<=[8]",
            "%b = (bf16[4,8]{1,0}, f32[8]{0}) all-gather-done(%a)",
            "%c = ((f32[6]{0}), f32[6]{0}) all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add",
            "%d = f32[6]{0} all-reduce-done(%c)",
            "%e = (f32[9]{0:T(8,128)(2,1)S(1)}, f32[9]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p),"
            " channel_id=4, source_target_pairs={{0,1},{1,0}}",
        )
    )
    assert {kind: numbers[:2] for (kind, _), numbers in rows.items()} == {
        "all-gather": (1, 64 + 32),
        "all-reduce": (1, 24),
        "collective-permute": (1, 36),
    }


def test_what_the_schedule_sends_beside_work_is_hidden():
    """The first start waits beside a product, the second one beside nothing; the third is in one piece."""
    groups = "replica_groups=[4,2]<=[8]"
    text = entry(
        f"%a = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%p), {groups}, dimensions={{0}}",
        "%d = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}",
        "%a.done = f32[8]{0} all-gather-done(%a)",
        f"%b = (f32[8]{{0}}, f32[16]{{0}}) all-gather-start(%d), {groups}, dimensions={{0}}",
        "%g = f32[8]{0} get-tuple-element(%p), index=0",
        "%b.done = f32[16]{0} all-gather-done(%b)",
        f"%c = f32[32]{{0}} all-gather(%b.done), {groups}, dimensions={{0}}",
    )
    (row,) = module.collectives(text, mesh=MESH)
    assert (row.sent, row.hidden) == ((32 + 64 + 128) // 2, 32 // 2)


def test_a_collective_that_a_tpu_spreads_over_fusions_counts_once_and_its_reduce_scatter_is_one():
    gather = "%g = bf16[4]{0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8]"
    text = "\n".join(
        [
            *[f"%step.{i} (p: bf16[2]) -> bf16[4] {{\n  {gather}\n}}" for i in range(3)],
            "%all-reduce-scatter.4 (p: bf16[4]) -> bf16[2] {",
            "  %r = bf16[4]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
            "}",
            entry(
                *[f"%f.{i} = bf16[4]{{0}} fusion(%p), kind=kCustom, calls=%step.{i}" for i in range(3)],
                "%s = bf16[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4",
            ),
        ]
    )
    assert found(text) == {("all-gather", ("tensor",)): (1, 8, 4), ("reduce-scatter", ("tensor",)): (1, 8, 4)}


class _Device:
    """A TPU of a slice."""

    def __init__(self, number, slice_index):
        self.id, self.slice_index = number, slice_index


@pytest.mark.parametrize(
    ("shape", "gathered"), [((2, 2, 2), ("fsdp",)), ((1, 4, 2), ("fsdp",)), ((4, 2, 1), ("data",))]
)
def test_a_program_for_two_slices_is_that_of_one_and_receives_from_the_other(shape, gathered):
    """As libtpu 0.0.50 writes it: groups number the four devices of a slice, whichever axis the slices are along."""
    mesh = Mesh(np.array([_Device(i, i // 4) for i in range(8)]).reshape(shape), ("data", "fsdp", "tensor"))
    between = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target='
    between += '"{1,2}x{0:3}",_xla_megascale_transfer_type="%s"}'
    shaken = "bf16[64,8]{1,0}, u32[]{:S(2)}, token[]"
    text = entry(
        "%a = f32[100]{0} all-gather(%p), channel_id=2, replica_groups={{0,2},{1,3}}, dimensions={0}",
        f"%send = ({shaken}) send(%b, %after), channel_id=3, is_host_transfer=true, {between % 'ALL_REDUCE'}",
        f"%recv = ({shaken}) recv(%after), channel_id=4, is_host_transfer=true, {between % 'ALL_REDUCE'}",
        f"%done = (bf16[64,8]{{1,0}}, token[]) recv-done(%recv), channel_id=4, {between % 'ALL_REDUCE'}",
        f"%c = (f32[6]{{0}}, u32[], token[]) recv(%after), channel_id=5, {between % 'ALL_GATHER'}",
        f"%d = (f32[6]{{0}}, u32[], token[]) recv(%after), channel_id=6, {between % 'ONE_TO_ONE'}",
        "%e = (f32[6]{0}, u32[], token[]) recv(%after), channel_id=7",  # from the host
    )
    assert found(text, mesh) == {
        ("all-gather", gathered): (1, 400, 200),
        ("all-reduce", ("slices",)): (1, 1024, 1024),
        ("all-gather", ("slices",)): (1, 24, 12),
        ("collective-permute", ("slices",)): (1, 24, 24),
    }


def test_a_gather_and_a_scatter_compiled_here():
    def both(x):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(whole), ("data", "fsdp"), tiled=True)

    places = {"in_specs": PartitionSpec("fsdp"), "out_specs": PartitionSpec(("data", "fsdp"))}
    mapped = jax.shard_map(both, mesh=MESH, check_vma=False, **places)
    assert found(jax.jit(mapped).lower(jnp.ones(24)).compile().as_text()) == {
        ("all-gather", ("fsdp",)): (1, 96, 48),
        ("reduce-scatter", ("data", "fsdp")): (1, 96, 72),
    }


def test_a_sum_over_devices_in_a_loop_compiled_here():
    def loop(x):
        def body(carry, part):
            return carry + jax.lax.psum(part, "tensor"), None

        return jax.lax.scan(body, jnp.zeros(5), x)[0]

    mapped = jax.shard_map(loop, mesh=MESH, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((7, 5))).compile().as_text()
    assert found(text) == {("all-reduce", ("tensor",)): (7, 7 * 20, 7 * 20)}

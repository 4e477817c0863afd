"""The attention kernels: one for the attended values, one for the gradient of the queries, one for keys and values.

A thread block works on one block of queries (or keys) of one head. One warpgroup copies the blocks that it visits into
a ring of stages in shared memory; two multiply 64 positions each. `Visits` says which blocks are visited, and which
of them have no hidden pair: those come first, and no mask is computed for them. In the forward pass the two multiply in
turns, so that one's softmax runs during the other's products.

What lies outside the arrays is read as zeros and never stored. Logarithms are binary: exp2 is what the hardware has.

Letters beyond `types.py`: P positions of padded rows, Q and S those of queries and keys of a warpgroup's tile, X and Y
blocks as in `block_mask.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax.kernels.attention import tiles

plgpu = tiles.plgpu
FORWARD_KEYS, DQ_KEYS, DKV_QUERIES = 128, 64, 64  # positions of a visited block
FORWARD_STAGES, DQ_STAGES, DKV_STAGES = 2, 4, 4
LOG2_E = math.log2(math.e)
_START, _MASKED = -1e30, -2e30  # maximum of no logits, and a hidden one: exp2 of the difference is 0


class Spec(NamedTuple):
    """Static facts."""

    scale: float
    interpret: bool


class Visits(NamedTuple):
    """For every block the other blocks that have anything to do with it, those without a hidden pair first."""

    order_NXY: jax.Array  # int32, block numbers; of each row of the array only the first `counts[..., 1]` count
    counts_NX2: jax.Array  # int32: of blocks without a hidden pair, and of all that have a visible one


class Plan(NamedTuple):
    """Who sees whom; arrays of integers."""

    bounds_N4P: jax.Array
    forward: Visits
    dq: Visits
    dkv: Visits


def forward(spec: Spec, q_NTHC, k_NTGC, v_NTGC, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Return the attended values and the log-sum-exp [N, H, P] of every query's logits, binary."""
    N, _, H, C = q_NTHC.shape
    P, group_size, dtype = plan.bounds_N4P.shape[-1], H // k_NTGC.shape[2], q_NTHC.dtype
    factor = spec.scale * LOG2_E

    def mosaic_attention_fwd(q_ref, k_ref, v_ref, bounds_ref, order_ref, counts_ref, out_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, q_filled, k_filled, v_filled, k_free, v_free, turn = scratch
        block, row, head = tiles.late_first(P), lax.axis_index("rows"), lax.axis_index("heads")
        whole, count = counts_ref[row, block, 0], counts_ref[row, block, 1]

        def copy():
            plgpu.copy_gmem_to_smem(q_ref.at[row, pl.ds(block * tiles.BLOCK, tiles.BLOCK), head], q_smem, q_filled)

            @pl.loop(0, count)
            def _fill_stage(index):
                stage = index % FORWARD_STAGES
                keys = (row, pl.ds(order_ref[row, block, index] * FORWARD_KEYS, FORWARD_KEYS), head // group_size)
                pl.when(index >= FORWARD_STAGES)(lambda: plgpu.barrier_wait(k_free.at[stage]))
                plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[stage], k_filled.at[stage])
                pl.when(index >= FORWARD_STAGES)(lambda: plgpu.barrier_wait(v_free.at[stage]))
                plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[stage], v_filled.at[stage])

            tiles.drain(count, FORWARD_STAGES, k_free, v_free)

        def multiply(group):
            rows_Q = pl.ds(block * tiles.BLOCK + group * tiles.ROWS, tiles.ROWS)
            q_tile = q_smem.at[pl.ds(group * tiles.ROWS, tiles.ROWS)]
            bounds_Q = [tiles.load(bounds_ref.at[row, part, rows_Q], axis=1) for part in range(4)]

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def see(index, carry, masked):
                out_QC, max_Q, sum_Q = carry
                stage = index % FORWARD_STAGES
                plgpu.barrier_wait(k_filled.at[stage])

                def logits(sum_ref):
                    plgpu.wgmma(sum_ref, q_tile, k_smem.at[stage].T)
                    take_turns()
                    return sum_ref[...]

                logits_QS = pl.run_scoped(logits, plgpu.ACC((tiles.ROWS, FORWARD_KEYS)))
                plgpu.barrier_arrive(k_free.at[stage])
                if masked:
                    first_key = order_ref[row, block, index] * FORWARD_KEYS
                    seen_QS = tiles.seen(bounds_Q, first_key, (tiles.ROWS, FORWARD_KEYS), queries=0)
                    logits_QS = jnp.where(seen_QS, logits_QS, _MASKED / factor)
                new_max_Q = jnp.maximum(max_Q, jnp.max(logits_QS, axis=1) * factor)
                keep_Q = jnp.exp2(max_Q - new_max_Q)
                weights_QS = jnp.exp2(logits_QS * factor - tiles.spread(new_max_Q, FORWARD_KEYS))
                sum_Q = sum_Q * keep_Q + jnp.sum(weights_QS, axis=1)
                out_QC = out_QC * tiles.spread(keep_Q, C)
                carry = out_QC, new_max_Q, sum_Q, weights_QS.astype(dtype)
                out_QC, new_max_Q, sum_Q, weights_QS = lax.optimization_barrier(carry)
                plgpu.barrier_wait(v_filled.at[stage])
                take_turns()
                (out_QC,) = tiles.add_products((out_QC, weights_QS, v_smem.at[stage]), interpret=spec.interpret)
                plgpu.barrier_arrive(v_free.at[stage])
                return out_QC, new_max_Q, sum_Q

            plgpu.barrier_wait(q_filled)
            pl.when(group == 1)(take_turns)
            carry = tiles.zeros(C), tiles.splat(_START), tiles.splat(0.0)
            carry = lax.fori_loop(0, whole, functools.partial(see, masked=False), carry)
            out_QC, max_Q, sum_Q = lax.fori_loop(whole, count, functools.partial(see, masked=True), carry)
            pl.when(group == 0)(take_turns)
            lse_ref[row, head, rows_Q] = max_Q + jnp.log(sum_Q) * LOG2_E
            out_QC *= tiles.spread(1.0 / sum_Q, C)
            tiles.store((q_tile, out_QC.astype(dtype), out_ref.at[row, rows_Q, head]))

        tiles.in_parts(copy, multiply)

    ring = plgpu.SMEM((FORWARD_STAGES, FORWARD_KEYS, C), dtype)
    filled = plgpu.Barrier(num_barriers=FORWARD_STAGES)
    free = plgpu.Barrier(num_arrivals=tiles.MULTIPLIERS, num_barriers=FORWARD_STAGES)
    return tiles.launch(
        mosaic_attention_fwd,
        out_type=(_like(q_NTHC), jax.ShapeDtypeStruct((N, H, P), jnp.float32)),
        scratch=[
            plgpu.SMEM((tiles.BLOCK, C), dtype),
            *(ring, ring),
            *(plgpu.Barrier(), filled, filled, free, free),
            plgpu.Barrier(num_arrivals=tiles.MULTIPLIERS),
        ],
        grid=(P // tiles.BLOCK, N, H),
        interpret=spec.interpret,
    )(q_NTHC, k_NTGC, v_NTGC, plan.bounds_N4P, *plan.forward)


def dq(spec: Spec, q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan: Plan) -> jax.Array:
    """Return the gradient of the queries: scale * sum_j p_ij (dp_ij - mean_i) k_j."""
    N, _, H, C = q_NTHC.shape
    P, group_size, dtype = plan.bounds_N4P.shape[-1], H // k_NTGC.shape[2], q_NTHC.dtype
    tile = tiles.ROWS, DQ_KEYS

    def mosaic_attention_dq(q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, *refs):
        bounds_ref, order_ref, counts_ref, dq_ref, q_smem, dout_smem, k_smem, v_smem, loaded, filled, free = refs
        block, row, head = tiles.late_first(P), lax.axis_index("rows"), lax.axis_index("heads")
        whole, count = counts_ref[row, block, 0], counts_ref[row, block, 1]

        def copy():
            queries = (row, pl.ds(block * tiles.BLOCK, tiles.BLOCK), head)
            plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem, loaded)
            plgpu.copy_gmem_to_smem(dout_ref.at[queries], dout_smem, loaded)

            @pl.loop(0, count)
            def _fill_stage(index):
                stage = index % DQ_STAGES
                keys = (row, pl.ds(order_ref[row, block, index] * DQ_KEYS, DQ_KEYS), head // group_size)
                pl.when(index >= DQ_STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
                plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[stage], filled.at[stage])
                plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[stage], filled.at[stage])

            tiles.drain(count, DQ_STAGES, free)

        def multiply(group):
            rows_Q = pl.ds(block * tiles.BLOCK + group * tiles.ROWS, tiles.ROWS)
            q_tile, dout_tile = (ref.at[pl.ds(group * tiles.ROWS, tiles.ROWS)] for ref in (q_smem, dout_smem))
            bounds_Q = [tiles.load(bounds_ref.at[row, part, rows_Q], axis=1) for part in range(4)]
            lse_Q, mean_Q = (tiles.load(ref.at[row, head, rows_Q], axis=1) for ref in (lse_ref, mean_ref))

            def see(index, dq_QC, masked):
                stage = index % DQ_STAGES
                plgpu.barrier_wait(filled.at[stage])

                def products(logits_ref, dp_ref):
                    plgpu.wgmma(logits_ref, q_tile, k_smem.at[stage].T)
                    plgpu.wgmma(dp_ref, dout_tile, v_smem.at[stage].T)
                    return logits_ref[...], dp_ref[...]

                logits_QS, dp_QS = pl.run_scoped(products, plgpu.ACC(tile), plgpu.ACC(tile))
                p_QS = jnp.exp2(logits_QS * (spec.scale * LOG2_E) - tiles.spread(lse_Q, DQ_KEYS))
                if masked:
                    first_key = order_ref[row, block, index] * DQ_KEYS
                    p_QS = jnp.where(tiles.seen(bounds_Q, first_key, tile, queries=0), p_QS, 0.0)
                dlogits_QS = p_QS * (dp_QS - tiles.spread(mean_Q, DQ_KEYS))
                (dq_QC,) = tiles.add_products(
                    (dq_QC, dlogits_QS.astype(dtype), k_smem.at[stage]), interpret=spec.interpret
                )
                plgpu.barrier_arrive(free.at[stage])
                return dq_QC

            plgpu.barrier_wait(loaded)
            dq_QC = lax.fori_loop(0, whole, functools.partial(see, masked=False), tiles.zeros(C))
            dq_QC = lax.fori_loop(whole, count, functools.partial(see, masked=True), dq_QC)
            tiles.store((q_tile, (dq_QC * spec.scale).astype(dtype), dq_ref.at[row, rows_Q, head]))

        tiles.in_parts(copy, multiply)

    fixed, ring = plgpu.SMEM((tiles.BLOCK, C), dtype), plgpu.SMEM((DQ_STAGES, DQ_KEYS, C), dtype)
    return tiles.launch(
        mosaic_attention_dq,
        out_type=_like(q_NTHC),
        scratch=[
            *(fixed, fixed, ring, ring),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=DQ_STAGES),
            plgpu.Barrier(num_arrivals=tiles.MULTIPLIERS, num_barriers=DQ_STAGES),
        ],
        grid=(P // tiles.BLOCK, N, H),
        interpret=spec.interpret,
    )(q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan.bounds_N4P, *plan.dq)


def dkv(spec: Spec, q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of keys and values, over all query heads that read them.

    dk_j = scale * sum_i p_ij (dp_ij - mean_i) q_i  and  dv_j = sum_i p_ij dout_i
    """
    N, _, H, C = q_NTHC.shape
    G, P, dtype = k_NTGC.shape[2], plan.bounds_N4P.shape[-1], q_NTHC.dtype
    group_size, tile, factor = H // G, (tiles.ROWS, DKV_QUERIES), spec.scale * LOG2_E

    def mosaic_attention_dkv(q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, *refs):
        bounds_ref, order_ref, counts_ref, dk_ref, dv_ref, k_smem, v_smem, *ring, loaded, filled, free = refs
        q_smem, dout_smem, lse_smem, mean_smem, bounds_smem = ring
        block, row, kv_head = lax.axis_index("blocks"), lax.axis_index("rows"), lax.axis_index("heads")
        # The heads of a block of queries one after the other.
        whole, count = (counts_ref[row, block, part] * group_size for part in range(2))

        def copy():
            keys = (row, pl.ds(block * tiles.BLOCK, tiles.BLOCK), kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem, loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem, loaded)

            @pl.loop(0, count)
            def _fill_stage(index):
                stage, head = index % DKV_STAGES, kv_head * group_size + index % group_size
                queries = pl.ds(order_ref[row, block, index // group_size] * DKV_QUERIES, DKV_QUERIES)
                pl.when(index >= DKV_STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
                for ref, smem in ((q_ref, q_smem), (dout_ref, dout_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[row, queries, head], smem.at[stage], filled.at[stage])
                plgpu.copy_gmem_to_smem(bounds_ref.at[row, :, queries], bounds_smem.at[stage], filled.at[stage])
                for ref, smem in ((lse_ref, lse_smem), (mean_ref, mean_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[row, head, queries], smem.at[stage], filled.at[stage])

            tiles.drain(count, DKV_STAGES, free)

        def multiply(group):
            rows_S = pl.ds(block * tiles.BLOCK + group * tiles.ROWS, tiles.ROWS)
            k_tile, v_tile = (ref.at[pl.ds(group * tiles.ROWS, tiles.ROWS)] for ref in (k_smem, v_smem))

            def seen_by(index, carry, masked):
                dk_SC, dv_SC = carry
                stage = index % DKV_STAGES
                plgpu.barrier_wait(filled.at[stage])

                (logits_SQ,) = tiles.add_products(
                    (tiles.zeros(DKV_QUERIES), k_tile, q_smem.at[stage].T), interpret=spec.interpret
                )
                if masked:
                    bounds_Q = [tiles.load(bounds_smem.at[stage, part], axis=0) for part in range(4)]
                    seen_SQ = tiles.seen(bounds_Q, rows_S.start, tile, queries=1)
                    logits_SQ = jnp.where(seen_SQ, logits_SQ, _MASKED / factor)
                lse_Q = tiles.load(lse_smem.at[stage], axis=0)
                p_SQ = jnp.exp2(logits_SQ * factor - lax.broadcast_in_dim(lse_Q, tile, (1,)))
                dv_term = dv_SC, p_SQ.astype(dtype), dout_smem.at[stage]
                dp_term = tiles.zeros(DKV_QUERIES), v_tile, dout_smem.at[stage].T
                dv_SC, dp_SQ = tiles.add_products(dv_term, dp_term, interpret=spec.interpret)
                mean_Q = tiles.load(mean_smem.at[stage], axis=0)
                dlogits_SQ = p_SQ * (dp_SQ - lax.broadcast_in_dim(mean_Q, tile, (1,)))
                (dk_SC,) = tiles.add_products(
                    (dk_SC, dlogits_SQ.astype(dtype), q_smem.at[stage]), interpret=spec.interpret
                )
                plgpu.barrier_arrive(free.at[stage])
                return dk_SC, dv_SC

            plgpu.barrier_wait(loaded)
            carry = tiles.zeros(C), tiles.zeros(C)
            carry = lax.fori_loop(0, whole, functools.partial(seen_by, masked=False), carry)
            dk_SC, dv_SC = lax.fori_loop(whole, count, functools.partial(seen_by, masked=True), carry)
            tiles.store(
                (k_tile, (dk_SC * spec.scale).astype(dtype), dk_ref.at[row, rows_S, kv_head]),
                (v_tile, dv_SC.astype(dtype), dv_ref.at[row, rows_S, kv_head]),
            )

        tiles.in_parts(copy, multiply)

    fixed, ring = plgpu.SMEM((tiles.BLOCK, C), dtype), plgpu.SMEM((DKV_STAGES, DKV_QUERIES, C), dtype)
    statistic = plgpu.SMEM((DKV_STAGES, DKV_QUERIES), jnp.float32)
    return tiles.launch(
        mosaic_attention_dkv,
        out_type=(_like(k_NTGC), _like(v_NTGC)),
        scratch=[
            *(fixed, fixed, ring, ring, statistic, statistic),
            plgpu.SMEM((DKV_STAGES, 4, DKV_QUERIES), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=5, num_barriers=DKV_STAGES),
            plgpu.Barrier(num_arrivals=tiles.MULTIPLIERS, num_barriers=DKV_STAGES),
        ],
        grid=(P // tiles.BLOCK, N, G),
        interpret=spec.interpret,
    )(q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan.bounds_N4P, *plan.dkv)


def _like(x_NTHC) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x_NTHC.shape, x_NTHC.dtype)

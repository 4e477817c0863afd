"""Flash attention in Pallas Mosaic GPU for Hopper GPUs (sm_90a), for rows of several texts, which cuDNN does not take.

Online softmax (FlashAttention, arXiv 2205.14135) with float32 statistics. The backward pass computes the weights again
from the log-sum-exp of every query, in two kernels: one for the queries' gradient, one for the keys' and values', which
adds up the query heads that read a key/value head. Nothing is added up in an order that may vary.

A thread block works on one block of queries (or keys) of one head. One warpgroup copies the blocks that it visits into
a ring of stages in shared memory; two multiply 64 positions each. `visible.py` says which blocks are visited, and which
of them have no hidden pair: those come first, and no mask is computed for them. In the forward pass the two multiply in
turns, so that one's softmax runs during the other's products.

What lies outside the arrays is read as zeros and never stored. Logarithms are binary: exp2 is what the hardware has.

Letters beyond `shapes.py`: P positions of padded rows, Q and S those of queries and keys of a warpgroup's tile, X and Y
blocks as in `visible.py`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax import shapes
from fpo_jax.attention import visible

plgpu: Any = None
try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # a jaxlib built without it
    pass

ROWS = 64  # positions of a warpgroup: the M of a WGMMA instruction
MULTIPLIERS = 2  # warpgroups that multiply; a third one copies
BLOCK = MULTIPLIERS * ROWS  # positions that a thread block works on
FORWARD_KEYS, DQ_KEYS, DKV_QUERIES = 128, 64, 64  # positions of a visited block
FORWARD_STAGES, DQ_STAGES, DKV_STAGES = 2, 4, 4
DEPTH = 64  # head dims are padded to a multiple: 128 bytes, the widest swizzle
MAX_HEAD_DIM = 128  # with 256 the float32 accumulators alone fill the registers
UNIT = 8  # positions of a row that a copy of swizzled rows moves together
COPY_REGISTERS, MULTIPLY_REGISTERS = 24, 240  # (24 + 2 * 240) * 128 threads = 64,512 of 65,536
LOG2_E = math.log2(math.e)
_START, _MASKED = -1e30, -2e30  # maximum of no logits, and a hidden one: exp2 of the difference is 0


class _Spec(NamedTuple):
    """Static facts."""

    scale: float
    interpret: bool


class _Plan(NamedTuple):
    """Who sees whom; arrays of integers."""

    bounds_N4P: jax.Array
    forward: visible.Visits
    dq: visible.Visits
    dkv: visible.Visits


def unsupported(*, dtype: jax.typing.DTypeLike, head_dim: int, soft_cap: float | None, compute_capability: str) -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        dtype: of queries, keys and values.
        head_dim: C.
        soft_cap: bound on the logits; None for none.
        compute_capability: of the device, such as "9.0"; empty for none.
    """
    name = jnp.dtype(dtype).name
    if compute_capability != "9.0":
        found = compute_capability or "an unknown one"
        return f"Mosaic attention needs a Hopper GPU, of compute capability 9.0, not {found}"
    if name not in ("bfloat16", "float16"):
        return f"Mosaic attention needs bfloat16 or float16, not {name}"
    if head_dim > MAX_HEAD_DIM:
        return f"Mosaic attention needs a head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
    if soft_cap is not None:
        return f"Mosaic attention has no soft-cap, and the model has one of {soft_cap}"
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"Mosaic attention needs jax 0.11, not {jax.__version__}"
    return ""


def attend(
    q_NTHC: jax.Array,
    k_NTGC: jax.Array,
    v_NTGC: jax.Array,
    segments: shapes.Segments | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally; the contract of `fpo_jax.attention.attend`, on one device.

    Args:
        q_NTHC: queries, bfloat16 or float16.
        k_NTGC: keys.
        v_NTGC: values.
        segments: of packed rows; None = a row is one text. Positions grow by one within a segment.
        scale: factor on the logits, above 0.
        window: positions a query sees, itself included; None = all before it.
        soft_cap: must be None.
        interpret: emulate the kernels.

    Raises:
        ValueError: what `unsupported` names, or a scale that is not positive.
    """
    N, T, _, C = q_NTHC.shape
    reason = unsupported(dtype=q_NTHC.dtype, head_dim=C, soft_cap=soft_cap, compute_capability="9.0")
    if scale <= 0:
        reason = f"Mosaic attention needs a scale above 0, not {scale}"
    if reason:
        raise ValueError(f"{reason}; take the implementation from attention.choose.")
    bounds_N4P = visible.bounds(segments, rows=N, positions=T, padded=pl.cdiv(T, BLOCK) * BLOCK, window=window)
    plan = _Plan(
        bounds_N4P,
        visible.visits(bounds_N4P, queries=BLOCK, keys=FORWARD_KEYS)[0],
        visible.visits(bounds_N4P, queries=BLOCK, keys=DQ_KEYS)[0],
        visible.visits(bounds_N4P, queries=DKV_QUERIES, keys=BLOCK)[1],
    )

    def whole(x_NTHC):  # positions and head dims that a copy moves together
        return jnp.pad(x_NTHC, ((0, 0), (0, -T % UNIT), (0, 0), (0, -C % DEPTH)))

    out_NTHC: jax.Array = _attend(_Spec(scale, interpret), whole(q_NTHC), whole(k_NTGC), whole(v_NTGC), plan)
    return out_NTHC[:, :T, :, :C]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, q_NTHC, k_NTGC, v_NTGC, plan) -> jax.Array:
    return _forward(spec, q_NTHC, k_NTGC, v_NTGC, plan)[0]


def _attend_fwd(spec: _Spec, q_NTHC, k_NTGC, v_NTGC, plan):
    out_NTHC, lse_NHP = _forward(spec, q_NTHC, k_NTGC, v_NTGC, plan)
    return out_NTHC, (q_NTHC, k_NTGC, v_NTGC, plan, out_NTHC, lse_NHP)


def _attend_bwd(spec: _Spec, residuals, dout_NTHC):
    q_NTHC, k_NTGC, v_NTGC, plan, out_NTHC, lse_NHP = residuals
    # sum_j p_ij dp_ij, of every query
    mean_NHT = jnp.einsum("NTHC,NTHC->NHT", dout_NTHC, out_NTHC, precision="highest", preferred_element_type="float32")
    mean_NHP = jnp.pad(mean_NHT, ((0, 0), (0, 0), (0, lse_NHP.shape[-1] - mean_NHT.shape[-1])))
    inputs = q_NTHC, k_NTGC, v_NTGC, dout_NTHC
    dq_NTHC = _dq(spec, *inputs, lse_NHP, mean_NHP, plan)
    if spec.interpret:  # the emulator runs one kernel at a time, so let the second one need the first one's result
        mean_NHP += 0 * dq_NTHC[0, 0, 0, 0].astype(jnp.float32)
    return (dq_NTHC, *_dkv(spec, *inputs, lse_NHP, mean_NHP, plan), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec: _Spec, q_NTHC, k_NTGC, v_NTGC, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Return the attended values and the log-sum-exp [N, H, P] of every query's logits, binary."""
    N, _, H, C = q_NTHC.shape
    P, group_size, dtype = plan.bounds_N4P.shape[-1], H // k_NTGC.shape[2], q_NTHC.dtype
    factor = spec.scale * LOG2_E

    def mosaic_attention_fwd(q_ref, k_ref, v_ref, bounds_ref, order_ref, counts_ref, out_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, q_filled, k_filled, v_filled, k_free, v_free, turn = scratch
        block, row, head = _late_first(P), lax.axis_index("rows"), lax.axis_index("heads")
        whole, count = counts_ref[row, block, 0], counts_ref[row, block, 1]

        def copy():
            plgpu.copy_gmem_to_smem(q_ref.at[row, pl.ds(block * BLOCK, BLOCK), head], q_smem, q_filled)

            @pl.loop(0, count)
            def _fill_stage(index):
                stage = index % FORWARD_STAGES
                keys = (row, pl.ds(order_ref[row, block, index] * FORWARD_KEYS, FORWARD_KEYS), head // group_size)
                pl.when(index >= FORWARD_STAGES)(lambda: plgpu.barrier_wait(k_free.at[stage]))
                plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[stage], k_filled.at[stage])
                pl.when(index >= FORWARD_STAGES)(lambda: plgpu.barrier_wait(v_free.at[stage]))
                plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[stage], v_filled.at[stage])

            _drain(count, FORWARD_STAGES, k_free, v_free)

        def multiply(group):
            rows_Q = pl.ds(block * BLOCK + group * ROWS, ROWS)
            q_tile = q_smem.at[pl.ds(group * ROWS, ROWS)]
            bounds_Q = [_load(bounds_ref.at[row, part, rows_Q], axis=1) for part in range(4)]

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

                logits_QS = pl.run_scoped(logits, plgpu.ACC((ROWS, FORWARD_KEYS)))
                plgpu.barrier_arrive(k_free.at[stage])
                if masked:
                    first_key = order_ref[row, block, index] * FORWARD_KEYS
                    seen_QS = _seen(bounds_Q, first_key, (ROWS, FORWARD_KEYS), queries=0)
                    logits_QS = jnp.where(seen_QS, logits_QS, _MASKED / factor)
                new_max_Q = jnp.maximum(max_Q, jnp.max(logits_QS, axis=1) * factor)
                keep_Q = jnp.exp2(max_Q - new_max_Q)
                weights_QS = jnp.exp2(logits_QS * factor - _spread(new_max_Q, FORWARD_KEYS))
                sum_Q = sum_Q * keep_Q + jnp.sum(weights_QS, axis=1)
                out_QC = out_QC * _spread(keep_Q, C)
                carry = out_QC, new_max_Q, sum_Q, weights_QS.astype(dtype)
                out_QC, new_max_Q, sum_Q, weights_QS = lax.optimization_barrier(carry)
                plgpu.barrier_wait(v_filled.at[stage])
                take_turns()
                (out_QC,) = _add_products((out_QC, weights_QS, v_smem.at[stage]), spec=spec)
                plgpu.barrier_arrive(v_free.at[stage])
                return out_QC, new_max_Q, sum_Q

            plgpu.barrier_wait(q_filled)
            pl.when(group == 1)(take_turns)
            carry = _zeros(C), _splat(_START), _splat(0.0)
            carry = lax.fori_loop(0, whole, functools.partial(see, masked=False), carry)
            out_QC, max_Q, sum_Q = lax.fori_loop(whole, count, functools.partial(see, masked=True), carry)
            pl.when(group == 0)(take_turns)
            lse_ref[row, head, rows_Q] = max_Q + jnp.log(sum_Q) * LOG2_E
            out_QC *= _spread(1.0 / sum_Q, C)
            _store((q_tile, out_QC.astype(dtype), out_ref.at[row, rows_Q, head]))

        _in_parts(copy, multiply)

    ring = plgpu.SMEM((FORWARD_STAGES, FORWARD_KEYS, C), dtype)
    filled = plgpu.Barrier(num_barriers=FORWARD_STAGES)
    free = plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=FORWARD_STAGES)
    return _launch(
        mosaic_attention_fwd,
        out_type=(_like(q_NTHC), jax.ShapeDtypeStruct((N, H, P), jnp.float32)),
        scratch=[
            plgpu.SMEM((BLOCK, C), dtype),
            *(ring, ring),
            *(plgpu.Barrier(), filled, filled, free, free),
            plgpu.Barrier(num_arrivals=MULTIPLIERS),
        ],
        grid=(P // BLOCK, N, H),
        spec=spec,
    )(q_NTHC, k_NTGC, v_NTGC, plan.bounds_N4P, *plan.forward)


def _dq(spec: _Spec, q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan: _Plan) -> jax.Array:
    """Return the gradient of the queries: scale * sum_j p_ij (dp_ij - mean_i) k_j."""
    N, _, H, C = q_NTHC.shape
    P, group_size, dtype = plan.bounds_N4P.shape[-1], H // k_NTGC.shape[2], q_NTHC.dtype
    tile = ROWS, DQ_KEYS

    def mosaic_attention_dq(q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, *refs):
        bounds_ref, order_ref, counts_ref, dq_ref, q_smem, dout_smem, k_smem, v_smem, loaded, filled, free = refs
        block, row, head = _late_first(P), lax.axis_index("rows"), lax.axis_index("heads")
        whole, count = counts_ref[row, block, 0], counts_ref[row, block, 1]

        def copy():
            queries = (row, pl.ds(block * BLOCK, BLOCK), head)
            plgpu.copy_gmem_to_smem(q_ref.at[queries], q_smem, loaded)
            plgpu.copy_gmem_to_smem(dout_ref.at[queries], dout_smem, loaded)

            @pl.loop(0, count)
            def _fill_stage(index):
                stage = index % DQ_STAGES
                keys = (row, pl.ds(order_ref[row, block, index] * DQ_KEYS, DQ_KEYS), head // group_size)
                pl.when(index >= DQ_STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
                plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[stage], filled.at[stage])
                plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[stage], filled.at[stage])

            _drain(count, DQ_STAGES, free)

        def multiply(group):
            rows_Q = pl.ds(block * BLOCK + group * ROWS, ROWS)
            q_tile, dout_tile = (ref.at[pl.ds(group * ROWS, ROWS)] for ref in (q_smem, dout_smem))
            bounds_Q = [_load(bounds_ref.at[row, part, rows_Q], axis=1) for part in range(4)]
            lse_Q, mean_Q = (_load(ref.at[row, head, rows_Q], axis=1) for ref in (lse_ref, mean_ref))

            def see(index, dq_QC, masked):
                stage = index % DQ_STAGES
                plgpu.barrier_wait(filled.at[stage])

                def products(logits_ref, dp_ref):
                    plgpu.wgmma(logits_ref, q_tile, k_smem.at[stage].T)
                    plgpu.wgmma(dp_ref, dout_tile, v_smem.at[stage].T)
                    return logits_ref[...], dp_ref[...]

                logits_QS, dp_QS = pl.run_scoped(products, plgpu.ACC(tile), plgpu.ACC(tile))
                p_QS = jnp.exp2(logits_QS * (spec.scale * LOG2_E) - _spread(lse_Q, DQ_KEYS))
                if masked:
                    first_key = order_ref[row, block, index] * DQ_KEYS
                    p_QS = jnp.where(_seen(bounds_Q, first_key, tile, queries=0), p_QS, 0.0)
                dlogits_QS = p_QS * (dp_QS - _spread(mean_Q, DQ_KEYS))
                (dq_QC,) = _add_products((dq_QC, dlogits_QS.astype(dtype), k_smem.at[stage]), spec=spec)
                plgpu.barrier_arrive(free.at[stage])
                return dq_QC

            plgpu.barrier_wait(loaded)
            dq_QC = lax.fori_loop(0, whole, functools.partial(see, masked=False), _zeros(C))
            dq_QC = lax.fori_loop(whole, count, functools.partial(see, masked=True), dq_QC)
            _store((q_tile, (dq_QC * spec.scale).astype(dtype), dq_ref.at[row, rows_Q, head]))

        _in_parts(copy, multiply)

    fixed, ring = plgpu.SMEM((BLOCK, C), dtype), plgpu.SMEM((DQ_STAGES, DQ_KEYS, C), dtype)
    return _launch(
        mosaic_attention_dq,
        out_type=_like(q_NTHC),
        scratch=[
            *(fixed, fixed, ring, ring),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=DQ_STAGES),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=DQ_STAGES),
        ],
        grid=(P // BLOCK, N, H),
        spec=spec,
    )(q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan.bounds_N4P, *plan.dq)


def _dkv(spec: _Spec, q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of keys and values, over all query heads that read them.

    dk_j = scale * sum_i p_ij (dp_ij - mean_i) q_i  and  dv_j = sum_i p_ij dout_i
    """
    N, _, H, C = q_NTHC.shape
    G, P, dtype = k_NTGC.shape[2], plan.bounds_N4P.shape[-1], q_NTHC.dtype
    group_size, tile, factor = H // G, (ROWS, DKV_QUERIES), spec.scale * LOG2_E

    def mosaic_attention_dkv(q_ref, k_ref, v_ref, dout_ref, lse_ref, mean_ref, *refs):
        bounds_ref, order_ref, counts_ref, dk_ref, dv_ref, k_smem, v_smem, *ring, loaded, filled, free = refs
        q_smem, dout_smem, lse_smem, mean_smem, bounds_smem = ring
        block, row, kv_head = lax.axis_index("blocks"), lax.axis_index("rows"), lax.axis_index("heads")
        # The heads of a block of queries one after the other.
        whole, count = (counts_ref[row, block, part] * group_size for part in range(2))

        def copy():
            keys = (row, pl.ds(block * BLOCK, BLOCK), kv_head)
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

            _drain(count, DKV_STAGES, free)

        def multiply(group):
            rows_S = pl.ds(block * BLOCK + group * ROWS, ROWS)
            k_tile, v_tile = (ref.at[pl.ds(group * ROWS, ROWS)] for ref in (k_smem, v_smem))

            def seen_by(index, carry, masked):
                dk_SC, dv_SC = carry
                stage = index % DKV_STAGES
                plgpu.barrier_wait(filled.at[stage])

                (logits_SQ,) = _add_products((_zeros(DKV_QUERIES), k_tile, q_smem.at[stage].T), spec=spec)
                if masked:
                    bounds_Q = [_load(bounds_smem.at[stage, part], axis=0) for part in range(4)]
                    seen_SQ = _seen(bounds_Q, rows_S.start, tile, queries=1)
                    logits_SQ = jnp.where(seen_SQ, logits_SQ, _MASKED / factor)
                lse_Q = _load(lse_smem.at[stage], axis=0)
                p_SQ = jnp.exp2(logits_SQ * factor - lax.broadcast_in_dim(lse_Q, tile, (1,)))
                dv_term = dv_SC, p_SQ.astype(dtype), dout_smem.at[stage]
                dp_term = _zeros(DKV_QUERIES), v_tile, dout_smem.at[stage].T
                dv_SC, dp_SQ = _add_products(dv_term, dp_term, spec=spec)
                mean_Q = _load(mean_smem.at[stage], axis=0)
                dlogits_SQ = p_SQ * (dp_SQ - lax.broadcast_in_dim(mean_Q, tile, (1,)))
                (dk_SC,) = _add_products((dk_SC, dlogits_SQ.astype(dtype), q_smem.at[stage]), spec=spec)
                plgpu.barrier_arrive(free.at[stage])
                return dk_SC, dv_SC

            plgpu.barrier_wait(loaded)
            carry = _zeros(C), _zeros(C)
            carry = lax.fori_loop(0, whole, functools.partial(seen_by, masked=False), carry)
            dk_SC, dv_SC = lax.fori_loop(whole, count, functools.partial(seen_by, masked=True), carry)
            _store(
                (k_tile, (dk_SC * spec.scale).astype(dtype), dk_ref.at[row, rows_S, kv_head]),
                (v_tile, dv_SC.astype(dtype), dv_ref.at[row, rows_S, kv_head]),
            )

        _in_parts(copy, multiply)

    fixed, ring = plgpu.SMEM((BLOCK, C), dtype), plgpu.SMEM((DKV_STAGES, DKV_QUERIES, C), dtype)
    statistic = plgpu.SMEM((DKV_STAGES, DKV_QUERIES), jnp.float32)
    return _launch(
        mosaic_attention_dkv,
        out_type=(_like(k_NTGC), _like(v_NTGC)),
        scratch=[
            *(fixed, fixed, ring, ring, statistic, statistic),
            plgpu.SMEM((DKV_STAGES, 4, DKV_QUERIES), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=5, num_barriers=DKV_STAGES),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=DKV_STAGES),
        ],
        grid=(P // BLOCK, N, G),
        spec=spec,
    )(q_NTHC, k_NTGC, v_NTGC, dout_NTHC, lse_NHP, mean_NHP, plan.bounds_N4P, *plan.dkv)


def _launch(kernel, *, out_type, scratch, grid: tuple[int, int, int], spec: _Spec):
    """Run a kernel on blocks, rows and heads; neighbours in time are heads, which share keys, and rows."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("blocks", "rows", "heads"),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
        # No thread reads shared memory that it wrote: each barrier that is needed is written out.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if spec.interpret else None,
    )


def _in_parts(copy, multiply) -> None:
    """Run `copy()` in one warpgroup and `multiply(group)` in the others."""
    group = lax.axis_index("group")

    def copying():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()

    def multiplying():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        multiply(group)

    lax.cond(group == MULTIPLIERS, copying, multiplying)


def _drain(count, stages: int, *barriers) -> None:
    """Wait until all that was copied is read."""

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _wait(index):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[index % stages])


def _store(*copies) -> None:
    """Copy values [64, C] through tiles of shared memory, whose last product is done, to global memory."""
    plgpu.commit_smem()  # all warps are done with the tiles
    for tile, value, _ in copies:
        tile[...] = value
    plgpu.commit_smem()
    for tile, _, ref in copies:
        plgpu.copy_smem_to_gmem(tile, ref)
    plgpu.wait_smem_to_gmem(0)


def _add_products(*terms, spec: _Spec) -> tuple:
    """Return sum + left . right of each (sum, left, right); right lies in shared memory, left there or in registers."""
    if spec.interpret:  # jax 0.11 emulates no product that adds to given values
        sums = tuple(
            sum_QC + jnp.dot(left[...], right_ref[...], preferred_element_type=jnp.float32)
            for sum_QC, left, right_ref in terms
        )
        plgpu.commit_smem()  # its race detection wants it between these loads and the next copy; products need none
        return sums

    def add(sum_refs):
        for sum_ref, (_, left, right_ref) in zip(sum_refs, terms, strict=True):
            plgpu.wgmma(sum_ref, left, right_ref)

    return pl.run_state(add)(tuple(plgpu.ACC.init(sum_QC) for sum_QC, _, _ in terms))


def _seen(bounds_Q, first_key, tile: tuple[int, int], *, queries: int):
    """Return whether the queries of a tile, which lie along axis `queries`, see the keys along the other.

    Places of queries come from memory: a compiler that numbers them keeps the numbers in registers that are not there.
    """
    places_S = plgpu.broadcasted_iota(jnp.int32, (tile[1 - queries],), 0, layout=plgpu.Layout.WGMMA.reduce(queries))
    j = lax.broadcast_in_dim(first_key + places_S, tile, (1 - queries,))
    i, own, first, end = (lax.broadcast_in_dim(x_Q, tile, (queries,)) for x_Q in bounds_Q)
    return ((own <= j) & (j <= i)) | ((first <= j) & (j < end))


def _late_first(P: int):
    """Block of queries of a thread block: the last ones, which see most, are begun first."""
    return P // BLOCK - 1 - lax.axis_index("blocks")


def _load(ref, *, axis: int):
    """Values laid out like the rows of an accumulator (`axis` 1, which is reduced) or its columns (0)."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def _spread(x_Q, size: int):
    """One value per row, spread over columns."""
    return lax.broadcast_in_dim(x_Q, (ROWS, size), (0,))


def _splat(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _zeros(width: int):
    return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)


def _like(x_NTHC) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x_NTHC.shape, x_NTHC.dtype)

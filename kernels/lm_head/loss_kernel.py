"""The kernel that ends the forward pass: from the parts of every token's softmax to the losses of the groups.

In: the partial softmax of each token, by splits of a kernel or by devices, and which completion each token belongs to.
Out: lse per token; per group the loss, the K log-probs, and the derivative of the loss with respect to them. It merges
the parts, subtracts, sums each completion's tokens, and runs the group loss and its derivative, traced from the Python
function that it is given. One source for TPUs and for GPUs (Pallas's Triton lowering).

    lse[n] = log sum_p exp(max[p, n]) * sum[p, n];   logp[b, k] = sum over n of (b, k)  target_logit[n] - lse[n]
    loss[b] = group_loss(logp[b]);   slope[b, k] = d loss[b] / d logp[b, k]

A row is a stretch of tokens that holds whole groups: one group of padded sequences, or what was packed into one. Rows
do not meet, so that each is one step of the grid, on any core, and sums run in one order: the same bits every time.

Letters beyond `blocks.py`: C rows, T tokens of a row, G groups of a row, K completions of a group.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax.kernels.lm_head import blocks, unrolled
from fpo_jax.kernels.lm_head import spec as specs

TOKENS = 256  # of a row that are in registers at a time


class Finished(NamedTuple):
    """Per token and per group, float32."""

    lse_N: jax.Array
    entropy_N: jax.Array | None  # None unless asked for
    is_argmax_N: jax.Array | None
    losses_B: jax.Array
    logps_BK: jax.Array
    slopes_BK: jax.Array


def finish(
    partials: blocks.Partials,
    slots_N: jax.Array,
    operands: Any,
    *,
    group_loss,
    groups: tuple[int, int],
    rows: int,
    spec: specs.HeadSpec,
    parameters,
) -> Finished:
    """Run the kernel on one device.

    Args:
        partials: of N = C * T tokens, row after row; a NaN target logit makes its group's loss NaN.
        slots_N: int32, the completion of its row that a token counts for, g * K + k; -1 for none.
        operands: what else the group loss reads: a pytree of float32 arrays [B, K], B = C * G, and scalars.
        group_loss: (logps_BK, operands) -> losses_B.
        groups: (B, K).
        rows: C.
        spec: `interpret`, `want_entropy` and `want_argmax` are read.
        parameters: what the compiler is told; decides which it is.

    Raises:
        ValueError: a group loss that does more than elementwise functions and reductions over K.
    """
    leaves, tree = jax.tree.flatten(operands)
    B, K = groups
    G, T = B // rows, slots_N.size // rows
    loss = _loss_of_one_group(group_loss, leaves, tree, K)
    sizes = _Sizes(_power_of_two(G), _power_of_two(K), -(-T // TOKENS) * TOKENS, K)
    parts = _power_of_two(partials.max_PM.shape[0])
    # Nothing, in parts and tokens that are not there: a sum of 1 has a logarithm.
    fills = (blocks.MASKED_LOGIT, 1.0, 0.0, 0.0)
    tokens_CPT = [
        _padded(jnp.swapaxes(x_PN.reshape(-1, rows, T), 0, 1), (rows, parts, sizes.tokens), fill)
        for x_PN, fill in zip(partials, fills, strict=True)
    ]
    if parts > partials.max_PM.shape[0]:  # but a part that is not there adds nothing
        tokens_CPT[1] = tokens_CPT[1].at[:, partials.max_PM.shape[0] :].set(0)
    slots_CT = _padded(slots_N.reshape(rows, 1, T), (rows, 1, sizes.tokens), -1)
    groups_CGK = [
        _padded(jnp.broadcast_to(leaf, (B, K)).reshape(rows, G, K), (rows, sizes.groups, sizes.completions), 0)
        for leaf in leaves
    ]
    wanted = 1 + spec.want_entropy + spec.want_argmax
    out_shapes = [(rows, 1, sizes.tokens)] * wanted
    out_shapes += [(rows, sizes.groups, 1), *[(rows, sizes.groups, sizes.completions)] * 2]
    inputs = (*tokens_CPT, slots_CT, *groups_CGK)
    outputs = pl.pallas_call(
        functools.partial(_kernel, loss=loss, leaf_shapes=[leaf.shape for leaf in leaves], sizes=sizes, spec=spec),
        grid=(rows,),
        in_specs=[_row_of(x.shape) for x in inputs],
        out_specs=[_row_of(shape) for shape in out_shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in out_shapes],
        compiler_params=parameters,
        interpret=spec.interpret,
        name="group_loss",
    )(*inputs)
    *by_token, losses_CG1, logps_CGK, slopes_CGK = outputs
    lse_N, *others_N = (x_C1T[:, 0, :T].reshape(-1) for x_C1T in by_token)
    entropy_N = others_N.pop(0) if spec.want_entropy else None
    is_argmax_N = others_N.pop(0) if spec.want_argmax else None
    logps_BK, slopes_BK = (x_CGK[:, :G, :K].reshape(B, K) for x_CGK in (logps_CGK, slopes_CGK))
    return Finished(lse_N, entropy_N, is_argmax_N, losses_CG1[:, :G].reshape(-1), logps_BK, slopes_BK)


class _Sizes(NamedTuple):
    """Of one row: powers of two, since a GPU's compiler takes no other arrays; `tokens` a multiple of TOKENS."""

    groups: int
    completions: int
    tokens: int
    K: int


def _kernel(*references, loss, leaf_shapes, sizes: _Sizes, spec: specs.HeadSpec):
    """Finish the tokens of a row, TOKENS at a time, then its groups."""
    partials, slots, operands = references[:4], references[4], references[5 : 5 + len(leaf_shapes)]
    *by_token, losses, logps, slopes = references[5 + len(leaf_shapes) :]
    groups_G1 = lax.broadcasted_iota(jnp.int32, (sizes.groups, 1), 0)

    def of_tokens(index, sums_G1):
        here = (slice(None), pl.ds(pl.multiple_of(index * TOKENS, TOKENS), TOKENS))
        logp_1T, statistics = _merged(blocks.Partials(*(x[here] for x in partials)), spec)
        for reference, value_1T in zip(by_token, statistics, strict=True):
            reference[here] = value_1T
        slots_1T = slots[here]
        return tuple(
            sum_G1 + jnp.sum(jnp.where(slots_1T == groups_G1 * sizes.K + k, logp_1T, 0.0), axis=1, keepdims=True)
            for k, sum_G1 in enumerate(sums_G1)
        )

    nothing_G1 = jnp.zeros((sizes.groups, 1), jnp.float32)
    sums_G1 = lax.fori_loop(0, sizes.tokens // TOKENS, of_tokens, (nothing_G1,) * sizes.K)
    one_group = (1, sizes.K)
    elements = [unrolled.Elements(one_group, list(sums_G1))]
    for reference, shape in zip(operands, leaf_shapes, strict=True):
        columns_G1 = _columns(reference[...], sizes.K if shape else 1)
        elements.append(unrolled.Elements(one_group if shape else (), columns_G1))
    loss_elements, slope_elements = loss(elements, (sizes.groups, 1))
    losses[...] = loss_elements.items[0]
    logps[...] = _joined(sums_G1, sizes.completions)
    slopes[...] = _joined(slope_elements.items, sizes.completions)


def _merged(parts: blocks.Partials, spec: specs.HeadSpec):
    """Merge the parts of some tokens' softmax: (log-prob, (lse, and what else is wanted)), each [1, T]."""
    max_PT, sum_PT, target_logit_PT, centred_PT = parts
    max_1T = jnp.max(max_PT, axis=0, keepdims=True)
    shift_PT = max_PT - max_1T
    scale_PT = jnp.exp(shift_PT)
    sum_1T = jnp.sum(scale_PT * sum_PT, axis=0, keepdims=True)
    target_logit_1T = jnp.sum(target_logit_PT, axis=0, keepdims=True)
    lse_1T = max_1T + jnp.log(sum_1T)
    statistics = [lse_1T]
    if spec.want_entropy:
        centred_1T = jnp.sum(scale_PT * (centred_PT + shift_PT * sum_PT), axis=0, keepdims=True)
        statistics.append(jnp.log(sum_1T) - centred_1T / sum_1T)
    if spec.want_argmax:
        statistics.append((target_logit_1T >= max_1T).astype(jnp.float32))
    return target_logit_1T - lse_1T, statistics


def _columns(x_GK, count: int) -> list[jax.Array]:
    """The first columns of an array, each [G, 1]."""
    columns_GK = lax.broadcasted_iota(jnp.int32, x_GK.shape, 1)
    return [jnp.sum(jnp.where(columns_GK == k, x_GK, 0.0), axis=1, keepdims=True) for k in range(count)]


def _joined(columns_G1, count: int) -> jax.Array:
    """Columns [G, 1] side by side, with zeros up to `count` of them."""
    columns_GK = lax.broadcasted_iota(jnp.int32, (columns_G1[0].shape[0], count), 1)
    joined_GK = jnp.zeros(columns_GK.shape, jnp.float32)
    for k, column_G1 in enumerate(columns_G1):
        joined_GK = jnp.where(columns_GK == k, column_G1, joined_GK)
    return joined_GK


def _loss_of_one_group(group_loss, leaves, tree, K: int):
    """The loss of one group and its derivative, of elements."""

    def with_slopes(logps_BK, *leaves):
        operands = jax.tree.unflatten(tree, leaves)
        losses_B, pullback = jax.vjp(lambda logps_BK: group_loss(logps_BK, operands), logps_BK)
        return losses_B, *pullback(jnp.ones_like(losses_B))

    one_group = jax.ShapeDtypeStruct((1, K), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return unrolled.trace(with_slopes, one_group, *(one_group if leaf.ndim else scalar for leaf in leaves))


def _row_of(shape: tuple[int, ...]) -> pl.BlockSpec:
    """One row of an array, at each step of the grid."""
    return pl.BlockSpec((None, *shape[1:]), lambda row: (row, 0, 0))


def _padded(x: jax.Array, shape: tuple[int, ...], fill) -> jax.Array:
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)], constant_values=fill)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()

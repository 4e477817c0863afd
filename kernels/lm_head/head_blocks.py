"""The head on one device: which rows of it are there, its blocks, and how those come and go on a mesh.

A head that is cut over its width is gathered block by block, each while the one before it is computed, and the gradient
of a block is summed over devices and cut again. A head that is cut over its rows stays: a device has a share of the
vocabulary.

Letters beyond `spec.py`: W rows of a head block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.kernels.lm_head import tiling


class Share(NamedTuple):
    """The part of the vocabulary that one device holds."""

    first_row: int | jax.Array  # of the device's head, in the vocabulary
    rows: int  # to be cut in blocks
    last: int | jax.Array  # rows beyond are padding

    @staticmethod
    def of(head_VD, spec: specs.HeadSpec) -> "Share":
        """Return what a device has; where the vocabulary ends depends on the device if rows of the head are cut."""
        axes, rows = specs.axes(spec), head_VD.shape[0]
        if not axes.vocab:
            vocab_size = spec.vocab_size or rows
            return Share(0, vocab_size, vocab_size)
        first_row = lax.axis_index(axes.vocab) * rows
        total = spec.vocab_size or rows * specs.shards(spec, axes.vocab)
        return Share(first_row, rows, jnp.clip(total - first_row, 0, rows))


def window(index, share: Share, blocks: tiling.Blocks):
    """Return of block `index` the row it starts at, and the first and the last of its columns that count."""
    if blocks.vocab_count == 1:
        return 0, 0, share.last
    wanted = index * blocks.vocab
    start = jnp.minimum(wanted, share.rows - blocks.vocab)
    if isinstance(share.last, int) and share.rows % blocks.vocab == 0:
        return start, 0, blocks.vocab
    return start, wanted - start, jnp.minimum(share.last - start, blocks.vocab)


def fetch(head_VD, index, *, share: Share, blocks: tiling.Blocks, dtype, spec: specs.HeadSpec):
    """Return the rows of block `index`; one block is the head as it is, padding rows and dtype included: no copy."""
    axes, head_WD = specs.axes(spec), head_VD
    if blocks.vocab_count > 1:
        head_WD = lax.dynamic_slice_in_dim(head_VD, window(index, share, blocks)[0], blocks.vocab)
        if head_VD.dtype == jnp.float32 and dtype == jnp.bfloat16:
            # XLA for TPUs would see that float32 is never needed, and hold the whole head in bfloat16 beside it.
            bits_WD = lax.optimization_barrier(lax.bitcast_convert_type(head_WD, jnp.uint32))
            head_WD = lax.bitcast_convert_type(bits_WD, jnp.float32)
    if axes.width:  # cast first: half the bytes to gather
        head_WD = lax.all_gather(head_WD.astype(dtype), axes.width, axis=1, tiled=True)
    return head_WD


def walk(of_block, fetch_block, carry, order: np.ndarray, *, ahead: bool):
    """Fold the blocks of the head into `carry`, in `order`; `ahead`: each is fetched while the one before is computed.

    of_block(carry, index, head_WD) -> carry;  fetch_block(index) -> head_WD
    """
    if not ahead:
        return lax.scan(lambda carry, index: (of_block(carry, index, fetch_block(index)), None), carry, order)[0]

    def step(state, indices):
        carry, head_WD = state
        following_WD = fetch_block(indices[1])
        return (of_block(carry, indices[0], head_WD), following_WD), None

    pairs = np.stack([order[:-1], order[1:]], axis=1)
    (carry, head_WD), _ = lax.scan(step, (carry, fetch_block(order[0])), pairs)
    return of_block(carry, order[-1], head_WD)


def sum_over_tokens(dhead_WD, axes: specs.Axes):
    """Add up what the devices' tokens contribute to a block of dhead; each keeps its columns."""
    if axes.width:
        dhead_WD = lax.psum_scatter(dhead_WD, axes.width, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in axes.tokens if axis not in axes.width)
    return lax.psum(dhead_WD, others) if others else dhead_WD

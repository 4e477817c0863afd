"""Rows times the matrix of their group: what a mixture of experts multiplies, without a product that nobody needs.

    out[m] = x[m] @ W[e]      for the rows m of group e, which stand together: sizes[0] rows of group 0, then of 1, ...

XLA has such a kernel on TPUs alone (`jax.lax.ragged_dot`). On a GPU it multiplies every row by every group, through a
copy of the rows for each of them: E times the operations, and [E, M, K] of memory. There, `triton` computes it.

Letters: E groups, M rows, K what is contracted, N columns. Of a tile: R rows, C columns.
"""

import functools

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from fpo_jax.kernels.experts import triton

IMPLEMENTATIONS = ("triton", "xla")
RESULT = "grouped_product"  # name of what `triton` returns, for policies of `jax.checkpoint`


def select(rows_MK: jax.Array, matrices_EKN: jax.Array, mesh: Mesh | None) -> str:
    """Return which of IMPLEMENTATIONS multiplies: the kernel wherever it can on a GPU, else XLA.

    Args:
        rows_MK: the operands, of which shapes and dtypes count.
        matrices_EKN: the same.
        mesh: whose devices the program is compiled for, here or absent; None = the one of this process.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform not in ("gpu", "cuda"):
        return "xla"
    capability = str(getattr(device, "compute_capability", ""))
    obstacle = triton.unsupported(
        width=rows_MK.shape[1],
        columns=matrices_EKN.shape[2],
        dtype=rows_MK.dtype,
        compute_capability=capability,
    )
    return "xla" if obstacle else "triton"


def grouped_product(
    rows_MK: jax.Array, matrices_EKN: jax.Array, sizes_E: jax.Array, *, implementation: str, interpret: bool = False
) -> jax.Array:
    """Multiply each row by the matrix of its group, in the dtype of the rows; accumulated in float32.

    Args:
        rows_MK: rows, those of a group together and the groups in order.
        matrices_EKN: one of each group, in the dtype of the rows.
        sizes_E: rows of each group, int32, of a sum that is at most M; what is beyond them becomes 0.
        implementation: one of IMPLEMENTATIONS.
        interpret: emulate the kernel on a CPU; for tests.

    Returns:
        [M, N]. It has gradients with respect to rows and matrices, each in the dtype of what it belongs to.

    Raises:
        ValueError: operands of `triton` with 2^31 elements, which its 32-bit indices do not reach.
    """
    if implementation == "xla":
        return lax.ragged_dot(rows_MK, matrices_EKN, sizes_E)
    return checkpoint_name(_in_triton(rows_MK, matrices_EKN, sizes_E, interpret), RESULT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_triton(rows_MK, matrices_EKN, sizes_E, interpret):
    return triton.grouped_rows(rows_MK, matrices_EKN, sizes_E, transposed=False, interpret=interpret)


def _forward(rows_MK, matrices_EKN, sizes_E, interpret):
    return _in_triton(rows_MK, matrices_EKN, sizes_E, interpret), (rows_MK, matrices_EKN, sizes_E)


def _backward(interpret, saved, dout_MN):
    rows_MK, matrices_EKN, sizes_E = saved
    drows_MK = triton.grouped_rows(dout_MN, matrices_EKN, sizes_E, transposed=True, interpret=interpret)
    dmatrices_EKN = triton.grouped_gradient(rows_MK, dout_MN, sizes_E, interpret=interpret)
    return drows_MK, dmatrices_EKN, None


_in_triton.defvjp(_forward, _backward)

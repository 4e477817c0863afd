"""Floating-point operations: of a model in closed form, and of a traced program by counting its matrix products.

    rows -> Work (tokens, attended pairs, scored positions) -> forward, train_step    what the mathematics needs: for
    MFU jaxpr -> traced                                                               what will run, recomputation
    included

A multiplication and an addition are two operations. Matrix products alone are counted. The model's number leaves out
what causality and windows mask, and scores only the positions that a batch scores; fed with a batch's real lengths it
counts valid tokens, fed with the padded length all of them.
"""

import collections
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend import core
from jax.sharding import Mesh

from fpo_jax import models
from fpo_jax.models import dispatch, params


class Work(NamedTuple):
    """What the operations of a pass over some rows are proportional to."""

    tokens: int  # through the layers
    pairs: int  # of a query and a key it attends to, per head and layer, the mean where layers differ
    scored: int  # positions through the LM head


Window = int | None | tuple[int | None, ...]


def work(lengths_N, loss_tokens_N, *, contexts: npt.ArrayLike = 0, sliding_window: Window) -> Work:
    """Sum up rows, or texts.

    Args:
        lengths_N: tokens of each row.
        loss_tokens_N: scored positions of each row, or of all.
        contexts: tokens that each of them follows without computing them: of a prompt that others share.
        sliding_window: positions a query sees, itself included; None = all before it; of each layer, where they differ.

    >>> work([3, 1], [2, 0], sliding_window=2)  # the first row's queries see 1, 2 and 2 keys
    Work(tokens=4, pairs=6, scored=2)
    >>> work([3, 1], [2, 0], contexts=[0, 3], sliding_window=None)  # 1 + 2 + 3, and 4
    Work(tokens=4, pairs=10, scored=2)
    >>> work([3], [0], sliding_window=(1, None)).pairs  # the mean of two layers' 3 and 6, rounded down
    4
    """
    lengths_N, contexts_N = np.asarray(lengths_N, np.int64), np.asarray(contexts, np.int64)

    def pairs(lengths_N, window):
        reach_N = lengths_N if window is None else np.minimum(lengths_N, window)
        return reach_N * (reach_N + 1) // 2 + (lengths_N - reach_N) * reach_N

    layers = collections.Counter(sliding_window if isinstance(sliding_window, tuple) else (sliding_window,))
    total = sum(
        count * int((pairs(contexts_N + lengths_N, window) - pairs(contexts_N, window)).sum())
        for window, count in layers.items()
    )
    return Work(int(lengths_N.sum()), total // layers.total(), int(np.sum(loss_tokens_N)))


def layer_weights(config: models.ModelConfig) -> int:
    """Return the number of weights of the layers' matrices that a token is multiplied by: of its own experts alone."""
    return sum(params.met(entry, config) for entry in params.entries(config) if entry.stacked and entry.decay)


def weights_on_a_device(config: models.ModelConfig, mesh: Mesh) -> tuple[float, float]:
    """Return how many weights of the layers' matrices a device multiplies by: those of all tokens, and of experts.

    They are what it holds once what is cut over `fsdp` is gathered.
    """
    matrices = [entry for entry in params.entries(config) if entry.stacked and entry.decay]
    shared, routed = (sum(entry.size for entry in matrices if entry.routed is kind) for kind in (False, True))
    tensor = mesh.shape["tensor"]
    return shared / tensor, routed / tensor / mesh.shape["expert"]


def forward(config: models.ModelConfig, done: Work) -> int:
    """Return the operations of a forward pass to the log-probs, such as the reference pass.

    2 P tokens + 2 L H (C + M) pairs + 2 D V scored, with P the weights of the layers' matrices and M the size of a
    value's head, mostly C; a reward model's head costs nothing that counts.
    """
    attention = 2 * config.layers * config.heads * (config.head_dim + (config.value_dim or config.head_dim))
    head = 0 if config.reward_head else 2 * config.width * config.vocab_size * done.scored
    return 2 * layer_weights(config) * done.tokens + attention * done.pairs + head


def head_cost(config: models.ModelConfig) -> float:
    """Return what a scored position costs in the head, relative to a token in the matrices of the layers."""
    one = [forward(config, Work(tokens, 0, 1 - tokens)) for tokens in (0, 1)]
    return one[0] / one[1]


def train_step(
    config: models.ModelConfig, done: Work, *, extra_forward: bool = False, adapter: models.Adapter | None = None
) -> int:
    """Return the operations of a step: forward, and twice as many backward; recomputation does not count.

    Args:
        config: the architecture.
        done: over all rows of the step.
        extra_forward: the loss needs a statistic of the batch from a pass of its own (KTO).
        adapter: an adapter is trained, whose own operations do not count: the backward pass then computes the gradients
            of activations, and of no weight but those that are trained whole beside it.
    """
    if adapter is None:
        return (3 + extra_forward) * forward(config, done)
    whole = [entry for entry in params.trained_entries(config, adapter) if entry.path in adapter.saved]
    saved = 2 * done.tokens * sum(entry.size for entry in whole if entry.stacked and entry.decay)
    head = 0
    if params.trains_head(config, adapter) and not config.reward_head:
        head = 2 * config.width * config.vocab_size * done.scored
    return (2 + extra_forward) * forward(config, done) + saved + head


def traced(jaxpr: core.Jaxpr, *, sliding_window: Window = None, fp8: bool = False) -> int:
    """Return the operations of a program over all its devices, from its jaxpr.

    The body of a scan counts as often as it runs; what `jax.checkpoint` recomputes stands in the jaxpr; the body of a
    shard_map counts once per device. Kernels are opaque and count by KERNELS. Where the rows of a mixture of experts
    are sent to devices, an even share of them counts in the first round, and none in further ones.

    Args:
        jaxpr: of the whole program, after differentiation (`jitted.trace(...).jaxpr`).
        sliding_window: of the model, or of its layers, which are then counted alike; a kernel skips what lies beyond.
        fp8: count only products of 8-bit floating-point numbers.

    Raises:
        ValueError: a matrix product in a loop of unknown length, or a kernel that KERNELS does not have.
    """
    return sum(_equation(equation, sliding_window, fp8) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn, window: Window, fp8: bool) -> int:
    name = equation.primitive.name
    called = str(equation.params.get("name", ""))
    if called.startswith("chunked_attention") and any(len(_shape(variable)) == 6 for variable in equation.invars):
        # without queries it is what differentiation moved out of the loops
        return 0 if fp8 else _kernel(called, equation, window)
    if name == "dot_general":
        narrow = all(_is_float(variable) and jnp.finfo(_dtype(variable)).bits == 8 for variable in equation.invars)
        return _product(equation) if narrow or not fp8 else 0
    if name == "ragged_dot_general":
        return 0 if fp8 else _grouped_product(equation)
    if name in _OPAQUE:
        return 0 if fp8 else _kernel(called or name, equation, window)
    if called in dispatch.SELDOM:
        return 0
    inner = [traced(nested, sliding_window=window, fp8=fp8) for nested in _nested(list(equation.params.values()))]
    if name == "cond":
        return max(inner)
    total = sum(inner)
    if called == dispatch.ROUND:
        return round(total / dispatch.ROOM)
    if name == "while" and total:
        raise ValueError("a matrix product inside a while loop: how often it runs is unknown; use lax.scan.")
    if name == "scan":
        return total * equation.params["length"]
    if name == "shard_map":
        sizes = equation.params["mesh"].shape
        return total * math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
    return total


def _product(equation: core.JaxprEqn) -> int:
    """Two operations for every element of the result and of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _grouped_product(equation: core.JaxprEqn) -> int:
    """The same where each row of M meets one of the groups: with M contracted, each group has its own result."""
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    groups = 1 if dimensions.rhs_group_dimensions else _shape(equation.invars[2])[0]
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted) // groups


# Primitives whose inside is not a program of whole arrays.
_OPAQUE = (
    "pallas_call",
    "mpmd_map",  # Mosaic GPU kernels
    "dot_product_attention_fwd_wrapper",  # cuDNN
    "dot_product_attention_bwd_wrapper",
)

# beginning of a kernel's name -> (matrix products of its plane, what the plane is): tokens by rows of the head, rows by
# the matrix of their group, or the attended pairs of queries laid out as said (X blocks of Q positions are a row of T)
KERNELS = {
    "partial_softmax": (1, "head"),  # pallas_gpu, pallas_triton
    "dlogits": (1, "head"),
    "token_stats": (1, "head"),  # pallas_tpu
    "group_loss": (0, "head"),  # a few numbers per token
    "grouped_rows": (1, "groups"),  # experts.triton
    "grouped_gradient": (1, "groups"),
    "dot_product_attention_fwd_wrapper": (2, "NTHC"),
    "dot_product_attention_bwd_wrapper": (5, "NTHC"),  # the scores again, dv, dp, dq, dk
    "chunked_attention_fwd": (2, "XNGRQC"),  # of packed rows a bound: what lies outside a group is passed over
    "chunked_attention_bwd": (5, "XNGRQC"),
    "mosaic_attention_fwd": (2, "NTHC"),  # of packed rows a bound
    "mosaic_attention_dq": (3, "NTHC"),  # the scores again, dp, dq
    "mosaic_attention_dkv": (4, "NTHC"),
    "splash_mha_fwd": (2, "NHTC"),
    "splash_mha_dq": (3, "NHTC"),
    "splash_mha_dkv": (4, "NHTC"),
}


def _kernel(name: str, equation: core.JaxprEqn, window: Window) -> int:
    row = next((row for start, row in KERNELS.items() if name.startswith(start)), None)
    if row is None:
        raise ValueError(f"the kernel {name!r} has no formula; flops.KERNELS knows {', '.join(KERNELS)}.")
    products, plane = row
    if name.startswith("splash_mha_dkv"):  # the fused one returns dq too, one part per block of keys
        products += any(len(_shape(variable)) == 5 for variable in equation.outvars)
    arrays = [_shape(variable) for variable in equation.invars if _is_float(variable)]
    if not products:
        return 0
    if plane == "head":
        (tokens, width), (rows, _) = [shape for shape in arrays if len(shape) == 2][:2]
        return 2 * products * tokens * rows * width
    if plane == "groups":
        return 2 * math.prod(arrays[0]) * _shape(equation.outvars[0])[-1]
    axes = len(plane) if plane[0] == "X" else 3  # under vmap or not; of blocks, rows of keys have one axis less
    queries = next(shape for shape in arrays if len(shape) >= axes)
    length = math.prod(queries[place - len(plane)] for place, letter in enumerate(plane) if letter in "TXQ")
    pairs = work([length], [0], sliding_window=window).pairs
    return 2 * products * pairs * (math.prod(queries) // length)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dtype(variable: Any) -> Any:
    return variable.aval.dtype


def _is_float(variable: Any) -> bool:
    return jnp.issubdtype(_dtype(variable), jnp.floating)


def _nested(value: Any) -> list[core.Jaxpr]:
    """Jaxprs inside a parameter value, through lists and tuples."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in _nested(item)] if isinstance(value, list | tuple) else []

"""A function of small arrays, evaluated element by element: what a kernel needs whose compiler has no arrays of size 3.

In: a function of the K log-probs of one group. Out: the same function of K vectors, one element for each of many
groups. A GPU's compiler takes arrays of 1, 2, 4, 8 ... elements alone, and K is any number from 2 on; a vector across
groups can have any padded length. The function is traced once for one group, and each of its operations then runs on
the vectors: no operation of a loss has to be written for a kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Of primitives: what stays in place, what only moves elements, what folds some axes, what calls another function.
_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type cos div eq erf exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt square "
    "sub tan tanh xor".split()
)
_MOVES = frozenset("broadcast_in_dim expand_dims reshape rev slice squeeze transpose".split())
_FOLDS: dict[str, Callable] = {
    "reduce_sum": jnp.add,
    "reduce_prod": jnp.multiply,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_or": jnp.logical_or,
    "reduce_and": jnp.logical_and,
}
_IDENTITIES = frozenset("copy copy_p optimization_barrier pvary reshard sharding_constraint stop_gradient".split())


class Elements(NamedTuple):
    """A small array whose elements are vectors, one entry for each group."""

    shape: tuple[int, ...]
    items: list[jax.Array]  # in row-major order, all of one shape


def trace(function: Callable, *examples: Any) -> Callable[[list[Elements], tuple[int, ...]], list[Elements]]:
    """Trace a function for one group, and return it as a function of elements.

    Args:
        function: of arrays; every axis of them is small and static.
        examples: pytrees of jax.ShapeDtypeStruct, its arguments.

    Returns:
        A function (arguments, shape of the vectors) -> results. Arguments and results are Elements, in the order of the
        leaves of what the function takes and returns.

    Raises:
        ValueError: an operation that is neither elementwise nor a reduction, nor moves elements.

    >>> less_mean = trace(lambda x: x - x.mean(), jax.ShapeDtypeStruct((3,), "float32"))
    >>> two_groups = Elements((3,), [jnp.array(pair) for pair in ((1.0, 0.0), (2.0, 0.0), (6.0, 3.0))])
    >>> [element.tolist() for element in less_mean([two_groups], (2,))[0].items]  # of (1, 2, 6) and of (0, 0, 3)
    [[-2.0, -1.0], [-1.0, -1.0], [3.0, 2.0]]
    """
    closed = jax.make_jaxpr(function)(*examples)
    _check(closed.jaxpr)
    return functools.partial(_evaluate, closed)


def _check(jaxpr) -> None:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = _called(eqn)
        if inner is not None:
            _check(inner.jaxpr)
        elif name not in _ELEMENTWISE | _MOVES | _IDENTITIES | {"iota"} and name not in _FOLDS:
            raise ValueError(
                f"the group loss uses {name!r}, which cannot run in the loss kernel; write it with elementwise"
                " functions and reductions over the completions, or set kernel.fuse_loss=off"
            )


def _called(eqn):
    """The function that an equation calls, closed; None for an operation."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
    return None


def _evaluate(closed, arguments: list[Elements], shape: tuple[int, ...]) -> list[Elements]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, (_spread(value, shape) for value in closed.consts), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom) -> Elements:
        return _spread(np.asarray(atom.val, atom.aval.dtype), shape) if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        operands, name, inner = [read(atom) for atom in eqn.invars], eqn.primitive.name, _called(eqn)
        if inner is not None:
            results = _evaluate(inner, operands, shape)
        elif name in _IDENTITIES:
            results = operands
        elif name == "iota":
            with jax.ensure_compile_time_eval():
                numbers = np.asarray(eqn.primitive.bind(**eqn.params))
            results = [_spread(numbers, shape)]
        elif name in _MOVES:
            results = [_moved(eqn, *operands)]
        elif name in _FOLDS:
            results = [_folded(_FOLDS[name], *operands, axes=eqn.params["axes"])]
        else:
            function, out_shape = functools.partial(eqn.primitive.bind, **eqn.params), eqn.outvars[0].aval.shape
            columns = [_broadcast(operand, out_shape) for operand in operands]
            results = [Elements(out_shape, [function(*row) for row in zip(*columns, strict=True)])]
        values |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _spread(value, shape: tuple[int, ...]) -> Elements:
    """An array that is known, each element as a vector."""
    known = np.asarray(value)
    return Elements(known.shape, [jnp.full(shape, element, known.dtype) for element in known.reshape(-1)])


def _broadcast(operand: Elements, shape: tuple[int, ...]) -> list[jax.Array]:
    """The elements of an array that goes with a larger one, once for each element of that."""
    numbers = np.arange(len(operand.items)).reshape(operand.shape)
    return [operand.items[number] for number in np.broadcast_to(numbers, shape).reshape(-1)]


def _moved(eqn, operand: Elements) -> Elements:
    """Move elements as the operation moves their numbers."""
    with jax.ensure_compile_time_eval():
        numbers = jnp.arange(len(operand.items), dtype=jnp.int32).reshape(operand.shape)
        moved = np.asarray(eqn.primitive.bind(numbers, **eqn.params))
    return Elements(moved.shape, [operand.items[number] for number in moved.reshape(-1)])


def _folded(function: Callable, operand: Elements, *, axes: tuple[int, ...]) -> Elements:
    """Fold axes, one element after the other from the first on."""
    kept = [axis for axis in range(len(operand.shape)) if axis not in axes]
    numbers = np.arange(len(operand.items)).reshape(operand.shape).transpose(*axes, *kept)
    shape = tuple(operand.shape[axis] for axis in kept)
    rows = numbers.reshape(-1, int(np.prod(shape, dtype=int)))
    items = [functools.reduce(function, (operand.items[number] for number in column)) for column in rows.T]
    return Elements(shape, items)

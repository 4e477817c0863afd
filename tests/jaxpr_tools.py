"""Find arrays that a program should not hold: by walking its jaxpr, and by reading its compiled text."""

import math
import re

import jax
from jax.extend import core

SHAPE = re.compile(r"\b(?:pred|bf16|[sufc]\d+)\[([\d,]+)\]")


def arrays_in_jaxpr(function, *args, elements: int) -> list[str]:
    """Every array of at least `elements` elements that tracing `function` names, in any nested jaxpr."""
    return [text for size, text in _avals(jax.make_jaxpr(function)(*args).jaxpr) if size >= elements]


def arrays_in_program(function, *args, elements: int) -> list[str]:
    """Every shape of at least `elements` elements in the compiled program, inside fusions and loops too."""
    return shapes_in_text(jax.jit(function).lower(*args).compile().as_text(), elements=elements)


def shapes_in_text(text: str, *, elements: int) -> list[str]:
    """Every shape of at least `elements` elements in a compiled program; on a mesh, of one device's part."""
    return [m.group() for m in SHAPE.finditer(text) if math.prod(map(int, m.group(1).split(","))) >= elements]


def matrix_products(function, *args) -> int:
    """Matrix products in the compiled program; one inside a loop counts once."""
    return len(re.findall(r"= \S+ dot\(", jax.jit(function).lower(*args).compile().as_text()))


def _avals(jaxpr):
    """(size, description) of every variable of a jaxpr and of the jaxprs in its equations' parameters."""
    for var in (*jaxpr.constvars, *jaxpr.invars):
        yield math.prod(var.aval.shape), f"input {var.aval}"
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield math.prod(getattr(var.aval, "shape", ())), f"{eqn.primitive} -> {var.aval}"
        for nested in _jaxprs(list(eqn.params.values())):
            yield from _avals(nested)


def _jaxprs(value):
    """Jaxprs inside a parameter value, through lists and tuples."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _jaxprs(item)

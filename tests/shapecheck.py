"""The runtime checker of the tests: shapes and dtypes of every function and dataclass that is annotated with some.

What has no array among its annotations is left to pyright: to wrap it as well takes a third of a test's time.
"""

import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand where a float is asked for (PEP 484)


def install(package: str) -> None:
    """Check a package that is not imported yet."""
    every = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker):
        wrap = every(typechecker=typechecker)
        return lambda one: wrap(one) if any(map(_has_array, inspect.get_annotations(one).values())) else one

    jaxtyping.jaxtyped = jaxtyped  # the hook decorates with what has this name
    jaxtyping.install_import_hook(package, "tests.shapecheck.checked")


def _has_array(annotation) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_array, typing.get_args(annotation)))

"""While the tests run, what is annotated with shapes is checked, and nothing else is wrapped."""

import jax.numpy as jnp
import jaxtyping
import pytest

from fpo_jax import losses
from fpo_jax.io import atomic_io


def test_a_wrong_shape_and_a_wrong_dtype_are_refused():
    logps = jnp.log(jnp.full((3, 2), 0.5))
    assert losses.f_divergence(logps, logps, name="jeffreys").shape == (3,)
    for wrong in (logps[:, :1], logps[0], logps.astype(int)):
        with pytest.raises(jaxtyping.TypeCheckError):
            losses.f_divergence(logps, wrong, name="jeffreys")


def test_what_has_no_array_is_not_wrapped():
    assert hasattr(losses.f_divergence, "__wrapped__") and not hasattr(atomic_io.write, "__wrapped__")

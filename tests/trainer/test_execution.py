"""A program that does not fit is refused with a remedy before it runs; compiled programs can be kept."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from fpo_jax import types
from fpo_jax.trainer import compiled_step
from tests import batches
from tests.paths import REPO

BATCH = batches.random_batch(groups=2, completions=2, length=13, vocab=24)
ARGUMENTS = 4 * 3 + sum(leaf.nbytes for leaf in jax.tree.leaves(BATCH))


def program():
    def total(first, batch: types.Batch):
        return first.sum() + sum(jax.numpy.sum(leaf) for leaf in jax.tree.leaves(batch))

    return compiled_step.CompiledStep("the step", jax.jit(total, keep_unused=True))


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (ARGUMENTS + 2**20, True), (ARGUMENTS - 1, False)])
def test_a_program_larger_than_a_device_is_refused(monkeypatch, limit, fits):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(limit)])
    first = np.arange(3, dtype=np.float32)
    if fits:
        assert np.isfinite(program()(first, BATCH))
    else:
        with pytest.raises(ValueError, match=r"the step needs .* a device lends .*micro_batch_per_device.*fpo plan"):
            program()(first, BATCH)


@pytest.mark.parametrize(
    ("text", "refused"),
    [("RESOURCE_EXHAUSTED: Ran out of memory on HBM: 17G of 15.75G", True), ("INTERNAL: something else", False)],
)
def test_a_compiler_out_of_memory_says_what_to_do(text, refused):
    class Refusing:
        def __call__(self):
            raise AssertionError("it does not compile")

        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    with pytest.raises(ValueError if refused else jax.errors.JaxRuntimeError) as caught:
        compiled_step.CompiledStep("the step", Refusing())(np.zeros(3, np.float32), BATCH)
    assert ("does not fit: RESOURCE_EXHAUSTED: Ran out" in str(caught.value)) == refused
    assert ("`fpo plan`" in str(caught.value)) == refused


def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
    """In processes of their own: the cache is the process's."""
    text = f"""
import jax
from fpo_jax.trainer import compiled_step
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x + 1)(1)  # what compiled before must not settle it
compiled_step.keep_compiled({str(tmp_path / "cache")!r})
jax.jit(lambda x: jax.numpy.sin(x) * 3)(2.0)
print(hits.count("/jax/compilation_cache/cache_hits"))
"""
    said = [
        subprocess.run([sys.executable, "-c", text], cwd=REPO, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert int(said[0]) == 0 and int(said[1]) >= 1 and any((tmp_path / "cache").iterdir())

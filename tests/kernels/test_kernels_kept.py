"""The plane of logits that stays from the forward to the backward pass: when, what it costs, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head import chunked
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from tests import jaxpr_tools, tolerances
from tests.kernels import test_kernels

N, V, D = 151, 1257, 16
PLACED = Placement(Mesh(np.array(jax.devices()[:1]), ("data",)), ("data",))


def planes(spec, *, dtype="float32", head_dtype="float32") -> list:
    """Dtypes of the [N, V] arrays that the backward pass is handed."""
    hidden_ND, head_VD, targets_N, _ = test_kernels.inputs(V, tokens=N, width=D)

    def stats(hidden_ND, head_VD):
        return chunked.token_stats(hidden_ND, head_VD, targets_N, spec=spec)[:2]

    _, pullback = jax.vjp(stats, hidden_ND.astype(dtype), head_VD.astype(head_dtype))
    return [x.dtype for x in jax.tree.leaves(pullback) if x.shape == (N, V)]


@pytest.mark.parametrize(
    ("dtype", "head_dtype", "softcap", "held"),
    [
        ("float32", "float32", None, V * N * 8),  # logits, dlogits
        ("bfloat16", "bfloat16", None, V * N * 6),
        ("bfloat16", "float32", None, V * N * 6),
        ("bfloat16", "float32", 5.0, V * N * 8),  # capped logits beside the raw ones
    ],
)
def test_kept_exactly_where_the_workspace_holds_them(dtype, head_dtype, softcap, held):
    options = {"compute_dtype": dtype, "softcap": softcap}
    kept = functools.partial(planes, dtype=dtype, head_dtype=head_dtype)
    assert kept(HeadSpec(**options, workspace_bytes=held)) == [jnp.float32]  # never rounded
    assert not kept(HeadSpec(**options, workspace_bytes=held - 1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"vocab_block": V}, True),
        ({"vocab_block": V - 1}, False),
        ({"placement": PLACED}, False),
        ({"placement": PLACED, "kept_bytes": 2**30}, True),
        ({"kept_bytes": 2**10}, False),
        ({"kept_bytes": 2**30, "workspace_bytes": 2**20}, True),
    ],
)
def test_on_a_mesh_and_in_more_than_the_workspace_kept_only_where_asked(options, kept):
    assert bool(planes(HeadSpec(**options))) == kept


@pytest.mark.parametrize("name", [name for name in logprobs.ENGINES if name != "chunked"])
def test_kernels_keep_nothing_unless_asked(name):
    plan = functools.partial(logprobs.ENGINES[name].kept_tiles, 1, 128, 64, "bfloat16", "bfloat16")
    assert plan(spec=HeadSpec()) is None
    assert plan(spec=HeadSpec(kept_bytes=2**20))


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "logit_scale": 0.7, "vocab_size": 1003, "want_entropy": True}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_numbers_as_recomputed(dtype, options):
    """The raw products that are kept are those that would be made again."""
    args = test_kernels.inputs(V, tokens=N, width=D, vocab_size=options.get("vocab_size"), dtype=dtype)
    kept, again = (
        test_kernels.run(chunked.token_stats, *args, spec=HeadSpec(**options, workspace_bytes=size))
        for size in (2**30, 2**20)
    )
    rounded = 2.0**-7 if dtype == "bfloat16" else tolerances.KERNEL_VALUE  # two neighbours in bfloat16
    test_kernels.assert_matches_oracle(kept, again, values=tolerances.KERNEL_VALUE, gradients=rounded)


@pytest.mark.parametrize("options", [{}, {"softcap": 6.0, "vocab_size": 1003}], ids=str)
def test_exact_in_float64(options):
    with jax.enable_x64(True):
        args = test_kernels.inputs(V, tokens=N, width=D, vocab_size=options.get("vocab_size"), dtype="float64")
        spec = HeadSpec(**options)
        results = test_kernels.run(chunked.token_stats, *args, spec=spec)
        test_kernels.assert_matches_oracle(
            results,
            test_kernels.oracle(*args, spec=spec),
            values=tolerances.KERNEL_FLOAT64,
            gradients=tolerances.KERNEL_FLOAT64,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_compiled_program_holds_no_more_than_planned(softcap, dtype):
    tokens, rows = 512, 4096
    spec = HeadSpec(softcap=softcap, compute_dtype=dtype)
    hidden_ND, head_VD, targets_N, cotangents = test_kernels.inputs(rows, tokens=tokens, width=D)
    function = functools.partial(test_kernels.weighted, chunked.token_stats, targets_N, cotangents, spec)
    compiled = jax.jit(jax.grad(function, (0, 1))).lower(hidden_ND.astype(dtype), head_VD).compile()
    plan = chunked.kept_tiles(tokens, rows, D, "float32", dtype, spec=spec)
    assert plan is not None
    beside = 2**20  # what is as long as N or V
    assert compiled.memory_analysis().temp_size_in_bytes <= plan.workspace_bytes + beside
    found = jaxpr_tools.shapes_in_text(compiled.as_text(), elements=tokens * rows)
    assert found  # they are there


def test_explain_says_so():
    here = {"target": logprobs.Target("cpu"), "shapes": logprobs.HeadShapes(512, 256, 32000), "dtype": "float32"}
    text = logprobs.explain(**here)
    assert "forward alone: 2 blocks of 16000 head rows" in text and "never held" not in text
    assert "forward and backward: all logits at once, kept between them, 125.0 MiB of workspace (limit 192.0" in text
    recomputed = logprobs.explain(**here, workspace_bytes=124 * 2**20)
    assert "kept between" not in recomputed and "never held: 62.5 MiB" in recomputed

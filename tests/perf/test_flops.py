"""Operations counted by hand against those of models, rows and traced programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fpo_jax import models
from fpo_jax.attention import blockwise, splash
from fpo_jax.kernels.lm_head import pallas_tpu, pallas_triton, spec
from fpo_jax.models import params
from fpo_jax.perf import flops
from tests import batches

LLAMA = models.ModelConfig(
    family="llama", vocab_size=11, width=8, layers=2, heads=4, kv_heads=2, head_dim=2, ffn=24, max_positions=64
)
NEOX = models.ModelConfig(
    family="gpt_neox", vocab_size=13, width=8, layers=3, heads=2, kv_heads=2, head_dim=4, ffn=20, max_positions=64
)


def traced(function, *args, **options):
    return flops.traced(jax.make_jaxpr(function)(*args).jaxpr, **options)


def test_work_counts_what_causality_and_the_window_leave():
    # rows of 5, 1 and 0 tokens; with a window of 3 the queries of the first see 1, 2, 3, 3, 3 keys
    assert flops.work([5, 1, 0], [2, 0, 0], sliding_window=None) == (6, 15 + 1, 2)
    assert flops.work([5, 1, 0], [2, 0, 0], sliding_window=3) == (6, 12 + 1, 2)
    assert flops.work([5], [5], sliding_window=9) == flops.work([5], [5], sliding_window=None)


def test_work_does_not_overflow():
    rows = np.full(2**10, 2**17, np.int32)
    assert flops.work(rows, rows, sliding_window=None).pairs == 2**10 * 2**16 * (2**17 + 1)


def test_forward_of_a_llama_by_hand():
    # q 8x8, k and v 8x4, out 8x8, gate, up and down 8x24: 768 weights a layer; biases and norms do not count
    layers = 2 * (64 + 2 * 32 + 64 + 3 * 192)
    assert flops.forward(LLAMA, flops.Work(7, 0, 0)) == 2 * layers * 7
    assert flops.forward(LLAMA, flops.Work(0, 10, 0)) == 2 * 4 * (2 + 2) * 2 * 10  # L H (q.k and p.v) C pairs
    assert flops.forward(LLAMA, flops.Work(0, 0, 5)) == 2 * 8 * 11 * 5


def test_forward_of_a_gpt_neox_by_hand():
    assert flops.forward(NEOX, flops.Work(1, 0, 0)) == 2 * 3 * (8 * 24 + 64 + 2 * 160)


def test_an_update_is_three_forward_passes_and_four_with_a_statistic_of_the_batch():
    done = flops.Work(7, 10, 5)
    assert flops.train_step(LLAMA, done) == 3 * flops.forward(LLAMA, done)
    assert flops.train_step(LLAMA, done, extra_forward=True) == 4 * flops.forward(LLAMA, done)


def test_a_product_counts_the_contracted_and_the_remaining_axes():
    x, w = jnp.ones((2, 3, 5)), jnp.ones((5, 7))
    assert traced(lambda x, w: x @ w, x, w) == 2 * (2 * 3 * 7) * 5
    assert traced(lambda x: jnp.einsum("abc,abd->acd", x, x), x) == 2 * (2 * 5 * 5) * 3  # a is a batch axis


def test_a_scan_counts_as_often_as_it_runs_and_a_branch_by_its_larger_side():
    x = jnp.ones((4, 4))

    def loop(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=6)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert traced(loop, x) == 6 * 2 * 4**3
    assert traced(jax.jit(branch), x) == 2 * 2 * 4**3
    assert traced(lambda x: loop(branch(x)), x) == 8 * 2 * 4**3


def test_recomputation_counts():
    x, w = jnp.ones((3, 4)), jnp.ones((2, 4, 4))
    policies = {
        "kept": (lambda layer: layer, 3),
        "dots": (functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable), 3),
        "recomputed": (jax.checkpoint, 4),
    }
    for wrap, products in policies.values():

        def total(w, x, wrap=wrap):
            def layer(x, w):
                return jnp.sin(x @ w), None

            return jnp.sum(jax.lax.scan(wrap(layer), x, w)[0])

        assert traced(jax.grad(total, (0, 1)), w, x) == products * 2 * 2 * (3 * 4 * 4)


def test_a_shard_map_counts_on_every_device():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    x = jnp.ones((4, 6))
    place = PartitionSpec("a", None)
    for manual, products in ((frozenset({"a", "b"}), 8), (frozenset({"a"}), 2)):
        product = jax.shard_map(
            lambda x: x @ x.T, mesh=mesh, in_specs=place, out_specs=place, axis_names=manual, check_vma=False
        )
        assert traced(jax.jit(product), x) == products * 2 * 2 * 2 * 6


@pytest.mark.parametrize("window", [None, 100])
def test_blockwise_attention_counts_the_pairs_that_are_seen(window):
    """Two products of every pair forward, five more backward; 2 rows of 256 positions, 4 heads of 8."""
    q, k = jnp.ones((2, 256, 4, 8)), jnp.ones((2, 256, 2, 8))

    def total(q, k, v):
        return jnp.sum(blockwise.attend(q, k, v, None, scale=1.0, window=window, soft_cap=None))

    pairs = flops.work([256], [0], sliding_window=window).pairs * 2 * 4 * 8
    assert traced(total, q, k, k, sliding_window=window) == 2 * 2 * pairs
    assert traced(jax.grad(total, (0, 1, 2)), q, k, k, sliding_window=window) == 2 * (2 + 5) * pairs


def test_a_product_in_a_loop_of_unknown_length_is_an_error():
    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="inside a while loop"):
        traced(loop, jnp.ones((2, 2)))
    assert traced(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), 0) == 0


def test_the_head_kernels_count_by_their_formulas():
    tokens, width, rows = 256, 128, 512
    hidden, head, targets = jnp.ones((tokens, width)), jnp.ones((rows, width)), jnp.zeros(tokens, jnp.int32)
    plane = 2 * tokens * width * rows

    def lse(hidden, head, engine):
        return jnp.sum(engine(hidden, head, targets, spec=spec.HeadSpec()).lse_N)

    assert traced(functools.partial(lse, engine=pallas_tpu.token_stats), hidden, head) == plane
    both = jax.grad(functools.partial(lse, engine=pallas_triton.token_stats), (0, 1))
    assert traced(both, hidden, head) == (1 + 1 + 2) * plane  # softmax; dlogits, of which XLA makes both gradients


@pytest.mark.parametrize(
    ("length", "products"), [(512, 2 + 5), (8192, 2 + 4 + 3)], ids=["fused backward", "two kernels"]
)
@pytest.mark.parametrize("window", [None, 100])
def test_splash_attention_counts_its_pairs(length, products, window):
    q, kv = jax.ShapeDtypeStruct((2, length, 4, 128), "bfloat16"), jax.ShapeDtypeStruct((2, length, 2, 128), "bfloat16")

    def total(q, k, v):
        return jnp.sum(splash.attend(q, k, v, None, scale=1.0, window=window, soft_cap=None), dtype=jnp.float32)

    pairs = flops.work([length], [0], sliding_window=window).pairs
    both = jax.value_and_grad(total, (0, 1, 2))
    out_times_dout = 2 * (2 * 4 * length * 128)  # outside of the kernels
    assert traced(both, q, kv, kv, sliding_window=window) == products * 2 * pairs * (2 * 4 * 128) + out_times_dout


def test_a_kernel_without_a_formula_is_an_error(monkeypatch):
    monkeypatch.delitem(flops.KERNELS, "token_stats")
    hidden, head, targets = jnp.ones((256, 128)), jnp.ones((384, 128)), jnp.zeros(256, jnp.int32)
    with pytest.raises(ValueError, match=r"'token_stats' has no formula.*dlogits"):
        traced(lambda h: pallas_tpu.token_stats(h, head, targets, spec=spec.HeadSpec()).lse_N, hidden)


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=lambda config: config.family)
def test_a_traced_forward_pass_is_the_closed_form_but_for_causality(config):
    batch = batches.random_batch(groups=3, completions=2, length=10, vocab=11)
    forward_fn = batches.forward_fn(config, implementation="reference")
    weights = params.init(config, jax.random.key(0), "float32")
    done = flops.work([10] * 6, [batch.targets_NR.shape[1]] * 6, sliding_window=None)
    unmasked = done._replace(pairs=6 * 10 * 10)  # XLA attention computes every pair
    mean_logits = 2 * 6 * 8  # a metric: the mean hidden state of each row times the mean row of the head
    assert traced(lambda w: forward_fn(w, batch), weights) == flops.forward(config, unmasked) + mean_logits

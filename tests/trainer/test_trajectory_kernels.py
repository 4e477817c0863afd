"""Twenty steps are the same twenty steps whichever kernel computes the log-probs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import losses, models, sharding, types
from fpo_jax.kernels.lm_head import pallas_tpu
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.trainer import train_step
from tests import batches, tolerances
from tests.data import test_layouts

STEPS, VOCAB = 20, 152
CONFIG = models.ModelConfig(
    family="llama", vocab_size=VOCAB, width=64, layers=1, heads=4, kv_heads=2, head_dim=16, ffn=96, max_positions=32,
    initializer_range=0.2,
)  # fmt: skip
KERNELS = {
    "dense": {"implementation": "reference"},
    "TPU kernel": {"implementation": "pallas_tpu", "interpret": True},
    "TPU kernel with the loss in it": {"implementation": "pallas_tpu", "fuse_loss": True, "interpret": True},
    "Triton kernel": {"implementation": "pallas_triton", "interpret": True},
}


@functools.cache
def trajectory(recipe, **forward_options):
    """Losses and final weights of twenty steps on two alternating batches."""
    loss = losses.resolve(recipe)
    forward_fn = batches.forward_fn(CONFIG, temperature=loss.temperature, **forward_options)
    weights = params.init(CONFIG, jax.random.key(0), "float32")
    two = [batches.random_batch(groups=4, completions=2, length=17, vocab=VOCAB, seed=seed) for seed in (0, 1)]
    two = [batch._replace(reference_logps_BK=np.full((4, 2), -45.0, np.float32)) for batch in two]
    return twenty_updates(weights, two, forward_fn=forward_fn, loss=loss, accumulation=2)


def twenty_updates(weights, two, *, forward_fn, loss, accumulation):
    """Losses and final weights of steps on two batches in turn, where the weights live."""
    rate = adamw.schedule(kind="cosine", peak=3e-3, warmup=4, total_steps=STEPS)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0, decay_mask=params.decay_mask(CONFIG)
    )
    update = jax.jit(
        functools.partial(train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate)
    )
    state, curve = types.TrainState(weights, optimizer.init(weights), jnp.int32(0)), []
    for index in range(STEPS):
        state, pairs = update(state, train_step.stack_micro_batches(two[index % 2], accumulation=accumulation))
        curve.append(float(pairs["loss"][0]))
    return np.array(curve), params.flatten(state.params)


@functools.cache
def of_shared_rows(recipe, *, sizes=None, **forward_options):
    """The same of rows in which groups share their prompts, on a mesh of so many devices along its axes."""
    loss, weights = losses.resolve(recipe), params.init(CONFIG, jax.random.key(0), "float32")
    grid = sharding.ONE_DEVICE
    two = [
        test_layouts.both(test_layouts.prepared_groups(8, 2, seed=seed, vocab=VOCAB), "shared", multiple=4, length=96)[
            1
        ]
        for seed in (0, 1)
    ]
    two = [batch._replace(reference_logps_BK=np.full(batch.rewards_BK.shape, -25.0, np.float32)) for batch in two]
    if sizes is not None:
        axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        mesh = sharding.make_mesh(**axes, devices=jax.devices()[: np.prod(sizes)])
        grid = sharding.Layout(mesh)
        weights = jax.device_put(weights, params.shardings(CONFIG, mesh=mesh))
        two = jax.device_put(two, sharding.batch_sharding(mesh, stacked=False))
    forward_fn = batches.forward_fn(CONFIG, temperature=loss.temperature, layout=grid, **forward_options)
    return twenty_updates(weights, two, forward_fn=forward_fn, loss=loss, accumulation=1)


def assert_same(ours, theirs):
    (curve, weights), (expected_curve, expected_weights) = ours, theirs
    assert expected_curve[-2] < expected_curve[0] - tolerances.DIFFERENT
    np.testing.assert_allclose(curve, expected_curve, rtol=0, atol=tolerances.TRAJECTORY_LOSS)
    for name, expected in expected_weights.items():
        error = np.abs(weights[name] - expected).max() / np.abs(expected).max()
        assert error < tolerances.TRAJECTORY_WEIGHTS, (name, error)


@pytest.mark.sampled(4)
@pytest.mark.slow  # compiles and emulates kernels
@pytest.mark.parametrize(
    ("kernel", "recipe"),
    [
        *itertools.product(KERNELS, ["alphapo-pref", "alphapo"]),
        ("TPU kernel with the loss in it", "jspo-pref"),  # the others never see which divergence it is
    ],
)
def test_every_kernel_gives_the_same_trajectory(kernel, recipe, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))
    expected = trajectory(recipe, implementation="chunked")
    assert_same(trajectory(recipe, **KERNELS[kernel]), expected)


@pytest.mark.sampled(6)
@pytest.mark.slow  # compiles and emulates kernels
@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 2, 2)], ids=["fsdp=4", "fsdp=2, tensor=2"])
@pytest.mark.parametrize(("kernel", "recipe"), [("pallas_tpu", "alphapo"), ("pallas_triton", "jspo-pref")])
def test_the_loss_kernel_gives_the_same_trajectory_on_meshes_of_shared_rows(kernel, sizes, recipe, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))
    ours = of_shared_rows(recipe, sizes=sizes, implementation=kernel, fuse_loss=True, interpret=True)
    assert_same(ours, of_shared_rows(recipe, implementation="reference"))


@pytest.mark.slow  # the GPU interpreter
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels and their interpreter need jax 0.11")
def test_the_gpu_kernel_gives_the_same_trajectory():
    """It multiplies bfloat16 alone, so both sides do."""
    expected = trajectory("alphapo-pref", implementation="chunked", compute_dtype="bfloat16")
    options = {"compute_dtype": "bfloat16", "fuse_loss": True, "interpret": True}
    ours = trajectory("alphapo-pref", implementation="pallas_gpu", **options)
    assert_same(ours, expected)

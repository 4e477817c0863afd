"""The step: any split of the batch and any mesh give the same one; nothing that is not finite is ever applied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import logprobs, losses, models, sharding, types
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.trainer import forward, train_step
from tests import batches, tolerances

CONFIG = models.ModelConfig(
    family="llama", vocab_size=24, width=8, layers=1, heads=4, kv_heads=2, head_dim=4, ffn=16, max_positions=32,
    initializer_range=0.5,
)  # fmt: skip
GROUPS = 8


def batch_of(completions=2, seed=0):
    batch = batches.random_batch(groups=GROUPS, completions=completions, length=13, vocab=24, seed=seed)
    noise = np.random.default_rng(seed).normal(size=batch.rewards_BK.shape)
    return batch._replace(reference_logps_BK=(-20.0 + noise).astype(np.float32))


def updated(loss, batch, *, accumulation=1, mesh=None, **forward_options):
    """One step from fixed weights: (new parameters, optimiser state, metrics)."""
    weights = params.init(CONFIG, jax.random.key(0), "float32")
    rate = adamw.schedule(kind="constant", peak=1e-2, warmup=0, total_steps=9)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.0, clip_norm=1.0, decay_mask=params.decay_mask(CONFIG)
    )
    forward_fn = batches.forward_fn(CONFIG, temperature=loss.temperature, **forward_options)
    update = functools.partial(train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate)
    state = types.TrainState(weights, optimizer.init(weights), jnp.int32(0))
    if mesh is None:
        jitted = jax.jit(update)
    else:
        places = params.shardings(CONFIG, mesh=mesh)
        moments = jax.tree.map(lambda _: sharding.replicated(mesh), state.opt_state)
        jitted = train_step.jit_train_step(
            update, mesh=mesh, state_shardings=types.TrainState(places, moments, sharding.replicated(mesh))
        )
    state, pairs = jitted(state, train_step.stack_micro_batches(batch, accumulation=accumulation))
    return state, {name: float(total) / float(count) for name, (total, count) in pairs.items() if float(count)}


def assert_same_update(first, second):
    for name in first[1]:
        np.testing.assert_allclose(second[1][name], first[1][name], err_msg=name, **tolerances.SAME_UPDATE)
    for a, b in zip(jax.tree.leaves(first[0].params), jax.tree.leaves(second[0].params), strict=True):
        np.testing.assert_allclose(b, a, **tolerances.SAME_UPDATE)


LOSSES = {
    "alpha with reference": ("alphapo-pref", {"temperature": 0.8}),
    "simpo with an SFT term": ("sigmoid", {"sft_weight": 0.5}),
    "kto, which has a batch statistic": ("kto", {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_split_into_micro_batches_gives_the_same_update(name):
    loss = losses.resolve(LOSSES[name][0], **LOSSES[name][1])
    whole = updated(loss, batch_of())
    assert whole[1]["grad_norm"] > tolerances.DIFFERENT
    for accumulation in (2, 8):
        assert_same_update(whole, updated(loss, batch_of(), accumulation=accumulation))


@pytest.mark.slow  # compiles for eight virtual devices
@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (2, 2, 2)])
def test_any_mesh_gives_the_same_update(data, fsdp, tensor):
    loss = losses.resolve("alphapo-pref")
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices())
    alone = updated(loss, batch_of())
    assert_same_update(alone, updated(loss, batch_of(), mesh=mesh, layout=sharding.Layout(mesh)))


def test_remat_and_dense_head_give_the_same_update():
    loss = losses.resolve("alphapo-pref")
    assert_same_update(updated(loss, batch_of()), updated(loss, batch_of(), remat="full", implementation="reference"))


def test_padding_groups_change_nothing():
    loss = losses.resolve("sigmoid", sft_weight=0.5)
    batch = batch_of()
    empty = jax.tree.map(np.zeros_like, batch)._replace(row_ids_B=np.full(GROUPS, -1, np.int32))
    padded = jax.tree.map(lambda *leaves: np.concatenate(leaves), batch, empty)
    assert_same_update(updated(loss, batch), updated(loss, padded))


def test_padding_tokens_change_nothing():
    loss = losses.resolve("alphapo-pref")
    batch = batch_of()
    wider = batch._replace(
        tokens_NT=np.pad(batch.tokens_NT, ((0, 0), (0, 6)), constant_values=7),
        valid_NT=np.pad(batch.valid_NT, ((0, 0), (0, 6))),
        predictors_NR=np.pad(batch.predictors_NR, ((0, 0), (0, 3))),
        targets_NR=np.pad(batch.targets_NR, ((0, 0), (0, 3)), constant_values=5),
        loss_mask_NR=np.pad(batch.loss_mask_NR, ((0, 0), (0, 3))),
    )
    assert_same_update(updated(loss, batch), updated(loss, wider))


@pytest.mark.parametrize("poison", ["a reference that is NaN", "a token outside the vocabulary"])
def test_an_update_that_is_not_finite_leaves_the_state(poison):
    loss = losses.resolve("alphapo-pref")
    batch = batch_of()
    if poison == "a reference that is NaN":
        batch.reference_logps_BK[3, 0] = np.nan
    else:
        batch.tokens_NT[5, 0] = 999
    state, numbers = updated(loss, batch, accumulation=2)
    assert numbers["nonfinite"] == 1.0 and int(state.step) == 1
    for old, new in zip(
        jax.tree.leaves(params.init(CONFIG, jax.random.key(0), "float32")), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(state.opt_state))


def test_one_candidate_is_plain_fine_tuning():
    loss = losses.resolve("sft")
    batch = batch_of(completions=1)
    _, numbers = updated(loss, batch)
    completion = jax.jit(batches.forward_fn(CONFIG))(params.init(CONFIG, jax.random.key(0), "float32"), batch)
    expected = -np.sum(np.asarray(completion.sum_N)) / np.sum(np.asarray(completion.count_N))
    np.testing.assert_allclose(numbers["loss"], expected, rtol=tolerances.FLOAT32)
    assert "rewards/margins" not in numbers


def evaluated(loss, batch, logps_BK, lengths_BK):
    """eval_step's metrics with the model's log-probs replaced."""

    class Given(forward.PolicyForward):
        def __call__(self, *_):
            return logprobs.CompletionLogps(
                jnp.asarray(logps_BK, jnp.float32).reshape(-1),
                jnp.asarray(lengths_BK, jnp.float32).reshape(-1),
                jnp.arange(np.size(logps_BK), dtype=jnp.float32),
            )

    forward_fn = Given(**vars(batches.forward_fn(CONFIG)))
    pairs = jax.jit(functools.partial(train_step.eval_step, forward_fn=forward_fn, loss=loss))(({}, 0.0), batch)
    return {name: float(total) / float(count) for name, (total, count) in pairs.items() if float(count)}


def test_metrics_by_hand():
    """Three groups: ranked right, tied, and one without a preference that must not count."""
    batch = batch_of()
    batch = jax.tree.map(lambda leaf: leaf[:3] if leaf.shape[0] == GROUPS else leaf[:6], batch)._replace(
        rewards_BK=np.array([[1, 0], [1, 0], [0, 0]], np.float32), reference_logps_BK=np.zeros((3, 2), np.float32)
    )
    loss = losses.resolve("dpo-pref", beta_pi=0.5)
    numbers = evaluated(loss, batch, [[-2, -6], [-4, -4], [-1, -9]], [[2, 3], [4, 2], [1, 1]])
    assert numbers["rewards/accuracies"] == 0.75  # ties count half
    assert numbers["rewards/chosen"] == 0.5 * (-2 - 4) / 2 and numbers["rewards/rejected"] == 0.5 * (-6 - 4) / 2
    assert numbers["rewards/margins"] == 1.0
    assert numbers["logps/chosen"] == -3.0 and numbers["logps/rejected"] == -5.0
    assert numbers["lengths/rejected"] == 2.5
    assert numbers["logits/chosen"] == 1.0 and numbers["logits/rejected"] == 2.0
    assert numbers["reference_kl"] == np.mean([-4, -4, -5])
    assert "group_kl" not in numbers  # infinite for hard labels


def test_length_normalised_losses_show_mean_logps():
    batch = jax.tree.map(lambda leaf: leaf[:1] if leaf.shape[0] == GROUPS else leaf[:2], batch_of())
    numbers = evaluated(losses.resolve("alphapo", beta=2.0, gamma_beta_ratio=0.8), batch, [[-6, -8]], [[3, 2]])
    assert numbers["logps/chosen"] == -2.0 and numbers["logps/rejected"] == -4.0
    assert numbers["rewards/chosen"] == -4.0  # beta * mean logp, without gamma


@pytest.mark.parametrize("fuse_loss", [False, True])
def test_the_loss_runs_in_the_kernel_where_asked(fuse_loss):
    forward_fn = batches.forward_fn(CONFIG, implementation="pallas_tpu", interpret=True, fuse_loss=fuse_loss)
    weights = params.init(CONFIG, jax.random.key(0), "float32")
    loss = losses.resolve("jspo-pref")
    operands = train_step._operands(batch_of(), None)
    text = str(jax.make_jaxpr(lambda w: forward_fn.group_losses(w, batch_of(), operands, loss=loss)[0])(weights))
    assert "name=token_stats" in text and ("name=group_loss" in text) == fuse_loss

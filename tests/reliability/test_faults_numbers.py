"""What is not finite, and what is a spike, changes no weight on any device; the same seed gives the same bytes."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fpo_jax import checkpoint, data, losses, sharding, types
from fpo_jax.models import params
from fpo_jax.optimizer import adamw, skip_step
from fpo_jax.trainer import compiled_step, metric_logger, reference_logprobs, train_step, trainer
from tests import batches, compiling, faults, resuming, tiny
from tests.paths import REPO
from tests.trainer.test_step import CONFIG, batch_of

MOST = 3


def one_leaf(where):
    """An optimiser's front that spoils a gradient leaf: all of it, or one shard's entry alone."""
    return lambda leaf: leaf.at[(0,) * leaf.ndim if where == "one shard" else ...].set(jnp.nan)


@functools.cache
def updater(*, devices, skip_rule=None, spoil=None):
    """(update(state, batch), fresh state) of the tiny model on one device or cut over eight."""
    loss, resharding = losses.resolve("alphapo-pref"), None
    rate = adamw.schedule(kind="linear", peak=1e-2, warmup=0, total_steps=9)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1, clip_norm=1.0, decay_mask=params.decay_mask(CONFIG)
    )
    optimizer = optimizer if skip_rule is None else skip_rule.watching(optimizer)
    weights = params.init(CONFIG, jax.random.key(0), "float32")
    layout = sharding.ONE_DEVICE
    if devices > 1:
        mesh = sharding.make_mesh(data=1, fsdp=devices, tensor=1, devices=jax.devices()[:devices])
        layout = sharding.Layout(mesh)
        cut = params.shardings(CONFIG, mesh=mesh)
        weights = jax.device_put(weights, cut)

    def spoiled(grads):
        return grads if spoil is None else {**grads, "embed": jax.tree.map(spoil, grads["embed"])}

    resharding = train_step.Resharding(gather_params=lambda x: x, shard_grads=spoiled, load_opt_state=lambda x: x)
    forward_fn = batches.forward_fn(CONFIG, temperature=loss.temperature, layout=layout)

    @jax.jit
    def update(state, batch):
        return train_step.train_step(
            state,
            batch,
            forward_fn=forward_fn,
            loss=loss,
            optimizer=optimizer,
            rate=rate,
            resharding=resharding,
            skip_rule=skip_rule,
        )

    counter = None if skip_rule is None else jnp.int32(0)
    state = types.TrainState(weights, jax.jit(optimizer.init)(weights), jnp.int32(0), None, counter)

    def applied(state, batch):
        return update(state, train_step.stack_micro_batches(batch, accumulation=1))

    return applied, state


def poisoned(kind):
    batch = batch_of()
    if kind == "a token outside the vocabulary":
        batch.tokens_NT[5, 0] = 999
    elif kind != "a gradient":
        batch.reference_logps_BK[3, 0] = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}[kind]
    return batch


def kept(state):
    """What a step that is not applied must leave: weights, moments and their counts."""
    return faults.digest((state.params, state.opt_state))


POISONS = ["nan", "inf", "-inf", "a token outside the vocabulary"]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.faults)])
@pytest.mark.parametrize(
    "kind", [*POISONS[:1], *(pytest.param(kind, marks=pytest.mark.faults) for kind in POISONS[1:])]
)
def test_poison_changes_nothing_and_the_schedule_waits(kind, devices):
    skip_rule = skip_step.SkipRule(most=MOST)
    update, state = updater(devices=devices, skip_rule=skip_rule)
    state, _ = update(state, batch_of())
    before = kept(state)
    for number in range(1, MOST):
        state, pairs = update(state, poisoned(kind))
        assert kept(state) == before and int(state.skipped) == number and float(pairs["nonfinite"][0]) == 1.0
    assert int(state.step) == MOST, "steps skipped are counted"
    state, pairs = update(state, batch_of(seed=1))
    assert int(state.skipped) == 0 and int(adamw.steps_applied(state.opt_state)) == 2 and kept(state) != before
    rate = adamw.schedule(kind="linear", peak=1e-2, warmup=0, total_steps=9)
    assert float(pairs["learning_rate"][0]) == float(rate(1)), "the rate that the first skipped step had"
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.faults
@pytest.mark.parametrize("where", ["one leaf", "one shard"])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_gradient_that_is_not_finite_in_one_leaf_or_shard_is_applied_on_no_device(where, devices):
    update, state = updater(devices=devices, skip_rule=skip_step.SkipRule(most=MOST), spoil=one_leaf(where))
    before = kept(state)
    state, pairs = update(state, batch_of())
    assert np.isfinite(float(pairs["loss"][0])) and float(pairs["nonfinite"][0]) == 1.0
    assert kept(state) == before and int(state.skipped) == 1
    for leaf in jax.tree.leaves(state):
        assert all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards)


@pytest.mark.parametrize(("weight", "bad"), [(1, MOST), (MOST, 1)])  # skip, stop
def test_after_too_many_nothing_is_applied_until_the_run_has_stopped(weight, bad):
    update, state = updater(devices=1, skip_rule=skip_step.SkipRule(most=MOST, weight=weight))
    state, _ = update(state, batch_of())
    before = kept(state)
    for batch in [poisoned("nan")] * bad + [batch_of(seed=1)] * 2:
        state, _ = update(state, batch)
        assert kept(state) == before
    assert int(state.skipped) == MOST


def test_the_guard_asks_the_host_for_nothing():
    update, state = updater(devices=1, skip_rule=skip_step.SkipRule(most=MOST, sigmas=6.0, window=4))
    text = str(jax.make_jaxpr(update)(state, batch_of()))
    assert not re.search("callback|infeed|outfeed", text), re.findall("[a-z_]*callback|infeed|outfeed", text)


def test_the_guard_moves_no_byte(monkeypatch):
    """A step that is chosen costs the memory traffic of one that is not: no moment is copied first."""

    def moved(skip_rule):
        update, state = updater.__wrapped__(devices=1, skip_rule=skip_rule)  # traced anew
        found = jax.jit(update, donate_argnums=0).lower(state, batch_of()).compile().cost_analysis()
        return found["bytes accessed"]

    guarded = moved(skip_step.SkipRule(most=MOST))
    monkeypatch.setattr(jnp, "isfinite", lambda x: jnp.ones(jnp.shape(x), bool))
    share = guarded / moved(None)
    assert share < 1.001, share


# --- runs


def config(inputs, **changed):
    options = {"train__batch_size": 4, "data__eval": "", "train__eval_every": 0, "train__epochs": 2.0}
    options |= {"train__micro_batch_per_device": 2, "optim__schedule": "constant", "optim__warmup_fraction": 0.0}
    return tiny.config(inputs / "model", inputs / "pairs.jsonl", **(options | changed))


def spoil_updates(monkeypatch, numbers, value):
    """Add a value to a reference log-prob of the steps of these numbers, from 1."""
    batch_at, filled, current = data.batch_at, reference_logprobs.attach, [0]

    def numbered(schedule, number, positions):
        current[0] = number + 1
        return batch_at(schedule, number, positions)

    def with_reference(batch, references):
        batch = filled(batch, references)
        if current[0] in numbers:
            batch.reference_logps_BK[0, 0] += np.float32(value)
        return batch

    monkeypatch.setattr(data, "batch_at", numbered)
    monkeypatch.setattr(reference_logprobs, "attach", with_reference)


def weights(workdir, number=None):
    found, meta = checkpoint.restore_params(workdir, number)
    return meta, faults.digest(found)


SELDOM = {"train__save_every": 99}


@pytest.fixture(scope="module")
def sound(inputs, tmp_path_factory):
    """Outcomes of the first three steps, and of the whole run, where every number is finite."""
    root = tmp_path_factory.mktemp("sound")
    for name, changed in {"three": {"train__max_steps": 3}, "whole": {}}.items():
        resuming.whole(config(inputs, **SELDOM, **changed), root / name)
    return weights(root / "three")[1], resuming.outcome(root / "whole")


@pytest.mark.faults  # several runs
@pytest.mark.parametrize(
    ("policy", "bad", "stops"), [({}, {4}, 4), ({"train__on_nonfinite": "skip", "train__max_nonfinite": 2}, {4, 5}, 5)]
)
def test_a_run_that_stops_has_saved_what_the_last_applied_update_left(
    inputs, sound, tmp_path, monkeypatch, policy, bad, stops
):
    changed = SELDOM | policy
    workdir = tmp_path / "w"
    with monkeypatch.context() as patch:
        spoil_updates(patch, bad, np.nan)
        for _ in range(2):  # the same command stops at the same step
            message = f"step {stops}: .* not applied; data: .*pairs.jsonl.* sound and holds what step 3 left"
            with pytest.raises(trainer.NonFinite, match=message):
                resuming.whole(config(inputs, **changed), workdir)
            meta, found = weights(workdir)
            assert meta["step"] == 3 and meta["nonfinite_in_a_row"] == 0
            assert found == sound[0]
            lines = metric_logger.read(workdir / metric_logger.METRICS_FILE)
            assert [line["step"] for line in lines if "nonfinite_rows" in line] == sorted(bad)
            assert all(len(line["nonfinite_rows"]) == 4 for line in lines if line["step"] in bad)
    resuming.whole(config(inputs, **changed | {"train__on_nonfinite": "skip", "train__max_nonfinite": 9}), workdir)
    assert resuming.outcome(workdir) == sound[1], "the cause gone, it goes on"


def test_a_stored_reference_that_is_not_finite_is_refused(tmp_path):
    logps = np.zeros((5, 2), np.float32)
    logps[3, 1] = np.nan
    reference_logprobs.save(tmp_path / "r.safetensors", logps, {})
    with pytest.raises(ValueError, match=r"r.safetensors are not finite for 1 of 5 groups \(first: \[3\]\); delete"):
        reference_logprobs.load(tmp_path / "r.safetensors")


# with DPO, whose loss knows no bound
SPIKES = {
    "loss__alpha": 1.0,
    "train__skip_spikes": 6.0,
    "train__spike_window": 4,
    "train__max_nonfinite": 2,
    "train__save_every": 1,
}


@pytest.mark.faults  # several runs
def test_an_outlier_is_skipped_and_logged_and_the_run_resumes_to_the_bit(inputs, tmp_path, monkeypatch):
    resuming.compile_once(monkeypatch)
    spoil_updates(monkeypatch, {3, 8}, 400.0)  # the first comes before the window is full
    resuming.whole(config(inputs, **SPIKES, train__keep_checkpoints=99), tmp_path / "whole")
    lines = metric_logger.read(tmp_path / "whole" / metric_logger.METRICS_FILE)
    assert [line["step"] for line in lines if line["spike"]] == [8]
    assert [line["step"] for line in lines if "spike_rows" in line] == [8] and len(lines[7]["spike_rows"]) == 4
    steps = [weights(tmp_path / "whole", number)[1] for number in range(2, 10)]
    assert steps[5] == steps[6], "step 8 leaves what step 7 left"
    assert len(set(steps)) == len(steps) - 1, "every other step is applied"
    for after in (6, 8):
        resuming.stopped(config(inputs, **SPIKES), tmp_path / f"w{after}", monkeypatch, after=after)
        assert resuming.outcome(tmp_path / f"w{after}") == resuming.outcome(tmp_path / "whole")


@pytest.mark.faults
def test_spikes_without_an_end_stop_the_run(inputs, tmp_path, monkeypatch):
    spoil_updates(monkeypatch, range(6, 99), 400.0)
    with pytest.raises(
        trainer.NonFinite, match=r"step 7: loss or gradient is a spike \(loss .*2 in a row.* what step 5"
    ):
        resuming.whole(config(inputs, **SPIKES), tmp_path)


@pytest.mark.faults  # several runs
def test_without_an_outlier_skipping_changes_no_bit(inputs, tmp_path, monkeypatch):
    def compiled(program, first, batch):
        return program.jitted.lower(first, batch).compile(compiler_options=compiling.AS_USERS)

    monkeypatch.setattr(compiled_step.CompiledStep, "_compile", compiled)
    for name, changed in {"off": {"loss__alpha": 1.0}, "on": SPIKES | {"train__spike_window": 3}}.items():
        resuming.whole(config(inputs, **changed, train__max_steps=4), tmp_path / name)
    assert weights(tmp_path / "off")[1] == weights(tmp_path / "on")[1]


def test_a_spike_by_hand():
    """Losses 1, 2, 3, 4 with mean 2.5 and deviation sqrt(5)/2, gradient norms 10."""
    skip_rule = skip_step.SkipRule(most=9, sigmas=2.0, window=4)
    optimizer = skip_rule.watching(optax.with_extra_args_support(optax.adamw(1e-3)))
    state = optimizer.init({"w": jnp.zeros(2)})
    grads = {"w": jnp.ones(2)}
    line = 2.5 + 2.0 * np.sqrt(5) / 2
    for number, value in enumerate([9.0, 1.0, 2.0, 3.0, 4.0]):  # the fifth takes the place of the first
        assert not bool(skip_rule.spike(state, jnp.float32(1e9), jnp.float32(1e9))) or number == 4
        _, state = optimizer.update(grads, state, grads, value=jnp.float32(value), grad_norm=jnp.float32(10.0))
    for value, norm, expected in [(line - 0.01, 10.0, False), (line + 0.01, 10.0, True), (1.0, 10.01, True)]:
        assert bool(skip_rule.spike(state, jnp.float32(value), jnp.float32(norm))) == expected
    assert not bool(skip_rule.spike(state, jnp.float32(-99.0), jnp.float32(0.0))), "lower is no spike"


def test_a_window_without_skipping_is_refused(inputs):
    with pytest.raises(ValueError, match="train.spike_window=4 is not used while train.skip_spikes is 0"):
        resuming.whole(config(inputs, train__spike_window=4), inputs / "never")


@pytest.mark.faults  # two processes that compile
def test_the_same_seed_gives_the_same_bytes_under_any_hash_seed(inputs, tmp_path):
    from tests.trainer.test_loop import command

    found = []
    for seed in ("0", "4242"):
        changed = {"train.max_steps": 4, "train.eval_every": 2, "train.epochs": 1.0}
        environment = os.environ | {"XLA_FLAGS": compiling.flags(), "PYTHONHASHSEED": seed}
        line = command(inputs, tmp_path / seed, **changed)
        assert line[0] == sys.executable
        done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        references = [
            reference_logprobs.load(path).tobytes() for path in sorted((tmp_path / seed / "reference").iterdir())
        ]
        files = [(tmp_path / seed / name).read_bytes() for name in (metric_logger.METRICS_FILE, "audit.json")]
        found.append([weights(tmp_path / seed)[1], *files, *references])
    assert found[0] == found[1]

"""Groups packed into rows, prompts standing once: the log-probs, gradients and runs of a row for each completion."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, data, losses, models, types
from fpo_jax.data import group_packing
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.perf import flops
from fpo_jax.trainer import metric_logger, run_inputs, run_schedule, train_step, trainer
from tests import batches, resuming, tiny, tolerances

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attention_soft_cap": 20.0, "final_soft_cap": 15.0, "query_scale": 0.3},
    "gpt_neox": {"kv_heads": 4, "activation": "gelu", "parallel_residual": True},
    "gpt2": {"kv_heads": 4, "activation": "gelu_new", "tied_head": True},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ("sliding", "full", "sliding"),
        "layers": 3,
        "sliding_rope": models.Rope(theta=100.0),
    },
    "phi3": {  # the rows hold more than 32 tokens, no text does
        "rope": models.Rope(
            type="longrope", short_factor=(1.0, 1.5), long_factor=(3.0, 4.0), original_max_position_embeddings=32
        )
    },
    "olmo3": {"sliding_window": 6, "layer_types": ("sliding", "full")},
    "granite": {"query_scale": 0.4, "embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 0.7},
    "smollm3": {"layer_types": ("full", "full_unrotated")},
    "mixtral": {"experts": 5, "experts_per_token": 2, "sliding_window": 6},
    "gpt_oss": {"experts": 5, "experts_per_token": 2, "sliding_window": 6},
    "deepseek_v2": {
        "kv_heads": 4,
        "rope_dim": 2,
        "value_dim": 3,
        "kv_rank": 7,
        "query_rank": 9,
        "experts": 6,
        "experts_per_token": 2,
        "shared_ffn": 48,
        "dense_layers": 1,
        "dense_ffn": 20,
        "expert_groups": 3,
        "groups_per_token": 2,
    },
    "qwen2_moe": {"experts": 5, "experts_per_token": 2, "shared_ffn": 20, "normalize_top_k": False},
    "cohere2": {"sliding_window": 6, "layer_types": ("sliding", "full_unrotated"), "logit_scale": 0.7},
}


def prepared_groups(count, completions, *, seed=0, longest_prompt=20, longest_completion=9, vocab=60, fork=0):
    """Random groups; the last `fork` tokens of each prompt differ between its completions."""
    random = np.random.default_rng(seed)
    rows, prompts = [], []
    for _ in range(count):
        prompt = random.integers(3, vocab, random.integers(1 + fork, longest_prompt + 1))
        for _ in range(completions):
            own = random.integers(3, vocab, fork + random.integers(1, longest_completion + 1))
            rows.append(np.concatenate([prompt[: len(prompt) - fork], own]).astype(np.int32))
            prompts.append(len(prompt))
    lengths = np.array([len(row) for row in rows], np.int32)
    return data.Prepared(
        tokens_S=np.concatenate(rows),
        starts_N=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        lengths_N=lengths,
        prompt_lengths_N=np.array(prompts, np.int32),
        rewards_BK=random.normal(size=(count, completions)).astype(np.float32),
        sources=tuple(f"f:{index}" for index in range(count)),
        pad_id=0,
    )


def both(prepared, layout, *, multiple=2, length=None):
    """The batch of all groups in rows of their own, and in rows that they share."""
    whole = {"batch_size": prepared.groups, "seed": 3}
    plain = data.schedule(prepared, **whole, buckets=(int(prepared.lengths_N.max()),))
    shared = data.packed(
        prepared, **whole, layout=layout, multiple=multiple, longest=256, head_cost=0.1, length=length, steps=1
    )
    return data.batch_at(plain, 0), data.batch_at(shared, 0), shared


def by_group(values_BK, batch):
    """Values of the real groups in the order of the data."""
    real = batch.row_ids_B >= 0
    return np.asarray(values_BK)[real][np.argsort(batch.row_ids_B[real])]


# --- what a row is


def test_a_shared_row_to_the_letter():
    prepared = data.Prepared(
        tokens_S=np.array([11, 12, 13, 11, 12, 14, 15, 21, 22, 21, 23], np.int32),
        starts_N=np.array([0, 3, 7, 9]),
        lengths_N=np.array([3, 4, 2, 2], np.int32),
        prompt_lengths_N=np.array([2, 2, 1, 1], np.int32),
        rewards_BK=np.array([[1, 0], [0, 1]], np.float32),
        sources=("f:0", "f:1"),
        pad_id=9,
    )
    sizes = group_packing.sizes(prepared, shared=True)
    assert sizes.shared_B.tolist() == [2, 1] and sizes.tokens_B.tolist() == [5, 3] and sizes.scored_B.tolist() == [3, 2]
    shape = group_packing.Packing(True, sizes, length=10, scored=6, places=3, multiple=1)
    batch = group_packing.assemble(prepared, shape, [[0, 1]])
    assert_array_equal(batch.tokens_NT, [[11, 12, 13, 14, 15, 21, 22, 23, 9, 9]])
    assert_array_equal(batch.segments.ids_NT, [[0, 0, 1, 2, 2, 3, 4, 5, -1, -1]])
    assert_array_equal(batch.segments.parents_NT, [[0, 0, 0, 0, 0, 3, 3, 3, -1, -1]])
    assert_array_equal(batch.segments.positions_NT, [[0, 1, 2, 2, 3, 0, 1, 1, 0, 0]])
    assert_array_equal(batch.valid_NT, [[True] * 8 + [False] * 2])
    assert_array_equal(batch.predictors_NR, [[1, 1, 3, 5, 5, 0]])
    assert_array_equal(batch.targets_NR, [[13, 14, 15, 22, 23, 0]])
    assert_array_equal(batch.loss_mask_NR, [[True] * 5 + [False]])
    assert_array_equal(batch.slots_NR, [[0, 1, 1, 2, 3, 0]])
    assert_array_equal(batch.ends_NP, [[2, 4, 6, 7, 0, 0]])
    assert_array_equal(batch.row_ids_B, [0, 1, -1])
    assert_array_equal(batch.weight_B, [1, 1, 0])
    assert_array_equal(batch.rewards_BK, [[1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_every_candidate_can_be_read_back(layout):
    prepared = prepared_groups(40, 3, fork=2)
    schedule = data.packed(
        prepared, layout=layout, batch_size=8, seed=1, multiple=4, longest=200, head_cost=0.1, steps=5
    )
    K, found = 3, {}
    for number in range(5):
        batch = data.batch_at(schedule, number)
        ids, parents = batch.segments.ids_NT, batch.segments.parents_NT
        parents = ids if parents is None else parents
        for slot, group in enumerate(batch.row_ids_B):
            if group < 0:
                continue
            row, place = divmod(slot, schedule.rows.packing.places)
            for k in range(K):
                end = batch.ends_NP[row, place * K + k]
                sees = (ids[row] == ids[row, end]) | (ids[row] == parents[row, end])
                own = np.flatnonzero(sees & (np.arange(len(sees)) <= end))
                tokens, prompt = prepared.row(int(group) * K + k)
                assert_array_equal(batch.tokens_NT[row, own], tokens)
                assert_array_equal(batch.segments.positions_NT[row, own], np.arange(len(tokens)))
                mine = batch.loss_mask_NR[row] & (batch.slots_NR[row] == place * K + k)
                assert_array_equal(batch.targets_NR[row, mine], tokens[prompt:])
                assert_array_equal(batch.predictors_NR[row, mine], own[prompt - 1 : -1])
            found[number, int(group)] = True
    assert len(found) == 5 * 8  # every group of every batch, once


def test_groups_of_an_update_are_those_of_the_padded_layout_on_any_number_of_processes():
    prepared = prepared_groups(50, 2)
    options = {"batch_size": 16, "seed": 5}
    plain = data.schedule(prepared, **options, buckets=(40,))
    shared = data.packed(prepared, **options, layout="shared", multiple=4, longest=64, head_cost=0.1, steps=9)
    for number in range(9):
        ids = data.group_ids(shared, number)
        assert sorted(ids[ids >= 0]) == sorted(data.group_ids(plain, number))
        whole = data.batch_at(shared, number)
        assert len(whole.tokens_NT) == shared.parts and shared.parts % 4 == 0
        parts = [data.batch_at(shared, number, np.arange(shared.parts)[start::2]) for start in (0, 1)]
        for name in ("tokens_NT", "slots_NR", "ends_NP"):
            for start, part in enumerate(parts):
                assert_array_equal(getattr(part, name), getattr(whole, name)[start::2])
        sizes = data.row_sizes(shared, number)
        filled = whole.valid_NT.any(axis=1).sum()
        assert sizes.texts.sum() == whole.valid_NT.sum() and sizes.completion_tokens == whole.loss_mask_NR.sum()
        assert sizes.rows == -(-filled // 4) * 4 and sizes.sequence_tokens == data.row_sizes(plain, number).texts.sum()
        assert data.tokens_once(plain, number) == sizes.texts.sum() < sizes.sequence_tokens


def test_a_pass_holds_every_group_once_and_pads_little():
    prepared = prepared_groups(300, 2)
    schedule = data.sequence(prepared, layout="shared", rows=4, longest=256, head_cost=0.1)
    batches_ = [data.batch_at(schedule, number) for number in range(schedule.steps_per_epoch)]
    ids = np.concatenate([batch.row_ids_B for batch in batches_])
    assert_array_equal(ids, np.concatenate([data.group_ids(schedule, n) for n in range(schedule.steps_per_epoch)]))
    assert sorted(ids[ids >= 0]) == list(range(300))
    valid = np.concatenate([batch.valid_NT for batch in batches_[:-1]])
    assert valid.mean() > 0.95


def test_rows_of_groups_that_are_all_alike_have_room_for_no_more():
    groups = 6
    found = group_packing.Sizes(np.full(groups, 128), np.full(groups, 192), np.full(groups, 64))
    samples = [range(groups)]
    shape = group_packing.packing(found, samples, shared=True, multiple=1, longest=384, head_cost=2.0)
    assert (shape.length, shape.scored) == (384, 128)


def test_work_of_shared_prompts_is_counted_once():
    done = flops.work([5, 2, 3], [0, 2, 3], contexts=[0, 5, 5], sliding_window=None)
    assert done == flops.Work(tokens=10, pairs=15 + (6 + 7) + (6 + 7 + 8), scored=5)
    windowed = flops.work([2, 3], [2, 3], contexts=[5, 5], sliding_window=4)
    assert windowed.pairs == 5 * 4
    assert flops.work([3], [0], contexts=[1], sliding_window=3).pairs == 2 + 3 + 3


# --- the same numbers


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("completions", [2, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_rows_of_their_own(family, completions, layout):
    if family not in ("mistral", "gpt2") and (layout == "packed" or completions != 4):
        pytest.skip("packed without sharing, and K but for 4: a window and learned positions alone")
    if layout == "packed" and completions != 4:
        pytest.skip("packed without sharing: K = 4 alone")
    options = {"vocab_size": 60, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 24}
    options |= {"max_positions": 64, "eos_ids": (2,), "initializer_range": 0.3} | FAMILIES[family]
    config = models.ModelConfig(family=family, **options)
    weights = params.init(config, jax.random.key(0), "float32")
    prepared = prepared_groups(7, completions, fork=1 if completions == 4 else 0)
    plain, packed, _ = both(prepared, layout)
    assert packed.tokens_NT.size < plain.tokens_NT.size or layout == "packed"
    implementation = "chunked" if config.attention_soft_cap or config.of_family.sinks else "xla"
    forward_fn = batches.forward_fn(config, attention=attention.Selection(implementation, "for the test"))
    random = np.random.default_rng(1)
    weight_BK = random.normal(size=(7, completions)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def run(weights, batch, order):
        def total(weights):
            logps_BK = forward_fn(weights, batch).sum_N.reshape(batch.rewards_BK.shape)
            logps_BK = logps_BK[jnp.array(order)]
            return jnp.sum(weight_BK * logps_BK), logps_BK

        return jax.grad(total, has_aux=True)(weights)

    def ordered(batch):
        return tuple(int(place) for place in [np.flatnonzero(batch.row_ids_B == group)[0] for group in range(7)])

    expected, expected_BK = run(weights, plain, ordered(plain))
    grads, logps_BK = run(weights, packed, ordered(packed))
    assert_allclose(logps_BK, expected_BK, rtol=tolerances.SHARED_LOGPS, atol=tolerances.SHARED_LOGPS)
    grads, expected = params.flatten(grads), params.flatten(expected)
    largest = max(float(jnp.abs(grad).max()) for grad in expected.values())
    for path, grad in expected.items():
        assert_allclose(grads[path], grad, rtol=0, atol=tolerances.SHARED_GRADIENT * largest, err_msg=path)


@pytest.mark.parametrize("name", ["alpha", "simpo", "kto"])
def test_an_update_is_that_of_the_padded_layout(name):
    """Loss, metrics and gradient of micro-batches that groups fill unevenly, one of them not at all."""
    config = models.ModelConfig(
        family="llama", vocab_size=60, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn=24, max_positions=64,
        eos_ids=(2,), initializer_range=0.3,
    )  # fmt: skip
    loss, weights = losses.resolve(name), params.init(config, jax.random.key(0), "float32")
    plain, packed, schedule = both(prepared_groups(8, 2), "shared")
    empty = group_packing.assemble(schedule.prepared, schedule.rows.packing, [[]] * 2)
    packed = jax.tree.map(lambda *parts: np.concatenate(parts), packed, empty)
    forward_fn = batches.forward_fn(config)
    optimizer = adamw.optimizer(
        lambda count: 1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=0.0, decay_mask=None,
        state_dtype="float32",
    )  # fmt: skip
    found = []
    for batch, accumulation in ((plain, 4), (packed, len(packed.tokens_NT) // 2)):
        state = types.TrainState(weights, optimizer.init(weights), jnp.int32(0))
        update = functools.partial(
            train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=lambda count: 1.0
        )
        reference_logps_BK = np.where(batch.row_ids_B[:, None] >= 0, -10.0 - batch.row_ids_B[:, None], 0)
        batch = batch._replace(
            reference_logps_BK=np.broadcast_to(reference_logps_BK, (len(batch.row_ids_B), 2)).astype(np.float32)
        )
        state, pairs = jax.jit(update)(state, train_step.stack_micro_batches(batch, accumulation=accumulation))
        found.append((metric_logger.means(jax.device_get(pairs)), params.flatten(state.params)))
    (expected, old), (numbers, new) = found
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        assert_allclose(numbers[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for path, value in old.items():
        assert_allclose(new[path], value, rtol=0, atol=1e-6, err_msg=path)


# --- the run


def run_config(root, **changed):
    one = {"mesh__data": 1, "mesh__fsdp": 1, "train__max_steps": 4, "train__eval_every": 2}
    return tiny.config(root / "model", root / "pairs.jsonl", **(one | changed))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("layouts")
    tiny.write_model(path / "model", layers=1)
    tiny.write_pairs(path / "pairs.jsonl", count=32)
    return path


def numbers_of(workdir):
    """Rows of metrics.jsonl: step and numbers."""
    return [json.loads(line) for line in (workdir / metric_logger.METRICS_FILE).read_text().splitlines()]


def assert_same_run(one, other):
    assert len(one) == len(other) > 4
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if key.endswith("accuracies"):
                continue  # the policy begins as the reference: the signs of its margins are rounding
            assert_allclose(mine[key], value, rtol=tolerances.SHARED_RUN, atol=tolerances.SHARED_RUN, err_msg=key)


@pytest.mark.slow  # five runs
def test_a_run_is_that_of_the_padded_layout_on_one_device_and_on_eight_and_resumes_to_the_bit(
    root, tmp_path, monkeypatch, caplog
):
    with caplog.at_level("INFO", logger="fpo_jax"):
        trainer.run(run_config(root), tmp_path / "padded", devices=jax.devices()[:1])
    (described,) = (line for line in caplog.messages if line.startswith("plan: "))
    inputs = run_inputs.prepare(run_config(root, data__layout="shared"))
    found = group_packing.sizes(inputs.train.prepared, shared=True)
    share = found.tokens_B.sum() / inputs.train.prepared.lengths_N.size / run_config(root).data.max_length
    assert f"data.layout=shared would hold the same in {share:.0%} of the positions" in described, (described, share)
    shared = run_config(root, data__layout="shared", train__save_every=2, train__micro_batch_per_device=2)
    trainer.run(shared, tmp_path / "shared", devices=jax.devices()[:1])
    mesh = run_config(root, data__layout="shared", mesh__data=4, mesh__fsdp=2)
    trainer.run(mesh, tmp_path / "mesh")
    padded = numbers_of(tmp_path / "padded")
    assert_same_run(numbers_of(tmp_path / "shared"), padded)
    assert_same_run(numbers_of(tmp_path / "mesh"), padded)
    resuming.stopped(shared, tmp_path / "stopped", monkeypatch, after=2)
    assert resuming.outcome(tmp_path / "shared") == resuming.outcome(tmp_path / "stopped")
    resuming.stopped(run_config(root), tmp_path / "changed", monkeypatch, after=2, then=shared)
    assert_same_run(numbers_of(tmp_path / "changed"), padded)


def test_passes_have_no_longer_rows_than_training(root, tmp_path):
    tiny.write_model(tmp_path / "model", layers=1, max_positions=2048)
    config = run_config(root, data__layout="shared", data__max_length=2048, train__max_steps=1)
    config.model.path = str(tmp_path / "model")
    plan = run_schedule.build(config, run_inputs.prepare(config), devices=1)
    lengths = [one.buckets[-1] for one in (plan.evaluation, *plan.references)]
    assert max(lengths) <= plan.schedule.buckets[-1] < 384


def test_rows_are_no_longer_than_kernels_take(root):
    """Where no group is: five completions of up to 2,048 tokens could take 10,240."""
    config = run_config(root, data__layout="shared", data__max_length=2048, data__group_size=5)
    described = run_inputs.read_model(run_config(root), root / "model")
    assert run_schedule._rows(config, described)["longest"] == attention.MAX_MASKED == 8192
    assert run_schedule._rows(config, described, longest=256)["longest"] == 256


@pytest.mark.slow  # two runs
def test_a_reward_model_trains_on_shared_prompts(root, tmp_path):
    changed = {"stage": "reward", "loss__name": "bradley_terry", "loss__alpha": None, "loss__beta_pi": None}
    for layout in ("padded", "shared"):
        config = run_config(root, **changed, data__layout=layout)
        trainer.run(config, tmp_path / layout, devices=jax.devices()[:1])
    assert_same_run(numbers_of(tmp_path / "shared"), numbers_of(tmp_path / "padded"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__layout": "dense"}, "data.layout='dense' is not one of auto, padded, packed, shared"),
        ({"data__row_length": 64}, "data.row_length=64 is not used by data.layout='padded'"),
        ({"data__layout": "shared", "data__buckets": (40,)}, "data.buckets=.* is not used by data.layout='shared'"),
        ({"data__layout": "packed", "data__packing": True}, "data.packing=True and data.layout='packed' exclude"),
        ({"data__layout": "shared", "data__group_size": 1}, "needs completions that share a prompt"),
    ],
)
def test_what_does_not_go_with_a_layout_is_refused(root, changed, message):
    with pytest.raises(ValueError, match=message):
        run_inputs.check(run_config(root, **changed))


def test_a_row_length_that_would_split_a_group_is_refused(root):
    config = run_config(root, data__layout="shared", data__row_length=16)
    with pytest.raises(ValueError, match="data.row_length=16 is shorter than the longest group of .* use at least"):
        run_schedule.build(config, run_inputs.prepare(config), devices=1)

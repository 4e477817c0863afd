"""Reward models and fine-tuning: scores, losses and gradients against torch, whole runs, export, best checkpoint."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import attention, checkpoint, data, hf, losses, models, tokenization, types
from fpo_jax.inference import reward_model
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.trainer import best_checkpoint, export, forward, metric_logger, run_inputs, train_step, trainer
from tests import resuming, tiny, tolerances


def reward_config(folder, pairs, **changed):
    defaults = {"stage": "reward", "loss__name": "bradley_terry", "loss__alpha": None, "loss__beta_pi": None}
    return tiny.config(folder, pairs, **(defaults | changed))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model and preferences that a reward model can learn: answers that end in "!" are better."""
    root = tmp_path_factory.mktemp("base")
    tiny.write_model(root / "model", layers=1)
    random = np.random.default_rng(0)
    words = lambda: " ".join(random.choice(["ab", "cde", "f"], size=random.integers(1, 4)))  # noqa: E731
    for name, count in (("train", 64), ("held_out", 32)):
        rows = [
            {"prompt": f"{i}: {words()}?", "chosen": f" {words()}!", "rejected": f" {words()}."} for i in range(count)
        ]
        rows[2]["prompt"] += "\u2028\x85"  # no end of a line
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A reward run of 40 steps."""
    c = reward_config(
        base / "model",
        base / "train.jsonl",
        data__eval=str(base / "held_out.jsonl"),
        optim__learning_rate=1e-2,
        train__epochs=5.0,
        train__eval_every=5,
        train__save_every=100,
        train__keep_checkpoints=1,
        train__keep_best="eval_rewards/accuracies",
    )
    workdir = tmp_path_factory.mktemp("run") / "w"
    trainer.run(c, workdir)
    return workdir


# --- the rows and the position of the score


@pytest.mark.parametrize(
    ("completion", "limit", "last"),
    [(" ab", 16, "b"), (" abcdefgh", 4, "c"), (" ab", 4, "b")],
    ids=["EOS present", "EOS cut off", "EOS just fits"],
)
def test_the_score_stands_at_the_last_content_token(base, completion, limit, last):
    encoder = tokenization.encoder(tokenization.load_tokenizer(base / "model"), tokenization.PromptFormat(rule="raw"))
    tokenizer = encoder.tokenizer
    record = data.Record("q?", [completion, " zz"], [1.0, 0.0], "here")
    prepared, _ = data.prepare([record], encoder, max_length=32, max_completion_length=limit, reward_pad_id=0)
    ids, prompt_length = prepared.row(0)
    assert tokenizer.decode(ids[prompt_length:])[-1] == last
    schedule = data.schedule(prepared, batch_size=1, buckets=(32,), seed=0)
    batch = data.batch_at(schedule, 0, np.arange(1))
    position = np.max(np.where(batch.loss_mask_NR, batch.predictors_NR + 1, 0), axis=1)[0]
    assert batch.tokens_NT[0, position] == ids[-1] and position == len(ids) - 1


def test_plain_text_loses_one_eos_and_a_conversation_its_pads(base):
    tokenizer, row = tokenization.load_tokenizer(base / "model"), tokenization.Row([5, 6, 2, 2], 1)
    raw, own = (tokenization.encoder(tokenizer, tokenization.PromptFormat(rule=rule)) for rule in ("raw", "chat"))
    assert data.reward_row(row, raw, 0).ids == [5, 6, 2]  # a second EOS is content
    assert data.reward_row(row._replace(ids=[5, 6]), raw, 0).ids == [5, 6]
    assert data.reward_row(row._replace(ids=[2], prompt_length=1), raw, 0).ids == [2]
    assert data.reward_row(row, own, 0).ids == data.reward_row(row, own, None).ids == [5, 6, 2, 2]
    assert data.reward_row(row, own, 2).ids == [5, 6]  # pad is EOS: transformers reads the token before


# --- losses


@pytest.mark.parity
def test_losses_and_gradients_equal_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    scores_BK, random = np.array([[1.5, -0.3], [0.2, 4.0], [-90.0, 90.0]], np.float32), np.random.default_rng(1)
    operands = losses.Completions(scores_BK * 0, scores_BK * 0, scores_BK * 0 + 3, np.float32([[1, 0]] * 3), 0.0)
    loss = losses.resolve("bradley_terry")
    value, gradient = jax.value_and_grad(lambda s: loss.of_logps(s, operands).mean())(jnp.asarray(scores_BK))
    theirs = torch.tensor(scores_BK, requires_grad=True)
    expected = -torch.nn.functional.logsigmoid(theirs[:, 0] - theirs[:, 1]).mean()
    expected.backward()
    assert_allclose(value, expected.item(), rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)
    assert_allclose(gradient, theirs.grad.numpy(), rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)

    labels_BK = np.float32([[1], [0], [1], [0.25]])
    single_BK = random.normal(size=(4, 1)).astype(np.float32) * 3
    operands = losses.Completions(single_BK * 0, single_BK * 0, single_BK * 0 + 3, labels_BK, 0.0)
    loss = losses.resolve("binary_cross_entropy")
    value, gradient = jax.value_and_grad(lambda s: loss.of_logps(s, operands).mean())(jnp.asarray(single_BK))
    theirs = torch.tensor(single_BK, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(theirs, torch.tensor(labels_BK))
    expected.backward()
    assert_allclose(value, expected.item(), rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)
    assert_allclose(gradient, theirs.grad.numpy(), rtol=tolerances.FLOAT32, atol=tolerances.FLOAT32)


def test_more_than_two_candidates_compare_every_better_with_every_worse_one():
    scores_BK, rewards_BK = jnp.array([[1.0, 3.0, 0.5], [7.0, 8.0, 9.0]]), np.float32([[0.1, 0.9, 0.1], [2, 2, 2]])
    zeros_BK = np.zeros_like(rewards_BK)
    loss = losses.resolve("bradley_terry")
    found = loss.of_logps(scores_BK, losses.Completions(zeros_BK, zeros_BK, zeros_BK, rewards_BK, 0.0))
    assert_allclose(found, [np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-2.5))]), 0], rtol=1e-6)
    assert loss.counted(rewards_BK).tolist() == [True, False]


def test_a_tie_changes_neither_the_update_nor_the_evaluation(base):
    """Two groups, and the same two beside a tied one: the same mean, the same gradient."""
    inputs = run_inputs.prepare(reward_config(base / "model", base / "train.jsonl"))
    weights = hf.load_params(inputs.source, inputs.model_config, dtype="float32", key=jax.random.key(0))
    forward_fn = forward.RewardForward(inputs.model_config, "float32", "none", attention.Selection("xla", "test"))
    schedule = data.schedule(inputs.train.prepared, batch_size=3, buckets=(40,), seed=0)
    whole = data.batch_at(schedule, 0, np.arange(3))
    whole.rewards_BK[2] = 0.5
    first = jax.tree.map(lambda leaf: leaf[: len(leaf) * 2 // 3], whole)

    def gradient(batch):
        totals = train_step._totals(train_step.stack_micro_batches(batch, accumulation=1), inputs.loss)
        value = functools.partial(
            train_step._objective,
            totals=totals,
            batch_kl=None,
            forward_fn=forward_fn,
            loss=inputs.loss,
            dropout_key=None,
        )
        return jax.jit(jax.grad(value, has_aux=True))(weights, batch)[0]

    assert np.abs(gradient(first)["score"]).max() > tolerances.DIFFERENT
    jax.tree.map(lambda a, b: assert_allclose(a, b, **tolerances.SAME_UPDATE), gradient(whole), gradient(first))
    evaluate = jax.jit(functools.partial(train_step.eval_step, forward_fn=forward_fn, loss=inputs.loss))
    with_tie, without = (
        metric_logger.means(jax.device_get(evaluate((weights, 0.0), batch))) for batch in (whole, first)
    )
    assert with_tie.keys() == without.keys()
    for name, value in without.items():
        assert_allclose(with_tie[name], value, err_msg=name, **tolerances.SAME_UPDATE)


# --- what a stage takes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss__name": "dpo"}, "loss.name='dpo' does not belong to stage 'reward'; use bradley_terry or binary"),
        ({"stage": "align"}, "loss.name='bradley_terry' does not belong to stage 'align'; use a loss of log-probs"),
        ({"stage": "sft"}, "does not belong to stage 'sft'; use 'sft'"),
        ({"data__group_size": 1}, "data.group_size=1 leaves nothing to compare, and loss 'bradley_terry' needs 2"),
        ({"loss__temperature": 0.8}, "'temperature' is not used by 'bradley_terry'"),
        ({"loss__sft_weight": 0.1}, "'sft_weight' is not used by 'bradley_terry'"),
        ({"reference__path": "elsewhere"}, "reference.path='elsewhere' is not used by loss 'bradley_terry'"),
        ({"kernel__workspace_mib": 64}, "kernel.workspace_mib=64 is not used by stage 'reward'"),
        (
            {"stage": "sft", "loss__name": "sft", "data__group_size": 2},
            "data.group_size=2: loss 'sft' in stage 'sft' trains on one completion",
        ),
        ({"loss__name": "binary_cross_entropy"}, "data.group_size=2: loss 'binary_cross_entropy' in stage 'reward'"),
        (
            {"stage": "sft", "loss__name": "sft", "data__group_size": 1, "loss__tie_policy": "first"},
            "loss.tie_policy='first' is not used by stage 'sft'",
        ),
        ({"train__keep_best": "loss"}, "train.keep_best='loss' must name a metric of an evaluation"),
        ({"train__keep_best": "eval_loss", "data__eval": ""}, "needs an evaluation; set data.eval"),
        ({"train__eval_groups": 0}, "train.eval_groups=0 must be finite and at least 1"),
    ],
)
def test_what_does_not_fit_the_stage_is_refused(base, changed, message):
    with pytest.raises(ValueError, match=message):
        run_inputs.check(reward_config(base / "model", base / "train.jsonl", **changed))


def test_a_metric_that_no_evaluation_has_is_refused_before_anything_is_read(base):
    c = reward_config(base / "absent", base / "train.jsonl", train__keep_best="eval_accuracy")
    with pytest.raises(ValueError, match=r"'eval_accuracy' is no metric of this run; choose from .*eval_loss"):
        run_inputs.prepare(c)


# --- the run


def test_a_reward_model_learns_what_is_preferred(run):
    lines = metric_logger.read(run / metric_logger.METRICS_FILE)
    held_out = [line["eval_rewards/accuracies"] for line in lines if "eval_loss" in line]
    assert held_out[-1] > 0.9 and held_out[0] < 0.8
    assert lines[-1]["eval_rewards/chosen"] > lines[-1]["eval_rewards/rejected"]
    assert "sft_loss" not in lines[-1] and not (run / "reference").exists()


def test_the_best_checkpoint_stays_beside_the_newest(run):
    lines = metric_logger.read(run / metric_logger.METRICS_FILE)
    scores = {line["step"]: line["eval_rewards/accuracies"] for line in lines if line.get("eval_loss") and line["step"]}
    _, meta = checkpoint.restore_params(run, "best")
    assert scores[meta["step"]] == max(scores.values())
    assert checkpoint.restore_params(run, None)[1]["step"] == max(scores)


@pytest.mark.slow  # two runs and a resumption
def test_a_stopped_run_goes_on_to_the_bit_and_remembers_its_best(base, tmp_path, monkeypatch):
    """The best score stands before the stop: what came after must not take its place."""
    monkeypatch.setitem(
        best_checkpoint.DIRECTIONS, "eval_rewards/rejected", 1.0
    )  # falls; nobody could ask for it otherwise
    c = reward_config(
        base / "model",
        base / "train.jsonl",
        optim__learning_rate=1e-2,
        train__max_steps=10,
        train__epochs=5.0,
        train__eval_every=2,
        train__save_every=3,
        train__keep_checkpoints=1,
        train__keep_best="eval_rewards/rejected",
    )
    resuming.whole(c, tmp_path / "whole")
    resuming.stopped(c, tmp_path / "stopped", monkeypatch, after=5)
    assert resuming.outcome(tmp_path / "whole") == resuming.outcome(tmp_path / "stopped")
    metas = [checkpoint.restore_params(tmp_path / name, "best")[1] for name in ("whole", "stopped")]
    assert metas[0]["step"] == metas[1]["step"] and metas[0]["score"] == metas[1]["score"]
    assert metas[0]["step"] <= 4, "the best step came before the stop"


# --- export


@pytest.mark.parity
@pytest.mark.parametrize("when", ["best", None])
def test_transformers_gives_the_same_scores(run, tmp_path, when):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers

    export.export(run, tmp_path / "rm", step=when, dtype=None)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    rows = [[1, 20, 30, 40], [1, 25], [1, *range(10, 40)]]
    width = max(map(len, rows))
    padded = torch.tensor([row + [theirs.config.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs(padded, attention_mask=mask).logits[:, 0].numpy()
    ours = reward_model.Rewarder(tmp_path / "rm", max_length=64, compute_dtype="float32", batch_per_device=1)(rows)
    assert_allclose(ours, expected, rtol=0, atol=tolerances.PARITY_LOGITS)


def test_a_reward_model_goes_on_training_and_is_no_language_model(run, base, tmp_path):
    export.export(run, tmp_path / "rm", step="best", dtype=None)
    assert hf.read_config(tmp_path / "rm").reward_head
    again = run_inputs.prepare(reward_config(tmp_path / "rm", base / "train.jsonl"))
    weights = hf.load_params(again.source, again.model_config, dtype="float32")
    best, _ = checkpoint.restore_params(run, "best")
    np.testing.assert_array_equal(weights["score"], np.asarray(best["score"]))
    with pytest.raises(ValueError, match="is a reward model, and stage 'align' needs a language model"):
        run_inputs.prepare(tiny.config(tmp_path / "rm", base / "train.jsonl"))
    with pytest.raises(ValueError, match="is a language model; give a reward model"):
        reward_model.Rewarder(base / "model", max_length=32, compute_dtype="float32", batch_per_device=1)


def test_the_exported_pad_token_is_the_tokenizers(run, base):
    """transformers scores the last token that is no pad token, and users pad with the tokenizer's."""
    _, meta = checkpoint.restore_params(run, None)
    config = dataclasses.replace(hf.read_config(base / "model"), pad_id=None)
    encoder = tokenization.resolve(Path(meta["model_dir"]))
    assert run_inputs.reward_pad_id(encoder, config) == 0
    encoder.tokenizer.pad_token = None
    assert run_inputs.reward_pad_id(encoder, config) == 2  # EOS


def test_a_classifier_of_two_labels_is_refused(base):
    content = json.loads((base / "model" / "config.json").read_text())
    content["architectures"] = ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="a classifier of 2 labels is no reward model"):
        models.from_hf_config(content)
    assert models.from_hf_config(content | {"num_labels": 1}).reward_head


def test_a_new_head_depends_on_the_seed_alone(base):
    config = dataclasses.replace(hf.read_config(base / "model"), reward_head=True)
    one, same, other = (
        np.asarray(hf.load_params(base / "model", config, dtype="float32", key=jax.random.key(seed))["score"])
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).all() and np.abs(one).max() <= config.width**-0.5
    assert "head" not in params.flatten(params.abstract(config, "float32"))


# --- fine-tuning


def sft_config(base, **changed):
    defaults = {"stage": "sft", "loss__name": "sft", "loss__alpha": None, "loss__beta_pi": None, "data__group_size": 1}
    return tiny.config(base / "model", base / "train.jsonl", **(defaults | changed))


def test_fine_tuning_takes_the_chosen_completion_alone(base):
    inputs = run_inputs.prepare(sft_config(base))
    assert inputs.train.prepared.group_size == 1 and inputs.train.prepared.groups == 64
    assert inputs.train.sample.endswith("!</s>⟧")


def test_perplexity_is_the_exponential_of_the_mean_over_tokens(base, tmp_path):
    c = sft_config(base, train__max_steps=4, train__eval_groups=16, optim__learning_rate=1e-2)
    trainer.run(c, tmp_path / "w")
    first, last = (
        line for line in metric_logger.read(tmp_path / "w" / metric_logger.METRICS_FILE) if "eval_loss" in line
    )
    assert_allclose(first["eval_perplexity"], np.exp(first["eval_sft_loss"]), rtol=1e-6)
    assert last["eval_perplexity"] < first["eval_perplexity"]


def test_a_row_that_fills_the_window_is_trained_on(base):
    """The original masks a row without padding whole."""
    c = sft_config(base, data__max_length=12, data__max_completion_length=8)
    inputs = run_inputs.prepare(c)
    prepared = inputs.train.prepared
    full = int(np.argmax(prepared.lengths_N))
    assert prepared.lengths_N[full] == 12
    schedule = data.schedule(prepared, batch_size=1, buckets=(12,), seed=0, shuffle=False)
    batch = data.batch_at(schedule, full, np.arange(1))
    assert batch.loss_mask_NR.sum() == 12 - prepared.prompt_lengths_N[full] > 0


def test_the_update_of_fine_tuning_is_the_token_mean_over_all_of_it(base):
    """Two micro-batches with different numbers of tokens: the gradient is that of one batch."""
    inputs = run_inputs.prepare(sft_config(base))
    schedule = data.schedule(inputs.train.prepared, batch_size=8, buckets=(40,), seed=0)
    batch = data.batch_at(schedule, 0, np.arange(8))
    weights = hf.load_params(inputs.source, inputs.model_config, dtype="float32")
    forward_fn = forward.PolicyForward(
        inputs.model_config, "float32", "none", attention.Selection("xla", "test"),
        implementation="chunked", workspace_bytes=2**20, temperature=1.0,
    )  # fmt: skip
    found = []
    for accumulation in (1, 4):
        stacked = train_step.stack_micro_batches(batch, accumulation=accumulation)
        optimizer = adamw.optimizer(
            lambda _: 1.0, b1=0.9, b2=0.9, eps=1.0, weight_decay=0.0, clip_norm=0.0,
            decay_mask=params.decay_mask(inputs.model_config),
        )  # fmt: skip
        state = types.TrainState(weights, optimizer.init(weights), jnp.int32(0))
        _, pairs = jax.jit(
            lambda state, batch, optimizer=optimizer: train_step.train_step(
                state,
                batch,
                forward_fn=forward_fn,
                loss=inputs.loss,
                optimizer=optimizer,
                rate=lambda _: jnp.float32(1.0),
            )
        )(state, stacked)
        found.append(metric_logger.means(jax.device_get(pairs)))
    assert_allclose(found[0]["grad_norm"], found[1]["grad_norm"], rtol=1e-5)
    nll, tokens = found[0]["sft_loss"], batch.loss_mask_NR.sum()
    assert tokens > 8 and nll > 0
    assert_allclose(found[0]["loss"], nll, rtol=1e-5, err_msg="mean over tokens, not over rows")


# --- every family


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama GQA", "mistral window", "qwen2", "qwen3", "gemma2", "gpt2", "neox parallel"])
def test_scores_of_every_family_equal_transformers(name, tmp_path):
    check_scores(name, tmp_path)


LATER = ["gemma", "gemma3", "phi3 window", "olmo2", "olmo3", "smollm3", "ministral", "arcee", "internlm3", "seed_oss"]
LATER += ["exaone4", "helium", "glm", "glm4", "starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
LATER += ["deepseek_v2"]


@pytest.mark.sampled(14)
@pytest.mark.parity
@pytest.mark.parametrize("name", LATER)
def test_scores_of_later_families_equal_transformers(name, tmp_path):
    check_scores(name, tmp_path)


def check_scores(name, tmp_path):
    """Compare the scores of rows of different lengths."""
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    import transformers

    from tests.models import test_model

    published = test_model.VARIANTS[name] | {"eos_token_id": 2, "pad_token_id": 0}
    config = dataclasses.replace(models.from_hf_config(published), reward_head=True)
    tree = test_model.random_params(config)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(published))
    hf.export(tree, config, out_dir=tmp_path / "rm", source_dir=tmp_path / "source", dtype="float32")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.num_labels == 1
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4, 3], [9, 8, 7, 6]]
    padded = torch.tensor([row + [0] * (9 - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs.eval()(padded, attention_mask=(padded != 0).long()).logits[:, 0].numpy()
    ours = reward_model.Rewarder(tmp_path / "rm", max_length=16, compute_dtype="float32", batch_per_device=1)(rows)
    assert_allclose(ours, expected, rtol=0, atol=tolerances.PARITY_LOGITS)
    assert np.ptp(expected) > 0.01

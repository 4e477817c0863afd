"""Twenty steps against an independent PyTorch trainer: same losses, same final weights."""

import functools
import math

import jax
import numpy as np
import pytest

from fpo_jax import hf, losses, models, types
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.trainer import train_step
from tests import batches, tiny, tolerances
from tests.models import test_model

torch = pytest.importorskip("torch", reason="parity with PyTorch needs torch, which is not installed here")
transformers = pytest.importorskip("transformers")

STEPS, ACCUMULATION, RATE, WARMUP, CLIP = 20, 2, 3e-3, 4, 1.0

RECIPES = {
    "alpha-po with reference": ("alphapo-pref", {"alpha": 0.1, "beta_pi": 0.5, "temperature": 0.8}, 2),
    "alpha-po on rewards, K=4": ("alphapo-rw", {"alpha": 0.1, "beta_pi": 0.35, "beta_r": 0.1, "temperature": 0.8}, 4),
    "reference-free": ("alphapo", {"alpha": 0.99, "beta": 2.0, "gamma_beta_ratio": 0.8}, 2),
    "reference-free with an SFT term": ("sigmoid", {"beta": 2.5, "gamma_beta_ratio": 0.3, "sft_weight": 0.1}, 2),
}
EXPERTS = {"experts": 5, "experts_per_token": 2}
YARN = {"type": "yarn", "theta": 15e4, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
FAMILIES = {
    "gpt_oss": EXPERTS | {"sliding_window": 6, "rope": models.Rope(**YARN)},
    "gemma3_text": {
        "layers": 3, "layer_types": ("sliding", "full", "sliding"), "sliding_window": 6, "query_scale": 0.25,
        "sliding_rope": models.Rope(theta=100.0), "activation": "gelu_pytorch_tanh",
    },
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS | {"normalize_top_k": False},
}  # fmt: skip


def torch_logps(model, batch, temperature):
    """Summed log-probs and lengths, the plain way: all logits, log_softmax, gather, mask."""
    logits = model(
        input_ids=torch.tensor(batch.tokens_NT).long(), attention_mask=torch.tensor(batch.valid_NT).long()
    ).logits
    logps = torch.log_softmax(logits / temperature, dim=-1)
    rows = torch.arange(len(batch.tokens_NT))[:, None]
    picked = logps[rows, torch.tensor(batch.predictors_NR).long(), torch.tensor(batch.targets_NR).long()]
    mask = torch.tensor(batch.loss_mask_NR)
    shape = batch.rewards_BK.shape
    return (picked * mask).sum(-1).reshape(shape), mask.sum(-1).reshape(shape)


def alpha_divergence(log_p, log_q, alpha):
    p, q = log_p.exp(), log_q.exp()
    mixed = torch.exp((1 - alpha) * log_p + alpha * log_q).sum(-1)
    return (mixed - (1 - alpha) * p.sum(-1) - alpha * q.sum(-1)) / (alpha * (alpha - 1))


def torch_losses(recipe, options, logps, reference, lengths, rewards):
    if recipe == "sigmoid":
        means = logps / lengths
        margin = means[:, 0] - means[:, 1] - options["gamma_beta_ratio"]
        return -torch.nn.functional.logsigmoid(options["beta"] * margin)
    if recipe == "alphapo":
        scores = options["beta"] * logps / lengths
        scores = scores - torch.tensor([options["beta"] * options["gamma_beta_ratio"], 0.0], dtype=scores.dtype)
    else:
        scores = options["beta_pi"] * (logps - reference)
    if recipe.endswith("-rw"):
        log_q = torch.log_softmax(rewards / options["beta_r"], -1).clamp_min(-10)
    else:
        log_q = torch.where(rewards > 0, 0.0, -10.0).to(scores.dtype)
    return alpha_divergence(torch.log_softmax(scores, -1), log_q, options["alpha"])


def torch_trajectory(folder, recipe, options, micro_batches):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )
    if model.config.model_type != "gemma3_text":  # whose softmax of a padded row, float32, is NaN by a float64 mask
        model = model.double()
    temperature = options.get("temperature", 1.0)
    with torch.no_grad():
        references = [[torch_logps(model, micro, temperature)[0] for micro in update] for update in micro_batches]
    torch_adamw = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    shape = lambda i: i / WARMUP if i < WARMUP else 0.5 * (1 + math.cos(math.pi * (i - WARMUP) / (STEPS - WARMUP)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(torch_adamw, shape)
    curve = []
    for update, reference in zip(micro_batches, references, strict=True):
        torch_adamw.zero_grad()
        total_tokens = sum(micro.loss_mask_NR.reshape(*micro.rewards_BK.shape, -1)[:, 0].sum() for micro in update)
        value = 0.0
        for micro, ref in zip(update, reference, strict=True):
            logps, lengths = torch_logps(model, micro, temperature)
            loss = torch_losses(recipe, options, logps, ref, lengths, torch.tensor(micro.rewards_BK).double())
            part = loss.sum() / sum(len(m.rewards_BK) for m in update)
            part = part - options.get("sft_weight", 0.0) * logps[:, 0].sum() / total_tokens
            part.backward()
            value += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        torch_adamw.step()
        schedule.step()
        curve.append(value)
    return np.array(curve), {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def our_trajectory(folder, recipe, options, micro_batches):
    config = hf.read_config(folder)
    weights = hf.load_params(folder, config, dtype="float32")
    loss = losses.resolve(recipe, **options)
    forward_fn = batches.forward_fn(config, temperature=loss.temperature)
    rate = adamw.schedule(kind="cosine", peak=RATE, warmup=WARMUP, total_steps=STEPS)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=CLIP, decay_mask=params.decay_mask(config)
    )
    update = jax.jit(
        functools.partial(train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate)
    )
    score = jax.jit(functools.partial(train_step.logprob_step, forward_fn=forward_fn))
    stacked = []
    for micros in micro_batches:
        if loss.needs_reference:
            micros = [micro._replace(reference_logps_BK=np.asarray(score(weights, micro))) for micro in micros]
        stacked.append(jax.tree.map(lambda *leaves: np.stack(leaves), *micros))
    state = types.TrainState(weights, optimizer.init(weights), np.int32(0))
    curve = []
    for batch in stacked:
        state, pairs = update(state, batch)
        curve.append(float(pairs["loss"][0]))
    return np.array(curve), params.flatten(state.params), config


@pytest.mark.sampled(4)
@pytest.mark.parity
@pytest.mark.slow  # twenty steps in PyTorch float64 and the compilation of ours: four times 10 s
@pytest.mark.parametrize("name", RECIPES)
def test_twenty_updates_match_pytorch(name, tmp_path):
    check_trajectory(tmp_path, *RECIPES[name])


@pytest.mark.sampled(4)
@pytest.mark.parity
@pytest.mark.slow  # as above
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_updates_of_other_families_match_pytorch(family, tmp_path):
    check_trajectory(tmp_path, *RECIPES["alpha-po with reference"], family=family, **FAMILIES[family])


def check_trajectory(tmp_path, recipe, options, completions, **described):
    """Compare the losses of twenty steps, and the weights after them."""
    config = tiny.write_model(tmp_path / "model", seed=1, **described)
    random = np.random.default_rng(3)
    different = []  # two steps' worth, repeated: the loss must fall
    for update in range(2):
        micros = []
        for part in range(ACCUMULATION):
            rewards = random.normal(size=(3, completions)).astype(np.float32) if completions > 2 else None
            seed = update * ACCUMULATION + part
            micros.append(
                batches.random_batch(
                    groups=3, completions=completions, length=19, vocab=config.vocab_size, seed=seed, rewards=rewards
                )
            )
        different.append(micros)
    micro_batches = different * (STEPS // 2)
    theirs, their_weights = torch_trajectory(tmp_path / "model", recipe, options, micro_batches)
    ours, our_weights, config = our_trajectory(tmp_path / "model", recipe, options, micro_batches)
    assert theirs[-2] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.TRAJECTORY_LOSS)
    their_weights = test_model.one_by_one(their_weights, config)
    for entry in params.entries(config):
        for hf_name, place in entry.tensors():
            ours_hf = params.to_hf(entry, np.asarray(our_weights[entry.path])[place])
            error = np.abs(ours_hf - their_weights[hf_name]).max() / np.abs(their_weights[hf_name]).max()
            assert error < tolerances.TRAJECTORY_WEIGHTS, (hf_name, error)

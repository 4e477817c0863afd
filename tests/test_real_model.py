"""A real chat model against torch and transformers, each side building prompts and rows of its own, in float32.

SmolLM2-135M-Instruct (dequantised from Q4_1: Llama, V = 49,152, 30 layers), where FPO_SMOLLM2 names its directory.
Programs run as a user calls them, in processes of their own on one device; only log-probs and gradients are taken here.
"""

import collections
import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import checkpoint, hf, losses, models, types
from fpo_jax import config as configuration
from fpo_jax.io import jsonl
from fpo_jax.models import params
from fpo_jax.trainer import metric_logger, run_inputs, run_workdir, train_step
from tests import batches, paths, tolerances

VARIABLE = "FPO_SMOLLM2"
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"${VARIABLE} names no directory of SmolLM2-135M-Instruct (shared/models/get_smollm2.sh makes one)",
    ),
]
GROUPS, STEPS, RATE, DECAY, CLIP, BETA, MARGIN = 4, 5, 1e-5, 0.1, 1.0, 2.5, 0.3
MAX_LENGTH, NEW = 144, 24  # tokens; the longest row has 138
SIDES = ("chosen", "rejected")
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [SYSTEM, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "Write the numbers from 1 to 5."}],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "  Say it in French: good morning 😀\n"}],
)

# --- what both sides read


@pytest.fixture(scope="module")
def directory():
    return Path(os.environ[VARIABLE])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return auto_tokenizer(directory)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """The shortest pairs of the real chats, for two different steps."""
    path = paths.shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    return sorted(rows, key=lambda pair: max(len(row(tokenizer, pair[side])[0]) for side in SIDES))[: 2 * GROUPS]


@pytest.fixture(scope="module")
def theirs(directory, torch):
    return causal(directory)


@pytest.fixture(scope="module")
def ours(directory):
    """(config, float32 parameters)."""
    config = hf.read_config(directory)
    return config, hf.load_params(directory, config, dtype="float32")


def auto_tokenizer(directory):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


def causal(directory):
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype="float32", attn_implementation="eager").eval()
    # pad = EOS here, and torch drops the gradient of a padding embedding: the end token of every turn
    model.get_input_embeddings().padding_idx = None
    return model


def prompt_ids(tokenizer, conversation):
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)["input_ids"]


def row(tokenizer, conversation):
    """Return (ids, prompt length) as transformers renders them, up to the end token of the answer."""
    prompt = prompt_ids(tokenizer, conversation[:-1])
    whole = tokenizer.apply_chat_template(conversation, tokenize=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    return whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)], len(prompt)


def theirs_greedy(torch, model, ids):
    with torch.no_grad():
        found = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=NEW, do_sample=False
        )
    return found[0, len(ids) :].tolist()


def called(*command):
    """Run a program on one device; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=paths.REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def generated(folder, model, conversations, *options):
    """Return the lines of fpo generate."""
    data, out = folder / "prompts.jsonl", folder / "answers.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in conversations))
    given = ("--compute-dtype", "float32", "--keep-ids", 1, "--max-length", 256, *options)
    called("-m", "fpo_jax.cli.generate", "--model", model, "--data", data, "--out", out, *given)
    return jsonl.read(out)


def trained(folder, directory, pairs, steps, **changed):
    """Train on the pairs with train.py and the defaults; returns the workdir."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {
        "model.path": str(directory),
        "model.compute_dtype": "float32",
        "model.remat": "none",
        "data.format": "chat_pairs",
        "data.train": str(folder / "pairs.jsonl"),
        "data.max_length": MAX_LENGTH,
        "data.max_prompt_length": MAX_LENGTH - 40,
        "data.shuffle": False,
        "loss.name": "simpo",
        "loss.beta": BETA,
        "loss.gamma_beta_ratio": MARGIN,
        "optim.learning_rate": RATE,
        "optim.schedule": "constant",
        "optim.weight_decay": DECAY,
        "optim.clip_norm": CLIP,
        "train.batch_size": GROUPS,
        "train.micro_batch_per_device": 1,
        "train.max_steps": steps,
        "train.epochs": 3.0,
        "train.eval_every": 0,
        "logging.tensorboard": False,
    } | changed
    lines = ["from fpo_jax import config", "", "", "def get_config():", "    c = config.default()"]
    lines += [f"    c.{name} = {value!r}" for name, value in settings.items() if value is not None]
    (folder / "run.py").write_text("\n".join([*lines, "    return c", ""]))
    called("train.py", "--config", folder / "run.py", "--workdir", folder / "run")
    return folder / "run"


def exported(run, out, *options):
    called("-m", "fpo_jax.cli.export", "--workdir", run, "--out", out, "--dtype", "float32", *options)
    return out


def rows_of(run):
    """Return (ids, prompt length) of every row that a run trained on."""
    config = configuration.default()
    settings = json.loads((run / "config.json").read_text())
    del settings[run_workdir.RESOLVED_LOSS]
    settings.pop(run_workdir.SETTLED, None)
    for name, value in configuration.flatten(settings).items():
        *parents, last = name.split(".")
        setattr(configuration.value_at(config, ".".join(parents)) if parents else config, last, value)
    prepared = run_inputs.prepare(config).train.prepared
    found = [prepared.row(index) for index in range(len(prepared.lengths_N))]
    return [(ids.tolist(), int(length)) for ids, length in found]


# --- forward


@functools.partial(jax.jit, static_argnames=("config", "adapter"))
def our_logits(tree, tokens_T, *, config, adapter=None):
    tokens_NT = tokens_T[None]
    hidden_NTD = models.hidden_states(
        tree, tokens_NT, jnp.ones(tokens_NT.shape, bool), config=config, compute_dtype="float32", adapter=adapter
    )
    return models.logits(tree, hidden_NTD[0], config=config)


def their_logits(torch, model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def log_probs(logits_TV, ids):
    """Log-probs of ids[1:] under float64 softmaxes of the logits."""
    x_TV = np.asarray(logits_TV, np.float64)[:-1]
    x_TV = x_TV - x_TV.max(-1, keepdims=True)
    logps_TV = x_TV - np.log(np.exp(x_TV).sum(-1, keepdims=True))
    return np.take_along_axis(logps_TV, np.array(ids[1:])[:, None], 1)[:, 0]


def test_logits_and_log_probs_of_real_chats(tokenizer, pairs, ours, theirs, torch):
    config, tree = ours
    for pair in pairs[:3]:
        ids, _ = row(tokenizer, pair["chosen"])
        found, expected = our_logits(tree, jnp.array(ids), config=config), their_logits(torch, theirs, ids)
        assert_allclose(found, expected, rtol=0, atol=tolerances.REAL_LOGITS * np.abs(expected).max())
        assert_allclose(log_probs(found, ids), log_probs(expected, ids), rtol=0, atol=tolerances.REAL_LOGPS)


# --- sampling


def test_greedy_chats_token_by_token(directory, tokenizer, theirs, torch, tmp_path):
    lines = generated(tmp_path, directory, CHATS, "--temperature", 0, "--max-new-tokens", NEW, "--batch-size", 5)
    for line, conversation in zip(lines, CHATS, strict=True):
        ids = prompt_ids(tokenizer, conversation)
        assert tokenizer.decode(line["prompt_ids"]) == tokenizer.decode(ids) and line["prompt_ids"] == ids
        expected = theirs_greedy(torch, theirs, ids)
        assert line["ids"] == [expected], tokenizer.decode(expected)
        assert line["completions"] == [tokenizer.decode(expected, skip_special_tokens=True)]
        assert line["finish"] == ["stop" if expected[-1] == tokenizer.eos_token_id else "length"]


def test_samples_are_of_the_softmax_and_come_again(directory, tokenizer, theirs, torch, tmp_path):
    count, temperature = 400, 0.8
    options = ("--temperature", temperature, "--max-new-tokens", 1, "--batch-size", 50, "--num-return", count)
    first, second = (generated(tmp_path / name, directory, CHATS[:1], *options) for name in ("a", "b"))
    assert first[0]["ids"] == second[0]["ids"]
    logits_V = their_logits(torch, theirs, prompt_ids(tokenizer, CHATS[0]))[-1].astype(np.float64) / temperature
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    seen = collections.Counter(token for (token,) in first[0]["ids"])
    likely = np.flatnonzero(p_V > 10 / count)
    assert len(likely) >= 2 and p_V[likely].sum() > 0.5, "a distribution that tells something"
    for token in likely:
        deviation = np.sqrt(p_V[token] * (1 - p_V[token]) / count)
        assert abs(seen[token] / count - p_V[token]) < 4.5 * deviation, tokenizer.decode([token])
    rest = 1 - p_V[likely].sum()
    found = 1 - sum(seen[token] for token in likely) / count
    assert abs(found - rest) < 4.5 * np.sqrt(rest * (1 - rest) / count) + 1 / count


# --- training


def torch_group_loss(torch, model, group):
    """SimPO of one pair of rows: -log sigmoid(beta (mean log-prob of chosen - that of rejected - gamma / beta))."""
    means = []
    for ids, length in group:
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0, length - 1 : -1], dim=-1)
        means.append(logps.gather(1, torch.tensor(ids[length:])[:, None]).mean())
    return -torch.nn.functional.logsigmoid(BETA * (means[0] - means[1] - MARGIN))


def batch_of(groups):
    """Return the batch of some pairs of rows, as the trainer lays rows out."""
    rows = [one for group in groups for one in group]
    tokens_NT = np.zeros((len(rows), MAX_LENGTH), np.int32)
    valid_NT = np.zeros(tokens_NT.shape, bool)
    loss_mask_NR = np.zeros((len(rows), MAX_LENGTH - 1), bool)
    for place, (ids, length) in enumerate(rows):
        tokens_NT[place, : len(ids)], valid_NT[place, : len(ids)] = ids, True
        loss_mask_NR[place, length - 1 : len(ids) - 1] = True
    predictors_NR = np.tile(np.arange(MAX_LENGTH - 1, dtype=np.int32), (len(rows), 1))
    rewards_BK = np.tile(np.array([[1.0, 0.0]], np.float32), (len(groups), 1))
    return types.Batch(
        tokens_NT, valid_NT, predictors_NR, tokens_NT[:, 1:], loss_mask_NR, rewards_BK, np.zeros_like(rewards_BK),
        np.ones(len(groups), np.float32), np.arange(len(groups), dtype=np.int32),
    )  # fmt: skip


def by_their_names(tree, config):
    """Yield (their name, array in their layout) of every parameter."""
    flat = params.flatten(tree)
    for entry in params.entries(config):
        array = np.asarray(flat[entry.path])
        for name, place in entry.tensors():
            yield name, params.to_hf(entry, array[place])


@pytest.fixture(scope="module")
def simpo(directory, pairs, tmp_path_factory):
    """The workdir of five steps of SimPO."""
    return trained(tmp_path_factory.mktemp("simpo"), directory, pairs, STEPS)


def test_gradients_are_those_of_torch_in_float64(directory, tokenizer, pairs, ours, torch):
    config, tree = ours
    twin = causal(directory).double()
    groups = [[row(tokenizer, pair[name]) for name in SIDES] for pair in pairs[:1]]
    loss = losses.resolve("simpo", beta=BETA, gamma_beta_ratio=MARGIN)
    batch = batch_of(groups)
    value = functools.partial(
        train_step._objective, batch_kl=None,
        totals=train_step._totals(jax.tree.map(lambda leaf: leaf[None], batch), loss),
        forward_fn=batches.forward_fn(config, workspace_bytes=2**28), loss=loss, dropout_key=None,
    )  # fmt: skip
    (found, _), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(tree, batch)
    total = 0.0
    for group in groups:
        part = torch_group_loss(torch, twin, group) / len(groups)
        part.backward()
        total += part.item()
    assert_allclose(found, total, rtol=0, atol=tolerances.REAL_LOSS)
    expected = {name: weight.grad.numpy() for name, weight in twin.named_parameters()}
    for name, array in by_their_names(gradient, config):
        assert np.linalg.norm(array - expected[name]) / np.linalg.norm(expected[name]) < tolerances.REAL_GRADIENT, name


def test_five_steps_are_those_of_torch(simpo, directory, pairs, tokenizer, torch):
    """Losses, gradient norms and what the steps changed: AdamW written out, decay on matrices alone."""
    twin = causal(directory)
    start = {name: weight.detach().clone() for name, weight in twin.named_parameters()}
    matrices = [weight for weight in twin.parameters() if weight.ndim > 1]
    vectors = [weight for weight in twin.parameters() if weight.ndim == 1]
    decayed = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decayed, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    groups = [[row(tokenizer, pair[name]) for name in SIDES] for pair in pairs]
    curve = []
    for number in range(STEPS):
        adamw.zero_grad()
        value = 0.0
        for group in groups[number % 2 * GROUPS :][:GROUPS]:
            part = torch_group_loss(torch, twin, group) / GROUPS
            part.backward()
            value += part.item()
        curve.append((value, torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP).item()))
        adamw.step()
    adamw.zero_grad()
    del adamw  # three copies of the weights, before the run's are read
    lines = [line for line in metric_logger.read(simpo / metric_logger.METRICS_FILE) if "loss" in line]
    assert_allclose([line["loss"] for line in lines], [loss for loss, _ in curve], rtol=0, atol=tolerances.REAL_LOSS)
    norms = [norm for _, norm in curve]
    assert_allclose([line["grad_norm"] for line in lines], norms, rtol=tolerances.REAL_GRADIENT)
    opened, _ = checkpoint.restore_params(simpo, None)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf), opened)
    end = {name: weight.detach().numpy() for name, weight in twin.named_parameters()}
    errors, changes = [], []
    for name, array in by_their_names(tree, hf.read_config(directory)):
        errors.append(np.linalg.norm(array - end[name]))
        changes.append(np.linalg.norm(end[name] - start[name].numpy()))
        assert errors[-1] < tolerances.REAL_CHANGE_OF_ONE * changes[-1], name
    assert len(changes) == len(end) and np.linalg.norm(errors) < tolerances.REAL_CHANGE * np.linalg.norm(changes)


def test_an_export_chats_with_the_prompt_it_was_trained_on(simpo, pairs, torch, tmp_path):
    out = exported(simpo, tmp_path / "out")
    tokenizer, twin = auto_tokenizer(out), causal(out)
    sides = [pair[name] for pair in pairs for name in SIDES]
    assert rows_of(simpo) == [row(tokenizer, side) for side in sides]
    prompts = [pair["chosen"][:-1] for pair in pairs[:2]]
    options = ("--temperature", 0, "--max-new-tokens", NEW, "--batch-size", 2)
    for line, prompt in zip(generated(tmp_path / "g", out, prompts, *options), prompts, strict=True):
        ids = prompt_ids(tokenizer, prompt)
        assert line["prompt_ids"] == ids and line["ids"] == [theirs_greedy(torch, twin, ids)]


def test_peft_reads_a_trained_adapter(directory, tokenizer, pairs, ours, theirs, torch, tmp_path):
    """Last of those that share the model: peft puts its layers into it."""
    peft = pytest.importorskip("peft", reason="peft is absent")
    changed = {"lora.rank": 8, "optim.learning_rate": 1e-3, "train.batch_size": 1}
    run = trained(tmp_path, directory, pairs, 2, **changed)
    opened, _ = checkpoint.restore_params(run, None)
    added = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), opened)
    config, tree = ours
    ids, _ = row(tokenizer, pairs[0]["chosen"])
    settings = json.loads((run / "config.json").read_text())["lora"]
    adapter = params.adapter(config, **settings)
    found = our_logits(params.union(tree, added), jnp.array(ids), config=config, adapter=adapter)
    before = log_probs(their_logits(torch, theirs, ids), ids)
    wrapped = peft.PeftModel.from_pretrained(theirs, exported(run, tmp_path / "adapter", "--lora", "adapter")).eval()
    expected = log_probs(their_logits(torch, wrapped, ids), ids)
    assert_allclose(log_probs(found, ids), expected, rtol=0, atol=tolerances.REAL_LOGPS)
    assert np.abs(expected - before).max() > 100 * tolerances.REAL_LOGPS, "an adapter that does something"


def test_labels_are_the_scores_of_transformers(directory, pairs, torch, tmp_path):
    """Read at the last token that is not the pad_token_id of config.json."""
    import transformers

    changed = {"stage": "reward", "loss.name": "bradley_terry", "loss.beta": None, "loss.gamma_beta_ratio": None}
    run = trained(tmp_path, directory, pairs, 2, **changed)
    out = exported(run, tmp_path / "out")
    lines = [
        {"prompt": pair["chosen"][:-1], "completions": [pair[name][-1]["content"] for name in SIDES]}
        for pair in pairs[:4]
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps({"index": index, **line}) + "\n" for index, line in enumerate(lines)))
    called(
        "-m", "fpo_jax.cli.label", "--model", out, "--data", data, "--out", tmp_path / "labels.jsonl",
        "--batch-size", 2, "--compute-dtype", "float32", "--max-length", 256,
    )  # fmt: skip
    tokenizer = auto_tokenizer(out)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    judge = load(out, dtype="float32", attn_implementation="eager").eval()
    for line, label in zip(lines, jsonl.read(tmp_path / "labels.jsonl"), strict=True):
        answers = [{"role": "assistant", "content": text} for text in line["completions"]]
        ids = [tokenizer.apply_chat_template([*line["prompt"], answer])["input_ids"] for answer in answers]
        expected = [their_logits(torch, judge, one).item() for one in ids]
        assert expected[0] != expected[1]
        assert_allclose(label["rewards"], expected, rtol=0, atol=tolerances.REAL_SCORE)

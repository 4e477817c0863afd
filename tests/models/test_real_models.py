"""Real models of two families against transformers, in float32: logits, greedy text, steps of DPO and their export.

FPO_GEMMA3 names a directory of Gemma-3-270M (dequantised from Q4_K_M: V = 262,144, a window of 512 in five layers of
six), FPO_SMOLLM2 one of SmolLM2-135M-Instruct. What one family needs beyond this is in tests/test_real_model.py.
"""

import functools
import gzip
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import checkpoint, hf
from fpo_jax.trainer import metric_logger
from tests import paths, test_real_model, tolerances

pytestmark = [pytest.mark.real_model, pytest.mark.parity, pytest.mark.slow]
VARIABLES = ("FPO_GEMMA3", "FPO_SMOLLM2")
NEW, STEPS, PAIRS, BATCH = 32, 10, 4, 2
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module", params=VARIABLES)
def directory(request):
    if not os.environ.get(request.param):
        pytest.skip(f"${request.param} names no directory of a real model")
    return Path(os.environ[request.param])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return test_real_model.auto_tokenizer(directory)


@functools.cache
def rows():
    """Real pairs, the shortest first."""
    path = paths.shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz")
    found = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    return sorted(found, key=lambda pair: max(len(json.dumps(pair[side])) for side in SIDES))


def ids_of(tokenizer, conversation):
    return tokenizer.apply_chat_template(conversation, tokenize=True)["input_ids"]


def assert_same_logits(torch, model, tree, config, ids):
    found = np.asarray(test_real_model.our_logits(tree, jnp.array(ids), config=config))
    expected = test_real_model.their_logits(torch, model, ids)
    error, scale = np.abs(found - expected).max(), np.abs(expected).max()
    print(f"{config.family}, {len(ids)} tokens: logits to {error / scale:.1e} of {scale:.1f}")
    assert error < tolerances.REAL_LOGITS_OF_ANY * scale


def test_logits_of_real_chats_and_of_one_beyond_the_window(directory, tokenizer, torch):
    config, theirs = hf.read_config(directory), test_real_model.causal(directory)
    tree = hf.load_params(directory, config, dtype="float32")
    for pair in rows()[:2]:
        assert_same_logits(torch, theirs, tree, config, ids_of(tokenizer, pair["chosen"]))
    if config.sliding_window is not None:
        longest = config.sliding_window + 128
        texts = (ids_of(tokenizer, pair["chosen"]) for pair in reversed(rows()))
        ids = next(ids for ids in texts if len(ids) >= longest)
        assert_same_logits(torch, theirs, tree, config, ids[:longest])


def test_greedy_text_token_by_token(directory, tokenizer, torch, tmp_path):
    theirs, chats = test_real_model.causal(directory), [pair["chosen"][:-1] for pair in rows()[:3]]
    options = ("--temperature", 0, "--max-new-tokens", NEW, "--batch-size", len(chats))
    for line, chat in zip(test_real_model.generated(tmp_path, directory, chats, *options), chats, strict=True):
        ids = test_real_model.prompt_ids(tokenizer, chat)
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        assert line["prompt_ids"] == ids and line["ids"] == [whole[0, len(ids) :].tolist()]


def test_steps_of_dpo_fall_and_transformers_opens_their_export(directory, tokenizer, torch, tmp_path):
    changed = {
        "loss.name": "dpo", "loss.beta": 0.1, "loss.gamma_beta_ratio": None,
        "train.batch_size": BATCH, "train.epochs": 5.0, "data.max_length": 256, "data.max_prompt_length": 200,
    }  # fmt: skip
    run = test_real_model.trained(tmp_path, directory, rows()[:PAIRS], STEPS, **changed)
    lines = metric_logger.read(run / metric_logger.METRICS_FILE)
    curve = [line["loss"] for line in lines if "loss" in line]
    print(f"{directory.name}: DPO {curve[0]:.4f} -> {curve[-1]:.4f}")
    assert len(curve) == STEPS and np.isfinite(curve).all()
    assert_allclose(curve[0], np.log(2), rtol=1e-5)
    epoch = PAIRS // BATCH
    assert np.mean(curve[-epoch:]) < np.mean(curve[:epoch]) - 0.05
    out, config = test_real_model.exported(run, tmp_path / "out"), hf.read_config(directory)
    opened, _ = checkpoint.restore_params(run, None)
    tree = hf.load_params(out, config, dtype="float32")
    assert_allclose(tree["final_norm"]["scale"], opened["final_norm"]["scale"], rtol=0)
    again, chat = test_real_model.auto_tokenizer(out), rows()[0]["chosen"]
    assert again.chat_template == tokenizer.chat_template and ids_of(again, chat) == ids_of(tokenizer, chat)
    assert_same_logits(torch, test_real_model.causal(out), tree, config, ids_of(again, chat))

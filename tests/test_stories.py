"""The real model stories260K: greedy text, log-probs against an independent float64 forward pass, and the way back."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

from fpo_jax import hf, models
from tests import paths, tolerances


@pytest.fixture(scope="module")
def stories():
    """(directory, config, float32 parameters)."""
    directory = hf.local_dir(paths.shared_data("stories260K"))
    config = hf.read_config(directory)
    return directory, config, hf.load_params(directory, config, dtype="float32")


def read(directory, name):
    return json.loads((directory / name).read_text(encoding="utf-8"))


@functools.partial(jax.jit, static_argnames=("config", "compute_dtype"))
def logits(tree, tokens_NT, valid_NT, *, config, compute_dtype="float32"):
    hidden_NTD = models.hidden_states(tree, tokens_NT, valid_NT, config=config, compute_dtype=compute_dtype)
    return hidden_NTD.astype(jnp.float32) @ models.head(tree, config=config).T


def token_logps(tree, config, ids, compute_dtype="float32"):
    tokens_NT = jnp.asarray([ids])
    logps_TV = jax.nn.log_softmax(
        logits(tree, tokens_NT, jnp.ones_like(tokens_NT, bool), config=config, compute_dtype=compute_dtype)[0]
    )
    return np.asarray(jnp.take_along_axis(logps_TV[:-1], tokens_NT[0, 1:, None], axis=1)[:, 0])


def test_greedy_decoding_tells_the_expected_story(stories):
    directory, config, tree = stories
    expected = read(directory, "expected_greedy.json")
    length = len(expected["greedy_ids"])
    tokens_T = np.zeros(length, np.int32)
    tokens_T[0] = config.bos_id
    for known in range(1, length):  # the whole window each time: padding after `known` must not matter
        valid_NT = jnp.asarray(np.arange(length)[None] < known)
        tokens_T[known] = np.argmax(logits(tree, jnp.asarray(tokens_T[None]), valid_NT, config=config)[0, known - 1])
    assert tokens_T.tolist() == expected["greedy_ids"]
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.decode(tokens_T.tolist()) == expected["expected_text"]


def test_log_probs_match_the_float64_forward_pass(stories):
    directory, config, tree = stories
    golden = read(directory, "golden_float64.json")
    greedy = token_logps(tree, config, golden["greedy_ids"])
    assert_allclose(greedy, golden["greedy_token_logprobs"], rtol=0, atol=tolerances.STORIES_LOGP)
    assert_allclose(greedy.sum(dtype=np.float64), golden["greedy_sum"], rtol=0, atol=tolerances.STORIES_SUM)
    random = token_logps(tree, config, golden["random_ids"])
    assert_allclose(random, golden["random_token_logprobs"], rtol=0, atol=tolerances.STORIES_LOGP)
    tokens_NT = jnp.asarray([golden["greedy_ids"]])
    last = logits(tree, tokens_NT, jnp.ones_like(tokens_NT, bool), config=config)[0, -1, :8]
    assert_allclose(last, golden["logits_last_first8"], rtol=0, atol=tolerances.STORIES_LOGP)


def test_bfloat16_compute_is_close_on_a_real_model(stories):
    directory, config, tree = stories
    golden = read(directory, "golden_float64.json")
    found = token_logps(tree, config, golden["greedy_ids"], "bfloat16")
    assert_allclose(np.mean(np.abs(found - golden["greedy_token_logprobs"])), 0, atol=tolerances.STORIES_BFLOAT16)


def test_export_gives_the_same_tensors_back(stories, tmp_path):
    directory, config, tree = stories
    hf.check_vocabulary(512, config)
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=directory, dtype="float32", max_shard_bytes=300_000)
    source = safetensors.numpy.load_file(directory / hf.SINGLE)
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    assert found.keys() == source.keys()
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in source.items())
    assert read(tmp_path / "out", "config.json") == read(directory, "config.json")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


@pytest.mark.parity
def test_transformers_agrees_with_our_logits_on_the_export(stories, tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    transformers = pytest.importorskip("transformers")
    directory, config, tree = stories
    golden = read(directory, "golden_float64.json")
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=directory, dtype="float32")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = golden["greedy_ids"]
    with torch.no_grad():
        expected = twin(torch.tensor([ids])).logits[0].numpy()
    found = logits(tree, jnp.asarray([ids]), jnp.ones((1, len(ids)), bool), config=config)[0]
    assert_allclose(found, expected, rtol=0, atol=tolerances.PARITY_LOGITS)

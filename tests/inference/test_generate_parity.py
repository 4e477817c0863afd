"""The cache of every family: greedy decoding against `transformers.generate`, hidden states against whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import models
from fpo_jax.inference import sampler
from tests import tolerances
from tests.models import test_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 5, 9, 20, 21, 22, 2, 4, 6, 8, 10, 12]]
NAMES = ["llama GQA", "llama tied", "llama3 scaling", "mistral window", "neox parallel", "neox tied gelu_new"]
NAMES += ["qwen2", "qwen3", "gemma2", "gpt2"]
LATER = ["gpt2 inverse scale", "qwen2 window", "gemma", "gemma3", "phi3 window", "olmo2", "olmo3", "granite", "smollm3"]
LATER += ["smollm3 sliding", "ministral", "arcee", "internlm3", "seed_oss", "exaone4", "helium", "glm", "glm4"]
LATER += [
    "cohere",
    "cohere2",
    "starcoder2",
    "mixtral window",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2 groups",
]


def made(name):
    """The config of a variant and weights whose greedy text varies: a large tied embedding repeats the last token."""
    config = models.from_hf_config(test_model.VARIANTS[name])
    tree = test_model.random_params(config)
    return config, tree | {"embed": tree["embed"] * (0.02 if config.tied_head else 1.0)}


@pytest.mark.sampled(4)
@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    check_greedy(name, tmp_path)


@pytest.mark.sampled(14)
@pytest.mark.parity
@pytest.mark.parametrize("name", LATER)
def test_greedy_tokens_of_later_families_equal_transformers(name, tmp_path):
    check_greedy(name, tmp_path)


def check_greedy(name, tmp_path):
    """Compare 24 tokens after each prompt, past the windows of 7."""
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    config, tree = made(name)
    theirs = test_model.torch_twin(tmp_path, test_model.VARIANTS[name], tree, config)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        expected.append([whole[0, len(prompt) :].tolist()])
    decoding = sampler.Decoding(24, temperature=0.0)
    assert sampler.sample(tree, PROMPTS, config=config, decoding=decoding, seed=0, batch_size=4) == expected
    assert len({tuple(tokens) for (tokens,) in expected}) >= len(PROMPTS) - 1
    assert sum(len(set(tokens)) > 1 for (tokens,) in expected) > 1, "texts that vary"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_against_the_cache_are_those_of_whole_rows(name):
    check_cache(name)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", LATER)
def test_hidden_states_of_later_families_against_the_cache_are_those_of_whole_rows(name):
    check_cache(name)


def check_cache(name):
    """Ten tokens beyond prompts of 1 to 9, past the windows of 7 of mistral and of every other layer of gemma2."""
    config, tree = made(name)
    random = np.random.default_rng(0)
    tokens_NT, lengths_N = random.integers(1, test_model.V, (4, 19)).astype(np.int32), np.array([1, 9, 4, 7], np.int32)
    whole_NTD = test_model.forward(tree, jnp.asarray(tokens_NT), jnp.ones((4, 19), bool), config=config)
    options = {"config": config, "compute_dtype": "float32"}
    hidden_ND, cache = jax.jit(functools.partial(models.prefill, positions=19, **options))(
        tree, tokens_NT[:, :9], lengths_N
    )
    step = jax.jit(functools.partial(models.decode, **options))
    for count in range(11):
        expected_ND = np.take_along_axis(np.asarray(whole_NTD), (lengths_N + count - 1)[:, None, None], axis=1)[:, 0]
        np.testing.assert_allclose(hidden_ND, expected_ND, rtol=0, atol=tolerances.CACHED)
        if count < 10:
            tokens_N = np.take_along_axis(tokens_NT, (lengths_N + count)[:, None], axis=1)[:, 0]
            hidden_ND, cache = step(tree, tokens_N, lengths_N + count, cache)


@pytest.mark.parametrize("name", ["llama GQA", "gemma2"])
def test_bfloat16_against_the_cache_is_as_good_as_over_whole_rows(name):
    """The bound is that of whole rows, whose error on these tokens is 0.0143 (llama) and 0.0202 (gemma2)."""
    config, tree = made(name)
    tokens_NT = np.random.default_rng(0).integers(1, test_model.V, (4, 19)).astype(np.int32)
    exact_NTD = test_model.forward(tree, jnp.asarray(tokens_NT), jnp.ones((4, 19), bool), config=config)[:, 8:18]
    options = {"config": config, "compute_dtype": "bfloat16"}
    hidden_ND, cache = jax.jit(functools.partial(models.prefill, positions=19, **options))(
        tree, tokens_NT[:, :9], np.full(4, 9, np.int32)
    )
    assert {array.dtype.name for array in cache} == {"bfloat16"}
    step, found = jax.jit(functools.partial(models.decode, **options)), []
    for position in range(8, 18):
        found.append(np.asarray(hidden_ND, np.float32))
        hidden_ND, cache = step(tree, tokens_NT[:, position + 1], np.full(4, position + 1, np.int32), cache)
    error = np.sqrt(np.mean((np.stack(found, 1) - exact_NTD) ** 2) / np.mean(np.square(exact_NTD)))
    assert 0 < error < tolerances.BFLOAT16_HIDDEN


def test_longrope_writes_no_text_beyond_its_original_length():
    config, tree = made("phi3")
    decoding = sampler.Decoding(5, temperature=0.0)
    options = {"config": config, "decoding": decoding, "seed": 0, "batch_size": 1}
    assert len(sampler.sample(tree, [[3] * 11], **options)[0][0]) == 5
    with pytest.raises(ValueError, match=r"need 17 positions, and beyond 16 the rotary frequencies"):
        sampler.sample(tree, [[3] * 12], **options)

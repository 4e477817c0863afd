"""Greedy decoding against `transformers.generate`, token for token, for every family; prompts of different lengths."""

import pytest

from fpo_jax import model, sample
from tests import test_model

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 5, 9, 20, 21, 22, 2, 4, 6, 8, 10, 12]]
NAMES = ["llama GQA", "llama tied", "llama3 scaling", "mistral window", "neox parallel", "neox tied gelu_new"]
NAMES += ["qwen2", "qwen3", "gemma2", "gpt2"]


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    config = model.from_hf_config(test_model.VARIANTS[name])
    tree = test_model.random_params(config)
    theirs = test_model.torch_twin(tmp_path, test_model.VARIANTS[name], tree, config)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            whole = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        expected.append([whole[0, len(prompt) :].tolist()])
    decoding = sample.Decoding(12, temperature=0.0)
    assert sample.sample(tree, PROMPTS, config=config, decoding=decoding, seed=0, batch_size=4) == expected
    assert len({tuple(tokens) for (tokens,) in expected}) > 1

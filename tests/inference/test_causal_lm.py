"""Models as Flax modules: parameters that are arrays, logits of transformers, a training loop that is not ours."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import fpo_jax
from fpo_jax import models, sharding
from fpo_jax.models import params
from tests import tiny, tolerances
from tests.models import test_model

FAMILIES = {
    "llama": test_model.LLAMA, "mistral": test_model.MISTRAL, "qwen2": test_model.QWEN2, "qwen3": test_model.QWEN3,
    "gemma2": test_model.GEMMA2, "gpt_neox": test_model.NEOX, "gpt2": test_model.GPT2, "gemma": test_model.GEMMA,
    "gemma3_text": test_model.GEMMA3, "phi3": test_model.PHI3, "olmo2": test_model.OLMO2, "olmo3": test_model.OLMO3,
    "granite": test_model.GRANITE, "smollm3": test_model.SMOLLM3, "ministral": test_model.MINISTRAL,
    "arcee": test_model.ARCEE, "internlm3": test_model.INTERNLM3, "seed_oss": test_model.SEED_OSS,
    "exaone4": test_model.EXAONE4, "helium": test_model.HELIUM, "glm": test_model.GLM,
    "glm4": test_model.VARIANTS["glm4"], "cohere": test_model.COHERE, "cohere2": test_model.COHERE2,
    "starcoder2": test_model.STARCODER2, "mixtral": test_model.MIXTRAL, "qwen2_moe": test_model.QWEN2_MOE,
    "qwen3_moe": test_model.QWEN3_MOE, "gpt_oss": test_model.GPT_OSS,
    "deepseek_v2": test_model.DEEPSEEK_V2,
}  # fmt: skip
TOKENS_NT = jnp.array(np.random.default_rng(0).integers(0, test_model.V, (2, 11)))


def drawn(family, **options):
    config = models.from_hf_config(FAMILIES[family] | {"initializer_range": 0.2})
    return fpo_jax.CausalLM(config, rngs=nnx.Rngs(0), **options)


def test_every_family_is_here():
    assert set(FAMILIES) == set(models.FAMILIES)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_a_flax_module_with_the_logits_of_transformers(family, tmp_path):
    model = drawn(family)
    state = nnx.state(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == params.count(model.config)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        nnx.display(model)
    assert "Param" in shown.getvalue() and "CausalLM" in shown.getvalue()
    logits_NTV = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS_NT)
    assert logits_NTV.dtype == jnp.float32
    model.save_pretrained(tmp_path / "saved")
    again = fpo_jax.CausalLM.from_pretrained(tmp_path / "saved")
    jax.tree.map(assert_array_equal, again.parameters(), model.parameters())
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(TOKENS_NT))).logits.numpy()
    assert_allclose(logits_NTV, expected, rtol=0, atol=tolerances.PARITY_LOGITS)


def test_optax_trains_it_without_our_trainer():
    model = drawn("llama")
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss(model):
            logits = model(tokens[:, :-1], remat="full")
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    first, *_, last = (float(step(model, optimizer, TOKENS_NT)) for _ in range(20))
    assert last < 0.5 * first


def test_padding_and_dtypes():
    model = drawn("llama", dtype="bfloat16")
    whole = model(TOKENS_NT)
    assert model.hidden_states(TOKENS_NT).dtype == jnp.bfloat16 and whole.dtype == jnp.float32
    padded = jnp.pad(TOKENS_NT, ((0, 0), (0, 3)))
    assert_array_equal(model(padded, jnp.arange(14)[None].repeat(2, 0) < 11)[:, :11], whole)


def test_on_a_mesh_it_is_the_same_model():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    config = models.from_hf_config(test_model.LLAMA | {"vocab_size": 40})
    cut, whole = (fpo_jax.CausalLM(config, rngs=nnx.Rngs(0), mesh=one) for one in (mesh, None))
    query = cut.layers.attention.query[...]
    assert query.sharding.shard_shape(query.shape) != query.shape
    found = nnx.jit(lambda model, tokens: model(tokens))(cut, TOKENS_NT)
    assert_allclose(found, whole(TOKENS_NT), rtol=0, atol=tolerances.PARITY_LOGITS)


def test_completions_are_those_of_the_sampler_and_a_read_model_keeps_its_tokenizer(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    model = fpo_jax.CausalLM.from_pretrained(tmp_path / "model")
    first, again = (model.generate([[5, 6, 7], [8]], max_new_tokens=4, seed=1, num_return=2) for _ in range(2))
    assert first == again and [len(returns) for returns in first] == [2, 2]
    assert all(len(ids) <= 4 for returns in first for ids in returns)
    model.save_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert (tmp_path / "saved" / "tokenizer.json").exists()

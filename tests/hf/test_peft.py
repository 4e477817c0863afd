"""Every kind of adapter against PEFT: forward, gradients, one optimizer step, both exports."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

from fpo_jax import hf, models
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.trainer import adapters
from tests import tolerances
from tests.models import test_lora, test_model

torch = pytest.importorskip("torch", reason="PyTorch is absent")
peft = pytest.importorskip("peft", reason="peft is absent")

SAVED = {"llama GQA": ("norm", "embed_tokens", "lm_head"), "gpt2": ("ln_f", "ln_1")}
KINDS = {  # kind -> family -> options
    "rslora": lambda family: {"use_rslora": True},
    "dora": lambda family: {"use_dora": True},
    "saved": lambda family: {"modules_to_save": SAVED[family]},
}
RATE = 1e-2
RATIO = {"rslora": 16.0}  # PEFT's LoRA+ also takes what is one-dimensional to B's rate; ours B alone, as the paper


@functools.cache
def both_sides(family: str, kind: str, folder):
    """Return the base, a random adapter of a kind, and the model with it as PEFT reads it from our export."""
    published = test_model.VARIANTS[family]
    c, adapter = test_lora.adapter_of(published, **KINDS[kind](family))
    tree = test_model.random_params(c)
    added = test_lora.random_adapter(c, adapter)
    theirs = test_model.torch_twin(folder, published, tree, c)
    base = folder / "model"
    hf.write_peft(added, c, adapter, out_dir=folder / "peft", base_name=str(base), revision=None, source_dir=base)
    return c, adapter, tree, added, peft.PeftModel.from_pretrained(theirs, folder / "peft", is_trainable=True).eval()


def mean_square(added, tree, *, c, adapter):
    both = {**params.flatten(tree), **params.flatten(added)}
    found = test_lora.logits(params.nest(both), jnp.asarray(test_lora.TOKENS_NT), config=c, adapter=adapter)
    return jnp.mean(jnp.square(found)), found


def named(added, c, adapter):
    """Yield PEFT's names with our values in PEFT's layout."""
    flat = params.flatten(added)
    for entry in params.trained_entries(c, adapter):
        for name, place in entry.tensors():
            prefix = "" if name.startswith("base_model.model.") else "base_model.model."
            yield prefix + name, params.to_hf(entry, np.asarray(flat[entry.path][place]))


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama GQA", "gpt2"])
def test_logits_gradients_and_a_step_are_those_of_peft(family, kind, tmp_path):
    c, adapter, tree, added, wrapped = both_sides(family, kind, tmp_path)
    (_, ours), grads = jax.value_and_grad(mean_square, has_aux=True)(added, tree, c=c, adapter=adapter)
    expected = wrapped(torch.tensor(test_lora.TOKENS_NT).long()).logits
    assert_allclose(ours, expected.detach().numpy(), rtol=0, atol=tolerances.PARITY_LOGITS)

    expected.square().mean().backward()
    theirs = {
        key.replace(".default", "").replace("modules_to_save.", "").replace("vector.weight", "vector"): value
        for key, value in wrapped.named_parameters()
        if value.requires_grad
    }
    found = dict(named(grads, c, adapter))
    assert found.keys() == theirs.keys()
    for key, value in found.items():
        wanted = theirs[key].grad.numpy()
        assert_allclose(value, wanted, rtol=0, atol=tolerances.PARITY_GRADIENT * np.abs(wanted).max(), err_msg=key)

    # From equal gradients: Adam's first step is their sign, which the last bit of small ones may turn.
    given, ratio = {key: value.grad for key, value in theirs.items()}, RATIO.get(kind, 1.0)
    torch_step(wrapped, ratio)
    stepped = dict(named(our_step(added, grads_like(added, given, c, adapter), ratio, c, adapter), c, adapter))
    for key, value in stepped.items():
        assert_allclose(
            value, theirs[key].detach().numpy(), rtol=0, atol=tolerances.FIRST_STEP * RATE * ratio, err_msg=key
        )


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["dora", "saved"])
@pytest.mark.parametrize("family", ["llama GQA", "gpt2"])
def test_the_merged_model_is_read_by_transformers_with_the_same_logits(family, kind, tmp_path):
    import transformers

    c, adapter, tree, added, _ = both_sides(family, kind, tmp_path)
    _, ours = mean_square(added, tree, c=c, adapter=adapter)
    whole = hf.merged(added, tmp_path / "model", c, adapter)
    hf.export(whole, c, out_dir=tmp_path / "merged", source_dir=tmp_path / "model", dtype="float32")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    with torch.no_grad():
        merged = read(torch.tensor(test_lora.TOKENS_NT).long()).logits.numpy()
    assert_allclose(ours, merged, rtol=0, atol=tolerances.PARITY_LOGITS)


TIED = {"llama tied": ("embed_tokens",), "gpt2": ("wte", "ln_f")}


@pytest.mark.parity
@pytest.mark.parametrize("family", TIED)
def test_a_tied_embedding_is_both_in_peft_too_and_read_back(family, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "tied", lambda family: {"modules_to_save": TIED[family]})
    c, adapter, tree, added, wrapped = both_sides(family, "tied", tmp_path)
    _, ours = mean_square(added, tree, c=c, adapter=adapter)
    with torch.no_grad():
        expected = wrapped(torch.tensor(test_lora.TOKENS_NT).long()).logits.numpy()
    assert_allclose(ours, expected, rtol=0, atol=tolerances.PARITY_LOGITS)
    again = adapters.of_settings(hf.read_peft(tmp_path / "peft", c), c)
    assert again == adapter and "embed" in adapter.saved
    jax.tree.map(np.testing.assert_array_equal, added, jax.device_get(hf.load_peft(tmp_path / "peft", c, again)))


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    c, adapter = test_lora.adapter_of(test_model.VARIANTS["llama tied"], modules_to_save=("embed_tokens",))
    added, folder = test_lora.random_adapter(c, adapter), tmp_path / "peft"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(test_model.VARIANTS["llama tied"]))
    hf.write_peft(added, c, adapter, out_dir=folder, base_name="b", revision=None, source_dir=tmp_path / "source")
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] += 1
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="an LM head that is not its embedding, and the model ties the two; train it"):
        hf.load_peft(folder, c, adapter)


def grads_like(added, theirs, c, adapter):
    """Return PEFT's gradients in our layout."""
    flat = {path: np.array(leaf) for path, leaf in params.flatten(added).items()}
    for entry in params.trained_entries(c, adapter):
        for name, place in entry.tensors():
            prefix = "" if name.startswith("base_model.model.") else "base_model.model."
            flat[entry.path][place] = params.from_hf(entry, theirs[prefix + name].numpy())
    return params.nest(flat)


def torch_step(wrapped, ratio):
    from peft.optimizers import create_loraplus_optimizer

    create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
    ).step()


def our_step(added, grads, ratio, c, adapter):
    trained = params.trained_entries(c, adapter)
    optimizer = adamw.optimizer(
        adamw.schedule(kind="constant", peak=RATE, warmup=0, total_steps=1),
        b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0, clip_norm=0.0,
        decay_mask=params.nest({entry.path: entry.decay for entry in trained}),
        faster=(ratio, params.nest({entry.path: params.is_b(entry.path) for entry in trained})),
    )  # fmt: skip
    updates, _ = optimizer.update(grads, optimizer.init(added), added)
    return optax.apply_updates(added, updates)


def test_a_scale_by_the_root_of_the_rank():
    assert models.Adapter(16, 8.0, 0.0, ()).scale == 0.5
    assert models.Adapter(16, 8.0, 0.0, (), rslora=True).scale == 2.0


# --- reading what PEFT wrote


@functools.cache
def written(family: str, kind: str, folder):
    """Return the base, PEFT's model with a random adapter, and the directory that PEFT saved it in."""
    published = test_model.VARIANTS[family]
    c = models.from_hf_config(published)
    tree = test_model.random_params(c)
    theirs = test_model.torch_twin(folder, published, tree, c)
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | KINDS[kind](family)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    for value in wrapped.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn_like(value)
    wrapped.save_pretrained(folder / "theirs")
    return c, tree, wrapped, folder / "theirs"


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama GQA", "gpt2"])
def test_an_adapter_of_peft_is_read(family, kind, tmp_path):
    c, tree, wrapped, folder = written(family, kind, tmp_path)
    with torch.no_grad():
        expected = wrapped(torch.tensor(test_lora.TOKENS_NT).long()).logits.numpy()
    adapter = adapters.of_settings(hf.read_peft(folder, c), c)
    added = hf.load_peft(folder, c, adapter)
    _, ours = mean_square(added, tree, c=c, adapter=adapter)
    assert_allclose(ours, expected, rtol=0, atol=tolerances.PARITY_LOGITS)


def test_the_score_of_a_reward_model_is_read_where_it_is_there(tmp_path):
    published = test_model.VARIANTS["llama GQA"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(published))
    c, adapter = test_lora.adapter_of(published)
    reward = dataclasses.replace(c, reward_head=True)
    for name, of in (("language", c), ("reward", reward)):
        added = test_lora.random_adapter(of, adapter)
        options = {"base_name": "b", "revision": None, "source_dir": source}
        hf.write_peft(added, of, adapter, out_dir=tmp_path / name, **options)
        assert adapters.of_settings(hf.read_peft(tmp_path / name, reward), reward) == adapter
        read = jax.device_get(hf.load_peft(tmp_path / name, reward, adapter))
        jax.tree.map(np.testing.assert_array_equal, added, read)
    with pytest.raises(ValueError, match="base_model.model.score.weight is unexpected"):
        hf.check_peft(tmp_path / "reward", c, adapter)


CONTENT = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'; adapters are LORA here"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{'q_proj': 4\}, which changes numbers and is not built"),
        ({"lora_bias": True}, "lora_bias=True, which changes numbers"),
        ({"bias": "all"}, "bias='all', which changes numbers"),
        ({"a_key_of_tomorrow": 2}, "a_key_of_tomorrow=2, which changes numbers"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the weights below the adapter"),
        ({"r": "8"}, "r='8', which is no number"),
        ({}, "is damaged or cut short"),
    ],
)
def test_what_changes_numbers_and_is_not_known_is_refused_by_name(changed, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONTENT | changed))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=message):
        hf.read_peft(tmp_path, models.from_hf_config(test_model.VARIANTS["llama GQA"]))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    c, adapter = test_lora.adapter_of(test_model.VARIANTS["llama GQA"], modules="q_proj")
    prefix = "base_model.model.model.layers"
    tensors = {f"{prefix}.0.self_attn.q_proj.lora_A.weight": np.zeros((2, c.width), np.float32)}
    tensors[f"{prefix}.0.self_attn.v_proj.lora_B.weight"] = np.zeros((4, 3), np.int32)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "another/base"}')
    with pytest.raises(ValueError, match=r"; give the model that it was trained on \(another/base\)\.$") as raised:
        hf.check_peft(tmp_path, c, adapter)
    said = str(raised.value)
    assert f"{prefix}.0.self_attn.q_proj.lora_B.weight is missing" in said
    assert f"{prefix}.0.self_attn.v_proj.lora_B.weight is unexpected" in said
    assert f"q_proj.lora_A.weight has shape [2, {c.width}], expected [3, {c.width}]" in said
    assert "is stored as I32" in said

"""Adapters of experts and of the embedding: against merged weights with gradients, against PEFT, on a mesh."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import hf, models, sharding
from fpo_jax.models import params
from tests import tolerances
from tests.models import test_lora, test_model

BOTH = "experts|embed_tokens|q_proj"
FAMILIES = ["mixtral", "gpt_oss", "qwen2_moe"]
TOKENS_NT = test_lora.TOKENS_NT


def drawn(family, modules=BOTH, **changed):
    """A tiny model and an adapter, all drawn."""
    c, adapter = test_lora.adapter_of(test_model.VARIANTS[family], modules=modules, **changed)
    return c, adapter, test_model.random_params(c), test_lora.random_adapter(c, adapter)


def dense(tree, added, c, adapter):
    """W + scale A B, written out for every matrix."""
    flat, own = params.flatten(tree), params.flatten(added)
    for entry in (entry for entry in params.entries(c) if entry.path in adapter.targets):
        path, lead = entry.path, entry.stacked + entry.routed
        a, b, letters = own[f"{path}_lora_a"], own[f"{path}_lora_b"], "LE"[:lead]
        inside, outside = "DHC"[: a.ndim - 1 - lead], "xyz"[: b.ndim - 1 - lead]
        product = jnp.einsum(f"{letters}{inside}r,{letters}r{outside}->{letters}{inside}{outside}", a, b)
        flat[path] = flat[path] + adapter.scale * product
    return params.nest(flat)


def total(logits):
    return jnp.mean(jnp.sin(logits))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_the_merged_model_with_its_gradients(family):
    c, adapter, tree, added = drawn(family)
    assert {"embed", "layers/mlp/down", "layers/attention/query"} < set(adapter.targets)

    def beside(added):
        logits = test_lora.logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter)
        return total(logits), logits

    def merged(added):
        logits = test_lora.logits(dense(tree, added, c, adapter), jnp.asarray(TOKENS_NT), config=c, adapter=None)
        return total(logits), logits

    (_, found), grads = jax.value_and_grad(beside, has_aux=True)(added)
    (_, expected), wanted = jax.value_and_grad(merged, has_aux=True)(added)
    assert_allclose(found, expected, rtol=0, atol=tolerances.PARITY_LOGITS)
    for path, one in params.flatten(wanted).items():
        scale = np.abs(one).max()
        assert scale > 0, path
        assert_allclose(params.flatten(grads)[path] / scale, one / scale, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.sampled(2)
@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "modules", "changed"),
    [
        ("mixtral", BOTH, {}),
        ("gpt_oss", BOTH, {}),
        ("mixtral", r"experts.*w[13]\.", {"use_rslora": True}),
        ("qwen2_moe", r"experts.*(up|down)_proj", {}),
        ("llama GQA", "embed_tokens", {}),
    ],
)
def test_peft_and_transformers_read_both_exports(family, modules, changed, tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    peft = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    c, adapter, tree, added = drawn(family, modules, **changed)
    twin = test_model.torch_twin(tmp_path, test_model.VARIANTS[family], tree, c)
    base, out, whole = tmp_path / "model", tmp_path / "peft", tmp_path / "merged"
    hf.write_peft(added, c, adapter, out_dir=out, base_name=str(base), revision=None, source_dir=base)
    ours = test_lora.logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter)
    hf.export(hf.merged(added, base, c, adapter), c, out_dir=whole, source_dir=base, dtype="float32")
    with torch.no_grad():
        tokens = torch.tensor(TOKENS_NT).long()
        before = twin(tokens).logits.numpy()
        wrapped = peft.PeftModel.from_pretrained(twin, out).eval()
        names = {name.replace(".default", "") for name, _ in wrapped.named_parameters() if "lora_" in name}
        assert names == set(hf.peft._header(out))
        of_adapter = wrapped(tokens).logits.numpy()
        read = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype="float32").eval()
        of_merged = read(tokens).logits.numpy()
    assert np.abs(ours - before).max() > 0.01
    assert_allclose(ours, of_merged, rtol=0, atol=tolerances.PARITY_LOGITS)
    assert_allclose(ours, of_adapter, rtol=0, atol=tolerances.PARITY_LOGITS)


@pytest.mark.slow  # compiles for four virtual devices
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_mesh_with_experts_and_tensor_gives_the_same_gradients(family):
    published = test_model.VARIANTS[family] | {"num_local_experts": 4}
    c, adapter = test_lora.adapter_of(published, modules=BOTH)
    tree, added = test_model.random_params(c), test_lora.random_adapter(c, adapter)
    tokens_NT = np.concatenate([TOKENS_NT, TOKENS_NT[:, ::-1]])[:, :8]

    def run(layout):
        def loss(added):
            hidden_NTD = models.hidden_states(
                params.union(tree, added), jnp.asarray(tokens_NT), jnp.ones(tokens_NT.shape, bool), config=c,
                compute_dtype="float32", adapter=adapter, layout=layout,
            )  # fmt: skip
            return total(hidden_NTD)

        return jax.jit(jax.value_and_grad(loss), compiler_options=test_model.QUICK)(added)

    value, wanted = run(sharding.ONE_DEVICE)
    mesh = sharding.make_mesh(data=1, fsdp=1, expert=2, tensor=2, devices=jax.devices()[:4])
    found, grads = run(sharding.Layout(mesh))
    assert_allclose(found, value, rtol=1e-5)
    for path, one in params.flatten(wanted).items():
        assert_allclose(params.flatten(grads)[path], one, rtol=0, atol=1e-4 * np.abs(one).max(), err_msg=path)


def test_no_array_has_an_axis_of_tokens_one_of_experts_and_the_rank():
    c, adapter, tree, added = drawn("mixtral", "experts", rank=13)

    def loss(added):
        return total(test_lora.logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter))

    text = str(jax.make_jaxpr(jax.grad(loss))(added))
    tokens = TOKENS_NT.size * c.experts_per_token
    assert f"f32[{tokens},13]" in text
    assert f"[{tokens},{c.experts},13" not in text and f"[{c.experts},{tokens},13" not in text


def test_experts_below_an_adapter_may_be_in_four_bits(tmp_path):
    """And what is merged then is what was trained."""
    published = test_model.MIXTRAL | {"hidden_size": 64, "intermediate_size": 64}
    c, adapter = test_lora.adapter_of(published, modules="experts", base_dtype="nf4")
    assert "layers/mlp/gate" in adapter.quantised
    tree, added = test_model.random_params(c), test_lora.random_adapter(c, adapter)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(published))
    hf.export(tree, c, out_dir=tmp_path / "model", source_dir=tmp_path / "source", dtype="float32")
    flat = params.flatten(tree)
    axes = {entry.path: params.four_bit_axis(entry, c) for entry in params.entries(c)}
    held = {path: models.nf4.quantise(flat[path], axes[path]) for path in adapter.quantised}
    run = functools.partial(test_lora.logits, tokens_NT=jnp.asarray(TOKENS_NT), config=c)
    ours = run(params.union(params.nest(flat | held), added), adapter=adapter)
    hf.export(
        hf.merged(added, tmp_path / "model", c, adapter), c, out_dir=tmp_path / "out", source_dir=tmp_path / "model",
        dtype="float32",
    )  # fmt: skip
    assert_allclose(run(hf.load_params(tmp_path / "out", c, dtype="float32"), adapter=None), ours, rtol=0, atol=1e-4)


def test_an_adapter_of_the_embedding_is_read_back(tmp_path):
    c, adapter, _, added = drawn("llama GQA", "embed_tokens|q_proj")
    (tmp_path / "source").mkdir()
    hf.write_peft(
        added, c, adapter, out_dir=tmp_path / "peft", base_name="base", revision=None, source_dir=tmp_path / "source"
    )
    read = hf.read_peft(tmp_path / "peft", c)
    same = params.adapter(c, **read)
    assert same.targets == adapter.targets
    found = params.flatten(hf.load_peft(tmp_path / "peft", c, same))
    for path, one in params.flatten(added).items():
        assert_allclose(found[path], one, rtol=0)


def test_a_copy_of_the_embedding_beside_its_adapter_is_refused(tmp_path):
    """PEFT writes one unless it is told not to."""
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    peft = pytest.importorskip("peft", reason="peft is absent")
    c, adapter, tree, _ = drawn("llama GQA", "embed_tokens|q_proj")
    twin = test_model.torch_twin(tmp_path, test_model.VARIANTS["llama GQA"], tree, c)
    options = peft.LoraConfig(r=adapter.rank, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    wrapped = peft.get_peft_model(twin, options)
    starts = {name: p for name, p in wrapped.named_parameters() if "lora_embedding" in name}
    assert [bool(torch.any(p)) for p in starts.values()] == [False, True], "A starts at zero, as ours"
    wrapped.save_pretrained(tmp_path / "with")
    with pytest.raises(ValueError, match=r"holds a copy of an embedding, .*; save it by PEFT with"):
        hf.check_peft(tmp_path / "with", c, adapter)
    wrapped.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    hf.check_peft(tmp_path / "without", c, params.adapter(c, **hf.read_peft(tmp_path / "without", c)))


def test_an_adapter_of_experts_is_started_from_by_peft_alone(tmp_path):
    c, adapter, _, added = drawn("mixtral")
    (tmp_path / "source").mkdir()
    hf.write_peft(
        added, c, adapter, out_dir=tmp_path / "peft", base_name="base", revision=None, source_dir=tmp_path / "source"
    )
    with pytest.raises(ValueError, match=r"has .*target_parameters=.*train that adapter with PEFT"):
        hf.read_peft(tmp_path / "peft", c)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("mixtral", {"modules": "experts", "use_dora": True}, r"lora\.use_dora has no magnitudes of it; unset"),
        ("llama GQA", {"modules": "embed", "use_dora": True}, r"lora\.use_dora has no magnitudes of it; unset"),
        ("gpt_oss", {"modules": "experts", "dropout": 0.1}, r"lora\.dropout=0\.1 is not built beside experts"),
        ("gpt_oss", {"modules": "router|experts"}, r"the router has no adapter; name others"),
        ("llama tied", {"modules": "embed_tokens"}, r"is the LM head too, .*; train it whole by lora\.modules_to_save"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(family, changed, message):
    with pytest.raises(ValueError, match=message):
        test_lora.adapter_of(test_model.VARIANTS[family], **changed)

"""Adapters: a step against PEFT and torch, a frozen base, dropout, resumption, meshes, both exports."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from fpo_jax import checkpoint, hf, models
from fpo_jax.models import families, layers, params
from fpo_jax.trainer import export, metric_logger, run_inputs, trainer
from tests import resuming, tiny, tolerances
from tests.models import test_model

LORA = {"lora__rank": 3, "lora__alpha": 6.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    tiny.write_model(root / "model", layers=2)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    return root


def config(base, **changed):
    defaults = {
        "train__max_steps": 3,
        "train__epochs": 2.0,
        "optim__learning_rate": 1e-2,
        "train__save_every": 1,
        "optim__warmup_fraction": 0.0,
    }
    return tiny.config(base / "model", base / "pairs.jsonl", **(LORA | defaults | changed))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    trainer.run(config(base), workdir)
    return workdir


def adapter_of(published, **changed):
    c = models.from_hf_config(published)
    return c, params.adapter(c, **({"rank": 3, "alpha": 6.0, "dropout": 0.0, "modules": "all-linear"} | changed))


def random_adapter(c, adapter, seed=1):
    random = np.random.default_rng(seed)
    return params.nest(
        {
            entry.path: jnp.asarray(random.normal(size=entry.shape) * 0.2, jnp.float32)
            for entry in params.trained_entries(c, adapter)
        }
    )


@functools.partial(jax.jit, static_argnames=("config", "adapter"))
def logits(tree, tokens_NT, key=None, *, config, adapter):
    hidden_NTD = models.hidden_states(
        tree, tokens_NT, jnp.ones(tokens_NT.shape, bool), config=config, compute_dtype="float32", adapter=adapter,
        dropout_key=key,
    )  # fmt: skip
    return jax.vmap(lambda hidden_ND: models.logits(tree, hidden_ND, config=config))(hidden_NTD)


FAMILIES = ["llama GQA", "mistral window", "qwen2", "qwen3", "gemma2", "gpt2", "neox parallel"]
LATER = ["llama biases", "gemma", "gemma3", "phi3", "olmo2", "olmo3", "granite tied", "smollm3 sliding", "ministral"]
LATER += ["arcee", "internlm3", "seed_oss", "exaone4", "helium", "glm", "glm4", "cohere", "cohere2", "starcoder2"]
LATER += ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2"]
TOKENS_NT = np.random.default_rng(0).integers(3, 30, size=(2, 9)).astype(np.int32)


@pytest.mark.sampled(6)
@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_the_adapter_and_gives_the_same_logits_and_gradients(name, tmp_path):
    check_peft(name, tmp_path)


@pytest.mark.sampled(14)
@pytest.mark.parity
@pytest.mark.parametrize("name", LATER)
def test_peft_reads_the_adapter_of_later_families(name, tmp_path):
    check_peft(name, tmp_path)


def check_peft(name, tmp_path):
    """Compare the logits and the gradients of an adapter of all matrices with PEFT's."""
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    peft = pytest.importorskip("peft", reason="peft is absent")
    mlp = families.FAMILIES[test_model.VARIANTS[name]["model_type"]].peft_has_mlp
    c, adapter = adapter_of(test_model.VARIANTS[name], **({} if mlp else {"modules": "self_attn"}))
    tree, added = test_model.random_params(c), random_adapter(c, adapter)
    theirs = test_model.torch_twin(tmp_path, test_model.VARIANTS[name], tree, c)
    base = tmp_path / "model"
    hf.write_peft(added, c, adapter, out_dir=tmp_path / "peft", base_name=str(base), revision=None, source_dir=base)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft", is_trainable=True).eval()
    expected = wrapped(torch.tensor(TOKENS_NT).long()).logits
    ours = logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter)
    assert_allclose(ours, expected.detach().numpy(), rtol=0, atol=tolerances.PARITY_LOGITS)
    plain = logits(tree, jnp.asarray(TOKENS_NT), config=c, adapter=None)
    assert np.abs(np.asarray(plain) - np.asarray(ours)).max() > 0.05

    expected.square().mean().backward()
    gradient = jax.grad(
        lambda added: jnp.mean(
            jnp.square(logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter))
        )
    )(added)
    flat = params.flatten(gradient)
    named = {key.replace(".default", ""): value for key, value in wrapped.named_parameters()}
    for entry in params.adapter_entries(c, adapter):
        for key, place in entry.tensors():
            found = params.to_hf(entry, np.asarray(flat[entry.path][place]))
            wanted = named[key].grad.numpy()
            assert_allclose(found, wanted, rtol=0, atol=tolerances.PARITY_GRADIENT * np.abs(wanted).max(), err_msg=key)


def test_an_adapter_that_peft_would_take_for_one_of_the_experts_is_not_written_for_it(tmp_path):
    c, adapter = adapter_of(test_model.DEEPSEEK_V2)
    added = random_adapter(c, adapter)
    with pytest.raises(ValueError, match=r"MLPs and shared experts of deepseek_v2 .* export the merged model"):
        hf.write_peft(
            added, c, adapter, out_dir=tmp_path / "peft", base_name="base", revision=None, source_dir=tmp_path
        )
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_equals_unmerged(name, tmp_path):
    check_merged(name, tmp_path)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", LATER)
def test_merged_equals_unmerged_in_later_families(name, tmp_path):
    check_merged(name, tmp_path, atol=tolerances.MERGED_LARGER)


def check_merged(name, tmp_path, *, atol=tolerances.MERGED):
    """Compare a base and an adapter of some matrices with the model that both are together."""
    published = test_model.VARIANTS[name]
    c, adapter = adapter_of(
        published, modules="q_proj|qkv|query_key_value|c_attn|(mlp|_experts?).down_proj|c_proj|4h_to_h"
    )
    tree, added = test_model.random_params(c), random_adapter(c, adapter)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(published))
    hf.export(tree, c, out_dir=tmp_path / "base", source_dir=tmp_path / "source", dtype="float32")
    whole = hf.merged(added, tmp_path / "base", c, adapter)
    hf.export(whole, c, out_dir=tmp_path / "merged", source_dir=tmp_path / "base", dtype="float32")
    read = hf.load_params(tmp_path / "merged", c, dtype="float32")
    ours = logits(params.union(tree, added), jnp.asarray(TOKENS_NT), config=c, adapter=adapter)
    merged = logits(read, jnp.asarray(TOKENS_NT), config=c, adapter=None)
    assert_allclose(merged, ours, rtol=0, atol=atol)
    untouched = [entry.path for entry in params.entries(c) if f"{entry.path}_lora_a" not in params.flatten(added)]
    for path in untouched:
        np.testing.assert_array_equal(params.flatten(read)[path], params.flatten(tree)[path], err_msg=path)


# --- runs


def test_a_fresh_adapter_changes_nothing_and_the_reference_is_the_base(run):
    lines = metric_logger.read(run / metric_logger.METRICS_FILE)
    first, *_, last = lines
    assert first["eval_reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(last["eval_reference_kl"]) > 1e-4 and last["eval_loss"] < first["eval_loss"]


def test_checkpoints_hold_the_adapter_alone(run, base):
    tree, meta = checkpoint.restore_params(run, None)
    paths = set(params.flatten(tree))
    assert all("_lora_" in path for path in paths) and len(paths) == 2 * 7
    assert meta["config"]["lora"]["rank"] == 3


def test_the_base_is_bit_unchanged_and_both_exports_agree(run, base, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    peft = pytest.importorskip("peft", reason="peft is absent")
    import transformers

    export.export(run, tmp_path / "merged", step=None, dtype=None)
    assert "adapter of rank 3 over 7 matrices, step 3" in export.export(
        run, tmp_path / "adapter", step=None, dtype=None, lora="adapter"
    )
    before, after = (
        params.flatten(hf.load_params(d, hf.read_config(d), dtype="float32"))
        for d in (base / "model", tmp_path / "merged")
    )
    changed = {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}
    assert changed == {
        path.removesuffix("_lora_a")
        for path in params.flatten(checkpoint.restore_params(run, None)[0])
        if path.endswith("_a")
    }
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype="float32")
    wrapped = peft.PeftModel.from_pretrained(load(base / "model"), tmp_path / "adapter").eval()
    with torch.no_grad():
        tokens = torch.tensor(TOKENS_NT).long()
        assert_allclose(
            wrapped(tokens).logits,
            load(tmp_path / "merged").eval()(tokens).logits,
            rtol=0,
            atol=tolerances.PARITY_LOGITS,
        )


def test_a_resumed_run_is_that_of_an_uninterrupted_one(base, run, tmp_path, monkeypatch):
    with resuming.signalled(monkeypatch, after=2):
        trainer.run(config(base), tmp_path / "w")
    trainer.run(config(base), tmp_path / "w")
    ours, theirs = (params.flatten(checkpoint.restore_params(w, None)[0]) for w in (tmp_path / "w", run))
    for path in theirs:
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(theirs[path]), err_msg=path)
    assert (tmp_path / "w" / metric_logger.METRICS_FILE).read_bytes() == (run / metric_logger.METRICS_FILE).read_bytes()


@pytest.mark.slow  # a second set of compilations
def test_weights_gathered_once_an_update_give_the_same_losses(base, run, tmp_path):
    trainer.run(config(base, mesh__data=1, mesh__fsdp=8, mesh__preset="zero2"), tmp_path / "w")
    ours, theirs = (
        [line["loss"] for line in metric_logger.read(w / metric_logger.METRICS_FILE) if "loss" in line]
        for w in (tmp_path / "w", run)
    )
    assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_reward_model_trains_its_head_beside_the_adapter(base, tmp_path):
    c = config(base, stage="reward", loss__name="bradley_terry", loss__alpha=None, loss__beta_pi=None)
    trainer.run(c, tmp_path / "w")
    tree, _ = checkpoint.restore_params(tmp_path / "w", None)
    assert "score" in tree and "embed" not in tree
    export.export(tmp_path / "w", tmp_path / "rm", step=None, dtype=None)
    read = hf.load_params(tmp_path / "rm", hf.read_config(tmp_path / "rm"), dtype="float32")
    np.testing.assert_array_equal(read["score"], np.asarray(tree["score"]))


# --- dropout


def test_dropout_is_unbiased_and_new_for_every_key():
    adapter, random = models.Adapter(2, 4.0, 0.4, ()), np.random.default_rng(0)
    a, b = random.normal(size=(6, 2)), random.normal(size=(2, 5))
    module = nnx.Module()
    module.up_lora_a, module.up_lora_b = nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b))
    x_NTD = jnp.asarray(random.normal(size=(1, 3, 6)), jnp.float32)

    def added(key):
        context = layers.Context(None, None, 1.0, None, None, None, None, adapter, key)
        return context._adapted("NTD,DF->NTF", x_NTD, module, "up")

    plain = np.asarray(added(None))
    assert_allclose(plain, 2.0 * (np.asarray(x_NTD) @ a @ b), rtol=0, atol=1e-5)
    drawn = np.asarray(jax.vmap(added)(jax.random.split(jax.random.key(0), 4000)))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1
    away = np.abs(drawn.mean(axis=0) - plain) / (drawn.std(axis=0) / np.sqrt(len(drawn)))
    assert away.max() < 4.5, "fifteen means, each within 4.5 standard errors"


def test_every_layer_and_update_drops_something_else(base, tmp_path):
    c, _ = adapter_of(test_model.VARIANTS["llama GQA"])
    adapter = params.adapter(c, rank=3, alpha=6.0, dropout=0.4, modules="down_proj")
    tree = params.union(test_model.random_params(c), random_adapter(c, adapter))
    one, two = (
        np.asarray(logits(tree, jnp.asarray(TOKENS_NT), jax.random.key(i), config=c, adapter=adapter)) for i in (0, 1)
    )
    assert np.abs(one - two).max() > 1e-3
    traced = str(
        jax.make_jaxpr(functools.partial(logits.__wrapped__, config=c, adapter=adapter))(
            tree, jnp.asarray(TOKENS_NT), jax.random.key(0)
        )
    )
    assert traced.count("random_fold_in") >= 2, "by layer and by matrix"


def test_without_dropout_no_randomness_is_traced():
    c, adapter = adapter_of(test_model.VARIANTS["llama GQA"])
    tree = params.union(test_model.random_params(c), random_adapter(c, adapter))
    traced = str(jax.make_jaxpr(functools.partial(logits.__wrapped__, config=c, adapter=adapter))(tree, TOKENS_NT * 1))
    assert "random" not in traced and "threefry" not in traced


# --- settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora__rank": 0}, "lora.alpha=6.0 is not used while lora.rank is 0"),
        ({"lora__dropout": 1.0}, r"lora.dropout=1.0 must lie in \[0, 1\)"),
        ({"lora__modules": "("}, "is no regular expression"),
        ({"lora__alpha": 0.0}, "lora.alpha=0.0 must be finite and greater than 0"),
    ],
)
def test_settings_out_of_range_are_listed(base, changed, message):
    with pytest.raises(ValueError, match=message):
        run_inputs.check(config(base, **changed))


def test_a_pattern_that_fits_nothing_lists_what_there_is(base):
    with pytest.raises(
        ValueError, match=r"'query_key_value' is in no name .*: down_proj, (embed_tokens, )?gate_proj, k_proj, o_proj"
    ):
        run_inputs.prepare(config(base, lora__modules="query_key_value"))


def test_an_adapter_of_no_adapter_is_refused(run, tmp_path, monkeypatch):
    tree, meta = checkpoint.restore_params(run, None)
    meta["config"]["lora"]["rank"] = 0
    monkeypatch.setattr(checkpoint, "restore_params", lambda workdir, step: (tree, meta))
    with pytest.raises(ValueError, match="trained no adapter"):
        export.export(run, tmp_path / "a", step=None, dtype=None, lora="adapter")


@pytest.mark.parametrize("modules", [r"gate\.weight|q_proj", "mlp"])
def test_an_adapter_of_the_router_is_refused_by_name(modules):
    with pytest.raises(ValueError, match=r"is in the name .*mlp\.gate.*the router has no adapter"):
        adapter_of(test_model.QWEN3_MOE, modules=modules)


def test_an_adapter_of_all_linear_layers_leaves_out_the_router_and_the_experts():
    _, adapter = adapter_of(test_model.QWEN3_MOE)
    assert adapter.targets == tuple(f"layers/attention/{name}" for name in ("query", "key", "value", "out"))
    _, adapter = adapter_of(test_model.QWEN2_MOE)
    assert adapter.targets[4:] == tuple(f"layers/mlp/shared_{name}" for name in ("gate", "up", "down", "share"))


@pytest.mark.parametrize(
    ("published", "changed", "message"),
    [
        (
            "llama GQA",
            {"modules_to_save": ("ln_f",)},
            "'ln_f' is the end of no module's name in this model: .*, norm, ",
        ),
        (
            "llama tied",
            {"modules_to_save": ("lm_head",)},
            "'lm_head' is the end of no .*; the LM head is model.embed_tok",
        ),
        (
            "llama GQA",
            {"modules_to_save": ("down_proj",)},
            "down_proj.weight is named by lora.modules and by lora.modul",
        ),
        (
            "qwen3_moe",
            {"modules_to_save": ("mlp.gate",)},
            "'mlp.gate' is the end of .*, and the router and the experts",
        ),
    ],
)
def test_modules_to_save_that_cannot_be_are_refused_by_name(published, changed, message):
    with pytest.raises(ValueError, match=message):
        adapter_of(test_model.VARIANTS[published], **changed)


def test_a_name_is_the_end_of_those_that_peft_would_take():
    _, adapter = adapter_of(test_model.VARIANTS["llama GQA"], modules_to_save=("norm", "lm_head"))
    assert adapter.saved == ("layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale", "head")
    _, adapter = adapter_of(test_model.VARIANTS["llama GQA"], modules_to_save=("model.norm",))
    assert adapter.saved == ("final_norm/scale",)


def test_the_norms_of_dora_are_those_of_the_whole_matrices():
    c, adapter = adapter_of(test_model.VARIANTS["llama GQA"], use_dora=True)
    tree, added = params.flatten(test_model.random_params(c)), params.flatten(random_adapter(c, adapter))
    module = nnx.Module()
    for name, value in (
        ("out", tree["layers/attention/out"]),
        *((f"out_lora_{part}", added[f"layers/attention/out_lora_{part}"]) for part in "abm"),
    ):
        setattr(module, name, nnx.Param(value[0]))
    context = layers.Context(None, None, 1.0, None, None, None, None, adapter)
    with jax.default_matmul_precision("highest"):
        found = context._magnified("NTHC,HCD->NTD", module, "out")
    whole = module.out[...] + adapter.scale * jnp.einsum("HCr,rD->HCD", module.out_lora_a[...], module.out_lora_b[...])
    expected = module.out_lora_m[...] / np.linalg.norm(np.asarray(whole).reshape(-1, c.width), axis=0)
    assert_allclose(found, expected, rtol=1e-5)

"""Model directories: import, export, atomicity, sharding, and every way a directory can be broken."""

import dataclasses
import fnmatch
import hashlib
import json
import os
import stat

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_array_equal

from fpo_jax import hf, models, sharding
from fpo_jax.models import params
from tests.models import test_model_configuration

LLAMA = models.ModelConfig(
    family="llama",
    vocab_size=11,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn=20,
    max_positions=32,
    eos_ids=(2,),
)
CONFIGS = {
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tied_head=True),
    "mistral": dataclasses.replace(LLAMA, family="mistral", sliding_window=3),
    "gpt_neox": dataclasses.replace(LLAMA, family="gpt_neox", heads=2, kv_heads=2, parallel_residual=True),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", width=16, ffn=24, experts=3, experts_per_token=2),
    "gpt_oss": dataclasses.replace(
        LLAMA, family="gpt_oss", width=16, ffn=24, experts=3, experts_per_token=2, sliding_window=3
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TENSORS = {
    "llama": 2 * 9 + 3,
    "llama tied": 2 * 9 + 2,
    "mistral": 2 * 9 + 3,
    "gpt_neox": 2 * 12 + 4,
    "mixtral": 2 * (6 + 1 + 9) + 3,
    "gpt_oss": 2 * (2 + 8 + 1 + 2 + 4) + 3,
}
DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def tensors_of(config, dtype="float32", seed=0):
    """Random tensors under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=entry.hf_shape).astype(DTYPES[dtype])
        for entry in params.entries(config)
        for name in entry.hf_names()
    }


def write(directory, config, tensors):
    """A model directory as the hub has them: weights, config, generation config, tokenizer, template."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(models.to_hf_config(config) | {"torch_dtype": "float16"}))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").write_text("a model card stays behind")
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_sharded(directory, config, tensors):
    """The same in two shards with an index."""
    write(directory, config, tensors)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def load(directory, config, dtype="float32", **options):
    assert hf.read_config(directory) == config
    return hf.load_params(hf.local_dir(directory), config, dtype=dtype, **options)


def read_all(directory):
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(path).items()
    }


@each_config
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writer", [write, write_sharded])
def test_round_trip_is_bit_identical(tmp_path, config, dtype, writer):
    tensors = tensors_of(config, dtype)
    source = writer(tmp_path / "source", config, tensors)
    tree = load(source, config, dtype)
    params.check(tree, config)
    for out, limit in (("single", 10**9), ("sharded", 2000)):
        hf.export(tree, config, out_dir=tmp_path / out, source_dir=source, dtype=DTYPES[dtype], max_shard_bytes=limit)
        found = read_all(tmp_path / out)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].tobytes() == tensor.tobytes(), name
        again = load(tmp_path / out, config, dtype)
        jax.tree.map(assert_array_equal, again, tree)
    if writer is write:  # even the file is the same, byte for byte
        assert (tmp_path / "single" / hf.SINGLE).read_bytes() == (source / hf.SINGLE).read_bytes()
    assert len(tensors) == TENSORS[next(name for name, value in CONFIGS.items() if value == config)]


def test_shards_keep_their_limit_and_the_index_is_complete(tmp_path):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    tree = load(source, LLAMA)
    hf.export(tree, LLAMA, out_dir=tmp_path / "out", source_dir=source, dtype="float32", max_shard_bytes=3000)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"] == {"total_parameters": params.count(LLAMA), "total_size": 4 * params.count(LLAMA)}
    for file in files:
        with safetensors.safe_open(tmp_path / "out" / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        assert {name: file for name in tensors} == {k: v for k, v in index["weight_map"].items() if v == file}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 3000 or len(tensors) == 1


def test_export_copies_what_a_model_needs_and_updates_the_dtype(tmp_path):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float16", "auto_map": {"AutoModel": "x.Y"}}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    out = tmp_path / "deep" / "er" / "out"
    hf.export(load(source, LLAMA), LLAMA, out_dir=out, source_dir=source, dtype="bfloat16")
    assert sorted(path.name for path in out.iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "digests.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert {tensor.dtype for tensor in read_all(out).values()} == {DTYPES["bfloat16"]}
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (out / "config.json").stat().st_mode
    )


def test_load_casts_once_and_places_on_the_mesh(tmp_path):
    config = dataclasses.replace(LLAMA, width=16, vocab_size=12)
    tensors = tensors_of(config)
    source = write(tmp_path / "source", config, tensors)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    abstract = params.abstract(config, "bfloat16")
    places = params.shardings(config, mesh=mesh)
    tree = load(source, config, "bfloat16", shardings=places)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree) == abstract
    assert jax.tree.map(lambda x: x.sharding, tree) == places
    query = tensors["model.layers.1.self_attn.q_proj.weight"].reshape(4, 6, 16).transpose(2, 0, 1)
    assert_array_equal(np.asarray(tree["layers"]["attention"]["query"][1]), query.astype(ml_dtypes.bfloat16))
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=source, dtype="bfloat16")
    for name, tensor in read_all(tmp_path / "out").items():
        assert_array_equal(tensor, tensors[name].astype(ml_dtypes.bfloat16))


def test_export_takes_host_arrays(tmp_path):
    tensors = tensors_of(LLAMA)
    source = write(tmp_path / "source", LLAMA, tensors)
    tree = jax.tree.map(np.asarray, load(source, LLAMA))
    hf.export(tree, LLAMA, out_dir=tmp_path / "out", source_dir=source, dtype=jnp.float32)
    assert (tmp_path / "out" / hf.SINGLE).read_bytes() == (source / hf.SINGLE).read_bytes()


def test_known_buffers_and_a_tied_copy_of_the_head_are_passed_over(tmp_path):
    config = CONFIGS["llama tied"]
    tensors = tensors_of(config)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    extra |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in (0, 1)}
    tree = load(write(tmp_path / "a", config, tensors | extra), config)
    jax.tree.map(assert_array_equal, tree, load(write(tmp_path / "b", config, tensors), config))
    neox = CONFIGS["gpt_neox"]
    buffers = {f"gpt_neox.layers.{layer}.attention.bias": np.ones((1, 1, 4, 4), np.bool_) for layer in (0, 1)}
    buffers |= {"gpt_neox.layers.1.attention.masked_bias": np.array(-1e9, np.float32)}
    load(write(tmp_path / "c", neox, tensors_of(neox) | buffers), neox)


def broken(tmp_path, change, config=LLAMA):
    tensors = tensors_of(config)
    change(tensors)
    return write(tmp_path / "source", config, tensors)


def test_every_tensor_problem_is_named_at_once(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((20, 12), np.float32)
        tensors["score.weight"] = np.zeros((1, 12), np.float32)
        tensors["lm_head.weight"] = np.zeros((12, 12), np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(12, np.int8)

    with pytest.raises(ValueError, match="do not fit its config") as caught:
        load(broken(tmp_path, change), LLAMA)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.2.mlp.up_proj.weight is unexpected",
        "score.weight is unexpected",
        "lm_head.weight has shape (12, 12), the config asks for (11, 12)",
        "model.layers.0.input_layernorm.weight is stored as I8, supported are BF16, F16, F32, F64",
    ):
        assert part in str(caught.value)


def test_a_long_list_of_problems_is_cut(tmp_path):
    with pytest.raises(ValueError, match=r"is missing; and 1 more\.$"):
        load(broken(tmp_path, lambda tensors: tensors.clear()), LLAMA)


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    config = CONFIGS["llama tied"]
    head = {"lm_head.weight": np.zeros((11, 12), np.float32)}
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the two differ"):
        load(broken(tmp_path, lambda tensors: tensors.update(head), config), config)


def test_missing_and_damaged_shards_are_named_together(tmp_path):
    source = write_sharded(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    first, second = sorted(source.glob("model-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002.safetensors, named by the index, is missing; model-00002"
    ):
        load(source, LLAMA)
    second.write_bytes(b"\x01")
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged or cut short"):
        load(source, LLAMA)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_an_error(tmp_path, cut):
    path = write(tmp_path / "source", LLAMA, tensors_of(LLAMA)) / hf.SINGLE
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short \(.*\); fetch it again"):
        load(path.parent, LLAMA)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    source = write_sharded(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    first, second = sorted(source.glob("model-*"))
    both = safetensors.numpy.load_file(first)
    safetensors.numpy.save_file(both | safetensors.numpy.load_file(second), second)
    with pytest.raises(ValueError, match=r"stands in several files, one of them model-00002"):
        load(source, LLAMA)


def test_an_index_cannot_lead_outside(tmp_path):
    source = write_sharded(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    (source / hf.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names files outside its directory: \.\./secret\.safetensors"):
        hf.local_dir(source)
    (source / hf.INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"has no weight_map from tensor names to file names"):
        hf.local_dir(source)


def test_single_file_and_index_together_are_ambiguous(tmp_path):
    source = write_sharded(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    write(source, LLAMA, tensors_of(LLAMA))
    with pytest.raises(ValueError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        hf.local_dir(source)


def test_pickles_are_refused_in_one_sentence(tmp_path):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    (source / hf.SINGLE).rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights only as pickles \(pytorch_model\.bin\), which run code when read"):
        hf.local_dir(source)


def test_places_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has neither model\.safetensors nor model\.safetensors\.index\.json"):
        hf.local_dir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"absent is not a directory; give a model directory or a hub name"):
        hf.local_dir(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"some-org/absent is no directory here and could not be fetched from the hub"):
        hf.local_dir("some-org/absent")
    with pytest.raises(ValueError, match=r"could not be fetched from the hub at revision v9"):
        hf.local_dir("some-org/absent", revision="v9")
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    with pytest.raises(ValueError, match=r"is a local directory, revision='main' has no meaning"):
        hf.local_dir(source, revision="main")
    assert hf.local_dir(str(source)) == source


def test_a_hub_name_fetches_weights_config_and_tokenizer_only(tmp_path, monkeypatch):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.local_dir("org/name-7b", revision="abc") == source
    assert (asked["name"], asked["revision"]) == ("org/name-7b", "abc")

    def fetched(file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["patterns"])

    wanted = ["model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json"]
    wanted += ["generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    wanted += ["special_tokens_map.json", "chat_template.jinja", "merges.txt", "added_tokens.json"]
    refused = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling_llama.py",
        "original/model.pth",
        "tf_model.h5",
    ]
    assert all(map(fetched, wanted))
    assert not any(map(fetched, refused))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json is not valid JSON .*; fetch it again"),
        ("[]", r"config\.json holds a list, expected a JSON object"),
        ('{"model_type": "bert"}', r"model_type 'bert' is not supported"),
        (None, r"config\.json is missing"),
    ],
)
def test_broken_configs(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path)


def test_export_refuses_a_used_directory_and_another_model(tmp_path):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    tree = load(source, LLAMA)
    common = {"source_dir": source, "dtype": "float32"}
    with pytest.raises(ValueError, match=r"source exists and is not an empty directory; choose another or remove it"):
        hf.export(tree, LLAMA, out_dir=source, **common)
    with pytest.raises(ValueError, match=r"README\.md exists and is not an empty directory"):
        hf.export(tree, LLAMA, out_dir=source / "README.md", **common)
    deeper = dataclasses.replace(LLAMA, norm_eps=0.5)
    with pytest.raises(ValueError, match=r"describes another model: norm_eps is 1e-05 there and 0\.5 here"):
        hf.export(tree, deeper, out_dir=tmp_path / "out", **common)
    with pytest.raises(
        ValueError, match=r"final_norm is missing; final_norm/scale is missing|final_norm/scale is missing"
    ):
        hf.export({k: v for k, v in tree.items() if k != "final_norm"}, LLAMA, out_dir=tmp_path / "out", **common)
    (tmp_path / "out").mkdir()
    hf.export(tree, LLAMA, out_dir=tmp_path / "out", **common)
    assert (tmp_path / "out" / hf.SINGLE).exists()


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, "float32"), (1e5, "float16")])
def test_a_failed_export_leaves_nothing(tmp_path, bad, dtype):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    tree = load(source, LLAMA)
    tree["layers"]["mlp"]["up"] = tree["layers"]["mlp"]["up"].at[1, 2, 3].set(bad)
    with pytest.raises(
        ValueError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite in {dtype}"
    ):
        hf.export(tree, LLAMA, out_dir=tmp_path / "out", source_dir=source, dtype=dtype, max_shard_bytes=2000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_export_leaves_no_directory_under_its_name(tmp_path, monkeypatch):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    tree = load(source, LLAMA)
    seen, to_hf = [], params.to_hf

    def stop(row, array):
        if row.path != "final_norm/scale":
            return to_hf(row, array)
        seen.append((tmp_path / "out").exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(params, "to_hf", stop)
    with pytest.raises(KeyboardInterrupt):
        hf.export(tree, LLAMA, out_dir=tmp_path / "out", source_dir=source, dtype="float32")
    assert seen == [False]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_vocabulary():
    hf.check_vocabulary(10, LLAMA)
    hf.check_vocabulary(11, LLAMA)
    with pytest.raises(ValueError, match=r"the tokenizer has 12 tokens, the model 11 embeddings"):
        hf.check_vocabulary(12, LLAMA)


def test_fingerprint_covers_weights_and_config_and_nothing_else(tmp_path):
    source = write_sharded(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    original = hf.weights_fingerprint(source)
    assert len(original) == 64
    os.utime(source / "config.json", (0, 0))
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors.bak").write_text("x")
    assert hf.weights_fingerprint(source) == original
    shard = source / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    flipped = hf.weights_fingerprint(source)
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    assert len({original, flipped, hf.weights_fingerprint(source)}) == 3
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        hf.weights_fingerprint(source)


def test_fingerprint_by_hand(tmp_path):
    source = write(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    lines = [
        f"{name} {hashlib.sha256((source / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert hf.weights_fingerprint(source) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parity
@each_config
@pytest.mark.parametrize("limit", [10**9, 2000])
def test_transformers_opens_the_export_and_writes_the_same_tensors_back(tmp_path, config, limit):
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    transformers = pytest.importorskip("transformers")
    tensors = tensors_of(config, "bfloat16")
    source = write(tmp_path / "source", config, tensors)
    hf.export(
        load(source, config, "bfloat16"),
        config,
        out_dir=tmp_path / "out",
        source_dir=source,
        dtype="bfloat16",
        max_shard_bytes=limit,
    )
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.dtype == torch.bfloat16
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    tokens = torch.arange(10)[None]
    assert torch.equal(opened(tokens).logits, original(tokens).logits)
    opened.save_pretrained(tmp_path / "theirs")
    theirs = read_all(tmp_path / "theirs")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].tobytes() == tensor.tobytes(), name
    assert hf.read_config(tmp_path / "theirs") == config
    tree = hf.load_params(tmp_path / "theirs", config, dtype="bfloat16")
    jax.tree.map(assert_array_equal, tree, load(source, config, "bfloat16"))


@pytest.mark.parity
@pytest.mark.parametrize("named", ["model.language_model.{rest}", "language_model.model.{rest}"])
def test_the_text_tower_of_a_multimodal_checkpoint_is_read_and_exported_alone(tmp_path, named, caplog):
    """As transformers 5 and 4 name its tensors; the export opens as a language model with the same logits."""
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    transformers = pytest.importorskip("transformers")
    text = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, max_position_embeddings=64,
    )  # fmt: skip
    twin = transformers.Gemma3ForCausalLM(text).eval()
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(whole | {"text_config": json.loads(text.to_json_string())}))
    own = {name: tensor.detach().numpy() for name, tensor in twin.named_parameters()}
    tensors = {named.format(rest=name.removeprefix("model.")): tensor for name, tensor in own.items()}
    towers = {name: np.ones((2, 3), np.float32) for name in ("vision_tower.a", "model.multi_modal_projector.b")}
    safetensors.numpy.save_file(tensors | towers, source / "model.safetensors", metadata={"format": "pt"})
    config = hf.read_config(source)
    tree = hf.load_params(source, config, dtype="float32")
    assert "also holds the vision tower and its projector, which are left out" in caplog.text
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=source, dtype="float32")
    exported = read_all(tmp_path / "out")
    assert {name: tensor.tobytes() for name, tensor in exported.items()} == {
        name: tensor.tobytes() for name, tensor in own.items()
    }
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="float32", output_loading_info=True
    )
    assert type(opened).__name__ == "Gemma3ForCausalLM"
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(opened(tokens).logits, twin(tokens).logits)
    assert hf.read_config(tmp_path / "out") == config
    adapter = params.adapter(config, rank=2, alpha=2.0, dropout=0.0, modules="q_proj")
    with pytest.raises(ValueError, match="which PEFT names the matrices differently; export the merged model"):
        hf.write_peft({}, config, adapter, out_dir=tmp_path / "a", base_name="b", revision=None, source_dir=source)


@pytest.mark.sampled(10)
@pytest.mark.parity
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_goes_in_and_out_bit_identical(tmp_path, family):
    """Made by transformers, read and written here, opened there again."""
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    transformers = pytest.importorskip("transformers")
    described = test_model_configuration.least(family)
    source = tmp_path / "source"
    made = transformers.AutoConfig.for_model(**described)
    made.pad_token_id, made.bos_token_id, made.eos_token_id = None, 1, 2
    theirs = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    theirs.save_pretrained(source)
    config = hf.read_config(source)
    tree = hf.load_params(source, config, dtype="bfloat16")
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=source, dtype="bfloat16")
    before, after = read_all(source), read_all(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened).__name__ == config.of_family.architecture

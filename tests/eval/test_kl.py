"""The divergence from the reference: each log-prob and the estimate against the enumeration of all completions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import hf, models, tokenization
from fpo_jax.cli import generate
from fpo_jax.eval.stats import kl
from fpo_jax.io import jsonl
from tests import tiny, tolerances

PROMPTS = ["one?", "two!", "six:"]  # of one length, for one compilation
TEMPERATURE, EOS, NEW, SAMPLES = 0.8, 2, 2, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and a reference of 259 tokens, and samples of two tokens at the most."""
    root = tmp_path_factory.mktemp("kl")
    for name, seed in (("policy", 0), ("reference", 1)):
        tiny.write_model(root / name, seed=seed, layers=1, eos_ids=(EOS,))
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    generate.run(options(root, root / "answers.jsonl"))
    return root


def options(root, out, **changed):
    given = {"model": str(root / "policy"), "data": str(root / "prompts.jsonl"), "max_new_tokens": NEW}
    given |= {
        "num_return": SAMPLES,
        "temperature": TEMPERATURE,
        "compute_dtype": "float32",
        "max_length": 24,
        "rule": "raw",
    }
    return generate.Options(out=out, batch_size=50, keep_ids=1, **(given | changed))


def measured(root, out, **changed):
    given = {"policy": str(root / "policy"), "reference": str(root / "reference"), "data": root / "answers.jsonl"}
    return kl.run(kl.Options(out=out, **(given | changed)))


@pytest.fixture(scope="module")
def finished(folder):
    return measured(folder, folder / "kl.jsonl"), jsonl.read(folder / "kl.jsonl")


@pytest.fixture(scope="module")
def exact(folder):
    """log p [V] of the first token and [V, V] of the second after it, of each model and prompt, in float64."""
    found = {}
    encoder = tokenization.encoder(
        tokenization.load_tokenizer(folder / "policy"), tokenization.PromptFormat(rule="raw")
    )
    for name in ("policy", "reference"):
        config = hf.read_config(folder / name)
        params = hf.load_params(folder / name, config, dtype="float32")
        for text, ids in zip(PROMPTS, tokenization.generation_prompts(encoder, PROMPTS), strict=True):
            tokens_NT = np.array([[*ids, token] for token in range(config.vocab_size)], np.int32)
            hidden_NTD = models.hidden_states(
                params, jnp.asarray(tokens_NT), jnp.ones(tokens_NT.shape, bool), config=config, compute_dtype="float32"
            )
            logits = [models.logits(params, hidden_NTD[:, place], config=config) for place in (-2, -1)]
            first_VV, second_VV = (log_softmax(np.asarray(jax.device_get(x), np.float64) / TEMPERATURE) for x in logits)
            found[name, text] = first_VV[0], second_VV
    return found


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def enumerated(exact, text, ends=(EOS,)):
    """Mean and variance of log p - log q over all completions: an end, or any two tokens of which the first is none."""
    (p1_V, p2_VV), (q1_V, q2_VV) = exact["policy", text], exact["reference", text]
    goes_on_V = ~np.isin(np.arange(len(p1_V)), ends)
    weight_VV = np.exp(p1_V[:, None] + p2_VV)[goes_on_V]
    ratio_VV = (p1_V - q1_V)[goes_on_V, None] + (p2_VV - q2_VV)[goes_on_V]
    weights = np.concatenate([weight_VV.ravel(), np.exp(p1_V[~goes_on_V])])
    ratios = np.concatenate([ratio_VV.ravel(), (p1_V - q1_V)[~goes_on_V]])
    assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    mean = (weights * ratios).sum()
    return mean, (weights * (ratios - mean) ** 2).sum()


def test_every_log_prob_is_that_of_the_drawn_tokens_at_the_sampling_temperature(folder, finished, exact):
    _, lines = finished
    drawn = jsonl.read(folder / "answers.jsonl")
    assert [line["prompt"] for line in lines] == PROMPTS
    for line, source in zip(lines, drawn, strict=True):
        for name, key in (("policy", "logprobs"), ("reference", "reference_logprobs")):
            first_V, second_VV = exact[name, line["prompt"]]
            expected = [first_V[ids[0]] + (second_VV[ids[0], ids[1]] if len(ids) > 1 else 0.0) for ids in source["ids"]]
            assert_allclose(line[key], expected, rtol=0, atol=tolerances.SAME_MATHS)
    assert any(len(ids) == 1 for line in drawn for ids in line["ids"]), "some completion is its EOS alone"


def test_the_estimate_is_the_exact_divergence_within_its_standard_error(finished, exact):
    found, _ = finished
    means, variances = zip(*(enumerated(exact, text) for text in PROMPTS), strict=True)
    error = np.sqrt(np.sum(variances) / SAMPLES) / len(PROMPTS)
    assert np.mean(means) > 20 * error, "a wrong sign or temperature would be seen"
    assert abs(found.mean - np.mean(means)) < 4 * error
    assert found.samples == SAMPLES * len(PROMPTS) and found.low < found.mean < found.high


def test_what_follows_a_stop_string_is_not_scored(folder, exact, tmp_path):
    """The divergence is that of completions which end with the stop string's token, EOS or the longest length."""
    tokenizer = tokenization.load_tokenizer(folder / "policy")
    firsts = [ids[0] for line in jsonl.read(folder / "answers.jsonl") for ids in line["ids"] if ids[0] != EOS]
    stop_id = max((token for token in set(firsts) if tokenizer.decode([token]).isascii()), key=firsts.count)
    stops = (tokenizer.decode([stop_id]),)
    generate.run(options(folder, tmp_path / "a.jsonl", stop_strings=stops))
    found = measured(folder, tmp_path / "kl.jsonl", data=tmp_path / "a.jsonl")
    drawn = jsonl.read(tmp_path / "a.jsonl")
    assert sum([stop_id] == ids for line in drawn for ids in line["ids"]) > 20
    for line, source in zip(jsonl.read(tmp_path / "kl.jsonl"), drawn, strict=True):
        first_V, second_VV = exact["policy", line["prompt"]]
        ended = [ids[0] in (EOS, stop_id) for ids in source["ids"]]
        expected = [
            first_V[ids[0]] + (0.0 if short else second_VV[ids[0], ids[1]])
            for ids, short in zip(source["ids"], ended, strict=True)
        ]
        assert_allclose(line["logprobs"], expected, rtol=0, atol=tolerances.SAME_MATHS)
    means, variances = zip(*(enumerated(exact, text, (EOS, stop_id)) for text in PROMPTS), strict=True)
    error = np.sqrt(np.sum(variances) / SAMPLES) / len(PROMPTS)
    assert abs(found.mean - np.mean(means)) < 4 * error


def test_it_is_exactly_zero_where_the_policy_is_the_reference(folder, tmp_path):
    found = measured(folder, tmp_path / "kl.jsonl", reference=str(folder / "policy"))
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 5}, "was drawn with top_k=5, not from the whole distribution"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"min_new_tokens": 1}, "min_new_tokens=1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"keep_ids": 0}, "holds texts without token ids; draw the samples with --keep-ids 1"),
        ({"model": "another"}, "was not drawn from .*policy; give the directory of the model that drew it"),
    ],
)
def test_samples_of_which_the_estimate_would_be_of_something_else(folder, tmp_path, changed, message):
    shutil.copy(folder / "answers.jsonl", tmp_path / "a.jsonl")
    record = json.loads((folder / "answers.jsonl.job.json").read_text())
    (tmp_path / "a.jsonl.job.json").write_text(json.dumps(record | changed))
    with pytest.raises(ValueError, match=message):
        measured(folder, tmp_path / "kl.jsonl", data=tmp_path / "a.jsonl")
    assert not (tmp_path / "kl.jsonl").exists()


def another_tokenizer(folder, copy, change):
    """Copy the reference and change the vocabulary of its tokenizer."""
    shutil.copytree(folder / "reference", copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    change(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))


def test_a_reference_of_another_tokenizer_is_refused(folder, tmp_path):
    """The ids of the policy's texts would be other texts to it, and the number would mean nothing."""

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    another_tokenizer(folder, tmp_path / "other", swap)
    first = tokenization.load_tokenizer(folder / "policy").get_vocab()["a"]
    message = rf"other is no reference of .*policy: 2 ids stand for other texts, e.g. {first} for 'b', not 'a'; give a"
    with pytest.raises(ValueError, match=message):
        measured(folder, tmp_path / "kl.jsonl", reference=str(tmp_path / "other"))
    assert not (tmp_path / "kl.jsonl").exists()


def test_tokenizers_of_the_same_texts_differ_in_what_is_no_text(folder, finished, tmp_path, caplog):
    """Renamed or missing special tokens, another template, no tokenizer at all: the ids' texts are the same."""

    def rename(content):
        content["model"]["vocab"]["<start>"] = content["model"]["vocab"].pop("<s>")
        content["added_tokens"] = [
            token | {"content": "<start>"} if token["content"] == "<s>" else token for token in content["added_tokens"]
        ]

    another_tokenizer(folder, tmp_path / "renamed", rename)
    settings = json.loads((tmp_path / "renamed" / "tokenizer_config.json").read_text())
    (tmp_path / "renamed" / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<start>"}))
    assert measured(folder, tmp_path / "kl.jsonl", reference=str(tmp_path / "renamed")).mean == finished[0].mean
    shutil.copytree(folder / "reference", tmp_path / "bare")
    for path in (tmp_path / "bare").glob("token*"):
        path.unlink()
    with caplog.at_level("INFO", "fpo_jax"):
        assert measured(folder, tmp_path / "kl.jsonl", reference=str(tmp_path / "bare")).mean == finished[0].mean
    assert (
        f"{tmp_path / 'bare'} holds no tokenizer: whether its ids are the policy's texts is not checked" in caplog.text
    )


def test_other_input_that_cannot_be_used(folder, tmp_path, capsys):
    shutil.copy(folder / "answers.jsonl", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl.job.json is missing"):
        measured(folder, tmp_path / "kl.jsonl", data=tmp_path / "a.jsonl")
    tiny.write_model(tmp_path / "short", layers=1, max_positions=5)
    with pytest.raises(ValueError, match=r"do not fit .*short, with a window of 5"):
        measured(folder, tmp_path / "kl.jsonl", reference=str(tmp_path / "short"))
    arguments = ["--policy", str(folder / "policy"), "--reference", str(folder / "none"), "--data", "x", "--out", "y"]
    assert kl.main(arguments) == 2 and "none is not a directory" in capsys.readouterr().err

"""What each family can do: every tick of the table in docs/models.md is a case here, on a tiny model of the family.

python -m tests.models.test_abilities     prints the table
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, hf, models, plan
from fpo_jax.inference import sampler
from fpo_jax.models import families, params
from fpo_jax.trainer import export, metric_logger, trainer
from tests import batches, tiny, tolerances
from tests.data import test_layouts
from tests.hf import test_hf
from tests.inference import test_causal_lm
from tests.paths import REPO

REFERENCE_FREE = {"loss__score": "mean_logp", "loss__beta": 2.0, "loss__beta_pi": None}


def described(family):
    """Fields of a tiny model of the family: two layers, of both kinds where there are several."""
    config = models.from_hf_config(test_causal_lm.FAMILIES[family])
    kinds = config.layer_types or config.of_family.layer_types
    changed = {"layers": 2, "layer_types": (kinds[0], kinds[-1]) if config.of_family.hf_layer_types else ()}
    if config.rope.type == "longrope":  # by whose original length frequencies depend on how long a text is
        changed["rope"] = dataclasses.replace(config.rope, original_max_position_embeddings=48)
    changed |= {"dropout": (), "bos_id": 1, "eos_ids": (2,), "pad_id": 0, "initializer_range": 0.2}
    changed["experts"] = 4 if config.experts else 0  # as many on each of two devices
    changed["vocab_size"] = 264  # the tokenizer has 259, and as Qwen2's one more
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | changed


def wide(family):
    """The same with blocks of 64 inputs, as matrices in four bits have them."""
    fields = described(family)
    if fields["heads"] * fields["head_dim"] == fields["width"]:
        fields["head_dim"] = 64 // fields["heads"]
    return fields | {"width": 64, "ffn": 64, "shared_ffn": 64 if fields["shared_ffn"] else 0}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Family -> a directory with a model of it, written once."""
    root = tmp_path_factory.mktemp("models")

    def written(family, describe=described):
        folder = root / f"{family}-{describe.__name__}"
        if not folder.exists():
            tiny.write_model(folder, **describe(family))
        return folder

    return written


def run_of(model, folder, **changed):
    """The configuration of one step without a reference."""
    one = {"mesh__data": 1, "mesh__fsdp": 1, "train__max_steps": 1, "train__batch_size": 2, "data__eval": ""}
    one |= {"optim__warmup_fraction": 0.0, "optim__learning_rate": 0.01}
    return tiny.config(model, tiny.write_pairs(folder / "pairs.jsonl", count=4), **(one | REFERENCE_FREE | changed))


def changed_by_training(model, folder, **changed):
    """Take the step and export it; the parameters that it changed, by path."""
    trainer.run(run_of(model, folder, **changed), folder / "run", devices=jax.devices()[:1])
    (metrics,) = (folder / "run" / metric_logger.METRICS_FILE).read_text().splitlines()
    assert np.isfinite(json.loads(metrics)["loss"])
    export.export(folder / "run", folder / "out", step=None, dtype="float32")
    config = hf.read_config(model)
    before, after = (params.flatten(hf.load_params(path, config, dtype="float32")) for path in (model, folder / "out"))
    return config, {path for path, array in before.items() if not np.array_equal(array, after[path])}


def train(model, folder):
    """One step through the trainer changes every matrix."""
    config, changed = changed_by_training(model, folder)
    assert changed >= {entry.path for entry in params.entries(config) if entry.decay and entry.path != "positions"}


def lora(model, folder):
    """One step of adapters changes their matrices alone, in the merged export."""
    config, changed = changed_by_training(model, folder, lora__rank=2)
    assert changed == set(params.adapter(config, rank=2, alpha=1.0, dropout=0.0, modules="all-linear").targets)


def qlora(model, folder):
    """The same over matrices in four bits, which the merged export has as they were rounded."""
    config, changed = changed_by_training(model, folder, lora__rank=2, lora__base_dtype="nf4", model__remat="full")
    adapter = params.adapter(config, rank=2, alpha=1.0, dropout=0.0, modules="all-linear", base_dtype="nf4")
    assert adapter.quantised and changed == {*adapter.targets, *adapter.quantised}


def expert_parallel(model, folder):
    """Two steps with the experts on two devices are those of one device."""
    losses = []
    for expert in (1, 2):
        workdir = folder / f"{expert}"
        config = run_of(model, folder, mesh__expert=expert, train__max_steps=2)
        trainer.run(config, workdir, devices=jax.devices()[:expert])
        losses.append([line["loss"] for line in metric_logger.read(workdir / metric_logger.METRICS_FILE)])
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    assert_allclose(losses[1], losses[0], rtol=1e-5)


def rows_that_are_shared(model, layout):
    """Log-probs of completions in rows that they share are those of rows of their own."""
    config = hf.read_config(model)
    weights = hf.load_params(model, config, dtype="float32")
    groups = test_layouts.prepared_groups(5, 3, longest_prompt=12, longest_completion=5, fork=1)
    plain, shared, _ = test_layouts.both(groups, layout)
    assert (shared.segments.parents_NT is not None) == (layout == "shared")
    implementation = "chunked" if config.attention_soft_cap or config.of_family.sinks else "xla"
    run = jax.jit(batches.forward_fn(config, attention=attention.Selection(implementation, "for the test")))
    expected, found = (
        test_layouts.by_group(run(weights, batch).sum_N.reshape(batch.rewards_BK.shape), batch)
        for batch in (plain, shared)
    )
    assert_allclose(found, expected, rtol=tolerances.SHARED_LOGPS, atol=tolerances.SHARED_LOGPS)


def packed(model, folder):
    """Whole texts next to each other."""
    rows_that_are_shared(model, "packed")


def shared(model, folder):
    """Prompts that stand once."""
    rows_that_are_shared(model, "shared")


def generate(model, folder):
    """Greedy tokens by the cache are the likeliest ones of the whole row."""
    config = hf.read_config(model)
    weights = hf.load_params(model, config, dtype="float32")
    prompts = [[5, 9, 11, 40, 7, 8, 100, 30, 5], [17, 4, 5]]
    decoding = sampler.Decoding(5, temperature=0.0)
    written = sampler.sample(weights, prompts, config=config, decoding=decoding, seed=0, batch_size=2)
    rows = [prompt + tokens for prompt, (tokens,) in zip(prompts, written, strict=True)]
    longest = max(map(len, rows))
    tokens_NT = jnp.array([row + [0] * (longest - len(row)) for row in rows])
    valid_NT = jnp.arange(longest) < jnp.array([len(row) for row in rows])[:, None]
    hidden_NTD = jax.jit(functools.partial(models.hidden_states, config=config, compute_dtype="float32"))(
        weights, tokens_NT, valid_NT
    )
    for row, prompt, hidden_TD in zip(rows, prompts, hidden_NTD, strict=True):
        likeliest = jnp.argmax(models.logits(weights, hidden_TD, config=config), axis=-1)
        assert row[len(prompt) :] == likeliest[len(prompt) - 1 : len(row) - 1].tolist()


def exported(model, folder):
    """What is read and written is the same, bit by bit."""
    config = hf.read_config(model)
    tree = hf.load_params(model, config, dtype="float32")
    hf.export(tree, config, out_dir=folder / "out", source_dir=model, dtype="float32")
    before, after = test_hf.read_all(model), test_hf.read_all(folder / "out")
    assert before.keys() == after.keys() and hf.read_config(folder / "out") == config
    for name, tensor in before.items():
        assert_array_equal(after[name], tensor, strict=True)


def planned(model, folder):
    """The run is compiled for this machine, and its parameters and operations are counted."""
    config = hf.read_config(model)
    report = plan.run(run_of(model, folder), "here", devices=lambda _: jax.devices()[:1])
    assert report.fits and report.outcome.operations > 0
    assert f"{params.count(config):,} parameters" in report.text
    assert (f"({params.active(config):,} for each token)" in report.text) == bool(config.experts)


ABILITIES = {
    "train": train,
    "LoRA": lora,
    "QLoRA": qlora,
    "experts": expert_parallel,
    "packed": packed,
    "shared": shared,
    "generate": generate,
    "export": exported,
    "plan": planned,
}
CASES = [
    (family, ability)
    for family in models.FAMILIES
    for ability in ABILITIES
    if ability != "experts" or "router" in families.FAMILIES[family].matrices
]


@pytest.mark.sampled(41)  # the first family's first ability, another one's last, ...
@pytest.mark.parametrize(("family", "ability"), CASES)
def test_a_family_can(family, ability, model_of, tmp_path):
    ABILITIES[ability](model_of(family, wide if ability == "QLoRA" else described), tmp_path)


def table() -> str:
    """Return the table of docs/models.md: a tick for each case."""
    rows = [["`model_type`", *ABILITIES], ["---"] * (1 + len(ABILITIES))]
    rows += [
        [f"`{family}`", *("✓" if (family, ability) in CASES else "–" for ability in ABILITIES)]
        for family in models.FAMILIES
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_has_the_table_of_these_cases():
    page = (REPO / "docs" / "models.md").read_text()
    assert table() in page, "put what python -m tests.models.test_abilities prints into docs/models.md"


if __name__ == "__main__":
    print(table(), end="")

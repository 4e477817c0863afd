"""The trainers that `benchmarks/train_step.py` compares: one process each, which takes its turn when it is told to.

    {"case": ..., "side": "ours-shared"} on the command line, then a line "go" on stdin for every round

Prints a line of JSON when it is ready and one after each round: seconds, losses of its updates, and at the end the peak
of its memory. Each trainer does an update of DPO with AdamW as its own users would have it: its own loop, its data
collation, its metrics; the reference log-probs come from where the trainer takes them.
"""

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.train_step_turns import BETA, Case, Turns


def write_model(case: Case, folder: Path) -> None:
    """Write a random Llama of the case's shape, or for a GPU a Mistral, with a tokenizer that nobody asks."""
    from benchmarks import random_model
    from fpo_jax.models import Rope
    from tests import tiny

    if case.on_gpu:
        random_model.write(folder, random_model.mistral(case.layers, vocab=case.vocab, width=case.width))
        return
    tiny.write_model(
        folder,
        vocab_size=case.vocab,
        width=case.width,
        layers=case.layers,
        heads=case.heads,
        kv_heads=case.heads,
        head_dim=case.width // case.heads,
        ffn=case.ffn,
        max_positions=1024,
        initializer_range=0.02,
        rope=Rope(theta=1e6),  # tunix takes this one whatever a model says
    )


def ours(case: Case, model: Path, layout: str) -> None:
    """fpo_jax: the programs of a run, batches made, placed and read as its loop does."""
    import jax

    import benchmarks.updates  # noqa: F401 - before the turns, as memory of imports does not count

    turns = Turns(case)
    run = our_run(case, model, layout)

    def begin(number: int) -> None:
        turns.reference(run.score(keep=number == 0))

    def finish() -> None:
        run.read()
        turns.losses(run.losses)
        run.losses = []
        run.wait()

    def device() -> dict:
        memory = jax.devices()[0].memory_stats() or {}
        return {"device": jax.devices()[0].device_kind, "peak_bytes": memory.get("peak_bytes_in_use", 0)}

    for number in range(run.plan.steps):
        turns.before(number, finish, functools.partial(begin, number))
        run.update(number)
    turns.done(finish, device if case.on_gpu else None)


def our_run(case: Case, model: Path, layout: str):
    """Return `updates.Updates` of a case."""
    from benchmarks.updates import Updates
    from fpo_jax import hf

    return Updates(*our_inputs(case, model, hf.read_config(model), layout), model)


def our_inputs(case: Case, model: Path, shape, layout: str):
    """Return configuration and inputs of a case for a model of some shape: DPO on pairs, EXO on more."""
    from fpo_jax import config as configuration
    from fpo_jax.trainer import run_inputs

    config = configuration.default()
    config.update(
        {
            "model": {"path": str(model), "compute_dtype": case.dtype, "remat": case.remat},
            "data": {"train": "in memory", "group_size": case.candidates, "layout": layout, "shuffle": False},
            "loss": {"name": "dpo" if case.candidates == 2 else "exo", "beta_pi": BETA},
            "optim": {"learning_rate": case.rate, "schedule": "constant", "clip_norm": 0.0},
            "train": {"batch_size": case.groups, "micro_batch_per_device": case.micro or case.groups},
        }
    )
    set_fields(config, case.fields)
    config.data.max_length, config.data.max_prompt_length = case.prompt + case.completion, case.prompt
    inputs = run_inputs.Inputs(
        run_inputs.check(config), model, shape, run_inputs.Dataset(_prepared(case), None, ""), None
    )
    if layout == "shared":
        config.data.row_length = case.prompt + case.candidates * case.completion  # a row for a group, as all are alike
    return config, inputs


def set_fields(config, fields: Sequence[str]) -> None:
    """Set "key=value" of a configuration; a value that is no JSON is a text."""
    for field in fields:
        key, _, value = field.partition("=")
        *parents, last = key.split(".")
        node = functools.reduce(lambda node, name: node[name], parents, config)
        try:
            node[last] = json.loads(value)
        except json.JSONDecodeError:
            node[last] = value


def _prepared(case: Case):
    from fpo_jax import data

    prompts, completions = case.ids()
    groups, length = prompts.shape[0] * prompts.shape[1], case.prompt + case.completion
    rows = np.concatenate([np.repeat(prompts[:, :, None], case.candidates, axis=2), completions], axis=-1)
    count = groups * case.candidates
    return data.Prepared(
        tokens_S=rows.astype(np.int32).reshape(-1),
        starts_N=np.arange(count, dtype=np.int64) * length,
        lengths_N=np.full(count, length, np.int32),
        prompt_lengths_N=np.full(count, case.prompt, np.int32),
        rewards_BK=np.tile(np.arange(case.candidates, 0, -1, dtype=np.float32), (groups, 1)),
        sources=tuple(map(str, range(groups))),
        pad_id=0,
    )


def tunix(case: Case, model: Path) -> None:
    """The DPOTrainer of tunix on tokens, with the reference model beside the policy, as it has no other way."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params
    from tunix.sft.dpo import dpo_trainer

    turns = Turns(case)
    described = json.loads((model / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=case.layers,
        vocab_size=case.vocab,
        embed_dim=case.width,
        hidden_dim=case.ffn,
        num_heads=case.heads,
        head_dim=case.width // case.heads,
        num_kv_heads=case.heads,
        rope_theta=int((described.get("rope_parameters") or described)["rope_theta"]),
        norm_eps=described["rms_norm_eps"],
    )
    grid = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with grid:
        policy, reference = (
            params.create_model_from_safe_tensors(str(model), config, grid, jnp.float32) for _ in range(2)
        )

        class Trainer(dpo_trainer.DPOTrainer):
            def _buffer_metrics(self, buffered, loss, *arguments, **named):
                pending.append(loss)
                return super()._buffer_metrics(buffered, loss, *arguments, **named)

        pending: list = []
        trainer = Trainer(
            model=policy,
            ref_model=reference,
            optimizer=optax.adamw(case.rate, weight_decay=0.0),
            training_config=dpo_trainer.DPOTrainingConfig(
                eval_every_n_steps=10**9, max_steps=case.updates * (case.rounds + 1), beta=BETA
            ),
        )

        def finish() -> None:
            jax.block_until_ready(nnx.state(trainer.model))
            turns.losses([float(loss) for loss in pending])
            pending.clear()

        def examples() -> Iterator[dpo_trainer.TrainingInput]:
            for update, (prompt, chosen, rejected) in enumerate(zip(*case.pairs(), strict=True)):
                turns.before(update, finish)
                ones = [np.ones(ids.shape, bool) for ids in (prompt, chosen, rejected)]
                yield dpo_trainer.TrainingInput(
                    prompt_ids=prompt.astype(np.int32),
                    prompt_mask=ones[0],
                    chosen_ids=chosen.astype(np.int32),
                    chosen_mask=ones[1],
                    rejected_ids=rejected.astype(np.int32),
                    rejected_mask=ones[2],
                )

        trainer.train(examples())
    turns.done(finish)


def torch_side(case: Case, model: Path, **options) -> None:
    """TRL, whose imports are no other side's."""
    from benchmarks import train_step_trl

    train_step_trl.trl(case, model, **options)


SIDES = {
    "ours-padded": functools.partial(ours, layout="padded"),
    "ours-shared": functools.partial(ours, layout="shared"),
    "trl": torch_side,
    "trl-liger": functools.partial(torch_side, liger=True),
    "trl-bf16": functools.partial(torch_side, weights="bfloat16"),
    "trl-bf16-liger": functools.partial(torch_side, weights="bfloat16", liger=True),
    "tunix": tunix,
}
GPU_SIDES = ("ours-padded", "ours-shared", "trl", "trl-liger", "trl-bf16", "trl-bf16-liger")
CPU_SIDES = ("ours-padded", "ours-shared", "trl", "tunix")


def main() -> None:
    """Run one side of one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", required=True, help="JSON of a Case")
    parser.add_argument("--side", required=True, choices=SIDES)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    case = Case(**json.loads(options.case))
    if options.side not in (GPU_SIDES if case.on_gpu else CPU_SIDES):
        parser.error(f"{options.side} runs on a {'CPU' if case.on_gpu else 'GPU'} alone")
    SIDES[options.side](case, options.model)


if __name__ == "__main__":
    main()

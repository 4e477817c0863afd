"""The trainers that `benchmarks/train_step.py` compares: one process each, which takes its turn when it is told to.

    {"case": ..., "side": "ours-shared"} on the command line, then a line "go" on stdin for every round

Prints a line of JSON when it is ready and one after each round: seconds, losses of its updates, and at the end the peak
of its memory. Each trainer does an update of DPO with AdamW as its own users would have it: its own loop, its data
collation, its metrics; the reference log-probs come from where the trainer takes them.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BETA, RATE, SEED = 0.1, 1e-4, 0
_RESETS = Path("/proc/self/clear_refs")  # "5" written there lets VmHWM start anew


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one comparison: `groups` prompts an update, each with `candidates` responses, the first preferred."""

    name: str
    vocab: int
    layers: int
    groups: int
    candidates: int
    prompt: int  # tokens
    response: int
    width: int = 256
    ffn: int = 688
    heads: int = 8
    updates: int = 2  # of a round
    rounds: int = 5

    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the whole run: prompts [updates, B, P] and responses [updates, B, K, R]."""
        random = np.random.default_rng(SEED)
        count = (self.updates * (self.rounds + 1), self.groups)  # one round to compile in
        prompts = random.integers(3, self.vocab, (*count, self.prompt))
        return prompts, random.integers(3, self.vocab, (*count, self.candidates, self.response))

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as pairs for trainers of K = 2: prompts [updates, pairs, P], chosen and rejected [..., R].

        K candidates are K / 2 pairs of neighbours, so that every candidate is computed once.
        """
        prompts, responses = self.ids()
        halves = self.candidates // 2
        chosen, rejected = (responses[:, :, place::2].reshape(len(prompts), -1, self.response) for place in (0, 1))
        return np.repeat(prompts, halves, axis=1), chosen, rejected


class Turns:
    """When this process may work, and what it reports."""

    def __init__(self, case: Case):
        """Keep the real stdout for reports; libraries print to stderr."""
        self._case, self._out = case, os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._losses: list[float] = []
        self._baseline = _status("VmRSS")
        self._started: float | None = None
        self._used = 0.0
        self._peaks: list[int] = []  # of the rounds, each since the one before it

    def before(self, update: int, finish=lambda: None) -> None:
        """Call before every update, counted from 0; `finish` waits for those that still run."""
        if update % self._case.updates:
            return
        finish()
        self._report()
        if not sys.stdin.readline():
            sys.exit("the comparison ended")
        self._started, self._used = time.perf_counter(), time.process_time()

    def losses(self, values: list[float]) -> None:
        """Note the losses of the next updates."""
        self._losses += values

    def reference(self, seconds: float) -> None:
        """Note the time of a reference pass over the groups of one update."""
        self._say({"reference_seconds": seconds})

    def done(self, finish=lambda: None) -> None:
        """Call after the last update."""
        finish()
        self._report()
        peaks = self._peaks[1:] if _RESETS.exists() else self._peaks  # the peak of compiling is not that of updates
        self._say({"peak_bytes": max(peaks) - self._baseline})

    def _report(self) -> None:
        if self._started is None:
            self._say({"ready": True})
            return
        seconds = {"seconds": time.perf_counter() - self._started, "cpu_seconds": time.process_time() - self._used}
        self._say(seconds | {"losses": self._losses})
        self._losses = []
        self._peaks.append(_status("VmHWM"))
        if _RESETS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is no round's
            _RESETS.write_text("5")

    def _say(self, what: dict) -> None:
        print(json.dumps(what), file=self._out, flush=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def write_model(case: Case, folder: Path) -> None:
    """Write a random Llama of the case's shape with a tokenizer that nobody asks."""
    from fpo_jax.model import Rope
    from tests import tiny

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
    import benchmarks.updates  # noqa: F401 - before the turns, as memory of imports does not count

    turns = Turns(case)
    run = our_run(case, model, layout)
    turns.reference(run.score())

    def finish() -> None:
        run.read()
        turns.losses(run.losses)
        run.losses = []

    for number in range(run.plan.steps):
        turns.before(number, finish)
        run.update(number)
    turns.done(finish)


def our_run(case: Case, model: Path, layout: str):
    """Return `updates.Updates` of a case: DPO on pairs, EXO on more."""
    from benchmarks.updates import Updates
    from fpo_jax import config as configuration
    from fpo_jax import hf, job

    config = configuration.default()
    config.update(
        {
            "model": {"path": str(model), "compute_dtype": "float32", "remat": "none"},
            "data": {"train": "in memory", "group_size": case.candidates, "layout": layout, "shuffle": False},
            "loss": {"name": "dpo" if case.candidates == 2 else "exo", "beta_pi": BETA},
            "optim": {"learning_rate": RATE, "schedule": "constant", "clip_norm": 0.0},
            "train": {"batch_size": case.groups, "micro_batch_per_device": case.groups},
        }
    )
    config.data.max_length, config.data.max_prompt_length = case.prompt + case.response, case.prompt
    inputs = job.Inputs(job.check(config), model, hf.read_config(model), job.Dataset(_prepared(case), None, ""), None)
    if layout == "shared":
        config.data.row_length = case.prompt + case.candidates * case.response  # a row for a group, as all are alike
    return Updates(config, inputs, model)


def _prepared(case: Case):
    from fpo_jax import data

    prompts, responses = case.ids()
    groups, length = prompts.shape[0] * prompts.shape[1], case.prompt + case.response
    rows = np.concatenate([np.repeat(prompts[:, :, None], case.candidates, axis=2), responses], axis=-1)
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


def trl(case: Case, model: Path, **options) -> None:
    """TRL's DPOTrainer on pairs that are tokens already, reference log-probs computed beforehand."""
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer

    turns = Turns(case)
    prompts, chosen, rejected = case.pairs()
    table = datasets.Dataset.from_dict(
        {
            "prompt_ids": prompts.reshape(-1, case.prompt).tolist(),
            "chosen_ids": chosen.reshape(-1, case.response).tolist(),
            "rejected_ids": rejected.reshape(-1, case.response).tolist(),
        }
    )

    class Gate(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            turns.before(state.global_step)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, *arguments):
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments)
            turns.reference((time.perf_counter() - started) / len(prompts))
            return found

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **named):
            found = super().compute_loss(*arguments, **named)
            turns.losses([float((found[0] if isinstance(found, tuple) else found).detach())])
            return found

    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        args=DPOConfig(
            output_dir=str(model.parent / "trl"),
            per_device_train_batch_size=prompts.shape[1],
            max_steps=len(prompts),
            learning_rate=RATE,
            beta=BETA,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            max_length=None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=prompts.shape[1],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            **options,
        ),
        train_dataset=table,
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        callbacks=[Gate()],
    )
    trainer.train()
    turns.done()


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
            optimizer=optax.adamw(RATE, weight_decay=0.0),
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


SIDES = {
    "ours-padded": lambda case, model: ours(case, model, "padded"),
    "ours-shared": lambda case, model: ours(case, model, "shared"),
    "trl": trl,
    "tunix": tunix,
}


def main() -> None:
    """Run one side of one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", required=True, help="JSON of a Case")
    parser.add_argument("--side", required=True, choices=SIDES)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    SIDES[options.side](Case(**json.loads(options.case)), options.model)


if __name__ == "__main__":
    main()

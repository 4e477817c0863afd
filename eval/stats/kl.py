"""How far a policy has moved: `fpo kl --policy DIR --reference SFT --data answers.jsonl --out kl.jsonl`.

The divergence of whole completions, estimated on the policy's own samples, those of `fpo generate --keep-ids 1`:

    KL(policy || reference) = E_x E_{y ~ policy(.|x)} [ log policy(y|x) - log reference(y|x) ]
                           ~= mean over prompts of the mean over their samples of the bracket
    log policy(y|x) = sum_t log softmax(logits_t / T)[y_t], likewise for the reference

with the token that ends a completion (a stop id, or the one that completes a stop string) among the y_t, and T the
sampling temperature for both models, so that it is the divergence of the distribution that was sampled: completions up
to such an end or the longest length. The estimate is unbiased; one sample may be below 0. The ids are scored that were
drawn, never a text encoded again, with weights in the dtype that they were drawn with. Everything about the sampling
comes from the record beside the file, and samples of another model, or not of the whole distribution (top-k, top-p,
greedy), are refused, as is a reference whose tokenizer makes other texts of the ids. For a policy that is its reference
it is exactly 0.

One line per prompt comes out, with its `completions`, their `logprobs`, `reference_logprobs`. Exit codes: 0 done; 2 the
input cannot be used.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, hf, losses, sharding, tokenization
from fpo_jax.cli import args as command_line
from fpo_jax.distributed import workdir_lock
from fpo_jax.eval.stats import confidence_intervals
from fpo_jax.io import atomic_io, jsonl, terminal
from fpo_jax.trainer import reference_logprobs, run_schedule, steps

log = logging.getLogger("fpo_jax")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which models, on which samples. Paths and names as on the command line."""

    policy: str  # directory or hub name of the model that drew the samples
    reference: str  # of the model it is compared with
    data: Path  # written by fpo generate with --keep-ids 1
    out: Path
    batch_size: int = 8  # prompts of a pass, per device


@dataclasses.dataclass(frozen=True)
class Summary:
    """The estimate in nats a completion, with the 95 % interval over prompts."""

    prompts: int
    samples: int
    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """In a few words."""
        return (
            f"KL(policy || reference) {self.mean:.3f} nats ({self.low:.3f}, {self.high:.3f}) from {self.samples}"
            f" samples of {self.prompts} prompts"
        )


def run(options: Options) -> Summary:
    """Score the samples under both models and write the file.

    Raises:
        ValueError: an option, the samples or a model cannot be used; or another process writes the file.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size} must be at least 1.")
    with workdir_lock.beside(options.out):
        return _run(options)


def _run(options: Options) -> Summary:
    policy, base = hf.local_dir(options.policy), hf.local_dir(options.reference)
    settings = _settings(options.data, policy)
    _check_tokenizers(policy, base)
    lines = jsonl.read(options.data)
    prepared = _prepared(options.data, lines, hf.read_config(policy).vocab_size)
    found = [_logprobs(source, prepared, settings, options.batch_size) for source in (policy, base)]
    rows = []
    for line, ours_K, theirs_K in zip(lines, *found, strict=True):
        head = {key: line[key] for key in ("index", "prompt", "completions")}
        rows.append(head | {"logprobs": ours_K.tolist(), "reference_logprobs": theirs_K.tolist()})
    workdir_lock.verify()
    jsonl.write(options.out, rows)
    return summary(options.out)


def completion_logprobs(
    model: Path, lines: Sequence[dict[str, Any]], *, temperature: float, compute_dtype: str, batch_size: int = 8
) -> np.ndarray:
    """Return the summed log-probs [B, K] of completions that any model drew, as ids, under `model`.

    Args:
        model: Hugging Face directory of a language model.
        lines: of `fpo generate --keep-ids 1`: `prompt_ids` and K lists of `ids` each.
        temperature: logits are divided by it.
        compute_dtype: float32 or bfloat16, of weights and products.
        batch_size: prompts of a pass, per device.

    Raises:
        ValueError: fewer than 2 lines, lines of different K, or ids and lengths that do not fit the model.
    """
    prepared = _prepared(Path("lines"), lines, hf.read_config(model).vocab_size)
    settings = {"temperature": temperature, "compute_dtype": compute_dtype}
    return _logprobs(model, prepared, settings, batch_size)


def summary(path: Path) -> Summary:
    """Return the estimate from a file of `run`: the prompt is the unit of the interval."""
    lines = jsonl.read(path)
    means = [
        math.fsum(a - b for a, b in zip(line["logprobs"], line["reference_logprobs"], strict=True))
        / len(line["logprobs"])
        for line in lines
    ]
    mean, low, high = confidence_intervals.mean_interval(means)
    return Summary(len(lines), sum(len(line["logprobs"]) for line in lines), mean, low, high)


def _settings(path: Path, policy: Path) -> dict[str, Any]:
    """Return how the samples were drawn, from the record that `fpo generate` leaves beside them."""
    record = path.with_name(path.name + ".job.json")
    if not record.is_file():
        raise ValueError(f"{record} is missing; without it nobody knows how the samples were drawn: draw them anew.")
    settings = atomic_io.read_json(record)
    if not settings.get("keep_ids"):
        raise ValueError(f"{path} holds texts without token ids; draw the samples with --keep-ids 1.")
    if settings["model"] != hf.weights_fingerprint(policy):
        raise ValueError(f"{path} was not drawn from {policy}; give the directory of the model that drew it.")
    neutral = {"top_k": 0, "top_p": 1.0, "min_new_tokens": 0}
    changed = [f"{name}={settings[name]}" for name, value in neutral.items() if settings[name] != value]
    changed += ["temperature=0"] if settings["temperature"] == 0 else []
    if changed:
        raise ValueError(
            f"{path} was drawn with {', '.join(changed)}, not from the whole distribution, whose divergence this is:"
            " draw the samples with a temperature alone."
        )
    return settings


def _check_tokenizers(policy: Path, base: Path) -> None:
    """Refuse a reference to which the policy's ids are other texts; special tokens, which are no text, may differ."""
    ours, theirs = (_pieces(source) for source in (policy, base))
    if ours is None or theirs is None:
        bare = policy if ours is None else base
        log.info("%s holds no tokenizer: whether its ids are the policy's texts is not checked", bare)
        return
    if others := [token for token in sorted(ours.keys() & theirs.keys()) if ours[token] != theirs[token]]:
        raise ValueError(
            f"{base} is no reference of {policy}: {len(others)} ids stand for other texts, e.g. {others[0]} for"
            f" {theirs[others[0]]!r}, not {ours[others[0]]!r}; give a reference that shares the policy's tokenizer."
        )


def _pieces(source: Path) -> dict[int, str] | None:
    """Return what a directory's tokenizer writes for each id that is no special token; None = it holds no tokenizer."""
    if not any(any(source.glob(name)) for name in ("tokenizer.*", "vocab.*", "spiece.model")):
        return None
    tokenizer = tokenization.load_tokenizer(source)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return {token: piece for piece, token in tokenizer.get_vocab().items() if token not in special}


def _prepared(path: Path, lines: Sequence[dict[str, Any]], vocab_size: int) -> data.Prepared:
    """Return the rows as they were drawn: the prompt's ids and each completion's."""
    if len(lines) < 2:
        raise ValueError(f"{path} has {len(lines)} lines; an interval needs at least 2 prompts.")
    size = len(lines[0]["ids"])
    if any(len(line["ids"]) != size for line in lines):
        raise ValueError(f"{path}: the lines have different numbers of samples; put the file back as it was written.")
    rows = [np.array(line["prompt_ids"] + ids, np.int32) for line in lines for ids in line["ids"]]
    lengths_N = np.array([len(row) for row in rows], np.int32)
    tokens_S = np.concatenate(rows)
    if int(tokens_S.max()) >= vocab_size:
        raise ValueError(f"{path} holds the token {int(tokens_S.max())}, outside the policy's {vocab_size}.")
    return data.Prepared(
        tokens_S=tokens_S,
        starts_N=np.cumsum(lengths_N, dtype=np.int64) - lengths_N,
        lengths_N=lengths_N,
        prompt_lengths_N=np.repeat([len(line["prompt_ids"]) for line in lines], size).astype(np.int32),
        rewards_BK=np.zeros((len(lines), size), np.float32),
        sources=tuple(f"{path}:{number}" for number in range(1, len(lines) + 1)),
        pad_id=0,
    )


def _logprobs(source: Path, prepared: data.Prepared, settings: dict[str, Any], per_device: int) -> np.ndarray:
    """Return the log-probs [B, K] of the completions under one model, at the sampling temperature."""
    described, longest = hf.read_config(source), int(prepared.lengths_N.max())
    if described.reward_head:
        raise ValueError(f"{source} is a reward model; give a language model.")
    if longest > described.max_positions or int(prepared.tokens_S.max()) >= described.vocab_size:
        raise ValueError(
            f"the samples, of up to {longest} tokens and ids up to {int(prepared.tokens_S.max())}, do not fit {source},"
            f" with a window of {described.max_positions} and {described.vocab_size} tokens; give a reference of the"
            " same family."
        )
    config = configuration.default()
    config.model.path = str(source)
    config.model.param_dtype = config.model.compute_dtype = settings["compute_dtype"]
    config.data.max_length, config.data.group_size = longest, prepared.group_size
    config.data.layout, config.model.remat = "padded", "none"
    config.mesh.preset = "multi_gpu"
    layout = sharding.make_layout(**config.mesh, devices=jax.devices())
    per_device = min(per_device, -(-prepared.groups // layout.data_parallel_degree))
    config.train.micro_batch_per_device = per_device
    batch_size = per_device * layout.data_parallel_degree
    schedule = run_schedule.sequential_schedule(config, prepared, described, batch_size=batch_size, longest=longest)
    loss = losses.resolve("dpo", beta_pi=1.0, temperature=settings["temperature"])
    scored = int(max(schedule.scored))
    blueprint = run_schedule.Blueprint(loss, described, schedule.buckets, scored, warmup=0, total_steps=1)
    compiled = steps.build(config, blueprint, layout)
    weights, positions = compiled.state.load(source), compiled.batches.positions(batch_size)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(schedule.steps_per_epoch):
            placed = compiled.batches.place(data.batch_at(schedule, number, positions), stacked=False)
            yield data.group_ids(schedule, number), jax.device_get(compiled.logprobs(weights, placed))

    return reference_logprobs.compute(batches(), groups=prepared.groups)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo kl", about=__doc__)


def _work(options: Options) -> int:
    terminal.say(f"{options.out}: {run(options).text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sample completions of fixed prompts at every evaluation, and how often they beat those of the start.

What flows in: the weights of now. What flows out: `completions/STEP.jsonl` in the workdir, one line per prompt, and

    eval_completions/length    tokens of an answer, its stop token included
    eval_completions/ended     share of the completions that ended by themselves
    eval_completions/reward    mean score of completions.reward_model
    eval_completions/win_rate  share of the prompts whose answer scores higher than that of the start, a tie one half

A prompt's noise is the same at every step: where the policy has not changed, the answer has not. The reward model is on
the devices for as long as it scores, so that training has all of their memory again.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, distributed, hf, sharding, tokenization, types
from fpo_jax.inference import reward_model, sampler
from fpo_jax.io import jsonl
from fpo_jax.tokenization import messages
from fpo_jax.trainer import run_inputs

log = logging.getLogger("fpo_jax")

Table = tuple[list[str], list[list[str]]]  # header and rows

FOLDER = "completions"
DECIMALS = 6  # of a reward in a file


class SampleCompletions:
    """The prompts of a run, ready to be answered by its weights."""

    def __init__(
        self,
        config: configuration.Config,
        workdir: Path,
        inputs: run_inputs.Inputs,
        *,
        layout: sharding.Layout = sharding.ONE_DEVICE,
    ):
        """Read and tokenize the prompts; touches no device and writes nothing.

        Raises:
            ValueError: no prompts, no room for an answer, or a reward model that is none.
        """
        options = config.completions
        self._options, self._folder, self._layout = options, workdir / FOLDER, layout
        self._config = inputs.model_config
        self._seed, self._dtype = config.seed, config.model.compute_dtype
        encoder = inputs.encoder
        assert encoder is not None
        self._tokenizer = encoder.tokenizer
        self._decoding = sampler.Decoding(
            options.max_new_tokens, temperature=options.temperature, stop_ids=encoder.format.end_ids
        )
        window = config.data.max_length
        room = window - options.max_new_tokens
        if room < 1:
            raise ValueError(
                f"completions.max_new_tokens={options.max_new_tokens} leaves no room for a prompt in"
                f" data.max_length={window} tokens; lower it."
            )
        found = _prompts(config, encoder, inputs.rows)
        self._prompts = [record.prompt for record in found]
        self._tools = [record.tools for record in found]
        ids = tokenization.generation_prompts(encoder, self._prompts, tools=self._tools)
        self._ids = [tokenization.keep_end(encoder, whole, room=room) for whole in ids]
        self._window = window
        self._judge = None
        if options.reward_model:
            self._judge = hf.local_dir(options.reward_model, revision=None)
            judge_config = hf.read_config(self._judge)
            if not judge_config.reward_head:
                raise ValueError(
                    f"completions.reward_model={options.reward_model!r} is a language model; give a reward model."
                )
            self._judge_window, self._judge_pad_id = judge_config.max_positions, judge_config.pad_id
            given = tokenization.Given(thoughts=tokenization.judge_thoughts(self._judge, config.data.thoughts))
            self._judge_encoder = tokenization.resolve(self._judge, given)
            log.info("completions.reward_model reads: %s", self._judge_encoder.format.text)
            with configuration.about("completions.reward_model"):
                self._rows(["fpo-answer"] * len(self._prompts))

    def __call__(
        self, number: int, weights: types.PyTree, check: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], Table]:
        """Complete every prompt, write the completions of step `number`, and return their metrics and them as a table.

        `check` is called after every batch, and may raise.
        """
        drawn = sampler.sample(
            weights,
            self._ids,
            config=self._config,
            decoding=self._decoding,
            seed=self._seed,
            batch_size=self._options.batch_per_device * self._layout.data_parallel_degree,
            window=self._window,
            compute_dtype=self._dtype,
            layout=self._layout,
            done=lambda _: check(),
        )
        lines = [self._line(index, completions[0]) for index, completions in enumerate(drawn)]
        found = {
            "eval_completions/length": float(np.mean([line["tokens"] for line in lines])),
            "eval_completions/ended": float(np.mean([line["finish"] == "stop" for line in lines])),
        }
        if self._judge is not None:
            rewards = self._rewards([line["completion"] for line in lines])
            for line, reward in zip(lines, rewards, strict=True):
                line["reward"] = round(reward, DECIMALS)
            found |= self._against_the_start(number, lines)
        with distributed.together():
            if distributed.is_main_process():
                self._write(number, lines)
        return found, _table(lines)

    def _line(self, index: int, ids: list[int]) -> dict:
        stopped = ids[-1] in self._decoding.stop_ids
        text = tokenization.continuation(self._tokenizer, self._ids[index], ids[:-1] if stopped else ids)
        finish = "stop" if stopped else "length"
        return {
            "index": index, "prompt": self._prompts[index], "completion": text, "finish": finish, "tokens": len(ids)
        }  # fmt: skip

    def _rewards(self, texts: list[str]) -> list[float]:
        assert self._judge is not None
        rows = self._rows(texts)
        rewarder = reward_model.Rewarder(
            self._judge,
            max_length=max(len(row) for row in rows),
            compute_dtype=self._dtype,
            batch_per_device=self._options.batch_per_device,
        )
        return rewarder(rows).tolist()

    def _rows(self, texts: list[str]) -> list[list[int]]:
        """Build the rows of the reward model, one answer to each prompt."""
        completions, limits = [[text] for text in texts], {"pad_id": self._judge_pad_id, "window": self._judge_window}
        groups = reward_model.rows(self._judge_encoder, self._prompts, completions, tools=self._tools, **limits)
        return [row.ids for group in groups for row in group]

    def _against_the_start(self, number: int, lines: list[dict]) -> dict[str, float]:
        start = lines if number == 0 else read(self._folder, 0)
        margins = np.array([line["reward"] - first["reward"] for line, first in zip(lines, start, strict=True)])
        wins = 0.5 * (np.sign(margins) + 1)
        return {
            "eval_completions/reward": float(np.mean([line["reward"] for line in lines])),
            "eval_completions/win_rate": float(wins.mean()),
        }

    def _write(self, number: int, lines: list[dict]) -> None:
        jsonl.write(self._folder / f"{number}.jsonl", lines)


def read(folder: Path, number: int) -> list[dict]:
    """Return the sample completions after a step.

    Raises:
        ValueError: there are none.
    """
    path = folder / f"{number}.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing, and the completions of a later step are compared with it; put it back.")
    return jsonl.read(path)


def _table(lines: list[dict]) -> Table:
    header = ["prompt", "answer", *(["reward"] if "reward" in lines[0] else [])]
    rows = []
    for line in lines:
        rows.append(
            [
                messages.said(line["prompt"]),
                line["completion"],
                *([f"{line['reward']:.4g}"] if "reward" in line else []),
            ]
        )
    return header, rows


def _prompts(config: configuration.Config, encoder: tokenization.Encoder, given: run_inputs.Rows) -> list[data.Record]:
    """Return the first records of distinct prompts; what the template refuses is left out where it may be skipped."""
    options, own = config.data, config.completions.prompts
    rows = configuration.row_slice("" if own else options.eval_rows)
    records = data.read(
        own or given.get("eval", options.eval),
        format="prompts" if own else options.format,
        split=None if own else options.eval_split or None,
        hh_split="last_turn" if own else options.hh_split,
        on_bad_row=options.on_bad_row,
        start=rows.start or 0,
        stop=rows.stop,
        data_dir=None if own else options.subfolder or None,
        revision=None if own else options.revision or None,
        tokenizer=encoder.tokenizer,
        wants="any" if own else run_inputs.wanted(config),
        rule=options.rule,
        name="eval_dataset",
    )
    kept: dict[str, data.Record] = {}
    for record in records.rows:
        if len(kept) == config.completions.count:
            break
        try:
            with configuration.about(record.source):
                tokenization.generation_prompts(encoder, [record.prompt], tools=[record.tools])
        except ValueError as error:
            if options.on_bad_row != "skip" or not isinstance(error.__cause__, tokenization.Refused):
                raise
            log.info("no sample completion: %s", error)
            continue
        kept[json.dumps([record.prompt, record.tools] if record.tools else record.prompt)] = record
    if not kept:
        raise ValueError("no prompt is left to answer; set completions.prompts.")
    return list(kept.values())

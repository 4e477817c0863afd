"""A reward model that is read: a score for each row, from a bias-free head on the hidden state of its last token.

    token rows ──Rewarder──► float32 scores of a model in a directory, batched over a mesh

Rows end with the token at which the score stands (`data.reward_row`): plain text at its last token, a conversation
where `transformers` reads it, at the last token of the template's text that is not the pad token.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import attention, data, hf, logprobs, models, sharding, tokenization
from fpo_jax.models import params
from fpo_jax.tokenization import messages

_UNCUT = 2**30  # tokens


class Rewarder:
    """A reward model on the devices of this process, ready to score rows."""

    def __init__(self, source: Path, *, max_length: int, compute_dtype: str, batch_per_device: int):
        """Read the model.

        Args:
            source: directory of a sequence-classification model with one label.
            max_length: tokens of the longest row; rows are padded to it or to a half, a quarter, ... of it.
            compute_dtype: of the forward pass; scores are float32.
            batch_per_device: rows of a forward pass.

        Raises:
            ValueError: not a reward model, a window shorter than max_length, damaged weights.
        """
        self.config = hf.read_config(source)
        if not self.config.reward_head:
            raise ValueError(
                f"{source} is a language model; give a reward model (…ForSequenceClassification, 1 label)."
            )
        if max_length > self.config.max_positions:
            raise ValueError(
                f"max_length={max_length} exceeds the window of {self.config.max_positions} tokens of {source}."
            )
        layout = sharding.make_layout(preset="fsdp", data=None, fsdp=None, tensor=None, devices=jax.local_devices())
        assert layout.mesh is not None
        self._lengths = _buckets(max_length)
        self._rows = batch_per_device * layout.data_parallel_degree
        self._place = sharding.batch_sharding(layout.mesh, stacked=False)
        places = params.shardings(self.config, mesh=layout.mesh)
        self._params = hf.load_params(source, self.config, dtype=compute_dtype, shardings=places)
        choice = attention.select(
            "auto",
            platform=jax.default_backend(),
            dtype=jnp.dtype(compute_dtype),
            head_dim=self.config.head_dim,
            heads=self.config.heads,
            kv_heads=self.config.kv_heads,
            positions=self._lengths,
            sliding_window=self.config.sliding_window,
            soft_cap=self.config.attention_soft_cap,
            sinks=self.config.of_family.sinks,
            segments=False,
            compute_capability=logprobs.Target.of(layout.mesh.devices.flat[0]).compute_capability,
            layout=layout,
        )

        def scores(weights, tokens_NT, valid_NT, last_N1):
            hidden_NTD = models.hidden_states(
                weights,
                tokens_NT,
                valid_NT,
                config=self.config,
                compute_dtype=compute_dtype,
                remat="none",
                attention=choice,
                layout=layout,
            )
            return models.scores(weights, hidden_NTD, last_N1)

        self._scores = jax.jit(scores, in_shardings=(places, self._place, self._place, self._place))

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the scores of token rows, float32, in their order.

        Raises:
            ValueError: an empty or too long row, or a score that is not finite.
        """
        for index, row in enumerate(rows):
            if not 0 < len(row) <= self._lengths[-1]:
                raise ValueError(f"row {index} has {len(row)} tokens; need 1 to {self._lengths[-1]}.")
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # rows of one length together
        found = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), self._rows):
            indices = order[start : start + self._rows]
            found[indices] = self._one([rows[index] for index in indices])
        if not np.isfinite(found).all():
            raise ValueError(f"row {int(np.argmin(np.isfinite(found)))} has a score that is not finite.")
        return found

    def _one(self, rows: list[Sequence[int]]) -> np.ndarray:
        """Score at most a batch of rows, filled up with rows of one token."""
        length = next(length for length in self._lengths if length >= len(rows[-1]))
        tokens_NT = np.zeros((self._rows, length), np.int32)
        lengths_N = np.ones(self._rows, np.int32)
        for index, row in enumerate(rows):
            tokens_NT[index, : len(row)] = row
            lengths_N[index] = len(row)
        valid_NT = np.arange(length) < lengths_N[:, None]
        put = functools.partial(jax.device_put, device=self._place)
        scores_N1 = self._scores(self._params, put(tokens_NT), put(valid_NT), put(lengths_N[:, None] - 1))
        return np.asarray(scores_N1)[: len(rows), 0]


def rows(
    encoder: tokenization.Encoder,
    prompts: Sequence[Any],
    completions: Sequence[Sequence[Any]],
    *,
    pad_id: int | None,
    window: int,
    tools: Sequence[Any] | None = None,
) -> list[list[tokenization.Row]]:
    """Build the rows of completions to prompts as a reward model's training builds them.

    Args:
        encoder: of the reward model, with its prompt format.
        prompts: texts, or conversations for rule `chat`.
        completions: of each prompt.
        pad_id: `pad_token_id` of the reward model's config; None = it has none.
        window: tokens of a row; a longer prompt loses its beginning.
        tools: JSON schemas that each prompt offers, for rule `chat`; None = none does.

    Raises:
        tokenization.Refused: a conversation that the template does not render.
        ValueError: tools under rule `raw`.
    """
    if encoder.format.rule == "raw":
        if tools is not None and any(tools):
            raise ValueError(messages.NO_TOOLS)
        longest = window + 1  # the EOS is cut off below
        most = max(1, window - 1)
        groups = tokenization.raw_rows(
            encoder, prompts, completions, max_length=longest, max_completion_length=most, cut_prompts_together=False
        )
    else:
        groups = tokenization.chat_rows(
            encoder, prompts, completions, tools=tools, max_length=_UNCUT + 1, max_prompt_length=_UNCUT, ends=False
        )
    return [[_fit(data.reward_row(row, encoder, pad_id), window) for row in group] for group in groups]


def _fit(row: tokenization.Row, window: int) -> tokenization.Row:
    """Cut a row to the window: its completion's end, where it fills the window alone, and its prompt's beginning."""
    prompt, completion = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
    kept = completion[: max(window - 1, 1)]
    head = prompt[max(0, len(prompt) - (window - len(kept))) :]
    return row._replace(
        ids=head + kept,
        prompt_length=len(head),
        prompt_cut=row.prompt_cut + len(prompt) - len(head),
        completion_cut=row.completion_cut + len(completion) - len(kept),
    )


def _buckets(longest: int) -> tuple[int, ...]:
    """Return longest and its halves down to 64, ascending.

    >>> _buckets(300)
    (75, 150, 300)
    """
    return tuple(sorted({-(-longest // 2**k) for k in range(8) if longest // 2**k >= 64} | {longest}))

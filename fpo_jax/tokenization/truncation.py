"""Token rows cut to a window: which end of a prompt goes, and who pays for the longest completion of a group."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

TRUNCATION_MODES = ("keep_end", "keep_start")


class Row(NamedTuple):
    """One completion as token ids, not yet padded; `ids[prompt_length:]` are scored, but for what is context."""

    ids: list[int]
    prompt_length: int
    prompt_cut: int = 0  # prompt tokens removed to fit the window
    completion_cut: int = 0  # completion tokens removed, EOS among them
    merged: bool = False  # a token straddles the boundary; it is scored
    header: int = 0  # first scored tokens that are the template's assistant header and no text of the answer
    context: tuple[tuple[int, int], ...] = ()  # begin and end, counted from the prompt's end, of what is not scored

    @property
    def scored(self) -> Bool[np.ndarray, " T"]:
        """Which tokens are scored: those of the completion that are an assistant's."""
        scored_T = np.arange(len(self.ids)) >= self.prompt_length
        for begin, end in self.context:
            scored_T[self.prompt_length + begin : self.prompt_length + end] = False
        return scored_T


def fit_raw(
    prompt: list[int],
    completion: list[int],
    *,
    max_length: int,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    bos_id: int | None = None,
    adds_bos: bool = False,
    longest: int = 0,
) -> Row:
    """Cut one plain-text row to the window: first the completion's end, then the prompt.

    A completion that begins with BOS loses that token (the original's rule: it matters where BOS = EOS and the
    completion is empty, which leaves nothing to score). `longest` is what the longest completion of the group keeps:
    the prompt leaves room for that one, so that all rows of a group have the same prompt.

    >>> fit_raw([1, 2, 3, 4], [5, 6, 0], max_length=5, max_completion_length=2)[:4]
    ([2, 3, 4, 5, 6], 3, 1, 1)
    """
    completion = completion[1:] if bos_id is not None and completion[:1] == [bos_id] else completion
    kept = completion[:max_completion_length]
    opening = [bos_id] if adds_bos and bos_id is not None else []
    room = min(max_length - len(opening) - max(longest, len(kept)), max_prompt_length or max_length)
    head = opening + _keep(prompt, room, truncation_mode)
    return Row(
        ids=head + kept,
        prompt_length=len(head),
        prompt_cut=max(len(prompt) - room, 0),
        completion_cut=len(completion) - len(kept),
    )


def fit_chat(
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    max_length: int,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_end",
    truncate_together: bool = False,
) -> list[Row]:
    """Cut the K rows of one group to the window: first the prompt, then the completions.

    With longest = max over the K completions: a prompt with |prompt| + longest > max_length is cut to
    max_prompt_length; if that is not enough, the completions are cut too (see `encode.chat_rows` for
    `truncate_together`).

    >>> rows = fit_chat([[1, 2, 3]] * 2, [[4], [5, 6, 7]], max_length=4, max_prompt_length=2)
    >>> [(row.ids, row.completion_cut) for row in rows]
    [([2, 3, 4], 0), ([2, 3, 5, 6], 1)]
    """
    limit = max_completion_length or max_length
    longest = max(len(completion[:limit]) for completion in completions)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        head, kept = prompt, completion[:limit]
        if len(head) + longest > max_length:
            head = _keep(head, max_prompt_length, truncation_mode)
        if truncate_together and len(head) + longest > max_length:
            kept = kept[: max_length - max_prompt_length]
        if not truncate_together:
            kept = kept[: max_length - len(head)]
        rows.append(Row(head + kept, len(head), len(prompt) - len(head), len(completion) - len(kept)))
    return rows


def check_lengths(*, max_length: int, max_prompt_length: int | None, max_completion_length: int | None) -> None:
    """Refuse limits that leave a prompt or a completion without a token.

    Raises:
        ValueError: a limit below 1, or one that fills `max_length` alone.
    """
    for name, value in (("max_prompt_length", max_prompt_length), ("max_completion_length", max_completion_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None for no limit of its own")
        if value is not None and value >= max_length:
            raise ValueError(
                f"{name}={value} with max_length={max_length} leaves no room for the other part of a row; "
                f"use at most {max_length - 1}"
            )


def _keep(ids: list[int], count: int, mode: str) -> list[int]:
    """Keep at most `count` ids, from the end or the start."""
    return ids[max(len(ids) - count, 0) :] if mode == "keep_end" else ids[:count]

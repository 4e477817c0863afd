"""The audit of a prepared data set: what was read, dropped, cut or odd, as text for a terminal and as JSON.

What flows in: the prepared rows and what `prepare` noticed while building them. What flows out: an `Audit`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_jax import tokenization
from fpo_jax.data.tokenized import Prepared

_EXAMPLES = 4  # sources named per reason in the text; the JSON has them all
_BARS = " ▁▂▃▄▅▆▇█"
_TOGETHER = 4096  # rows whose tokens are looked at together: a large set would not fit into memory as a whole


class Lengths(NamedTuple):
    """Distribution of a length in tokens."""

    least: int
    median: float
    p90: float
    p99: float
    most: int
    edges: tuple[int, ...]  # bin i counts edges[i] <= length < edges[i+1]; the last bin has no end
    counts: tuple[int, ...]


class Bucket(NamedTuple):
    """Groups whose longest row needs this row length, each padded to it alone."""

    length: int
    groups: int
    padding: float  # share of the positions that hold no token, 0 to 1


class Packed(NamedTuple):
    """Rows that hold several texts each."""

    rows: int
    length: int
    padding: float  # share of the positions that hold no token, 0 to 1
    before: float  # the same with one text a row, each padded to its bucket


class Audit(NamedTuple):
    """What became of the rows of a data set; counts are exact."""

    rule: str
    rows_read: int
    groups_formed: int  # before the groups in `dropped` were taken out
    groups: int
    group_size: int
    tokens: int
    scored_tokens: int
    largest_token_id: int
    dropped: Mapping[str, Sequence[str]]  # reason -> where; rows by the reader, groups by `prepare`
    noted: Mapping[str, Sequence[str]]  # odd, dropped or not
    prompts_cut: int  # groups
    prompt_tokens_cut: int  # of one row of each group, the most
    prompts_differ: int  # groups whose rows were cut to different prompts
    completions_cut: int  # rows, which lost their end token
    completion_tokens_cut: int  # of all rows
    missing_eos: int  # rows that do not end in an end token
    missing_eos_unexplained: int  # of those, rows that were not cut
    merged: int  # rows in which a token straddles prompt and completion
    double_eos: int  # rows whose scored part holds more end tokens than assistant turns
    double_bos: int  # rows with two BOS tokens in a row
    no_bos: int  # rows without, where the tokenizer opens texts with BOS: their prompts lost it
    ties: int  # groups whose highest reward is shared
    pad: str  # which id fills, and why
    prompt_format: str  # how prompts and completions became ids
    warnings: tuple[str, ...]  # what of the chat template will not do what it looks like
    lengths: dict[str, Lengths]  # prompt, completion, row
    buckets: tuple[Bucket, ...]
    packed: Packed | None = None
    left_out: int = 0  # sound groups that `prepare` was told not to keep
    example: dict[str, Any] | None = None  # a conversation and its ids, by which an export is checked
    format: str = ""  # of the rows, and why, where it was found and not named

    def with_packed(self, rows: int, *, length: int) -> "Audit":
        """Return the audit of the same texts packed into so many rows."""
        padded = sum(bucket.groups * bucket.length for bucket in self.buckets) * self.group_size
        padding, before = (1 - self.tokens / positions for positions in (rows * length, padded))
        return self._replace(packed=Packed(rows, length, padding, before))

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for `json.dumps`."""
        fields = self._asdict()
        del fields["example"]
        return fields | {
            "dropped": {reason: list(sources) for reason, sources in self.dropped.items()},
            "noted": {reason: list(sources) for reason, sources in self.noted.items()},
            "lengths": {name: lengths._asdict() for name, lengths in self.lengths.items()},
            "buckets": [bucket._asdict() for bucket in self.buckets],
            "packed": None if self.packed is None else self.packed._asdict(),
        }

    def text(self) -> str:
        """Compact table for a terminal."""
        lines = [
            f"data audit, rule {self.rule}: {self.rows_read:,} rows read, {self.groups:,} groups of {self.group_size} "
            f"kept{self._left_out()}, {self.tokens:,} tokens, {self.scored_tokens:,} scored"
        ]
        lines += [f"  format {self.format}"] if self.format else []
        lines.append(f"  prompt format: {self.prompt_format}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [_reason("dropped", name, sources) for name, sources in self.dropped.items()]
        lines += [_reason("noted", name, sources) for name, sources in self.noted.items()]
        for name, count, unit in (
            ("prompts cut", self.prompts_cut, f"of {self.groups:,} groups{_lost(self.prompt_tokens_cut)}"),
            ("prompts differ", self.prompts_differ, "groups, their completions follow differently cut prompts"),
            (
                "completions cut",
                self.completions_cut,
                f"of {self.groups * self.group_size:,} rows{_lost(self.completion_tokens_cut)}",
            ),
            ("missing EOS", self.missing_eos, f"rows, {self.missing_eos_unexplained} of them not cut"),
            ("double EOS", self.double_eos, "rows, every end token is scored"),
            ("boundary merges", self.merged, "rows, the token across the boundary is scored"),
            ("double BOS", self.double_bos, "rows"),
            ("lost BOS", self.no_bos, "rows, with the start of their prompts"),
            ("reward ties", self.ties, "groups"),
        ):
            lines.append(f"  {name:<16}{count:>9,}  {unit}")
        lines.append(f"  {'pad':<16}{self.pad}")
        lines.append(
            f"  {'tokens':<16}{'min':>9}{'median':>8}{'p90':>7}{'p99':>7}{'max':>7}  from {_edges(self.lengths)}"
        )
        for name, length in self.lengths.items():
            lines.append(
                f"  {name:<16}{length.least:>9}{length.median:>8.0f}{length.p90:>7.0f}{length.p99:>7.0f}"
                f"{length.most:>7}  {_bars(length.counts)}"
            )
        lines += [
            f"  {f'T = {bucket.length}':<16}{bucket.groups:>9,}  groups, {bucket.padding:.1%} padding"
            for bucket in self.buckets
        ]
        if self.packed is not None:
            rows, length, padding, before = self.packed
            lines.append(f"  {'packed':<16}{rows:>9,}  rows of {length}, {padding:.1%} padding instead of {before:.1%}")
        return "\n".join(lines)

    def _left_out(self) -> str:
        return f" of {self.groups + self.left_out:,}, at equal distances" if self.left_out else ""


def from_dict(found: Mapping[str, Any]) -> Audit:
    """Return the audit of which `Audit.as_dict` made this, as JSON gives it back; without the example."""
    places = {kind: {reason: tuple(listed) for reason, listed in found[kind].items()} for kind in ("dropped", "noted")}

    def tuples(one: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}

    lengths = {name: Lengths(**tuples(one)) for name, one in found["lengths"].items()}
    return Audit(
        **{
            **found,
            **places,
            "warnings": tuple(found["warnings"]),
            "lengths": lengths,
            "buckets": tuple(Bucket(**one) for one in found["buckets"]),
            "packed": None if found["packed"] is None else Packed(**found["packed"]),
        }
    )


def audit(
    prepared: Prepared,
    facts_N4: np.ndarray,
    encoder: tokenization.Encoder,
    *,
    rows_read: int,
    groups_formed: int,
    dropped: Mapping[str, Sequence[str]],
    noted: Mapping[str, Sequence[str]],
    buckets: Sequence[int],
    left_out: int = 0,
    example: dict[str, Any] | None = None,
    format: str = "",
) -> Audit:
    """Count everything worth knowing about prepared rows.

    Args:
        prepared: the rows.
        facts_N4: int, per row: prompt length, prompt tokens cut, completion tokens cut, merged.
        encoder: that they were made with.
        rows_read: rows the reader saw.
        groups_formed: groups before any was dropped by `prepare`.
        dropped: reason -> sources.
        noted: reason -> sources of rows that are odd, dropped or not.
        buckets: row lengths for the padding share.
        left_out: sound groups that were not kept.
        example: a conversation of the rows, with its ids.
        format: of the rows, and why, where it was found.
    """
    shape_BK = prepared.rewards_BK.shape
    prompt_cut_N, completion_cut_N, merged_N = facts_N4[:, 1], facts_N4[:, 2], facts_N4[:, 3]
    no_eos_N, scored_ends_N, bos_N, double_bos_N = _token_counts(prepared, encoder)
    loss_tokens_N = prepared.loss_tokens_N
    return Audit(
        rule=encoder.format.rule,
        rows_read=rows_read,
        groups_formed=groups_formed,
        groups=prepared.groups,
        group_size=prepared.group_size,
        tokens=int(prepared.lengths_N.sum()),
        scored_tokens=int(loss_tokens_N.sum()),
        largest_token_id=int(prepared.tokens_S.max()),
        dropped={reason: tuple(sources) for reason, sources in dropped.items()},
        noted={reason: tuple(sources) for reason, sources in noted.items()},
        prompts_cut=int((prompt_cut_N.reshape(shape_BK) > 0).any(axis=1).sum()),
        prompt_tokens_cut=int(prompt_cut_N.reshape(shape_BK).max(axis=1).sum()),
        prompts_differ=int((prompt_cut_N.reshape(shape_BK) != prompt_cut_N.reshape(shape_BK)[:, :1]).any(axis=1).sum()),
        completions_cut=int((completion_cut_N > 0).sum()),
        completion_tokens_cut=int(completion_cut_N.sum()),
        missing_eos=int(no_eos_N.sum()),
        missing_eos_unexplained=int((no_eos_N & (completion_cut_N == 0)).sum()),
        merged=int(merged_N.sum()),
        double_eos=int((scored_ends_N > _scored_turns(prepared)).sum()),
        double_bos=int(double_bos_N.sum()),
        no_bos=int((bos_N == 0).sum()) if encoder.adds_bos else 0,
        ties=int(((prepared.rewards_BK == prepared.rewards_BK.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum()),
        pad=_pad_note(prepared.pad_id, encoder),
        prompt_format=encoder.format.text,
        warnings=tuple(tokenization.warnings(encoder)),
        lengths={
            "prompt": _lengths(prepared.prompt_lengths_N),
            "completion": _lengths(prepared.lengths_N - prepared.prompt_lengths_N),
            "row": _lengths(prepared.lengths_N),
        },
        buckets=_buckets(prepared.lengths_N.reshape(shape_BK), buckets),
        left_out=left_out,
        example=example,
        format=format,
    )


def _token_counts(prepared: Prepared, encoder: tokenization.Encoder) -> list[np.ndarray]:
    """Tell of each row: no end token is its last, end tokens in its scored part, BOS tokens, two of them in a row."""
    counts = []
    for first in range(0, len(prepared.lengths_N), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        begin, lengths_N = int(prepared.starts_N[first]), prepared.lengths_N[rows]
        tokens_S = np.asarray(prepared.tokens_S[begin : begin + int(lengths_N.sum())])
        starts_N = prepared.starts_N[rows] - begin
        is_end_S = np.isin(tokens_S, encoder.format.end_ids)
        scored_S = True if prepared.scored_S is None else prepared.scored_S[begin : begin + len(tokens_S)]
        ends_so_far = np.concatenate([[0], np.cumsum(is_end_S & scored_S)])
        scored_ends_N = ends_so_far[starts_N + lengths_N] - ends_so_far[starts_N + prepared.prompt_lengths_N[rows]]
        no_eos_N = ~is_end_S[starts_N + lengths_N - 1]
        counts.append((no_eos_N, scored_ends_N, *_bos_counts(tokens_S, starts_N, encoder)))
    return [np.concatenate(part) for part in zip(*counts, strict=True)]


def _scored_turns(prepared: Prepared) -> np.ndarray | int:
    """Count the assistant turns that are scored in each row: stretches of scored tokens."""
    if prepared.scored_S is None:
        return 1
    begins_S = prepared.scored_S & ~np.concatenate([[False], prepared.scored_S[:-1]])
    begins_S[prepared.starts_N] = prepared.scored_S[prepared.starts_N]
    return np.add.reduceat(begins_S.astype(np.int32), prepared.starts_N)


def _bos_counts(
    tokens_S: np.ndarray, starts_N: np.ndarray, encoder: tokenization.Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """BOS tokens per row, and whether two follow each other: <|im_start|> as BOS opens every turn.

    One and none where BOS is also EOS and cannot be told from it.
    """
    if encoder.bos_id is None or encoder.bos_id == encoder.eos_id:
        return np.ones(len(starts_N), np.int32), np.zeros(len(starts_N), bool)
    is_bos_S = tokens_S == encoder.bos_id
    again_S = is_bos_S & np.concatenate([[False], is_bos_S[:-1]])
    again_S[starts_N] = False
    counts = [np.add.reduceat(flags.astype(np.int32), starts_N) for flags in (is_bos_S, again_S)]
    return counts[0], counts[1] > 0


def _pad_note(pad_id: int, encoder: tokenization.Encoder) -> str:
    same = " = EOS" if pad_id == encoder.eos_id else ""
    why = "" if encoder.tokenizer.pad_token_id == pad_id else " as the model knows no pad token"
    return f"id {pad_id}{same}{why}; filler only: masks come from lengths, EOS is scored"


def _lengths(lengths_N: np.ndarray) -> Lengths:
    edges = tuple(2**power for power in range(3, 15))
    bins_N = np.searchsorted(edges, lengths_N, side="right")
    p50, p90, p99 = (float(value) for value in np.percentile(lengths_N, [50, 90, 99]))
    counts = np.bincount(bins_N, minlength=len(edges) + 1)
    return Lengths(
        int(lengths_N.min()), p50, p90, p99, int(lengths_N.max()), (0, *edges), tuple(int(count) for count in counts)
    )


def _buckets(lengths_BK: np.ndarray, buckets: Sequence[int]) -> tuple[Bucket, ...]:
    bounds = sorted(set(buckets))
    longest_B = lengths_BK.max(axis=1)
    which_B = np.searchsorted(bounds, longest_B)
    found = []
    for index, bound in enumerate(bounds):
        inside = lengths_BK[which_B == index]
        found.append(Bucket(bound, len(inside), 1 - int(inside.sum()) / (inside.size * bound) if inside.size else 0.0))
    return tuple(found)


def _lost(tokens: int) -> str:
    return f", {tokens:,} tokens lost" if tokens else ""


def _reason(kind: str, name: str, sources: Sequence[str]) -> str:
    shown = []
    for place, before in zip(sources[:_EXAMPLES], ("", *sources[:_EXAMPLES]), strict=False):
        same_file = ":" in place and place.rpartition(":")[0] == before.rpartition(":")[0]
        shown.append(place.rpartition(":")[2] if same_file else place.rpartition("/")[2])
    more = ", ..." if len(sources) > _EXAMPLES else ""
    return f"  {kind:<8}{len(sources):>17,}  {name}: {', '.join(shown)}{more}"


def _edges(lengths: Mapping[str, Lengths]) -> str:
    edges = next(iter(lengths.values())).edges
    return f"0, {edges[1]}, {edges[2]}, ... {edges[-1]} (doubling)"


def _bars(counts: Sequence[int]) -> str:
    most = max(counts)
    return "".join(_BARS[-(-8 * count // most)] for count in counts)

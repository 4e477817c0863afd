"""What a run did in a few sentences, and warnings, each with the rule that raises it: what a report opens with.

What flows in: the evaluations of a run, the audit of its data, its first and last sample completions and the summaries
of `fpo winrate`; or what a pipeline found. What flows out: blocks of a page. docs/curves.md has the same rules.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fpo_jax.eval.report.html import Block, Heading, Text
from fpo_jax.eval.stats import confidence_intervals, win_rates

Line = Mapping[str, Any]

DRIFT = 0.25  # relative change of the length of answers
FORGOTTEN = 0.5  # nats per token of the chosen completions
ALIKE = 0.5  # share of the distinct answers of the start
ENDED = 0.10  # change of the share of answers that end
LENGTH_BOUGHT = 0.10  # of a win rate that equal length takes away
TIED = 0.20  # share of groups
LOST = 0.20  # share of the best gain


class Warned(NamedTuple):
    """One warning."""

    name: str
    seen: str
    rule: str
    remedy: str


RULES = {  # name -> (rule, remedy)
    "collapse": (
        f"−log π per token of the chosen (`sft_loss`) rose by more than {FORGOTTEN} nats, or fewer than {ALIKE:.0%} as"
        f" many answers are distinct as at the start, or {ENDED:.0%} fewer end by themselves",
        "lower `optim.learning_rate`, raise β, or add `loss.sft_weight`",
    ),
    "length drift": (
        f"the mean length of the answers changed by more than {DRIFT:.0%}",
        "a loss of means (`simpo`), `r_dpo`, or a larger β",
    ),
    "reward hacking": (
        "the reward rose while a judge's win rate lies below 50 % with its whole interval, or equal length takes"
        f" {100 * LENGTH_BOUGHT:.0f} points of a win rate",
        "stop earlier, raise β, read the answers side by side",
    ),
    "ties": (
        f"more than {TIED:.0%} of the training groups share their highest reward",
        "see `loss.tie_policy`; such groups teach little",
    ),
    "over-optimisation": (
        f"at the end more than {LOST:.0%} of the best evaluation's gain is lost again",
        "`train.keep_best`, or fewer epochs",
    ),
}


def of_run(
    evaluations: Sequence[Line],
    audits: Mapping[str, Any],
    answers: tuple[Sequence[Line], Sequence[Line]] | None,
    summaries: Sequence[Line],
) -> list[Block]:
    """Return the verdict on a run.

    Args:
        evaluations: lines of metrics.jsonl with `eval_`, in their order.
        audits: audit.json.
        answers: first and last sample completions to the same prompts.
        summaries: of `fpo winrate`.
    """
    if not evaluations:
        return [Heading("Verdict"), Text("The run has no evaluation: nothing is known of what it improved.")]
    sentences = [_gain(evaluations, audits, answers), _distance(evaluations)]
    sentences += [
        f"A judge prefers its answers in {win_rates.shown(one, 'win_rate')} of the comparisons (95 % interval)."
        for one in summaries
        if "win_rate" in one
    ]
    return [Heading("Verdict"), Text(" ".join(sentences)), *_shown(_warnings(evaluations, audits, answers, summaries))]


def of_pipeline(found: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Return the verdict on a pipeline, from its report.json: the start's entry first."""
    start, *others = found.items()
    lines, warned = [], []
    for name, one in others:
        change = one["change"]
        distance = "" if "kl" not in one else f" at a KL of {one['kl']['mean']:.3g} nats from the start"
        lines.append(
            f"`{name}`: {_direction(change['low'], change['high'])} mean reward {change['mean']:+.3f} (95 % interval"
            f" {change['low']:+.3f} to {change['high']:+.3f}), {win_rates.shown(one, 'win_rate')} of its answers beat"
            f" the start's{distance}."
        )
        before, after = start[1], one
        warned += [
            warning._replace(seen=f"`{name}`: {warning.seen}")
            for warning in (
                *_drift(before["mean_characters"], after["mean_characters"], "characters"),
                *_alike(before["distinct_answers"], after["distinct_answers"]),
                *(_bought(one) if change["low"] > 0 else []),
            )
        ]
    return [Heading("Verdict"), *map(Text, lines), *_shown(warned)]


def _gain(
    evaluations: Sequence[Line], audits: Mapping[str, Any], answers: tuple[Sequence[Line], Sequence[Line]] | None
) -> str:
    """Say what improved, by how much and how sure that is: by the answers' rewards, else on the held-out data."""
    first, last = evaluations[0], evaluations[-1]
    rewards: list[Any] | None = None
    if answers is not None:
        rewards = [[line.get("reward") for line in part] for part in answers]
    if rewards and len(rewards[0]) > 1 and None not in [*rewards[0], *rewards[1]]:
        mean, low, high = confidence_intervals.paired_difference(*rewards)
        return (
            f"**The answers {_direction(low, high)}**: mean reward {mean:+.3g} (95 % interval {low:+.3g} to"
            f" {high:+.3g}) over {len(rewards[0])} prompts, between step {first['step']} and step {last['step']}."
        )
    accuracies: list[Any] = [line.get("eval_rewards/accuracies") for line in (first, last)]
    part = audits.get("eval") or {}
    count = part.get("groups", 0) - part.get("ties", 0)
    if None not in accuracies and count > 0:
        was, now = map(float, accuracies)
        low, high = confidence_intervals.wilson(round(now * count), count)
        return (
            f"**The order of held-out completions {_direction(low - was, high - was)}**: {was:.1%} → {now:.1%} of"
            f" {count:,} groups are in the right order (95 % interval {low:.1%} to {high:.1%}), between step"
            f" {first['step']} and step {last['step']}."
        )
    for name in ("eval_perplexity", "eval_loss"):
        was, now = first.get(name), last.get(name)
        if was is not None and now is not None:
            kind = "improved" if now < was else "got no better"
            return (
                f"**Held-out {name.removeprefix('eval_')} {kind}**: {was:.4g} → {now:.4g} between step {first['step']}"
                f" and step {last['step']}; an interval would need the numbers of single examples, which a run does not"
                " keep."
            )
    return "No evaluation says what improved."


def _distance(evaluations: Sequence[Line]) -> str:
    distance = evaluations[-1].get("eval_reference_kl")
    if distance is None:
        return "How far it went from a reference is not known: the loss has none; `fpo kl` measures it."
    return (
        f"Its distance from the reference is a log-ratio of {distance:+.3g} nats per completion of the data; `fpo kl`"
        " measures the KL."
    )


def _direction(low: float, high: float) -> str:
    """Say whether a change is more than chance at 95 %."""
    return "improved" if low > 0 else "got worse" if high < 0 else "did not change by more than chance"


def _warnings(
    evaluations: Sequence[Line],
    audits: Mapping[str, Any],
    answers: tuple[Sequence[Line], Sequence[Line]] | None,
    summaries: Sequence[Line],
) -> list[Warned]:
    first, last = evaluations[0], evaluations[-1]
    found: list[Warned] = []

    def both(name: str) -> tuple[float, float]:
        """Return the first and the last value of an evaluation's metric; NaN, of which no rule holds, for none."""
        was, now = (math.nan if line.get(f"eval_{name}") is None else line[f"eval_{name}"] for line in (first, last))
        return was, now

    was, now = both("sft_loss")
    if now - was > FORGOTTEN:
        found.append(_warned("collapse", f"`sft_loss` {was:.3g} → {now:.3g}"))
    was, now = both("completions/ended")
    if was - now > ENDED:
        found.append(_warned("collapse", f"{was:.0%} → {now:.0%} of the answers end by themselves"))
    if answers is not None and answers[0] and answers[1]:
        found += _alike(*(len({line["completion"] for line in part}) / len(part) for part in answers))
    found += _drift(*both("completions/length"), "tokens")
    was, now = both("completions/reward")
    if math.isnan(was):
        was, now = both("rewards/margins")
    if now > was:
        for one in summaries:
            found += _bought(one)
            if "win_rate" in one and one["win_rate"]["high"] < 0.5:
                found.append(
                    _warned(
                        "reward hacking", f"reward {was:.3g} → {now:.3g}, win rate {win_rates.shown(one, 'win_rate')}"
                    )
                )
    train = audits.get("train") or {}
    if train.get("groups") and train.get("ties", 0) > TIED * train["groups"]:
        found.append(_warned("ties", f"{train['ties']:,} of {train['groups']:,} groups"))
    return found + _past_the_best(evaluations)


def _past_the_best(evaluations: Sequence[Line]) -> list[Warned]:
    """Compare the last evaluation with the best one, by the answers' reward where there is one, else by the loss."""
    for name, sign in (("eval_completions/reward", 1.0), ("eval_loss", -1.0)):
        points = [(line["step"], sign * line[name]) for line in evaluations if line.get(name) is not None]
        if len(points) < 3:
            continue
        step, best = max(points, key=lambda point: point[1])
        gain, lost = best - points[0][1], best - points[-1][1]
        if gain > 0 and lost > LOST * gain:
            seen = (
                f"{name.removeprefix('eval_')} {sign * best:.4g} at step {step}, {sign * points[-1][1]:.4g} at the end"
            )
            return [_warned("over-optimisation", seen)]
        return []
    return []


def _drift(was: float, now: float, unit: str) -> list[Warned]:
    if was > 0 and abs(now / was - 1) > DRIFT:
        return [_warned("length drift", f"{was:.0f} → {now:.0f} {unit} ({now / was - 1:+.0%})")]
    return []


def _alike(was: float, now: float) -> list[Warned]:
    return [_warned("collapse", f"{was:.0%} → {now:.0%} of the answers are distinct")] if now < ALIKE * was else []


def _bought(one: Line) -> list[Warned]:
    """Compare a win rate with that at equal length."""
    if "win_rate" not in one or "length_controlled_win_rate" not in one:
        return []
    raw, equal = one["win_rate"]["mean"], one["length_controlled_win_rate"]["mean"]
    if raw - equal > LENGTH_BOUGHT:
        return [_warned("reward hacking", f"win rate {raw:.1%}, at equal length {equal:.1%}")]
    return []


def _warned(name: str, seen: str) -> Warned:
    return Warned(name, seen, *RULES[name])


def _shown(warned: Sequence[Warned]) -> list[Block]:
    if not warned:
        names = ", ".join(RULES)
        return [Text(f"No warning: what was recorded meets none of the rules for {names} (docs/curves.md).")]
    return [
        Text(f"**Warning, {one.name}**: {one.seen}. Raised where {one.rule}. Remedy: {one.remedy}.") for one in warned
    ]

"""Count what a quickstart achieved: answers to the held-out prompts in, rates with 95 % intervals out."""

from typing import Any

from fpo_jax.eval.quickstart import quickstart_task as task
from fpo_jax.eval.stats import confidence_intervals

Answer = dict[str, Any]  # prompt, completion, outcome (of the completion), greedy


def compare(before: list[Answer], after: list[Answer]) -> dict[str, Any]:
    """Return success before and after, and the difference in points, of the same prompts in the same order.

    Raises:
        ValueError: the prompts differ.
    """
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        raise ValueError("the answers before and after alignment are to different prompts; delete both to start over.")
    mean, low, high = confidence_intervals.paired_difference(_correct(before), _correct(after))
    return {
        "success": {"before": success(before), "after": success(after)},
        "difference": {"points": 100 * mean, "low": 100 * low, "high": 100 * high},
    }


def success(answers: list[Answer]) -> dict[str, Any]:
    """Return rates of the sampled answers (all, per number of digits), of greedy ones, and counts per outcome."""
    digits = range(task.SHORTEST, task.LONGEST + 1)
    by_digits = {str(count): [row for row in answers if len(task.answer(row["prompt"])) == count] for count in digits}
    return {
        **_rate(answers),
        "greedy_rate": sum(row["greedy"] == task.answer(row["prompt"]) for row in answers) / len(answers),
        "by_digits": {count: _rate(rows) for count, rows in by_digits.items() if rows},
        "outcomes": {name: sum(row["outcome"] == name for row in answers) for name in task.OUTCOMES},
    }


def _correct(answers: list[Answer]) -> list[bool]:
    return [row["outcome"] == task.CORRECT for row in answers]


def _rate(answers: list[Answer]) -> dict[str, Any]:
    correct, count = sum(_correct(answers)), len(answers)
    low, high = confidence_intervals.wilson(correct, count)
    return {"rate": correct / count, "low": low, "high": high, "correct": correct, "count": count}

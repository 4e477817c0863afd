"""Every option of every loss: type, range, default, meaning. The one list behind errors, `--help`, docs and config."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType

from fpo_jax.losses import f_divergences, preference_losses, scores, targets

Value = float | bool | str


@dataclasses.dataclass(frozen=True)
class Option:
    """One option; `range` is both what a person reads and what is enforced."""

    name: str
    type: type  # float, bool or str
    range: str  # "(0, inf)", an interval whose round brackets exclude the end; or "a | b", choices; "" for bool
    default: Value  # unless a loss has its own
    meaning: str  # one line, with unit

    @property
    def choices(self) -> tuple[str, ...]:
        """The legal strings of a str option, else ()."""
        return tuple(self.range.split(" | ")) if self.type is str else ()

    def parse(self, value: object) -> Value:
        """Return the value in this option's type.

        Raises:
            ValueError: wrong type or outside the range; fact, limit and remedy.

        >>> Option("tau", float, "(0, inf)", 0.1, "").parse(1)
        1.0
        """
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}={value!r} is not a bool; give True or False")
            return value
        if self.type is str:
            if value not in self.choices:
                raise ValueError(f"{self.name}={value!r} is not one of: {', '.join(self.choices)}")
            return str(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{self.name}={value!r} is not a number; give one in {self.range} ({self.meaning})")
        low, high = (float(end) for end in self.range[1:-1].split(","))
        number = float(value)
        above = number >= low if self.range[0] == "[" else number > low
        below = number <= high if self.range[-1] == "]" else number < high
        if math.isnan(number) or not (above and below):
            raise ValueError(f"{self.name}={number} is outside {self.range} ({self.meaning}); give a value inside")
        return number


_ROWS = (
    Option("temperature", float, "(0, inf)", 1.0, "logits are divided by it before the log-softmax, reference too"),
    Option("sft_weight", float, "[0, inf)", 0.0, "weight of an added token-mean NLL of the chosen completion"),
    Option("target", str, " | ".join(targets.TARGETS), "preference", "where q comes from"),
    Option("score", str, " | ".join(scores.SCORES), "log_ratio", "what p is the softmax of"),
    Option("alpha", float, "(-inf, inf)", 0.1, "α of the divergence; 0 is EXO, 1 is DPO"),
    Option("weight", float, "(0, 1)", 0.5, "weight of p in Jensen-Shannon's mixture"),
    Option(
        "epsilon", float, "[0, 0.5)", f_divergences.AUTHORS_EPSILON, "label of a rejected completion; 0 = hard labels"
    ),
    Option("normalize", bool, "", False, "labels (1-ε, ε) that sum to 1 instead of (1, ε)"),
    Option("tie_policy", str, " | ".join(targets.TIE_POLICIES), "uniform", "which of equal best rewards is chosen"),
    Option("beta_r", float, "(0, inf)", 0.5, "temperature of the rewards in q; unit of a reward"),
    Option("log_clamp", float, "[-inf, 0]", f_divergences.AUTHORS_LOG_CLAMP, "floor of log q, nats; -inf = none"),
    Option("beta_pi", float, "(0, inf)", 0.5, "scale of a log-ratio to the reference; DPO's β"),
    Option(
        "beta", float, "(0, inf)", 2.0, "scale of a log-prob without reference; of other losses their beta_pi or tau"
    ),
    Option("gamma_beta_ratio", float, "[0, inf)", 0.25, "γ/β, nats per token taken off the chosen completion before β"),
    Option(
        "label_smoothing", float, "[0, 0.5)", 0.0, "probability of a wrong label; divergences: epsilon and normalize"
    ),
    Option("tau", float, "(0, inf)", 0.1, "IPO's τ: the margin aimed at is 1/(2τ) nats"),
    Option("delta", float, "[0, inf)", 1.0, "margin of the hinge, nats"),
    Option("chosen_nll_weight", float, "[0, inf)", 1.0, "λ of -logp (sum over tokens) of the chosen completion"),
    Option("odds_weight", float, "(0, inf)", 0.1, "λ of ORPO's odds-ratio term"),
    Option("length_penalty", float, "[0, inf)", 0.05, "R-DPO's α, logits per token of length difference"),
    Option("desirable_weight", float, "[0, inf)", 1.0, "KTO's λ of the chosen completion"),
    Option("undesirable_weight", float, "[0, inf)", 1.0, "KTO's λ of the others"),
    Option("reward_alpha", float, "(-inf, inf)", 0.25, "AlphaPO's α (arXiv 2501.03884); 0 is SimPO"),
    Option("basu_lambda", float, "(-1, inf)", 1.0, "BPO's λ of Basu's power divergence; -0.5 is nearest to DPO"),
    Option("gradient_scale", float, "(0, inf)", 4.0, "BPO's s, which divides the loss; 4 has DPO's slope at the start"),
    Option("constraint_alpha", float, "[0, inf)", 0.5, "f-DPO's α of the constraint on π/π_ref; TRL's is 1 - α"),
)

OPTIONS: Mapping[str, Option] = MappingProxyType({row.name: row for row in _ROWS})
GENERAL = ("temperature", "sft_weight")  # every loss of log-probs has them; applied outside this package


def options_of(name: str, *, target: str = "preference", score: str = "log_ratio") -> dict[str, Value]:
    """Return the options that a loss reads, with its defaults; target and score matter for divergences only.

    >>> list(options_of("ipo"))
    ['temperature', 'sft_weight', 'tie_policy', 'tau']
    """
    if name in preference_losses.OBJECTIVES:
        row = preference_losses.OBJECTIVES[name]
        own = dict(row.options)
        names = (*(() if row.of_scores else (*GENERAL, "tie_policy")), *own)
    else:
        divergence = f_divergences.DIVERGENCES[name]
        own = {**divergence.parameters, "epsilon": divergence.epsilon, "log_clamp": divergence.log_clamp}
        own |= {"target": target, "score": score}
        names = (
            *GENERAL,
            *divergence.parameters,
            "target",
            *targets.TARGETS[target].options,
            "score",
            *scores.SCORES[score].options,
        )
    return {key: own.get(key, OPTIONS[key].default) for key in names}

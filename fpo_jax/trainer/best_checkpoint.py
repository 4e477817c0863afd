"""Which metric of an evaluation may tell the best checkpoint, and which way is better."""

from collections.abc import Iterable

from fpo_jax import config as configuration
from fpo_jax import losses

# metric of an evaluation -> 1.0 where more is better, -1.0 where less is
DIRECTIONS = {
    "eval_loss": -1.0,
    "eval_sft_loss": -1.0,
    "eval_perplexity": -1.0,
    "eval_f_divergence": -1.0,
    "eval_group_kl": -1.0,
    "eval_rewards/accuracies": 1.0,
    "eval_rewards/margins": 1.0,
    "eval_rewards/chosen": 1.0,
    "eval_logps/chosen": 1.0,
    "eval_completions/reward": 1.0,
    "eval_completions/win_rate": 1.0,
}
# What is observed without a better or worse: the distance to the reference is 0 before training, a length or a mean
# logit is no merit, and an answer that ends says that completions.max_new_tokens is enough.
UNDIRECTED = {
    "eval_rewards/rejected",
    "eval_logps/rejected",
    "eval_lengths/chosen",
    "eval_lengths/rejected",
    "eval_logits/chosen",
    "eval_logits/rejected",
    "eval_reference_kl",
    "eval_completions/length",
    "eval_completions/ended",
}


def score(config: configuration.Config, found: dict[str, float]) -> float | None:
    """Return what tells the best checkpoint, higher is better; None where the run keeps none.

    Raises:
        ValueError: the evaluation does not have the metric, as no pair of its data has a preference.
    """
    name = config.train.keep_best
    if not name:
        return None
    if name not in found:
        raise ValueError(f"train.keep_best={name!r} is no metric of this run; choose from {', '.join(found)}.")
    return DIRECTIONS[name] * found[name]


def problems(config: configuration.Config, loss: losses.Loss) -> list[str]:
    """List what keeps `train.keep_best` from telling a best checkpoint: no such metric, or one without a direction."""
    name, written = config.train.keep_best, names(config, loss)
    directed = [metric for metric in written if _directed(metric, config)]
    if not name.startswith("eval_") or not written or name in directed:
        return []
    what = "is no metric of this run" if name not in written else "is neither better for being more nor for being less"
    return [f"train.keep_best={name!r} {what}; choose from {', '.join(directed)}."]


def names(config: configuration.Config, loss: losses.Loss) -> list[str]:
    """Return the metrics that an evaluation of this run writes, in the order of DIRECTIONS, then of the alphabet."""
    found: set[str] = set()
    if config.data.eval:
        found |= {f"eval_{name}" for name in _of_data(config, loss)}
    if config.completions.count:
        found |= {"eval_completions/length", "eval_completions/ended"}
        found |= {"eval_completions/reward", "eval_completions/win_rate"} if config.completions.reward_model else set()
    order = list(DIRECTIONS)
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def _of_data(config: configuration.Config, loss: losses.Loss) -> Iterable[str]:
    """Yield the names that `metrics.pairs` and the evaluation give; the mean logits depend on the LM head's kernel."""
    pairs = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    yield from ("loss", "lengths/chosen")
    if loss.of_scores:
        yield from pairs
        return
    yield "sft_loss"
    if config.stage == "sft":
        yield "perplexity"
    if config.data.group_size == 1:
        return
    yield from (*pairs, "logps/chosen", "logps/rejected", "lengths/rejected", "logits/chosen", "logits/rejected")
    if loss.needs_reference:
        yield "reference_kl"
    if loss.name in losses.DIVERGENCES:
        yield "f_divergence"
        if loss.options.get("epsilon") != 0:
            yield "group_kl"


def _directed(metric: str, config: configuration.Config) -> bool:
    """Whether more or less of a metric is better; of a reward model's scores only differences mean anything."""
    return metric in DIRECTIONS and not (config.stage == "reward" and metric == "eval_rewards/chosen")

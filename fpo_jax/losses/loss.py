"""A loss with all its options settled: `Completions` in, one number per group out. Made by `registry.resolve`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fpo_jax.losses import numerics, targets
from fpo_jax.losses.f_divergences import DIVERGENCES, f_divergence
from fpo_jax.losses.preference_losses import OBJECTIVES, Objective, over_pairs, over_ranked_pairs
from fpo_jax.losses.scores import SCORES, Completions, Options, Score
from fpo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of DIVERGENCES or OBJECTIVES with its options; frozen and hashable, so a static argument of jit."""

    name: str  # canonical
    options: Options  # every option this loss reads, filled in

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.options.items()))))

    @property
    def temperature(self) -> float:
        """Logits of policy and reference are divided by it before the log-softmax, in `logprobs`."""
        return self.options.get("temperature", 1.0)

    @property
    def sft_weight(self) -> float:
        """Weight of the token-mean NLL of the chosen completions that `train_step.py` adds."""
        return self.options.get("sft_weight", 0.0)

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logps_BK` is read."""
        return self._scoring.needs_reference

    @property
    def needs_batch_kl(self) -> bool:
        """Whether `batch_kl` is read."""
        return self.name in OBJECTIVES and OBJECTIVES[self.name].needs_batch_kl

    @property
    def length_normalized(self) -> bool:
        """Whether scores are per token, so that mean log-probs are what to show."""
        return self._scoring.length_normalized

    @property
    def over_tokens(self) -> bool:
        """Whether the train step divides the sum of the losses by its chosen tokens instead of its groups."""
        return self.name in OBJECTIVES and OBJECTIVES[self.name].over_tokens

    @property
    def of_scores(self) -> bool:
        """Whether it trains a reward model, whose scores then stand where log-probs do."""
        return self.name in OBJECTIVES and OBJECTIVES[self.name].of_scores

    @property
    def family(self) -> str:
        """Whose options mean the same as this loss's: the losses of one score, or the loss alone."""
        if self.name in DIVERGENCES:
            return self.options["score"]
        return OBJECTIVES[self.name].family or self.name

    @property
    def minimum_completions(self) -> int:
        """Smallest K it is defined for: 1 where the chosen completion is all it reads (`sft`), else 2."""
        return 1 if self.name in OBJECTIVES and OBJECTIVES[self.name].pair is None else 2

    @property
    def _scoring(self) -> Score | Objective:
        return OBJECTIVES[self.name] if self.name in OBJECTIVES else SCORES[self.options["score"]]

    def loss(self, completions: Completions) -> Float[jax.Array, " B"]:
        """Return one loss per group: Σ_i q_i f(p_i/q_i) with p = softmax(scores), or the objective's equation.

        Args:
            completions: [B, K] log-probs, lengths and rewards; K >= minimum_completions.

        Returns:
            [B], float32 (float64 when given float64), not averaged.

        Raises:
            ValueError: fewer completions than the loss compares, or fields of different shapes.

        >>> import numpy as np
        >>> from fpo_jax.losses import registry
        >>> f = np.float32
        >>> pair = Completions(f([[-1, -3]]), f([[-2, -2]]), f([[1, 1]]), f([[1, 0]]), f(0))  # log-ratios 1 and -1
        >>> [round(float(x), 4) for x in registry.resolve("dpo", beta_pi=0.5).loss(pair)]  # log(1 + exp(-0.5·2))
        [0.3133]
        """
        completions = self._checked(completions)
        if self.name in DIVERGENCES:
            return self._divergence(completions)
        return self._objective(completions)

    def of_logps(self, logps_BK: Float[jax.Array, "B K"], operands: Completions) -> Float[jax.Array, " B"]:
        """Return `loss` with these log-probs in place of those in `operands`: what a kernel differentiates."""
        return self.loss(operands._replace(logps_BK=logps_BK))

    def scores(self, completions: Completions) -> Float[jax.Array, "B K"]:
        """Return the score of each completion; p = softmax(scores) where the loss is a divergence."""
        completions = self._checked(completions)
        return jnp.asarray(self._scoring.score(completions, self.chosen(completions), self.options))

    def implied_rewards(self, completions: Completions) -> Float[jax.Array, "B K"]:
        """Return the rewards that metrics show, without gradient and without γ: β_π·log-ratio, or β·mean logp."""
        rewards_BK = self._scoring.reward(self._checked(completions), self.options)
        return jax.lax.stop_gradient(jnp.asarray(rewards_BK))

    def log_target(self, completions: Completions) -> Float[jax.Array, "B K"] | None:
        """Return log q, or None where the loss has no target distribution."""
        return self._log_q(completions) if self.name in DIVERGENCES else None

    def chosen(self, completions: Completions) -> Float[jax.Array, "B K"]:
        """Return the shares of the chosen label; a tie is shared where the loss itself names no winner."""
        return targets.chosen_shares(completions.rewards_BK, tie_policy=self.options.get("tie_policy", "uniform"))

    def counted(self, rewards_BK: Float[Array, "B K"]) -> Bool[jax.Array, " B"]:
        """Return which groups count in the mean: for pairs of a reward model, those with a preference."""
        if not self.of_scores or self.minimum_completions == 1:
            return jnp.ones(rewards_BK.shape[0], bool)
        return jnp.max(rewards_BK, axis=-1) > jnp.min(rewards_BK, axis=-1)

    def _divergence(self, completions: Completions) -> jax.Array:
        row = DIVERGENCES[self.name]
        log_p_BK, log_q_BK = numerics.log_softmax(self.scores(completions)), self._log_q(completions)
        parameters = {name: self.options[name] for name in row.parameters}
        return f_divergence(log_p_BK, log_q_BK, name=self.name, **parameters) + row.loss_offset(log_q_BK)

    def _log_q(self, completions: Completions) -> jax.Array:
        target = targets.TARGETS[self.options["target"]]
        return target.log_q(completions.rewards_BK, **{name: self.options[name] for name in target.options})

    def _objective(self, completions: Completions) -> jax.Array:
        row, chosen_BK = OBJECTIVES[self.name], self.chosen(completions)
        losses_B = jnp.zeros(chosen_BK.shape[0], chosen_BK.dtype)
        if row.pair is not None:
            pair, scores_BK = row.pair, self.scores(completions)
            pairing, order_BK = (over_pairs, chosen_BK)
            if row.of_scores:
                pairing, order_BK = (over_ranked_pairs, completions.rewards_BK)
            losses_B += pairing(lambda win, lose: pair(win, lose, self.options), scores_BK, order_BK)
        if row.chosen_term is not None:
            losses_B += (chosen_BK * row.chosen_term(completions, self.options)).sum(axis=-1)
        return losses_B

    def _checked(self, completions: Completions) -> Completions:
        shapes = {field: array.shape for field, array in completions._asdict().items() if field != "batch_kl"}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"completions of different shapes: {shapes}; every field but batch_kl is [B, K]")
        count = completions.logps_BK.shape[-1]
        if count < self.minimum_completions:
            raise ValueError(
                f"a group of K={count} completions holds nothing to compare; {self.name!r} needs K >= "
                f"{self.minimum_completions}: give more completions per prompt, or use 'sft'"
            )
        return Completions(*numerics.as_float(*completions))

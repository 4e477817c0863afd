"""Metrics of a batch: what a step or an evaluation observes, as (sum, count), inside the compiled program.

Log-probs and losses of the groups go in; `metric_logger.means` adds the pairs of all batches and divides. Adding a
metric is adding a name to the dict that `pairs` returns.
"""

import jax
import jax.numpy as jnp

from fpo_jax import logprobs, losses, types

Pairs = dict[str, tuple[jax.Array, jax.Array]]  # metric name -> (sum, count)


def pairs(
    batch: types.Batch,
    completion: logprobs.CompletionLogps,
    completions: losses.Completions,
    losses_B: jax.Array,
    loss: losses.Loss,
) -> Pairs:
    """Return the metrics of B groups under TRL's names; rejected is the completion of lowest reward.

    Args:
        batch: the groups; those of weight 0 are padding and count nowhere.
        completion: what the forward function gave for them.
        completions: the same as the loss reads it, [B, K].
        losses_B: the loss of every group.
        loss: what is minimised.
    """
    if loss.of_scores:
        return _score_pairs(batch, completions, loss)
    weight_B = batch.weight_B
    logps_BK, lengths_BK, rewards_BK = completions.logps_BK, completions.lengths_BK, completions.rewards_BK
    best_BK = loss.chosen(completions)
    worst_BK = jax.nn.one_hot(jnp.argmin(rewards_BK, axis=-1), rewards_BK.shape[-1])

    def pair(values_B, weights_B):
        return jnp.sum(jnp.where(weights_B > 0, weights_B * values_B, 0.0)), jnp.sum(weights_B)

    def pick(values_BK, which_BK):
        return jnp.sum(jnp.where(which_BK > 0, which_BK * values_BK, 0.0), axis=-1)

    # A padding group scores no token, so that its NLL and its length are exactly 0.
    nll, tokens = -jnp.sum(weight_B * pick(logps_BK, best_BK)), jnp.sum(weight_B * pick(lengths_BK, best_BK))
    completions_B = jnp.ones_like(weight_B)
    if batch.segments is not None and batch.slots_NR is None:  # K = 1, a row is a group of texts
        completions_B = 1.0 + jnp.max(batch.segments.ids_NT, axis=1)
    found = {"sft_loss": (nll, tokens), "lengths/chosen": (tokens, jnp.sum(weight_B * completions_B))}
    if rewards_BK.shape[-1] == 1:
        return found
    # Groups without a preference (all rewards equal) say nothing about chosen against rejected.
    decided_B = weight_B * (jnp.max(rewards_BK, axis=-1) > jnp.min(rewards_BK, axis=-1))
    implied_BK = loss.implied_rewards(completions)
    margins_B = pick(implied_BK, best_BK) - pick(implied_BK, worst_BK)
    shown_BK = logps_BK / jnp.maximum(lengths_BK, 1.0) if loss.length_normalized else logps_BK
    found |= {
        "rewards/chosen": pair(pick(implied_BK, best_BK), decided_B),
        "rewards/rejected": pair(pick(implied_BK, worst_BK), decided_B),
        "rewards/margins": pair(margins_B, decided_B),
        "rewards/accuracies": pair((margins_B > 0) + 0.5 * (margins_B == 0), decided_B),
        "logps/chosen": pair(pick(shown_BK, best_BK), decided_B),
        "logps/rejected": pair(pick(shown_BK, worst_BK), decided_B),
        "lengths/rejected": pair(pick(lengths_BK, worst_BK), decided_B),
    }
    if completion.mean_logit_N is not None:
        mean_logits_BK = completion.mean_logit_N.reshape(logps_BK.shape)
        found["logits/chosen"] = pair(pick(mean_logits_BK, best_BK), decided_B)
        found["logits/rejected"] = pair(pick(mean_logits_BK, worst_BK), decided_B)
    if loss.needs_reference:
        found["reference_kl"] = pair(jnp.mean(logps_BK - completions.reference_logps_BK, axis=-1), weight_B)
    log_q_BK = loss.log_target(completions)
    if log_q_BK is not None:
        found["f_divergence"] = pair(losses_B, weight_B)
        if loss.options.get("epsilon") != 0:  # with hard labels KL(p‖q) is infinite
            log_p_BK = losses.log_softmax(loss.scores(completions))
            group_kl_B = losses.f_divergence(log_p_BK, losses.log_softmax(log_q_BK), name="kl_policy_target")
            found["group_kl"] = pair(group_kl_B, weight_B)
    return found


def _score_pairs(batch: types.Batch, completions: losses.Completions, loss: losses.Loss) -> Pairs:
    """Metrics of a reward model: scores of the best and the worst, or right signs where there is one completion."""
    weight_B, rewards_BK, scores_BK = batch.weight_B, completions.rewards_BK, completions.logps_BK
    best_BK = loss.chosen(completions)
    worst_BK = jax.nn.one_hot(jnp.argmin(rewards_BK, axis=-1), rewards_BK.shape[-1])
    decided_B = weight_B
    if rewards_BK.shape[-1] == 1:
        margins_B = jnp.where(rewards_BK[:, 0] > 0.5, scores_BK[:, 0], -scores_BK[:, 0])
    else:
        decided_B *= jnp.max(rewards_BK, axis=-1) > jnp.min(rewards_BK, axis=-1)
        margins_B = jnp.sum((best_BK - worst_BK) * scores_BK, axis=-1)

    def pair(values_B):
        return jnp.sum(jnp.where(decided_B > 0, decided_B * values_B, 0.0)), jnp.sum(decided_B)

    return {
        "rewards/chosen": pair(jnp.sum(best_BK * scores_BK, axis=-1)),
        "rewards/rejected": pair(jnp.sum(worst_BK * scores_BK, axis=-1)),
        "rewards/margins": pair(margins_B),
        "rewards/accuracies": pair((margins_B > 0) + 0.5 * (margins_B == 0)),
        "lengths/chosen": pair(jnp.sum(best_BK * completions.lengths_BK, axis=-1)),
    }

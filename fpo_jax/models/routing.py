"""Where the tokens of a mixture of experts went: sums over a forward pass, the router's losses, metrics.

    per layer: probs_E, counts_E, tokens ──► balancing_loss      evens the experts out; in the objective, with a weight
               squares of logsumexp      ──► z_loss              keeps the router's logits small; the same
                                         ──► metrics             share of the busiest expert, entropy of the router

Padding counts nowhere. Mixture layers record into `layers.Context.routes`; a layer without experts records nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Sums over the valid tokens of a batch, of every layer, float32."""

    probs_LE: jax.Array  # of the router's probabilities
    counts_LE: jax.Array  # tokens that each expert has
    entropy_L: jax.Array  # of the router's probabilities, in nats
    squares_L: jax.Array  # of the logsumexp of the router's logits
    tokens_L: jax.Array

    def summed(self, axis_name: str) -> "Routing":
        """Add up what the replicas along a mesh axis have."""
        return jax.lax.psum(self, axis_name)


def within_groups(scores_NTE: jax.Array, *, groups: int, kept: int) -> jax.Array:
    """Return the scores with 0 for experts outside of the token's groups: the `kept` ones with the largest scores.

    DeepSeek-V2 (arXiv 2405.04434), section 2.2.2. Groups are experts that are neighbours, equally many in each.
    """
    *batch, experts = scores_NTE.shape
    best_NTG = jnp.max(scores_NTE.reshape(*batch, groups, experts // groups), axis=-1)
    _, chosen_NTU = jax.lax.top_k(best_NTG, kept)
    allowed_NTG = jnp.any(jax.nn.one_hot(chosen_NTU, groups, dtype=bool), axis=-2)
    return jnp.where(jnp.repeat(allowed_NTG, experts // groups, axis=-1), scores_NTE, 0.0)


class Recorder:
    """Takes the routing of one layer while it is traced."""

    found: Routing | None = None

    def record(self, logits_NTE: jax.Array, chosen_NTU: jax.Array, valid_NT: jax.Array) -> None:
        """Sum up the probabilities and choices of the valid tokens, from float32 logits; U experts of each."""
        valid_NT1, probs_NTE = valid_NT[..., None], jax.nn.softmax(logits_NTE)
        squares_NT = jnp.square(jax.nn.logsumexp(logits_NTE, axis=-1))
        chosen_NTE = jnp.sum(jax.nn.one_hot(chosen_NTU, probs_NTE.shape[-1], dtype=jnp.float32), axis=-2)
        logs_NTE = jnp.log(jnp.maximum(probs_NTE, jnp.finfo(jnp.float32).tiny))
        entropy_NT = -jnp.sum(probs_NTE * logs_NTE, axis=-1)
        self.found = Routing(
            jnp.sum(jnp.where(valid_NT1, probs_NTE, 0.0), axis=(0, 1)),
            jnp.sum(jnp.where(valid_NT1, chosen_NTE, 0.0), axis=(0, 1)),
            jax.lax.stop_gradient(jnp.sum(jnp.where(valid_NT, entropy_NT, 0.0))),
            jnp.sum(jnp.where(valid_NT, squares_NT, 0.0)),
            jnp.sum(valid_NT, dtype=jnp.float32),
        )


def balancing_loss(routing: Routing) -> jax.Array:
    """Return E sum_e f_e P_e over the tokens of all layers together, float32; 0 without tokens.

    f_e is the share of tokens that have the expert, P_e the mean of its probability: Switch Transformer (arXiv
    2101.03961), eq. 4 to 6, as transformers' `load_balancing_loss_func` has it. It is the number of experts of a token
    where all experts have equally many, and mostly greater elsewhere.
    """
    tokens = jnp.maximum(jnp.sum(routing.tokens_L), 1.0)
    shares_E, probs_E = (jnp.sum(x_LE, axis=0) / tokens for x_LE in (routing.counts_LE, routing.probs_LE))
    return shares_E.shape[0] * jnp.sum(jax.lax.stop_gradient(shares_E) * probs_E)


def z_loss(routing: Routing) -> jax.Array:
    """Return the mean of (log sum_e exp x_e)^2 of the router's logits x, float32; 0 without tokens.

    The router z-loss of ST-MoE (arXiv 2202.08906), eq. 5, over the tokens of all layers together. A compiled program
    that does not use it does not compute it.
    """
    return jnp.sum(routing.squares_L) / jnp.maximum(jnp.sum(routing.tokens_L), 1.0)


def metrics(routing: Routing, *, z_weight: float = 0.0) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the router's metrics as (sum, count) over the tokens of all layers; the z-loss where it has a weight."""
    tokens = jnp.sum(routing.tokens_L)
    busiest = jnp.sum(jnp.max(routing.counts_LE, axis=-1))
    return {
        "router/busiest_expert": (busiest, tokens),
        "router/entropy": (jnp.sum(routing.entropy_L), tokens),
        "router/balancing_loss": (balancing_loss(routing) * tokens, tokens),
    } | ({"router/z_loss": (jnp.sum(routing.squares_L), tokens)} if z_weight else {})

"""The learning-rate schedule and the optax chain: clip by global norm, then AdamW.

Moments and weights may be kept in bfloat16 between updates; they are then rounded stochastically. Moments may be kept
in eight bits (`eight_bits`).

The schedule is that of the trainers whose recipes we run (Hugging Face's): update i (from 0) uses the rate at i, so
that the first update of a warm-up has rate 0.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fpo_jax import types
from fpo_jax.optimizer import eight_bits

Keep = Bool[Array, ""] | bool  # whether an update is applied


def warmup_steps(*, fraction: float, steps: int | None, total_steps: int) -> int:
    """Return the number of warm-up updates: `steps`, or ceil(fraction * total_steps).

    >>> warmup_steps(fraction=0.1, steps=None, total_steps=477)
    48
    """
    return steps if steps is not None else math.ceil(fraction * total_steps)


def schedule(*, kind: str, peak: float, warmup: int, total_steps: int):
    """Return step -> learning rate.

    With progress t = (step - warmup) / (total_steps - warmup) in [0, 1]:
    cosine: peak * (1 + cos(pi t)) / 2; linear: peak * (1 - t); constant: peak. Below warmup: peak * step / warmup.

    Args:
        kind: cosine, linear or constant.
        peak: highest rate.
        warmup: updates of the linear rise from 0.
        total_steps: update at which cosine and linear reach 0; the rate stays 0 from there on.
    """
    decay = {
        "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
        "linear": lambda t: 1.0 - t,
        "constant": jnp.ones_like,
    }[kind]

    def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
        return peak * jnp.where(step < warmup, step / max(1, warmup), decay(progress))

    return rate


def optimizer(
    rate,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    decay_mask: types.PyTree,
    state_dtype: str = "float32",
    faster: tuple[float, types.PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return clipping by the global norm (off when clip_norm is 0) followed by AdamW with decoupled weight decay.

    Where the argument `keep` of its `update` is False the state stays as it was, and the updates mean nothing.

    Args:
        rate: step -> learning rate, from `schedule`.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: applied where decay_mask is True.
        clip_norm: largest global gradient norm.
        decay_mask: tree of bool like the parameters (params.decay_mask).
        state_dtype: of the moments between updates, "int8" for eight bits with a scale per block; an update itself is
            float32.
        faster: a factor on the learning rate, of the decay too, and a tree of bool like the parameters that says where
            (LoRA+, arXiv 2402.12354: that of an adapter's B); None = one rate.
    """
    clip = _clip(clip_norm) if clip_norm else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    of_rate = [_keeping(optax.scale_by_learning_rate(rate))]
    if faster is not None:
        of_rate.append(optax.masked(optax.scale(faster[0]), faster[1]))
    adamw = optax.chain(_adam(b1, b2, eps), decay, *of_rate)
    whole = optax.chain(clip, adamw)
    return _in_eight_bits(whole) if state_dtype == "int8" else _stored_in(whole, jnp.dtype(state_dtype))


def kept(fresh: types.PyTree, old: types.PyTree, keep: Keep) -> types.PyTree:
    """Return `fresh`, or `old` where the update is not applied."""
    return jax.tree.map(lambda new, was: jnp.where(keep, new, was), fresh, old)


def steps_applied(opt_state: types.PyTree) -> Int[Array, ""]:
    """Return the number of updates that the optimiser has applied: what the schedule counts."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def apply_updates(params: types.PyTree, updates: types.PyTree, key: jax.Array) -> types.PyTree:
    """Add float32 updates to the parameters, in the parameters' dtype.

    A bfloat16 weight is rounded stochastically: its neighbours are 2^-8 apart relative to it, an update of AdamW is the
    learning rate, and rounding to nearest would lose every one of them.
    """
    exact = jax.tree.map(lambda x, update: x.astype(jnp.float32) + update, params, updates)
    return _stored(exact, params, key)


def stochastic_round(x: Float[Array, "..."], key: jax.Array) -> Float[Array, "..."]:
    """Round float32 to one of its two bfloat16 neighbours, so that the mean over keys is x.

    P(up) = (x - down) / (up - down). What is not finite stays what it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # bfloat16 drops the last 16 bits
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    # Without the skip_rule a NaN could lose the bits that tell it from infinity.
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.bfloat16)


def _clip(limit: float) -> optax.GradientTransformation:
    """Multiply by min(1, limit / global norm), one number.

    optax divides every entry by the norm; as a division is not done twice for the two moments, the compiler would
    write the clipped gradients to memory first.
    """

    def update(grads, state, params=None):
        scale = jnp.minimum(1.0, limit / optax.global_norm(grads))
        return jax.tree.map(lambda grad: grad * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]


def _keeping(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leave the state as it was where `keep` is False."""

    def update(grads, state, params=None, *, keep: Keep = True, **_):
        updates, fresh = inner.update(grads, state, params)
        return updates, kept(fresh, state, keep)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but that its direction is that of the moments which stay where `keep` is False.

    A direction of the fresh moments would need the old ones after the kept ones are written in their place, and the
    compiler would copy both in every update.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def update(grads, state, params=None, *, keep: Keep = True, **_):
        _, fresh = inner.update(grads, state, params)
        count, mu, nu = kept(fresh, state, keep)
        mean = optax.tree_utils.tree_bias_correction(mu, b1, count)
        square = optax.tree_utils.tree_bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(inner.init, update)  # pyright: ignore[reportArgumentType]


def _stored_in(inner: optax.GradientTransformationExtraArgs, dtype: jnp.dtype) -> optax.GradientTransformationExtraArgs:
    """Keep the floating-point states of `inner` in `dtype` between updates, and hand them to it in float32."""

    def wanted(state, as_dtype):
        def one(x):
            return jax.ShapeDtypeStruct(x.shape, as_dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

        return jax.tree.map(one, state)

    def init(params):
        return jax.tree.map(lambda x, to: x.astype(to.dtype), state := inner.init(params), wanted(state, dtype))

    def update(grads, state, params=None, **extra):
        exact = jax.tree.map(lambda x, to: x.astype(to.dtype), state, wanted(state, jnp.float32))
        updates, exact = inner.update(grads, exact, params, **extra)
        key = jax.random.fold_in(jax.random.key(_STATE_STREAM), steps_applied(state))
        return updates, _stored(exact, wanted(state, dtype), key)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _in_eight_bits(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Keep the moments of `inner` in eight bits between updates, small arrays apart, and hand them to it in float32."""

    def each_moment(change, state):
        def one(node):
            if not isinstance(node, optax.ScaleByAdamState):
                return node
            mu, nu = (
                jax.tree.map(lambda x, signed=signed: change(x, signed), moment, is_leaf=eight_bits.holds)
                for moment, signed in ((node.mu, True), (node.nu, False))
            )
            return node._replace(mu=mu, nu=nu)

        return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))

    def narrow(x, signed):
        return eight_bits.encode(x, signed=signed) if eight_bits.worth(x) else x

    def wide(x, signed):
        return eight_bits.decode(x, signed=signed) if eight_bits.holds(x) else x

    def init(params):
        return each_moment(lambda x, signed: narrow(x.astype(jnp.float32), signed), inner.init(params))

    def update(grads, state, params=None, **extra):
        updates, exact = inner.update(grads, each_moment(wide, state), params, **extra)
        return updates, each_moment(narrow, exact)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


_STATE_STREAM = 1  # keeps the rounding of states independent of that of weights


def _stored(exact: types.PyTree, like: types.PyTree, key: jax.Array) -> types.PyTree:
    """Bring float32 leaves to the dtypes of `like`, each rounded with a key of its own."""
    leaves, structure = jax.tree.flatten(exact)
    found = []
    for index, (leaf, to) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True)):
        narrow = leaf.dtype == jnp.float32 and to.dtype == jnp.bfloat16
        found.append(stochastic_round(leaf, jax.random.fold_in(key, index)) if narrow else leaf.astype(to.dtype))
    return jax.tree.unflatten(structure, found)

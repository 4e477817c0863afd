"""The definition of attention in float64, value and gradient, dense: what every implementation is compared with."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import attention, sharding, types


class Case(NamedTuple):
    """Sizes and options; pairwise distinct sizes."""

    T: int = 21
    H: int = 6
    G: int = 2
    C: int = 8
    window: int | None = None
    cap: float | None = None
    segments: bool = False
    shared: bool = False  # of the segments every third is followed by the two behind it
    sinks: bool = False
    scale: float = 0.3
    lengths: tuple[int, ...] = (21, 13, 0)  # full, padded, nothing but padding

    @property
    def valid_NT(self):
        return np.arange(self.T)[None] < np.array(self.lengths)[:, None]

    @property
    def packed(self):
        """Segments of 4, 5, 6, ... positions; the ids neither start at 0 nor grow."""
        if not (self.segments or self.shared):
            return None
        sizes = np.arange(4, 4 + self.T)
        numbers = np.arange(self.T)
        follows = numbers - numbers % 3 if self.shared else numbers
        begins = np.cumsum(sizes) - sizes
        places = np.where(follows == numbers, 0, sizes[follows]) - begins  # of a segment's first token
        one = (90 - numbers, places, 90 - follows)
        ids, offsets, parents = (np.repeat(values, sizes)[: self.T] for values in one)
        rows = (ids, offsets + np.arange(self.T), parents)
        rows = [jnp.asarray(np.tile(row, (len(self.lengths), 1)), jnp.int32) for row in rows]
        return types.Segments(*rows) if self.shared else types.Segments(*rows[:2])

    def inputs(self, dtype="float32", seed=0):
        """Queries, keys, values, the cotangent of the output and, where there are any, sinks."""
        rng = np.random.default_rng(seed)
        shapes = [(len(self.lengths), self.T, heads, self.C) for heads in (self.H, self.G, self.G, self.H)]
        arrays = tuple(rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes)
        return (*arrays, rng.normal(size=self.H).astype(np.float32)) if self.sinks else arrays

    def oracle(self, q_NTHC, k_NTGC, v_NTGC, do_NTHC, sinks_H=None):
        """Output and gradients of sum(output * do), from the equation and its derivative, in float64."""
        q, k, v, do = (np.asarray(x, np.float64) for x in (q_NTHC, k_NTGC, v_NTGC, do_NTHC))
        R = self.H // self.G
        k, v = np.repeat(k, R, axis=2), np.repeat(v, R, axis=2)
        i, j = np.mgrid[: self.T, : self.T]
        seen = np.broadcast_to(j <= i, (len(q), 1, self.T, self.T))
        places = np.broadcast_to(np.arange(self.T), (len(q), self.T))
        if self.packed is not None:
            ids, places = np.asarray(self.packed.ids_NT), np.asarray(self.packed.positions_NT)
            mine = ids[:, :, None] == ids[:, None, :]
            if self.shared:
                mine = mine | (np.asarray(self.packed.parents_NT)[:, :, None] == ids[:, None, :])
            seen = seen & mine[:, None]
        seen = seen & (places[:, :, None] - places[:, None, :] < (self.window or self.T))[:, None]
        raw = np.einsum("NTHC,NSHC->NHTS", q, k) * self.scale
        logits = raw if self.cap is None else self.cap * np.tanh(raw / self.cap)
        slope = 1 if self.cap is None else 1 - np.tanh(raw / self.cap) ** 2
        logits = np.where(seen, logits, -np.inf)
        sinks_H11 = (
            np.full((self.H, 1, 1), -np.inf) if sinks_H is None else np.asarray(sinks_H, np.float64)[:, None, None]
        )
        largest = np.maximum(logits.max(axis=-1, keepdims=True), sinks_H11)
        p, p_sink = np.exp(logits - largest), np.exp(sinks_H11 - largest)
        total = p.sum(axis=-1, keepdims=True) + p_sink
        p, p_sink = p / total, p_sink / total
        valid = self.valid_NT[:, :, None, None]
        out, do = np.einsum("NHTS,NSHC->NTHC", p, v) * valid, do * valid
        dp = np.einsum("NTHC,NSHC->NHTS", do, v)
        mean = np.sum(p * dp, axis=-1, keepdims=True)
        dlogits = p * (dp - mean) * slope * self.scale

        def grouped(x_NTHC):
            return x_NTHC.reshape(*x_NTHC.shape[:2], self.G, R, self.C).sum(axis=3)

        dq = np.einsum("NHTS,NSHC->NTHC", dlogits, k)
        dk, dv = np.einsum("NHTS,NTHC->NSHC", dlogits, q), np.einsum("NHTS,NTHC->NSHC", p, do)
        found = out, dq, grouped(dk), grouped(dv)
        return found if sinks_H is None else (*found, -np.sum(p_sink * mean, axis=(0, 2, 3)))


@functools.cache
def program(case, implementation, layout):
    """(queries, keys, values, cotangent, sinks) -> output and gradients of `attention.attend`, jitted."""
    call = functools.partial(
        attention.attend,
        valid_NT=jnp.asarray(case.valid_NT),
        scale=case.scale,
        sliding_window=case.window,
        soft_cap=case.cap,
        segments=case.packed,
        choice=attention.Selection(
            implementation,
            reason="a test",
            interpret=implementation in ("mosaic", "splash") and jax.default_backend() == "cpu",
        ),
        layout=layout,
    )

    def both(q, k, v, do, *sinks):
        out, pull_back = jax.vjp(lambda *given: call(*given[:3], sinks_H=given[3] if sinks else None), q, k, v, *sinks)
        return out, *pull_back(do)

    # Compiling takes nearly all of the time of these tests.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(both, compiler_options=quick)


def run(case, arrays, *, implementation, layout=sharding.Layout()):  # noqa: B008 - frozen
    """Output and gradients."""
    return program(case, implementation, layout)(*arrays)

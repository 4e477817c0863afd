"""attention.attend against a dense float64 oracle, literal masks, padding and gradients; attention.choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, sharding
from tests import tolerances

N, T, H, G, C = 3, 7, 6, 2, 4
LENGTHS = (7, 4, 0)  # full, padded, nothing but padding
ALONE = sharding.Layout()
VALID_NT = np.arange(T)[None] < np.array(LENGTHS)[:, None]


def oracle(q_NTHC, k_NTGC, v_NTGC, *, valid_NT, scale, sliding_window):
    """Row by row, head by head, in float64."""
    out = np.zeros(q_NTHC.shape)
    for n, i, h in np.ndindex(*q_NTHC.shape[:3]):
        if not valid_NT[n, i]:
            continue
        g = h // (q_NTHC.shape[2] // k_NTGC.shape[2])
        first = 0 if sliding_window is None else max(0, i - sliding_window + 1)
        logits = k_NTGC[n, first : i + 1, g].astype(np.float64) @ q_NTHC[n, i, h].astype(np.float64) * scale
        weights = np.exp(logits - logits.max())
        out[n, i, h] = weights / weights.sum() @ v_NTGC[n, first : i + 1, g]
    return out


def inputs(dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((N, T, H, C), (N, T, G, C), (N, T, G, C))
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def choice(implementation):
    return attention.Choice(implementation, reason="a test", interpret=implementation == "splash")


def attend(q, k, v, *, sliding_window=None, scale=0.3, implementation="xla", layout=ALONE):
    call = functools.partial(
        attention.attend, scale=scale, sliding_window=sliding_window, choice=choice(implementation), layout=layout
    )
    return jax.jit(lambda q, k, v: call(q, k, v, valid_NT=jnp.asarray(VALID_NT[:, : q.shape[1]])))(q, k, v)


def seen(sliding_window, valid):
    """Which keys each query reads: with equal logits and one-hot values the output is mask / row sum."""
    size = len(valid)
    nothing = jnp.zeros((1, size, 1, size))
    onehot = jnp.eye(size)[None, :, None, :]
    out = jax.jit(
        lambda q, k, v: attention.attend(
            q,
            k,
            v,
            valid_NT=jnp.asarray([valid]),
            scale=1.0,
            sliding_window=sliding_window,
            choice=choice("xla"),
            layout=ALONE,
        )
    )(nothing, nothing, onehot)
    return (np.asarray(out)[0, :, 0, :] > 0).astype(int)


def test_causal_mask_with_padding():
    assert_array_equal(
        seen(None, [True, True, True, True, False]),
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0],  # padding reads nothing and returns zero
        ],
    )


def test_sliding_window_of_three_counts_the_query_itself():
    assert_array_equal(
        seen(3, [True] * 6),
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
        ],
    )


def test_sliding_window_of_one_reads_only_itself():
    assert_array_equal(seen(1, [True, True, False]), [[1, 0, 0], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("sliding_window", [None, 3, 1, T, 50])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_the_oracle(dtype, sliding_window):
    q, k, v = inputs(dtype)
    out = attend(q, k, v, sliding_window=sliding_window)
    assert out.dtype == dtype
    wide = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = oracle(*wide, valid_NT=VALID_NT, scale=0.3, sliding_window=sliding_window)
    assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=tolerances.ATTENTION[dtype])


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_gradient_matches_finite_differences_of_the_oracle(sliding_window):
    arrays = inputs()
    weights = np.random.default_rng(1).normal(size=(N, T, H, C))
    grads = jax.grad(lambda *qkv: jnp.sum(attend(*qkv, sliding_window=sliding_window) * weights), argnums=(0, 1, 2))(
        *arrays
    )
    rng = np.random.default_rng(2)
    host = [np.asarray(x, np.float64) for x in arrays]

    def value(qkv):
        return np.sum(oracle(*qkv, valid_NT=VALID_NT, scale=0.3, sliding_window=sliding_window) * weights)

    for which, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        ahead, behind = (
            [x + step * direction if i == which else x for i, x in enumerate(host)] for step in (1e-5, -1e-5)
        )
        slope = (value(ahead) - value(behind)) / 2e-5
        assert_allclose(np.sum(np.asarray(grad) * direction), slope, rtol=tolerances.ATTENTION_SLOPE)


@pytest.mark.parametrize("sliding_window", [None, 2])
def test_padding_changes_nothing_and_gets_no_gradient(sliding_window):
    q, k, v = inputs()
    padding = ~VALID_NT[:, :, None, None]
    noisy = [jnp.where(padding, 1e4 * x, x) for x in (q, k, v)]
    assert_array_equal(attend(q, k, v, sliding_window=sliding_window), attend(*noisy, sliding_window=sliding_window))
    assert np.all(np.asarray(attend(*noisy, sliding_window=sliding_window))[~VALID_NT] == 0)
    grads = jax.grad(lambda *qkv: jnp.sum(attend(*qkv, sliding_window=sliding_window) ** 2), argnums=(0, 1, 2))(*noisy)
    for grad in map(np.asarray, grads):
        assert np.isfinite(grad).all()
        assert np.all(grad[~VALID_NT] == 0)
        assert np.any(grad[VALID_NT] != 0)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"'flash' is not one of xla, cudnn"):
        attend(*inputs(), implementation="flash")


def choose(requested, **facts):
    rest = {"heads": 8, "kv_heads": 4, "sliding_window": None, "soft_cap": None, "segments": False, "layout": ALONE}
    return attention.choose(requested, **{**rest, **facts})


@pytest.mark.parametrize(
    ("requested", "platform", "dtype", "head_dim", "positions", "name", "reason"),
    [
        ("auto", "cpu", "bfloat16", 64, 512, "xla", "NVIDIA GPU, not cpu"),
        ("auto", "tpu", "bfloat16", 128, 512, "xla", "NVIDIA GPU, not tpu"),
        ("auto", "gpu", "bfloat16", 128, 512, "cudnn", "flash attention for bfloat16, head_dim 128"),
        ("auto", "cuda", "float16", 80, 512, "cudnn", "flash attention for float16"),
        ("auto", "gpu", "float32", 64, 512, "xla", "not float32"),
        ("auto", "gpu", "bfloat16", 20, 512, "xla", "divisible by 8 and at most 128, not 20"),
        ("auto", "gpu", "bfloat16", 256, 512, "xla", "not 256"),
        ("auto", "gpu", "bfloat16", 64, 511, "xla", "even length to train, not 511"),
        ("xla", "gpu", "bfloat16", 64, 512, "xla", "asked for"),
        ("cudnn", "gpu", "bfloat16", 64, 512, "cudnn", "asked for"),
    ],
)
def test_choose(requested, platform, dtype, head_dim, positions, name, reason):
    chosen = choose(requested, platform=platform, dtype=dtype, head_dim=head_dim, positions=[128, positions])
    assert chosen.implementation == name
    assert reason in chosen.reason


def test_choose_refuses_cudnn_where_it_cannot_run():
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU, not cpu; set model\.attention to auto or xla"):
        choose("cudnn", platform="cpu", dtype="bfloat16", head_dim=64, positions=[512])
    with pytest.raises(ValueError, match=r"not float32; set model\.attention"):
        choose("cudnn", platform="gpu", dtype="float32", head_dim=64, positions=[512])
    with pytest.raises(ValueError, match=r"'flash' is not one of auto, xla, cudnn"):
        choose("flash", platform="tpu", dtype="bfloat16", head_dim=64, positions=[512])


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_cudnn_matches_xla(sliding_window):
    q, k, v = (jnp.tile(x[:, :6], (1, 1, 1, 2)) for x in inputs("bfloat16"))

    def run(implementation):
        return jax.value_and_grad(
            lambda q, k, v: jnp.sum(
                attend(q, k, v, sliding_window=sliding_window, implementation=implementation).astype(jnp.float32) ** 2
            ),
            argnums=(0, 1, 2),
        )(q, k, v)

    (value, grads), (expected, expected_grads) = run("cudnn"), run("xla")
    assert_allclose(value, expected, rtol=tolerances.ATTENTION["bfloat16"])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        grad, expected_grad = np.asarray(grad, np.float32), np.asarray(expected_grad, np.float32)
        assert_allclose(
            grad, expected_grad, rtol=0, atol=tolerances.ATTENTION["bfloat16"] * np.abs(expected_grad).max()
        )

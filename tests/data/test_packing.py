"""Packing: which texts share a row, what a packed row is, and that no number of a run depends on it."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, data, losses, models, sharding
from fpo_jax.data import sequence_packing
from fpo_jax.models import params
from fpo_jax.trainer import metric_logger, run_inputs, train_step, trainer
from tests import batches, resuming, tiny, tolerances


def texts(lengths, prompts, vocab=90):
    """Texts of given lengths whose tokens tell them apart."""
    random = np.random.default_rng(0)
    lengths = np.asarray(lengths, np.int32)
    return data.Prepared(
        tokens_S=random.integers(3, vocab, lengths.sum()).astype(np.int32),
        starts_N=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        lengths_N=lengths,
        prompt_lengths_N=np.asarray(prompts, np.int32),
        rewards_BK=np.ones((len(lengths), 1), np.float32),
        sources=tuple(f"f:{index}" for index in range(len(lengths))),
        pad_id=0,
    )


def one_batch(prepared, *, length):
    schedule = data.schedule(prepared, batch_size=prepared.groups, buckets=(length,), seed=0, shuffle=False)
    return data.batch_at(schedule, 0)


# --- which texts share a row


def test_every_text_has_a_place_and_no_row_overflows():
    lengths = np.random.default_rng(0).integers(1, 33, 500).tolist()
    rows = sequence_packing.bins(lengths, length=64)
    assert sorted(text for row in rows for text in row) == list(range(500))
    filled = [sum(lengths[text] for text in row) for row in rows]
    assert max(filled) <= 64 and len(rows) <= 1.03 * np.ceil(sum(lengths) / 64)
    assert sequence_packing.bins(lengths, length=64) == rows == sorted(rows)


def test_a_text_goes_to_the_fullest_row_with_room():
    assert sequence_packing.bins([5, 6, 3, 2], length=8) == [[0, 2], [1, 3]]
    assert sequence_packing.bins([5, 6, 2], length=8) == [[0], [1, 2]]  # not beside the 5, where 1 would stay free
    assert sequence_packing.bins([8, 8], length=8) == [[0], [1]]


# --- what a packed row is


def test_a_packed_row_to_the_letter():
    prepared = texts([4, 2, 3], [2, 1, 1])._replace(tokens_S=np.array([11, 12, 13, 14, 21, 22, 31, 32, 33], np.int32))
    packed = data.pack(prepared, length=7)
    batch = one_batch(packed, length=8)
    assert packed.sources == ("f:0, f:2", "f:1") and packed.loss_tokens_N.tolist() == [4, 1]
    assert_array_equal(batch.tokens_NT, [[11, 12, 13, 14, 31, 32, 33, 0], [21, 22, 0, 0, 0, 0, 0, 0]])
    assert_array_equal(batch.segments.ids_NT, [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, -1, -1, -1, -1, -1, -1]])
    assert_array_equal(batch.valid_NT, [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    assert_array_equal(batch.loss_mask_NR, [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    assert_array_equal(batch.targets_NR[batch.loss_mask_NR], [13, 14, 32, 33, 22])
    assert_array_equal(batch.predictors_NR[batch.loss_mask_NR], [1, 2, 4, 5, 0])
    schedule = data.schedule(packed, batch_size=2, buckets=(8,), seed=0, shuffle=False)
    part = data.batch_at(schedule, 0, np.array([1]))
    jax.tree.map(lambda mine, whole: assert_array_equal(mine, whole[1:]), part, batch)
    sizes = data.row_sizes(schedule, 0)
    assert sizes.texts.tolist() == [4, 3, 2] and (sizes.completion_tokens, sizes.rows) == (5, 2)


def test_positions_restart_and_a_text_sees_itself_alone():
    batch = one_batch(data.pack(texts([2, 3, 1], [1, 1, 1]), length=6), length=8)
    segments = jax.tree.map(jnp.asarray, batch.segments)
    assert_array_equal(segments.ids_NT, [[0, 0, 1, 1, 1, 2, -1, -1]])
    assert_array_equal(segments.positions_NT, [[0, 1, 0, 1, 2, 0, 0, 1]])
    identity_NTHC = jnp.eye(8)[None, :, None]
    seen = attention.attend(
        0 * identity_NTHC, 0 * identity_NTHC, identity_NTHC, valid_NT=jnp.asarray(batch.valid_NT), scale=1.0,
        sliding_window=None, segments=segments, choice=attention.Selection("xla", "test"), layout=sharding.ONE_DEVICE,
    )  # fmt: skip
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert_array_equal(np.asarray(seen)[0, :, 0] > 0, np.array(expected, bool))


def test_the_fingerprint_tells_packed_rows_apart():
    prepared = texts([4, 3, 2, 5], [1, 1, 1, 1])
    prints = {data.pack(prepared, length=length).fingerprint() for length in (7, 9)} | {prepared.fingerprint()}
    assert len(prints) == 3


# --- the numbers

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "kv_heads": 2},
    "gpt_neox": {"family": "gpt_neox", "kv_heads": 4, "activation": "gelu", "parallel_residual": True},
    "gpt2": {"family": "gpt2", "kv_heads": 4, "activation": "gelu_new", "tied_head": True},
    "mistral, with a window": {"family": "mistral", "kv_heads": 2, "sliding_window": 5},
}


def gradient(config, batch, implementation):
    """Token mean of the batch and its gradient."""
    loss, weights = losses.resolve("sft"), params.init(config, jax.random.key(1), "float32")
    forward_fn = batches.forward_fn(config, attention=attention.Selection(implementation, "test"))
    totals = train_step._totals(train_step.stack_micro_batches(batch, accumulation=1), loss)
    value = functools.partial(
        train_step._objective, totals=totals, batch_kl=None, forward_fn=forward_fn, loss=loss, dropout_key=None
    )
    (mean, pairs), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(weights, batch)
    return float(mean), metric_logger.means(jax.device_get(pairs)), jax.device_get(params.flatten(grads))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "implementation"), [*((name, "xla") for name in FAMILIES), ("llama", "chunked")])
def test_packed_rows_have_the_loss_and_the_gradient_of_their_texts(name, implementation):
    sizes: dict[str, Any] = {
        "vocab_size": 90,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "head_dim": 4,
        "ffn": 24,
        "max_positions": 32,
    }
    config = models.ModelConfig(initializer_range=0.3, **(sizes | FAMILIES[name]))
    prepared = texts([9, 4, 12, 3, 7, 5], [3, 1, 6, 2, 1, 4])
    packed = data.pack(prepared, length=16)
    assert packed.groups == 3
    alone, together = (gradient(config, one_batch(rows, length=16), implementation) for rows in (prepared, packed))
    assert_allclose(together[0], alone[0], rtol=tolerances.FLOAT32)
    assert together[1].keys() == alone[1].keys()
    for key, value in alone[1].items():
        assert_allclose(together[1][key], value, rtol=tolerances.FLOAT32, err_msg=key)
    largest = max(np.abs(grad).max() for grad in alone[2].values())
    for path, grad in alone[2].items():
        assert_allclose(together[2][path], grad, rtol=0, atol=tolerances.PACKED_GRADIENT * largest, err_msg=path)


# --- the run


def packed_config(root, **changed):
    defaults = {"stage": "sft", "loss__name": "sft", "loss__alpha": None, "loss__beta_pi": None}
    defaults |= {"data__group_size": 1, "data__packing": True, "train__batch_size": 2, "mesh__fsdp": 1, "mesh__data": 1}
    return tiny.config(root / "model", root / "pairs.jsonl", **(defaults | changed))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("packing")
    tiny.write_model(path / "model", layers=1)
    tiny.write_pairs(path / "pairs.jsonl", count=40)
    return path


def test_the_audit_says_what_packing_saves(root):
    alone, packed = (run_inputs.prepare(packed_config(root, data__packing=on)).train for on in (False, True))
    found = packed.audit.packed
    assert (
        found is not None
        and alone.audit.packed is None
        and found.rows == packed.prepared.groups < alone.prepared.groups == 40
    )
    assert_allclose(found.before, 1 - alone.prepared.lengths_N.sum() / (40 * 40))
    assert_allclose(found.padding, 1 - alone.prepared.lengths_N.sum() / (40 * found.rows))
    assert f"rows of 40, {found.padding:.1%} padding instead of {found.before:.1%}" in packed.audit.text()
    assert packed.sample == alone.sample


def test_what_cannot_be_packed_is_refused(root):
    with pytest.raises(ValueError, match="data.packing=True is for stage 'sft', not 'align'"):
        run_inputs.check(tiny.config(root / "model", root / "pairs.jsonl", data__packing=True))
    with pytest.raises(ValueError, match="groups of 2 completions cannot be packed"):
        data.pack(texts([2, 2], [1, 1])._replace(rewards_BK=np.ones((1, 2), np.float32)), length=4)
    tiny.write_model(root / "dynamic", layers=1, rope=models.Rope(type="dynamic", factor=2.0))
    with pytest.raises(ValueError, match="depend on a row's length .* set data.packing=False"):
        run_inputs.read_model(packed_config(root), root / "dynamic")
    for original, refused in ((40, False), (39, True)):
        pairs = {"short_factor": (1.0, 1.5), "long_factor": (2.0, 3.0), "original_max_position_embeddings": original}
        tiny.write_model(
            root / "longrope", layers=1, head_dim=4, rope=models.Rope(type="longrope", **pairs), family="phi3"
        )
        with pytest.raises(ValueError, match="rope type 'longrope'") if refused else contextlib.nullcontext():
            run_inputs.read_model(packed_config(root), root / "longrope")


@pytest.mark.slow  # four runs
def test_a_packed_run_evaluates_as_an_unpacked_one_and_resumes_to_the_bit(root, tmp_path, monkeypatch):
    c = packed_config(root, train__max_steps=5, train__epochs=3.0, train__save_every=2, train__eval_every=3)
    resuming.whole(c, tmp_path / "whole")
    resuming.stopped(c, tmp_path / "stopped", monkeypatch, after=3)
    assert resuming.outcome(tmp_path / "whole") == resuming.outcome(tmp_path / "stopped")
    resuming.whole(packed_config(root, data__packing=False, train__max_steps=1), tmp_path / "alone")
    trainer.run(
        packed_config(root, train__max_steps=1, train__batch_size=8, mesh__data=4, mesh__fsdp=2), tmp_path / "mesh"
    )
    packed, alone, mesh = (
        metric_logger.read(tmp_path / name / metric_logger.METRICS_FILE)[0] for name in ("whole", "alone", "mesh")
    )
    assert packed.keys() == alone.keys() == mesh.keys()
    for name, value in alone.items():
        assert_allclose([packed[name], mesh[name]], value, rtol=tolerances.LOGPS, err_msg=name)

import numpy as np
import pytest

from fpo_jax import reference, shapes


def batch(row_ids):
    filler = np.zeros(1)
    ids = np.asarray(row_ids, np.int32)
    return shapes.Batch(filler, filler, filler, filler, filler, filler, filler, filler, ids)


def score(one):
    return np.stack([one.row_ids_B * 10.0, one.row_ids_B * 10.0 + 1.0, one.row_ids_B * 10.0 + 2.0], axis=1)


def test_every_group_lands_in_its_row_and_padding_nowhere():
    found = reference.compute(score, [batch([2, 0]), batch([1, -1])], groups=3)
    np.testing.assert_array_equal(found, [[0, 1, 2], [10, 11, 12], [20, 21, 22]])
    assert found.dtype == np.float32


def test_nonfinite_reference_names_the_groups():
    with pytest.raises(ValueError, match=r"not finite for 1 of 2 groups \(first: \[1\]\)"):
        reference.compute(lambda b: np.where(b.row_ids_B[:, None] == 1, np.inf, 0.0), [batch([0, 1])], groups=2)


def test_round_trip_and_damage(tmp_path):
    path = tmp_path / "cache" / "train.safetensors"
    logps = np.arange(6, dtype=np.float32).reshape(3, 2)
    reference.save(path, logps, {"weights": "a"})
    np.testing.assert_array_equal(reference.load(path), logps)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="do not match their digest; delete"):
        reference.load(path)
    path.write_bytes(bytes(damaged[:-5]))
    with pytest.raises(ValueError, match="cannot be read"):
        reference.load(path)


def test_verify_accepts_rounding_and_refuses_another_model(tmp_path):
    stored = reference.compute(score, [batch([0, 1, 2])], groups=3)
    off = reference.verify(stored, lambda b: score(b) * (1 + 1e-6), [batch([2, -1])], rtol=1e-4, path=tmp_path)
    assert 0 < off < 1e-4
    with pytest.raises(ValueError, match="0.5 nats off"):
        reference.verify(stored, lambda b: score(b) + 0.5, [batch([0])], rtol=1e-4, path=tmp_path)


def test_fingerprint_depends_on_every_part_and_no_order():
    parts = {"weights": "a", "temperature": 0.8}
    assert reference.fingerprint(parts) == reference.fingerprint(dict(reversed(parts.items())))
    for key, value in {"weights": "b", "temperature": 1.0}.items():
        assert reference.fingerprint(parts) != reference.fingerprint(parts | {key: value})


def test_verification_steps_span_the_data():
    assert reference.verification_steps(101) == [0, 50, 100]
    assert reference.verification_steps(1) == [0]

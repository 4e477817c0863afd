import numpy as np
import pytest

from fpo_jax.trainer import reference_logprobs


def scored(*row_ids, change=lambda logps: logps):
    """One batch per list of row ids; the log-probs of group i are 10 i, 10 i + 1, 10 i + 2."""
    for ids in map(np.asarray, row_ids):
        yield ids, change(np.stack([ids * 10.0, ids * 10.0 + 1.0, ids * 10.0 + 2.0], axis=1))


def test_every_group_lands_in_its_row_and_padding_nowhere():
    found = reference_logprobs.compute(scored([2, 0], [1, -1]), groups=3)
    np.testing.assert_array_equal(found, [[0, 1, 2], [10, 11, 12], [20, 21, 22]])
    assert found.dtype == np.float32


def test_nonfinite_reference_names_the_groups():
    with pytest.raises(ValueError, match=r"not finite for 1 of 2 groups \(first: \[1\]\)"):
        reference_logprobs.compute([(np.array([0, 1]), np.array([[0.0], [np.inf]]))], groups=2)


def test_round_trip_and_damage(tmp_path):
    path = tmp_path / "cache" / "train.safetensors"
    logps = np.arange(6, dtype=np.float32).reshape(3, 2)
    reference_logprobs.save(path, logps, {"weights": "a"})
    np.testing.assert_array_equal(reference_logprobs.load(path), logps)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="do not match their digest; delete"):
        reference_logprobs.load(path)
    path.write_bytes(bytes(damaged[:-5]))
    with pytest.raises(ValueError, match="cannot be read"):
        reference_logprobs.load(path)


def test_an_unfinished_pass_is_gone_on_with_and_a_damaged_part_is_none(tmp_path):
    path = tmp_path / "train.safetensors"
    known = np.full((3, 3), np.nan, np.float32)
    assert reference_logprobs.load_part(path) is None
    known[1] = 7.0
    reference_logprobs.save_part(path, known, {})
    found = reference_logprobs.load_part(path)
    np.testing.assert_array_equal(found, known)
    whole = reference_logprobs.compute(scored([2, 0]), groups=3, known=found)
    np.testing.assert_array_equal(whole, [[0, 1, 2], [7, 7, 7], [20, 21, 22]])
    reference_logprobs.part_of(path).write_bytes(reference_logprobs.part_of(path).read_bytes()[:-1] + b"?")
    assert reference_logprobs.load_part(path) is None
    reference_logprobs.save(path, whole, {})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_verify_accepts_rounding_and_refuses_another_model(tmp_path):
    stored = reference_logprobs.compute(scored([0, 1, 2]), groups=3)
    nearly = scored([2, -1], change=lambda logps: logps * (1 + 1e-6))
    off = reference_logprobs.verify(stored, nearly, rtol=1e-4, path=tmp_path)
    assert 0 < off < 1e-4
    with pytest.raises(ValueError, match="0.5 nats off"):
        reference_logprobs.verify(stored, scored([0], change=lambda logps: logps + 0.5), rtol=1e-4, path=tmp_path)


def test_fingerprint_depends_on_every_part_and_no_order():
    parts = {"weights": "a", "temperature": 0.8}
    assert reference_logprobs.fingerprint(parts) == reference_logprobs.fingerprint(dict(reversed(parts.items())))
    for key, value in {"weights": "b", "temperature": 1.0}.items():
        assert reference_logprobs.fingerprint(parts) != reference_logprobs.fingerprint(parts | {key: value})


def test_verification_steps_span_the_data():
    assert reference_logprobs.verification_steps(101) == [0, 50, 100]
    assert reference_logprobs.verification_steps(1) == [0]

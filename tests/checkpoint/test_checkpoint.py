import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint, sharding, types
from fpo_jax.checkpoint import integrity


def placed_state(value):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, devices=jax.devices())
    place = sharding.param_shardings(
        {"w": ("embed", "vocab")}, {"w": jax.ShapeDtypeStruct((8, 6), "float32")}, mesh=mesh
    )
    rest = sharding.replicated(mesh)
    weights = jax.device_put({"w": jnp.full((8, 6), value, jnp.float32)}, place)
    moments = (jax.device_put(jnp.full((3,), value, jnp.bfloat16), rest), jax.device_put(jnp.int32(7), rest))
    return types.TrainState(weights, moments, jax.device_put(jnp.int32(0), rest))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / checkpoint.SOURCE_FOLDER).mkdir()
    (tmp_path / checkpoint.SOURCE_FOLDER / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def test_round_trip_keeps_bits_placement_and_meta(workdir):
    state = placed_state(1.25)
    saver = checkpoint.Checkpointer(workdir, keep=2)
    saver.save(3, state, {"note": "x"})
    saver.close()
    reader = checkpoint.Checkpointer(workdir, keep=2)
    assert reader.latest_step() == 3
    assert reader.meta(3) == {"note": "x", "step": 3, "score": None}
    restored = reader.restore(3, abstract(state))
    assert int(restored.step) == 3
    for old, new in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(restored[:2]), strict=True):
        assert old.dtype == new.dtype and old.sharding == new.sharding
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
    reader.close()


def test_state_may_be_donated_right_after_save(workdir):
    """The writer works in the background while the next step reuses the buffers."""
    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = placed_state(0.0)
    saver = checkpoint.Checkpointer(workdir, keep=20)
    for step in range(1, 11):
        state = advance(state)
        saver.save(step, state, {})
    saver.wait()
    like = abstract(state)
    for step in range(1, 11):
        np.testing.assert_array_equal(np.asarray(saver.restore(step, like).params["w"]), float(step))
    saver.close()


def test_keeps_the_newest(workdir):
    saver = checkpoint.Checkpointer(workdir, keep=2)
    for step in (1, 2, 5):
        saver.save(step, placed_state(step), {})
    saver.close()
    assert sorted(path.name for path in (workdir / checkpoint.FOLDER).iterdir() if path.name.isdigit()) == ["2", "5"]


def test_an_old_step_is_whole_or_gone_wherever_a_run_is_killed(workdir, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed a file
    saver = checkpoint.Checkpointer(workdir, keep=1)
    for step in (1, 2):
        saver.save(step, placed_state(1.0), {})
    saver.close()
    folder = workdir / checkpoint.FOLDER
    assert integrity.steps(folder) == [2] and [path.name for path in folder.glob(".removed/*")] == ["1"]
    assert integrity.faults(folder / ".removed" / "1") == ""
    monkeypatch.undo()
    checkpoint.Checkpointer(workdir, keep=1).close()
    assert integrity.steps(folder) == [2] and not list(folder.glob(".removed/*"))


def test_restore_params_reads_parameters_alone(workdir):
    saver = checkpoint.Checkpointer(workdir, keep=2)
    saver.save(1, placed_state(1.0), {})
    saver.save(2, placed_state(2.0), {})
    saver.close()
    weights, meta = checkpoint.restore_params(workdir, None)
    np.testing.assert_array_equal(np.asarray(weights["w"]), 2.0)
    assert meta["step"] == 2 and meta["hf_config"] == {"model_type": "llama"}
    weights, _ = checkpoint.restore_params(workdir, 1)
    np.testing.assert_array_equal(np.asarray(weights["w"]), 1.0)


def test_missing_checkpoints_say_what_there_is(workdir):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.restore_params(workdir, None)
    saver = checkpoint.Checkpointer(workdir, keep=2)
    saver.save(4, placed_state(1.0), {})
    saver.close()
    with pytest.raises(ValueError, match="no checkpoint of step 9; it has 4"):
        checkpoint.restore_params(workdir, 9)

"""Stages: a finished one is skipped while nothing changed, a changed one is refused, an interrupted one runs again."""

import hashlib
import logging
import os
import re

import pytest

from fpo_jax.eval.pipeline.stages import StageError, Stages


@pytest.fixture
def stages(tmp_path):
    """A function that runs one stage writing `out.txt` in a fresh program; returns how often its work was done."""
    done = []

    def run(setting=1, work=None):
        def write():
            done.append(1)
            (tmp_path / "out.txt").write_text("made")
            return "made it"

        Stages(tmp_path, total=1, program="quickstart").run(
            "copy",
            "Copy",
            work or write,
            inputs={"setting": setting, "source": tmp_path / "in.txt"},
            outputs=[tmp_path / "out.txt"],
        )
        return len(done)

    (tmp_path / "in.txt").write_text("one")
    return run


def test_a_finished_stage_is_skipped(stages, capsys):
    assert [stages(), stages()] == [1, 1]
    assert re.fullmatch(
        r"\[1/1\] Copy \.\.\. [0-9.]+ s: made it\n\[1/1\] Copy \.\.\. done before: made it\n", capsys.readouterr().out
    )


def test_a_stage_whose_output_is_gone_is_done_again(stages, tmp_path):
    stages()
    (tmp_path / "out.txt").unlink()
    assert stages() == 2


def test_other_inputs_or_changed_outputs_are_refused(stages, tmp_path):
    stages()
    with pytest.raises(StageError, match=r"'copy' made from other inputs:\n  setting: 1 -> 2\nuse another"):
        stages(setting=2)
    (tmp_path / "in.txt").write_text("two")
    with pytest.raises(StageError, match="source: '[0-9a-f]{64}' -> '[0-9a-f]{64}'"):
        stages()
    (tmp_path / "in.txt").write_text("one")
    (tmp_path / "out.txt").write_text("edited")
    with pytest.raises(StageError, match=r"out.txt in .* changed since stage 'copy' wrote it"):
        stages()
    (tmp_path / "out.txt").write_text("made")
    assert stages() == 1
    (tmp_path / "in.txt").unlink()
    with pytest.raises(StageError, match="in.txt is missing"):
        stages()


def test_a_failed_stage_is_named_and_done_again(stages, tmp_path):
    def fail():
        logging.getLogger("fpo_jax").info("about to fail")
        raise ValueError("no digits left")

    with pytest.raises(StageError, match=r"stage 'copy' failed: no digits left\n\(details: .*run.log"):
        stages(work=fail)
    assert "about to fail" in (tmp_path / "run.log").read_text()
    assert stages() == 1

    def crash():
        raise RuntimeError("bug")

    (tmp_path / "out.txt").unlink()
    with pytest.raises(RuntimeError, match="bug") as caught:
        stages(work=crash)
    assert "in stage 'copy' of quickstart" in caught.value.__notes__[0]


def test_a_key_changes_with_settings_and_with_content_alone(tmp_path):
    (tmp_path / "in.txt").write_text("one")
    stages = Stages(tmp_path, total=0, program="quickstart")
    first = stages.key({"setting": 1, "source": tmp_path / "in.txt"})
    assert re.fullmatch("[0-9a-f]{10}", first)
    assert first != stages.key({"setting": 2, "source": tmp_path / "in.txt"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in.txt").write_text("one")
    assert stages.key({"setting": 1, "source": tmp_path / "in.txt"}) == first
    (tmp_path / "in.txt").write_text("two")
    assert stages.key({"setting": 1, "source": tmp_path / "in.txt"}) != first


def test_an_unchanged_file_is_hashed_once(tmp_path, stages, monkeypatch):
    stages()
    hashed = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or whole(file, name))
    stages()
    assert hashed == []
    os.utime(tmp_path / "in.txt", ns=(0, 0))
    stages()
    assert hashed == [str(tmp_path / "in.txt")]

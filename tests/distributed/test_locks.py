"""One writer at a time: locks that tell the living from the dead, and every program's output under one."""

import errno
import fcntl
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fpo_jax.cli import __main__ as command
from fpo_jax.cli import jsonl_job
from fpo_jax.distributed import workdir_lock
from fpo_jax.eval.judge import winrate
from tests.paths import REPO


class TestLock:
    OTHER = (
        "import sys; from pathlib import Path; from fpo_jax.distributed import workdir_lock\n"
        "with workdir_lock.hold(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )

    def other_run(self, workdir):
        """A process that holds the lock until its input ends."""
        command = [sys.executable, "-c", self.OTHER, str(workdir)]
        process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        return process

    def test_second_run_is_refused_until_the_first_is_dead(self, tmp_path, caplog):
        with self.other_run(tmp_path) as other:
            with pytest.raises(ValueError, match=f"is in use by process {other.pid} of host .* on this host"):
                workdir_lock.hold(tmp_path).__enter__()
            other.kill()
            other.wait()
        with workdir_lock.hold(tmp_path):
            assert f"process {other.pid} of host" in caplog.text and "taken over" in caplog.text
        assert list(tmp_path.iterdir()) == [], "an orderly end leaves no claim"

    def test_error_releases_it(self, tmp_path):
        with pytest.raises(RuntimeError, match="fault"), workdir_lock.hold(tmp_path):
            raise RuntimeError("fault")
        with workdir_lock.hold(tmp_path):
            pass

    def claim(self, workdir, **changed):
        """Write what another process would have written, and return it."""
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": workdir_lock.started(os.getpid()),
            "machine": workdir_lock._machine(),
            "token": "0" * 16,
            "beat": 1,
        } | changed
        (workdir / workdir_lock.FILE).write_text(json.dumps(owner))
        return owner

    @pytest.fixture
    def quick(self, monkeypatch):
        """A lease of a second, so that heartbeats are many and waits short."""
        for name, seconds in {"BEAT_S": 0.05, "LEASE_S": 1.0, "POLL_S": 0.1}.items():
            monkeypatch.setattr(workdir_lock, name, seconds)

    def test_claim_of_another_host_without_a_heartbeat_is_taken_over_after_a_wait_that_is_told(
        self, quick, tmp_path, caplog
    ):
        self.claim(tmp_path, host="pod-abc12", machine="another boot")
        with workdir_lock.hold(tmp_path):
            assert "waiting up to 1 s to see whether process" in caplog.text
            assert "of host pod-abc12 ended without releasing it; taken over" in caplog.text

    def test_claim_of_another_host_with_a_heartbeat_is_refused(self, quick, tmp_path):
        owner, over = self.claim(tmp_path, host="pod-abc12", machine="another boot"), threading.Event()

        def beat():
            while not over.wait(0.05):
                owner["beat"] += 1
                with (tmp_path / workdir_lock.FILE).open("r+") as file:  # in place, as an owner writes it
                    file.write(json.dumps(owner))

        living = threading.Thread(target=beat)
        living.start()
        try:
            with pytest.raises(ValueError, match="is in use by process .* of host pod-abc12; wait for it"):
                workdir_lock.hold(tmp_path).__enter__()
        finally:
            over.set()
            living.join()

    def test_claim_of_another_host_that_goes_while_we_watch_is_no_reason_to_wait_longer(self, tmp_path, monkeypatch):
        self.claim(tmp_path, host="pod-abc12", machine="another boot")
        monkeypatch.setattr(workdir_lock, "POLL_S", 0.1)
        threading.Timer(0.3, (tmp_path / workdir_lock.FILE).unlink).start()
        started = time.monotonic()
        with workdir_lock.hold(tmp_path):
            assert time.monotonic() - started < workdir_lock.LEASE_S / 2

    def test_restart_under_another_host_name_on_the_same_machine_goes_on_at_once(self, tmp_path, monkeypatch, caplog):
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        self.claim(tmp_path, host="pod-abc12", pid=dead.pid)
        monkeypatch.setattr(workdir_lock.time, "sleep", None)  # nothing may wait
        with workdir_lock.hold(tmp_path):
            assert "taken over" in caplog.text

    def test_a_killed_process_that_nobody_waited_for_is_dead(self):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert workdir_lock.started(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert workdir_lock.started(child.pid) is None
        child.communicate()

    @pytest.mark.parametrize("how", ["taken over", "deleted"])
    def test_an_owner_that_lost_its_lease_writes_no_further_and_leaves_the_other_s_claim(self, tmp_path, how):
        with workdir_lock.hold(tmp_path):
            workdir_lock.verify()
            other = self.claim(tmp_path, token="1" * 16) if how == "taken over" else None
            if how == "deleted":
                (tmp_path / workdir_lock.FILE).unlink()
            with pytest.raises(workdir_lock.LeaseLost, match="is another process's now.*stops without writing on"):
                workdir_lock.verify()
        left = tmp_path / workdir_lock.FILE
        assert not left.exists() if other is None else json.loads(left.read_text()) == other

    def test_heartbeat_changes_the_claim_and_stops_where_it_is_another_s(self, quick, tmp_path):
        with workdir_lock.hold(tmp_path):
            file = tmp_path / workdir_lock.FILE
            first, end = file.read_text(), time.monotonic() + 30
            while file.read_text() == first:
                assert time.monotonic() < end
                time.sleep(0.01)
            other = self.claim(tmp_path, token="1" * 16)
            time.sleep(0.3)
            assert json.loads(file.read_text()) == other

    def test_a_stopped_owner_that_was_taken_over_makes_no_further_line(self, quick, tmp_path):
        """SIGSTOP as a host that stands still; the other one is on another machine by what it knows."""
        body = (
            "import sys, time; from pathlib import Path; from fpo_jax.distributed import workdir_lock\n"
            "workdir_lock.BEAT_S, folder = 0.05, Path(sys.argv[1])\n"
            "with workdir_lock.hold(folder):\n"
            "    while True:\n"
            "        workdir_lock.verify(); (folder / 'line').touch(); print('held', flush=True); time.sleep(0.02)"
        )
        taking = (
            "import sys; from pathlib import Path; from fpo_jax.distributed import workdir_lock as lock\n"
            "lock.LEASE_S, lock.POLL_S, lock._machine = 1.0, 0.1, lambda: 'elsewhere'\n"
            "lock.atomic_io.flock = lambda file: None\n"
            "with lock.hold(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
        )
        command, pipes = [sys.executable, "-c", body, str(tmp_path)], {"stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, **pipes) as first:
            assert first.stdout.readline() == "held\n"
            first.send_signal(signal.SIGSTOP)
            command[2] = taking
            with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, **pipes) as second:
                assert second.stdout.readline() == "held\n"
                (tmp_path / "line").unlink()
                first.send_signal(signal.SIGCONT)
                assert "is another process's now" in first.communicate()[1]
                assert not (tmp_path / "line").exists()
                second.communicate("")
                assert second.returncode == 0
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("flock", [True, False])
    def test_claim_of_a_number_that_another_process_has_now_is_broken(self, tmp_path, monkeypatch, caplog, flock):
        if not flock:
            self.no_flock(monkeypatch)
        self.claim(tmp_path, started="another-boot/17")
        with workdir_lock.hold(tmp_path):
            assert "taken over" in caplog.text

    def test_without_flock_a_living_process_is_refused_and_a_dead_one_broken(self, tmp_path, monkeypatch, caplog):
        self.no_flock(monkeypatch)
        self.claim(tmp_path)
        with pytest.raises(ValueError, match="is in use by process"):
            workdir_lock.hold(tmp_path).__enter__()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        self.claim(tmp_path, pid=dead.pid, started="boot/17")
        with workdir_lock.hold(tmp_path):
            assert "taken over" in caplog.text

    @pytest.mark.parametrize(
        "content", [b"no JSON", b"[1]", b'{"host": "a"}', b'{"host": "a", "pi', b"\xff\xfe", b"[" * 4000, b"3"]
    )
    def test_what_is_no_lock_is_refused_in_one_sentence(self, tmp_path, content):
        (tmp_path / workdir_lock.FILE).write_bytes(content)
        with pytest.raises(
            ValueError, match="lock.json is not a lock that this version wrote.*delete that file"
        ) as described:
            workdir_lock.hold(tmp_path).__enter__()
        assert "\n" not in str(described.value) and (tmp_path / workdir_lock.FILE).read_bytes() == content

    @pytest.mark.parametrize("content", [b"", bytes(512)])
    def test_an_empty_lock_of_a_power_cut_is_free(self, quick, tmp_path, content):
        (tmp_path / workdir_lock.FILE).write_bytes(content)
        with workdir_lock.hold(tmp_path):
            pass

    @pytest.mark.parametrize("what", ["folder", "fifo", "file in the way", "dangling"])
    def test_a_place_that_takes_no_lock_is_told_in_one_sentence(self, tmp_path, what):
        workdir = tmp_path / "w"
        if what == "file in the way":
            workdir.touch()
        else:
            workdir.mkdir()
            make = {"folder": Path.mkdir, "fifo": os.mkfifo, "dangling": lambda path: path.symlink_to("no/where")}[what]
            make(workdir / workdir_lock.FILE)
        with pytest.raises(ValueError, match="cannot be locked: .*mend it, or use another --workdir") as described:
            workdir_lock.hold(workdir).__enter__()
        assert "\n" not in str(described.value)

    @pytest.mark.parametrize("call", ["open", "pwrite", "fsync"])
    def test_a_disk_that_takes_no_lock_is_told_in_one_sentence(self, tmp_path, monkeypatch, call):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(workdir_lock.os, call, full)
            with pytest.raises(ValueError, match="cannot be locked: .*No space left on device"):
                workdir_lock.hold(tmp_path).__enter__()
        assert list(tmp_path.iterdir()) == []

    def test_a_file_s_lock_lies_beside_it_and_goes_with_it(self, tmp_path):
        with workdir_lock.beside(tmp_path / "new" / "a.jsonl"):
            assert [path.name for path in (tmp_path / "new").iterdir()] == [".a.jsonl.lock"]
            with pytest.raises(ValueError, match=r"a.jsonl is in use by process \d+ of host .* use another --out"):
                workdir_lock.beside(tmp_path / "new" / "a.jsonl").__enter__()
            with workdir_lock.beside(tmp_path / "new" / "b.jsonl"):
                pass
        assert list((tmp_path / "new").iterdir()) == []

    def no_flock(self, monkeypatch):
        def unsupported(*_):
            raise OSError(errno.ENOTSUP, "no locks here")

        monkeypatch.setattr(fcntl, "flock", unsupported)


PROGRAMS = {  # module of a program -> its command line, to which the output is added, and how that is locked
    "cli.generate": ("--model none --data none --max-new-tokens 4 --out", workdir_lock.beside),
    "cli.label": ("--model none --data none --out", workdir_lock.beside),
    "cli.export": ("--workdir . --out", workdir_lock.beside),
    "eval.stats.kl": ("--policy none --reference none --data none --out", workdir_lock.beside),
    "eval.benchmarks.answer": (
        "--benchmark alpaca_eval --data {questions} --model none --temperature 0 --max-new-tokens 4 --out",
        workdir_lock.hold,
    ),
    "eval.judge.winrate": ("--candidate none --baseline none --reward-model none --out", workdir_lock.hold),
    "eval.report.report": ("--workdir . --out", workdir_lock.hold),
    "eval.report.divergence_figure": ("--out", workdir_lock.hold),
    "eval.pipeline.pipeline": (f"--config {REPO / 'configs/pipelines/hh_rw.py'} --workdir", workdir_lock.hold),
    "eval.quickstart.quickstart": ("--workdir", workdir_lock.hold),
    "eval.benchmarks.alpaca_eval": ("--annotations none --json", workdir_lock.beside),
    "eval.benchmarks.arena_hard": ("--judgements none --json", workdir_lock.beside),
    "eval.benchmarks.mt_bench": ("--judgements none --json", workdir_lock.beside),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_second_start_of_a_program_is_refused_before_it_reads_a_model(tmp_path, capsys, name):
    """Models and data that are not there would be told next."""
    command, lock = PROGRAMS[name]
    (tmp_path / "questions.jsonl").write_text('{"instruction": "q"}\n')
    arguments = [*command.format(questions=tmp_path / "questions.jsonl").split(), str(tmp_path / "o")]
    main = importlib.import_module(f"fpo_jax.{name}").main
    with lock(tmp_path / "o"):
        code = main(arguments)
    said = capsys.readouterr().err.strip()
    assert code == 2 and re.search(
        rf"o is in use by process {os.getpid()} of host \S+ on this host; wait for it", said
    ), said
    assert "\n" not in said and [path.name for path in tmp_path.iterdir() if path.name != "questions.jsonl"] in (
        [],
        ["o"],
    )


def test_every_program_that_has_an_output_is_among_them():
    """A new program needs an entry above, or is one of those that write nothing."""
    silent = {"plan", "config", "losses", "init"}  # the last writes one small file at once, and none that is there
    modules = {module.removeprefix("fpo_jax.") for name, (module, _) in command.PROGRAMS.items() if name not in silent}
    assert modules == {*PROGRAMS, "cli.train"}  # whose lock tests/reliability/test_faults_storage.py tests


def test_two_comparisons_do_not_write_one_file_of_replies(tmp_path):
    options = winrate.Options(
        candidate=tmp_path, baseline="b", out=tmp_path / "o", store=str(tmp_path / "shared.jsonl")
    )
    with winrate._store(options), pytest.raises(ValueError, match=r"shared.jsonl is in use by .* another --store"):
        winrate._store(options).__enter__()


def test_a_lost_lease_stops_a_job_before_its_next_line(tmp_path):
    with jsonl_job.JobFile(tmp_path / "a.jsonl", {}, count=2) as file, workdir_lock.beside(tmp_path / "a.jsonl"):
        file.append({"index": 0})
        (tmp_path / ".a.jsonl.lock").unlink()
        with pytest.raises(workdir_lock.LeaseLost):
            file.append({"index": 1})
        with pytest.raises(workdir_lock.LeaseLost):
            file.finish()
    assert (tmp_path / "a.jsonl.part").read_text().count("\n") == 1

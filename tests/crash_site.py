"""A tiny run that faults strike, and what it is when nothing does."""

import json
import re
import signal
import time

from fpo_jax import checkpoint
from fpo_jax.checkpoint import integrity
from fpo_jax.trainer import metric_logger
from tests import faults, tiny

STEPS, SAVE_EVERY, PAIRS = 6, 2, 12
PROMPTS = 8


class Site:
    """A tiny run, and what it is when nothing strikes it."""

    def __init__(self, root, zygote):
        self.root, self.zygote = root, zygote
        tiny.write_model(root / "model", layers=1)
        tiny.write_pairs(root / "pairs.jsonl", count=PAIRS)
        (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} ab?"}) + "\n" for i in range(PROMPTS)))
        whole = root / "whole"
        code, said = self.train(whole, {"folder": str(whole), "count": 10**9}, keep_checkpoints=STEPS)
        assert code == 0, said  # it leaves the executables, too
        started = time.monotonic()
        assert self.train(root / "again")[0] == 0
        self.seconds = time.monotonic() - started
        self.operations = int(re.findall(r"came by (\d+) times", said)[-1])
        self.metrics = (whole / metric_logger.METRICS_FILE).read_bytes()
        self.weights = {step: weights(whole, step) for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)}
        self.groups = dict(faults.trained(whole))

    def train(self, workdir, fault=None, *, keep_checkpoints=2, async_save=True):
        """Start train.py; return its exit code and what it said."""
        workdir.mkdir(exist_ok=True)
        options = {
            "model.path": self.root / "model", "data.train": self.root / "pairs.jsonl",
            "data.eval": self.root / "pairs.jsonl", "data.format": "json", "data.hh_split": "last_turn",
            "data.subfolder": "", "data.train_split": "", "data.eval_split": "", "data.max_length": 40,
            "data.max_completion_length": 16, "model.compute_dtype": "float32", "optim.learning_rate": 3e-3,
            "train.batch_size": 4, "train.micro_batch_per_device": 2, "train.epochs": STEPS * 4 / PAIRS,
            "train.save_every": SAVE_EVERY, "train.eval_every": 3, "train.eval_batch_per_device": 6,
            "train.keep_checkpoints": keep_checkpoints, "train.async_save": async_save, "logging.tensorboard": False,
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        command = ["--config", "configs/pythia_hh_pref.py", "--workdir", workdir, *flags]
        return self.zygote.run("fpo_jax.cli.train", command, self.root / "log", fault)

    def finish(self, workdir, context):
        """Start it again without a fault: it ends as the uninterrupted run did."""
        code, said = self.train(workdir)
        assert code == 0, f"{context}\n{said}"
        assert (workdir / metric_logger.METRICS_FILE).read_bytes() == self.metrics, context
        assert weights(workdir, STEPS) == self.weights[STEPS], context
        effective = dict(faults.trained(workdir))  # a number's last start is the one that counts
        assert effective == self.groups, context
        for epoch in range(2):
            ids = [one for number in range(3 * epoch + 1, 3 * epoch + 4) for one in effective[number]]
            assert sorted(ids) == list(range(PAIRS)), f"{context}: an example is lost or repeated"
        left = [path for name in ("*.tmp", "*tmp-*", ".removed/*") for path in workdir.rglob(name)]
        assert not left, f"{context}: {left}"


def weights(workdir, step):
    """Digest of a checkpoint's weights."""
    found, _ = checkpoint.restore_params(workdir, step)
    return faults.digest(found)


def saved(workdir):
    """Steps of the committed checkpoints, ascending."""
    return integrity.steps(workdir / checkpoint.FOLDER)


# how often a whole run comes by each point
LAST = {"data": 2, "load": 1, "reference": 2, "reference written": 2, "step": STEPS, "evaluation": 3, "save": 3}


def stop(point, count, number=signal.SIGTERM, **more):
    return {"point": point, "count": count, "signal": number, **more}

"""What a set of dependencies must be able to do, in a minute: `python -m tests.smoke`, without pytest.

Import everything; train, save and export a tiny model; answer prompts with it and through a server.
"""

import importlib
import json
import os
import tempfile
from pathlib import Path

import fpo_jax
from fpo_jax.cli import generate
from tests import compiling, tiny
from tests.answer_server import AnswerServer


def main() -> None:
    """Do it all.

    Raises:
        Exception: whatever a release lacks.
    """
    os.environ.setdefault("XLA_FLAGS", compiling.flags())
    package = Path(fpo_jax.__path__[0])
    for path in sorted(package.glob("**/*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny.write_model(folder / "model")
        pairs = tiny.write_pairs(folder / "pairs.jsonl", count=16)
        given = {
            "mesh__data": 1,
            "mesh__fsdp": 1,
            "train__batch_size": 4,
            "train__save_every": 1,
            "train__eval_every": 2,
        }
        config = tiny.config(folder / "model", pairs, **given)
        config.train.epochs = 1
        trainer = fpo_jax.Trainer(config, folder / "run")
        trainer.train()
        trainer.save_pretrained(folder / "exported")
        asked = {"data": str(pairs), "format": "prompts", "rule": "raw", "max_new_tokens": 4, "num_prompts": 3}
        here = generate.run(generate.Options(model=str(folder / "exported"), out=folder / "here.jsonl", **asked))
        with AnswerServer(lambda *_: None, str.upper).served() as server:
            there = generate.Options(server=server.url, server_model="m", out=folder / "there.jsonl", **asked)
            assert (here.prompts, generate.run(there).prompts, here.failed) == (3, 3, 0)
        assert len([json.loads(line) for line in (folder / "there.jsonl").read_text().splitlines()]) == 3
    print("the smoke test has passed")


if __name__ == "__main__":
    main()

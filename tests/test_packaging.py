"""The wheel holds fpo_jax with kernels, recipes and eval, nothing else at top level, and works without the checkout."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile

import datasets
import numpy as np
import pytest

from tests import compiling, tiny
from tests.paths import REPO

pytestmark = pytest.mark.slow  # builds a wheel and starts a fresh interpreter


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="the test extra brings setuptools>=77")
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = REPO / name
        if not path.exists() and not path.is_symlink():
            continue  # deleted in the working tree
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(root)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(root.glob("*.whl"))


def test_top_level_is_fpo_jax_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fpo_jax"}
    for folder in ("kernels", "eval", "configs"):
        linked = {f"fpo_jax/{path.relative_to(REPO)}" for path in (REPO / folder).rglob("*.py")}
        assert linked and linked <= names, f"a module of {folder} is missing"
    packages = {path.relative_to(REPO).as_posix() for path in (REPO / "fpo_jax").rglob("*.py")}
    assert packages <= names, "a module is missing from the wheel"
    assert {
        "fpo_jax/py.typed",
        "fpo_jax/eval/judge/templates/helpful.txt",
        "fpo_jax/eval/report/page.html",
        "fpo_jax/requirements/python3.11.txt",
    } <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run a command with the installed wheel, and the dependencies of this environment, but not its checkout."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": compiling.flags(devices=1)}

    def run(folder, *words):
        done = subprocess.run(list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return site, run


def test_installed_wheel_imports_beside_transformers(installed, tmp_path):
    site, run = installed
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[2])]\n"
        "import fpo_jax, fpo_jax.kernels.lm_head.chunked, fpo_jax.trainer.trainer, transformers\n"
        "for module in (fpo_jax, fpo_jax.kernels.lm_head.chunked): assert module.__file__.startswith(sys.argv[1])\n"
        "assert transformers.PreTrainedTokenizerFast and transformers.LlamaConfig()\n"
        "assert not {'kernels', 'eval', 'configs'} & set(sys.modules)\n"
    )
    run(tmp_path, sys.executable, "-c", code, site, REPO)


CHANGES = (
    "data.format=json", "data.hh_split=last_turn", "data.max_length=40", "data.max_completion_length=16",
    "data.subfolder=", "data.train=pairs.jsonl", "data.train_split=", "data.eval=pairs.jsonl", "data.eval_split=",
    "model.compute_dtype=float32", "train.batch_size=8", "train.max_steps=2", "train.epochs=4", "train.eval_every=0",
    "train.eval_groups=4", "train.save_every=2", "mesh.data=1", "mesh.fsdp=1", "logging.tensorboard=False",
)  # fmt: skip


def test_the_installed_command_trains_and_exports(installed, tmp_path):
    site, run = installed
    tiny.write_model(tmp_path / "model", layers=1)
    tiny.write_pairs(tmp_path / "pairs.jsonl", count=16)
    fpo, changes = site / "bin" / "fpo", (*CHANGES, "model.path=model")
    assert "quickstart" in run(tmp_path, fpo, "--help") and "mesh.fsdp  int, unset" in run(tmp_path, fpo, "config")
    options = [f"--config.{change}" for change in changes]
    run(tmp_path, fpo, "train", "--config", "pythia_hh_pref", "--workdir", "run", *options)
    run(tmp_path, fpo, "export", "--workdir", "run", "--out", "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "llama"


def test_the_python_example_of_the_readme_runs(installed, tmp_path):
    """With a model, data and sizes that fit a test in the place of the recipe's."""
    _, run = installed
    tiny.write_model(tmp_path / "model", layers=1)
    tiny.write_pairs(tmp_path / "pairs.jsonl", count=16)
    (example,) = re.findall(r"```python\n(import fpo_jax\n.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert example.count('"mistral_base", [') == 1
    example = example.replace("mistral_base", "pythia_hh_pref")
    changes = repr([*CHANGES, "model.path=model"])
    run(tmp_path, sys.executable, "-c", re.sub(r"\[.*?\]", lambda _: changes, example, count=1, flags=re.DOTALL))
    assert (tmp_path / "exported" / "model.safetensors").exists()


def question(number):
    return [{"role": "user", "content": f"{number} ab?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


ROWS = {  # what a stranger has, by file
    "pairs.csv": lambda i: {"prompt": f"{i} ab?", "chosen": " cd", "rejected": " e f"},
    "pairs.parquet": lambda i: {"prompt": f"{i} ab?", "chosen": " cd", "rejected": " e f"},
    "pairs.jsonl": lambda i: {"question": f"{i} ab?", "chosen": " cd", "rejected": " e f"},
    "chats.jsonl": lambda i: {"chosen": question(i) + answer(" cd"), "rejected": question(i) + answer(" e f")},
    "demonstrations.jsonl": lambda i: {"messages": question(i) + answer(" cd")},
}
STRANGER = {  # name -> data, more of `fpo init`, more of `fpo train`, and of `fpo export`
    "DPO": ("pairs.csv", "", "", ""),
    "alpha": ("pairs.parquet", "", "loss.name=alpha loss.beta=0.2", "--dtype bfloat16"),
    "chat": ("chats.jsonl", "", "", ""),
    "SFT": ("demonstrations.jsonl", "", "", ""),
    "LoRA": ("pairs.jsonl", "", "lora.rank=2", "--lora adapter"),
    "reward": ("pairs.jsonl", "--stage reward", "", ""),
}


@pytest.mark.sampled(6)  # half a minute each; the first in the default suite
@pytest.mark.parametrize("name", STRANGER)
def test_a_stranger_trains_exports_and_loads_own_data_at_the_first_try(installed, tmp_path, name):
    """With the wheel alone and the commands of the docs; every one ends with 0 at its first call."""
    data, of_init, of_train, of_export = STRANGER[name]
    site, run = installed
    fpo = site / "bin" / "fpo"
    tiny.write_model(tmp_path / "model", layers=1, max_positions=128)
    table = datasets.Dataset.from_list([ROWS[data](i) for i in range(44)])
    {"csv": table.to_csv, "parquet": table.to_parquet, "jsonl": table.to_json}[data.partition(".")[2]](tmp_path / data)

    printed = run(tmp_path, fpo, "init", "--data", data, "--model", "model", "--out", "own.py", *of_init.split())
    command = shlex.split(printed.strip().split("\n")[-1])
    assert command[:2] == ["fpo", "train"] and "⟦" in printed
    few = ("train.max_steps=2", "data.max_length=64", "data.max_prompt_length=32", *of_train.split())
    run(tmp_path, fpo, *command[1:], *(f"--config.{change}" for change in few))
    workdir = tmp_path / command[command.index("--workdir") + 1]
    run(tmp_path, fpo, "report", "--workdir", workdir)
    run(tmp_path, fpo, "export", "--workdir", workdir, "--out", "exported", *of_export.split())
    loads_in_transformers(tmp_path, adapter="adapter" in of_export, rewards=name == "reward")
    if name == "reward":
        texts = [{"prompt": f"{i} ab?", "completions": [" cd"]} for i in range(8)]
        for side, more in (("candidate", {}), ("baseline", {"completions": [" e f"]})):
            lines = "".join(json.dumps(text | more) + "\n" for text in texts)
            (tmp_path / f"{side}.jsonl").write_text(lines)
        run(
            tmp_path, fpo, "winrate", "--candidate", "candidate.jsonl", "--baseline", "baseline.jsonl",
            "--reward-model", "exported", "--out", "judged",
        )  # fmt: skip
        assert json.loads((tmp_path / "judged" / "summary.json").read_text())


def loads_in_transformers(folder, *, adapter, rewards):
    """Read the export as its users do, and compute with it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = transformers.AutoModelForSequenceClassification if rewards else transformers.AutoModelForCausalLM
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "model"), folder / "exported")
    else:
        model = kind.from_pretrained(folder / "exported")
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "exported")("3 ab?", return_tensors="pt")
    with torch.no_grad():
        assert np.isfinite(model(**tokens).logits.float().numpy()).all()

"""What a person reads is true: commands, options, links, metrics, messages and names are those of the code.

Above every block of commands or Python stands what holds for it: `<!-- run -->` (here, in the order of its page),
`<!-- file: NAME -->` (written there, and loaded as a configuration), `<!-- test: FILE -->` (another test runs it), or
`<!-- needs: WHAT -->`. Whatever it is, its `fpo` commands are compared with the programs' options and the fields.
"""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import fpo_jax
from fpo_jax import config as configuration
from fpo_jax import data, losses
from fpo_jax.cli import __main__ as fpo
from fpo_jax.config import fields, overrides
from fpo_jax.io import jsonl
from fpo_jax.perf import profiler
from fpo_jax.trainer import best_checkpoint
from tests import compiling, tiny
from tests.paths import REPO

DOCS = REPO / "docs"
PAGES = sorted([*REPO.glob("*.md"), *DOCS.glob("*.md"), REPO / "kernels" / "README.md"])
READ = [page for page in PAGES if page.name != "CHANGELOG.md"]
MARK = re.compile(r"<!-- (run|file|test|needs)(?:: (.+?))? -->\n```(\w+)\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page):
    return page.relative_to(REPO).as_posix()


def marked(page):
    return [match.groups() for match in MARK.finditer(page.read_text())]


def commands(text):
    """Command lines of a block, without comments, prompts and what a shell adds."""
    joined = text.replace("\\\n", " ")
    for line in joined.split("\n"):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a line of a longer shell text
        if words and words[0].endswith("fpo"):
            yield ["fpo", *words[1:]]
        elif words[:2] == ["python", "train.py"] or words[1:3] == ["python", "train.py"]:
            yield ["fpo", "train", *words[words.index("train.py") + 1 :]]


# --- blocks


@pytest.mark.parametrize("page", READ, ids=name)
def test_every_block_says_what_runs_it(page):
    text = page.read_text()
    blocks, found = BLOCK.findall(text), marked(page)
    assert len(blocks) == len([one for one in found if one[2] in ("bash", "python")]), "a block has no mark above it"
    for kind, what, language, body in found:
        if kind == "test":
            assert (REPO / what.split(",")[0]).exists(), f"{what} is no test"
        elif kind == "needs":
            for path in re.findall(r"tests/[\w/.]+\w", what):
                assert (REPO / path).exists(), f"{path} is no test"
        elif kind == "file":
            assert language == "python" and "def get_config" in body


@functools.cache
def options_of(program):
    """Options that --help of a program names."""
    done = subprocess.run(
        [sys.executable, "-m", "fpo_jax.cli", program, "--help"], cwd=REPO, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.parametrize("page", READ, ids=name)
def test_every_command_has_programs_options_fields_and_recipes_that_exist(page):
    known = set(overrides.recipes())
    for _, body in BLOCK.findall(page.read_text()):
        for _, program, *words in commands(body):
            if program.startswith("--"):
                continue
            assert program in fpo.PROGRAMS, program
            plain = [word.partition("=")[0] for word in words if word.startswith("--") and "." not in word[:9]]
            if plain:
                missing = {word for word in plain if word not in options_of(program)}
                assert not missing, f"fpo {program} has no {missing}"
            changes = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
            recipe = words[words.index("--config") + 1] if "--config" in words else "mistral_base"
            recipe = re.sub(r"^configs/(.*)\.py", r"\1", recipe)
            if program in ("train", "plan"):
                base = recipe if recipe.partition(":")[0] in known else "mistral_base"
                assert base == recipe or recipe.endswith(".py"), f"no recipe {recipe}"
                fpo_jax.load_config(base, changes)


@pytest.mark.parametrize("page", READ, ids=name)
def test_fields_that_a_page_names_exist(page):
    known = {field.name for field in fields.FIELDS}
    sections = {one.partition(".")[0] for one in known if "." in one}
    named = set(re.findall(rf"`(?:--config\.)?((?:{'|'.join(sections)})\.[a-z]\w+)(?:=[^`]*)?`", page.read_text()))
    modules = {one for one in named if (REPO / "fpo_jax" / f"{one.replace('.', '/')}.py").exists()}
    wrong = {one for one in named - known - modules if not one.endswith((".json", ".py", ".yaml"))}
    assert not wrong, wrong


def test_no_page_installs_another_project_of_the_name():
    for page in [*PAGES, *(REPO / "fpo_jax").rglob("*.py"), *(REPO / "eval").rglob("*.py")]:
        assert not re.search(r"install ['\"]?fpo_jax\[", page.read_text()), page


# --- links


def anchors(page):
    """Names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        if page.parent == DOCS:
            assert DOCS in there.parents, f"{target} leaves the site"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def test_the_site_has_every_page_once_and_fetches_nothing():
    text = (REPO / "mkdocs.yml").read_text()
    listed = re.findall(r": (\w[\w-]*\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
    assert "font: false" in text and "http" not in text and "repo_url" not in text
    for line in (DOCS / "site.css").read_text().split("\n"):
        assert "url(" not in line and "@import" not in line
    assert len((REPO / "README.md").read_text().split("\n")) <= 121
    pictures = [path for path in (DOCS / "images").iterdir() if path.suffix == ".png"]
    assert sum(path.stat().st_size for path in pictures) < 400_000
    for picture in pictures:
        assert any(f"images/{picture.name}" in page.read_text() for page in PAGES), f"{picture.name} is in no page"


# --- metrics


def test_every_metric_is_explained(tmp_path):
    text = (DOCS / "metrics.md").read_text()
    explained = set(re.findall(r"`([\w/]+)`", text))
    names = {one.removeprefix("eval_") for one in {*best_checkpoint.DIRECTIONS, *best_checkpoint.UNDIRECTED}}
    architecture = tiny.write_model(tmp_path / "model", layers=1)
    meter = profiler.Meter(architecture, devices=1, peak=1e12)
    rows = data.RowSizes(np.array([8]), np.array([0]), 8, 4, rows=1, length=8, scored=4)
    names |= {*meter.step(rows, seconds=1.0), *meter.overall(), "seconds", "grad_norm", "learning_rate", "spike"}
    assert names <= explained, names - explained


# --- losses


GIVEN = losses.Completions(
    logps_BK=jnp.array([[-10.0, -12.5], [-20.0, -17.0], [-6.0, -9.0]]),
    reference_logps_BK=jnp.array([[-11.0, -11.0], [-19.0, -18.5], [-7.5, -8.0]]),
    lengths_BK=jnp.array([[5.0, 7.0], [9.0, 8.0], [3.0, 4.0]]),
    rewards_BK=jnp.array([[1.0, 0.0]] * 3),
    batch_kl=jnp.zeros(()),
)
LOGPS, REFERENCE, LENGTHS = (
    np.asarray(part, np.float64) for part in (GIVEN.logps_BK, GIVEN.reference_logps_BK, GIVEN.lengths_BK)
)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def margin(scores):
    return scores[:, 0] - scores[:, 1]


RATIOS, RATIO_OF_MEANS = LOGPS - REFERENCE, margin(LOGPS / LENGTHS)
BETA, SMOOTHING = 0.1, 0.1


def exo_pair(epsilon):
    m = BETA * margin(RATIOS)
    q = 1 / (1 + np.exp(-m))
    return q * (log_sigmoid(m) - np.log1p(-epsilon)) + (1 - q) * (log_sigmoid(-m) - np.log(epsilon))


# What the others compute, from their formulas in float64, in the order of the table.
OTHERS = (
    -log_sigmoid(BETA * margin(RATIOS)),
    exo_pair(1e-3),
    -log_sigmoid(BETA * margin(1 - np.exp(-RATIOS))),
    -log_sigmoid(BETA * margin(np.log(2) + log_sigmoid(RATIOS))),
    -log_sigmoid(BETA * margin((np.exp((0.3 - 1) * RATIOS) - 1) / (0.3 - 1))),
    -log_sigmoid(2 * RATIO_OF_MEANS - 1),
    -log_sigmoid(BETA * margin(LOGPS)),
    -log_sigmoid(2 * (RATIO_OF_MEANS - 0.5)),
    np.maximum(0, 1 - 2 * (RATIO_OF_MEANS - 0.5)),
    -(1 - SMOOTHING) * log_sigmoid(BETA * margin(RATIOS)) - SMOOTHING * log_sigmoid(-BETA * margin(RATIOS)),
)


def table_below(page, mark):
    """Rows of the table under a comment, without its head."""
    text = (DOCS / page).read_text().partition(f"<!-- checked: {mark} -->\n")[2]
    rows = text.partition("\n\n")[0].split("\n")[2:]
    assert rows, f"{page} has no table {mark}"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def resolved(text):
    """The loss that `loss.name=NAME loss.OPTION=VALUE ...` names."""
    given = dict(word.removeprefix("loss.").split("=") for word in text.strip("`").split())
    config = fpo_jax.load_config("quickstart", [f"loss.{key}={value}" for key, value in (CLEAN | given).items()])
    return losses.resolve(config.loss.name, **configuration.loss_options(config))


CLEAN = dict.fromkeys(("alpha", "beta_pi", "beta_r"), "None") | {"target": "", "score": ""}


def test_the_losses_of_others_are_what_the_page_says():
    rows = table_below("migrating.md", "losses of others")
    assert len(rows) == len(OTHERS)
    for (there, here), expected in zip(rows, OTHERS, strict=True):
        np.testing.assert_allclose(resolved(here).loss(GIVEN), expected, rtol=1e-5, atol=1e-6, err_msg=there)


def test_the_gradients_at_margin_0_are_what_the_page_says():
    import jax

    even = GIVEN._replace(logps_BK=GIVEN.reference_logps_BK)
    for label, shown in table_below("losses.md", "gradients at margin 0"):
        canonical, _, alpha = label.replace("`", "").partition(", α = ")
        options = {"score": "log_ratio"} if canonical == "exo" else {}
        loss = losses.resolve(canonical, beta_pi=1.0, **({"alpha": float(alpha)} if alpha else {}), **options)
        slope = jax.grad(lambda logps_BK, loss=loss: loss.of_logps(logps_BK, even)[0])(even.logps_BK)[0]
        # Where the labels (1, ε) do not sum to 1 the slopes of both completions still do, to 0.
        assert f"{float(slope[0]):.3f}".replace("-", "−") == shown, label


def test_the_table_of_recipes_is_that_of_the_files():
    listed = {}
    for names, _, _, loss, rate in table_below("recipes.md", "recipes"):
        for recipe in re.findall(r"`(\w+)`", names):
            listed[recipe] = re.findall(r"`([\w-]+)`", loss)[0], re.findall(r"α (\.\d+)", loss), float(rate)
    for recipe in overrides.recipes():
        if recipe.startswith(("pipelines/", "own_")):
            continue
        config = fpo_jax.load_config(recipe)
        alpha = [] if config.loss.alpha is None else [f"{config.loss.alpha:g}".removeprefix("0")]
        assert listed[recipe] == (config.loss.name, alpha, config.optim.learning_rate), recipe


# --- messages and names


@functools.cache
def written():
    """Every text of the code, with … for what is filled in."""

    def parts(node):
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(map(parts, node.values))
        if isinstance(node, ast.BinOp):
            return parts(node.left) + parts(node.right)
        return "…"

    files = [*(REPO / "fpo_jax").rglob("*.py"), *(REPO / "eval").rglob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    texts = {parts(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)}
    return "\n".join(re.sub(r"%[.\w]*[sdfgr]", "…", text) for text in texts)


def test_every_message_of_the_page_is_one_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text().partition("## Start")[2]
    messages = [
        one for cells in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE) for one in re.findall(r"`([^`]+)`", cells)
    ]
    assert len(messages) > 40
    for message in messages:
        pieces = [piece for piece in (part.strip(" '=;:,.()`") for part in message.split("…")) if len(piece) > 3]
        assert pieces and all(piece in written() for piece in pieces), f"the code says nothing like: {message}"


def test_names_of_the_recipes_for_extending_exist():
    text = (DOCS / "extending.md").read_text()
    for path in re.findall(r"`((?:fpo_jax|tests|eval|kernels|configs|docs)/[\w/.]*)`", text):
        assert (REPO / path).exists(), path
    for names, path in re.findall(r"`(\w+)(?:\(\.\.\.\))?` (?:in|of) `(fpo_jax/[\w/]+\.py)`", text):
        assert re.search(rf"^(class |def |)\b{names}\b", (REPO / path).read_text(), re.MULTILINE), (
            f"{path} has no {names}"
        )
    callback = importlib.import_module("fpo_jax.trainer.callbacks").Callback
    for event in re.findall(r"`(on_\w+)`", text):
        assert hasattr(callback, event), event


# --- runs


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Names that the pages use: models/mine, data/*.jsonl, and `fpo` and `python` of this checkout."""
    folder = tmp_path_factory.mktemp("docs")
    tools = folder / "bin"
    tools.mkdir()
    for tool, words in (("fpo", "-m fpo_jax.cli"), ("python", "")):
        (tools / tool).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (tools / tool).chmod(0o755)
    tiny.write_model(folder / "models" / "mine", layers=1, max_positions=1024)
    (folder / "data").mkdir()
    tiny.write_pairs(folder / "data" / "pairs.jsonl", count=64)
    tiny.write_pairs(folder / "data" / "held_out.jsonl", count=8, seed=1)
    jsonl.write(folder / "data" / "prompts.jsonl", [{"prompt": "one: ab?"}, {"prompt": "two: cde?"}])
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    return folder, os.environ | variables | {"XLA_FLAGS": compiling.flags(devices=1), "JAX_PLATFORMS": "cpu"}


RUN = [page for page in READ if any(kind == "run" for kind, *_ in marked(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_blocks_of_a_page_run(page, environment):
    folder, variables = environment
    for kind, what, language, body in marked(page):
        if kind == "file":
            (folder / what).write_text(body)
        elif kind == "run":
            words = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
            done = subprocess.run([*words, body], cwd=folder, env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    if page.name == "quickstart.md":
        explained = set(re.findall(r"`([\w/]+)`", (DOCS / "metrics.md").read_text()))
        for file in ("metrics.jsonl", "timing.jsonl"):
            seen = {key for line in jsonl.read(folder / "runs" / "mine" / file) for key in line}
            missing = {key for key in seen if key.removeprefix("eval_") not in explained}
            assert not missing, f"{file} has {missing}, which docs/metrics.md does not explain"
        assert (folder / "exported" / "model.safetensors").exists()
        assert (folder / "runs" / "mine" / "report" / "report.html").exists()


@pytest.mark.parametrize("page", READ, ids=name)
def test_the_files_of_a_page_are_configurations(page, tmp_path):
    for kind, what, _, body in marked(page):
        if kind == "file":
            (tmp_path / what).write_text(body)
            config = fpo_jax.load_config(str(tmp_path / what))
            configuration.validate(config)
            losses.resolve(config.loss.name, **configuration.loss_options(config))


@pytest.mark.slow
def test_the_notebook_runs(environment):
    cells = json.loads((DOCS / "notebooks" / "python_api.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "the notebook is kept without outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    folder, variables = environment
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'eval_rewards/accuracies':" in done.stdout and "did you mean --config.loss.beta?" in done.stdout


def test_the_python_page_has_the_example_of_the_readme():
    (example,) = re.findall(r"```python\n(import fpo_jax\n.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert example in (DOCS / "python.md").read_text()

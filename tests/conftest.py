"""Eight virtual CPU devices, no network, and shape checks on every function of the package that names some."""

import atexit
import collections
import logging
import os
import shutil
import tempfile

from tests import compiling

# Programs that several tests or their child processes compile are compiled once a session.
_CACHE = tempfile.mkdtemp(prefix="fpo_jax_compiled_")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # of every operation: a twentieth of the time of a lowering

# Flags of yours come last and win.
os.environ["XLA_FLAGS"] = f"{compiling.flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # plans and limits are those of the default
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from tests import shapecheck


def pytest_addoption(parser):
    """`make test-all` sets the first, `make test-quick` the second."""
    parser.addoption("--every-case", action="store_true", help="run also what tests marked `sampled` leave out")
    parser.addoption("--quick", action="store_true", help="run one case of each light test; make test-quick sets it")


def pytest_configure(config):
    """Check shapes; not where faults are injected into what the other tests have checked: there, minutes count."""
    compiling.collect_seldom()
    if config.getoption("markexpr") != "faults":
        shapecheck.install("fpo_jax")


@pytest.fixture(autouse=True)
def forgotten_share():
    """The share of a GPU that a program sets for its process, and a test that runs one here for those after it."""
    yield
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)


@pytest.fixture(autouse=True)
def forgotten_log_handlers():
    """Those that a program adds for its process: the standard error they write to is closed with their test."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [one for one in root.handlers if one not in before]:
        root.removeHandler(handler)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and 24 pairs; modules that train something else have inputs of their own."""
    from tests import tiny  # not before the checks are installed

    root = tmp_path_factory.mktemp("inputs")
    tiny.write_model(root / "model", layers=1)
    tiny.write_pairs(root / "pairs.jsonl", count=24)
    return root


# The files that take longest, first, so that no worker is left with one of them at the end.
LONGEST = (
    "faults_crash", "faults_resume", "faults_numbers", "hosts", "faults_input", "faults_storage", "faults_security",
    "loop", "layouts", "loss_kernel", "trajectory_kernels", "pipeline_recipes", "attention", "head_loss", "plan",
    "loading", "lora", "pallas_tpu", "passes", "pallas_triton", "meshes", "step", "generate", "generate_parity",
    "rewarding", "winrate", "pipeline", "model", "sample", "trajectory", "prompt_format", "packing", "answering",
    "kernels_sharded", "quickstart", "losses_invariances", "server", "golden_losses", "imdb_pipeline", "kernels",
    "overrides", "benchmark_kernels", "losses", "kernel_options", "eight_bits", "nf4", "adapters", "auto_settings",
    "replicas", "fp8", "mixture", "extend",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Order the files, and leave out what needs a large machine unless it is asked for."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.getoption("quick"):
        _keep_quick(config, items)
    elif not config.getoption("every_case"):
        _leave_out(config, items)
    if "large" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("large"):
            item.add_marker(
                pytest.mark.skip(reason="needs 30 GB of disk and 20 GB of memory; ask for it with -m large")
            )


def _leave_out(config, items):
    """Of a test marked `sampled(n)` keep every n-th case."""
    seen, left = collections.Counter(), []
    for item in list(items):
        if mark := item.get_closest_marker("sampled"):
            name = (item.path, item.originalname)
            if seen[name] % mark.args[0]:
                left.append(item)
                items.remove(item)
            seen[name] += 1
    if left:
        config.hook.pytest_deselected(items=left)


# What `make test-quick` takes: of two minutes the most tests. Of the folders PROCESSES, whose tests start processes and
# wait for them, none; of a file of LONGEST, where a test takes ten times as long as elsewhere, so many.
PROCESSES = ("distributed", "reliability")
OF_LONGEST = 1


def _keep_quick(config, items):
    """Keep the first case of each test that is not marked `slow`, of a file of LONGEST the first OF_LONGEST tests."""
    taken, counts, kept, left = set(), collections.Counter(), [], []
    longest = {f"test_{name}" for name in LONGEST}
    for item in items:
        name = (item.path, item.cls, item.originalname)
        heavy = item.path.parent.name in PROCESSES or item.get_closest_marker("slow")
        if heavy or name in taken or (item.path.stem in longest and counts[item.path] == OF_LONGEST):
            left.append(item)
        else:
            kept.append(item)
            taken.add(name)
            counts[item.path] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left)

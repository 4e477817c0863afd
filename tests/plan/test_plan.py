"""Plans for the devices of this machine: memory by hand, the verdict, remedies, and the command."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from fpo_jax import models, plan, sharding
from fpo_jax.models import params
from fpo_jax.perf import flops, hardware
from fpo_jax.plan import compilation, report, roofline, suggestions
from fpo_jax.plan.collectives import Collective
from fpo_jax.trainer import batch_shapes, run_inputs
from tests import tiny
from tests.paths import REPO

GIB = 2**30
REFERENCE_FREE = {"loss__score": "mean_logp", "loss__beta": 2.0, "loss__beta_pi": None}
HELD = hardware.Capacity(4 * GIB, 1e12, 1e11, 1e10, 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory with nothing but config.json, and one with a tokenizer and data beside it."""
    path = tmp_path_factory.mktemp("plan")
    config = tiny.write_model(path / "model")
    tiny.write_pairs(path / "pairs.jsonl", count=24)
    (path / "bare").mkdir()
    (path / "bare" / "config.json").write_text(json.dumps(models.to_hf_config(config)))
    return path


def bare(folder, **changed):
    """A configuration whose data and weights are elsewhere."""
    c = tiny.config(folder / "bare", "hub/name", data__max_length=40, **changed)
    return c


@pytest.fixture(scope="module")
def planned(folder):
    """A run on data x fsdp = 4 x 2, from its data."""
    return plan.run(tiny.config(folder / "model", folder / "pairs.jsonl"), "here", capacity=lambda _: HELD)


@pytest.mark.parametrize("data", ["pairs.jsonl", "absent.jsonl"])
def test_rows_of_shared_prompts_are_planned_with_the_attention_that_they_get(folder, data):
    """Rows above the limit of XLA's attention, whose blocks run in loops of unknown length."""
    config = tiny.config(folder / "model", folder / data, data__layout="shared", data__row_length=512, data__eval="")
    config.reference.batch_per_device = 1
    report = plan.run(config, "here", capacity=lambda _: HELD)
    assert report.fits and report.outcome.operations > 0
    assert report.outcome.sizes.train_step.length == 512
    assert any(choice.startswith("attention: chunked") for choice in report.outcome.choices)
    if data == "pairs.jsonl":  # several groups a row, so that eight rows hold a step, and all 24 groups
        assert "step: 8 groups x 2 in 8 rows of T=512" in report.text and "; 4,096 tokens" in report.text
        assert report.outcome.sizes.scoring_batches == 1


def test_micro_batches_without_groups_cost_nothing(folder):
    """A micro-batch is four rows: four of the twelve steps fill one, the others two."""
    shared = {"data__layout": "shared", "data__row_length": 64, "data__eval": "", "train__epochs": 4.0}
    shared |= {"mesh__data": 1, "mesh__fsdp": 2, "train__micro_batch_per_device": 2}
    one, two = (
        compilation.compile_all(
            tiny.config(folder / "model", folder / "pairs.jsonl", **shared, train__max_steps=steps), jax.devices()[:2]
        )
        for steps in (1, 12)
    )
    assert (one.accumulation, two.accumulation, two.sizes.filled) == (1, 2, 20 / 24)
    assert two.operations == round(one.operations * 20 / 12)
    traffic = [roofline.memory_traffic(outcome) - 2 * outcome.state - outcome.gradients for outcome in (one, two)]
    assert traffic[1] == round(traffic[0] * 20 / 12)
    sent = [roofline.estimate(outcome._replace(collectives=two.collectives), HELD).links for outcome in (one, two)]
    assert sent[1] == sent[0] * two.sizes.filled > 0
    described = report.text("here", two, capacity=None, limit=None, suggestion=None, remedied=None, tried=())
    assert "in 2 micro-batches; 512 tokens in the largest, 83% of them in the mean" in described


def test_state_and_batch_are_what_the_shapes_say(planned):
    outcome, config = planned.outcome, planned.outcome.sizes.blueprint.model_config
    on_device = 0
    for entry in params.entries(config):
        cut = 2 if "D" in entry.letters and entry.axes[entry.letters.index("D")] == "embed" else 1
        on_device += 4 * math.prod(entry.shape) // cut
    assert outcome.parameters == outcome.gradients == on_device
    # two moments; the counters of AdamW, the schedule and the state, and of steps skipped in a entry
    assert outcome.state == 3 * on_device + 4 * 4
    update = outcome.programs[0]
    entries, T, R = 16 // 8, 40, outcome.sizes.train_step.scored
    batch = entries * (T * (4 + 1) + R * (4 + 4 + 1)) + 1 * (2 * 4 + 2 * 4 + 4 + 4)
    assert (update.name, update.arguments, update.beside) == ("step", outcome.state + batch, 0)
    assert update.temporaries > outcome.gradients


def test_the_moments_stay_while_the_evaluation_runs_and_not_while_the_reference_is_scored(planned):
    outcome = planned.outcome
    _, evaluation, reference = outcome.programs
    assert (evaluation.name, evaluation.beside) == ("evaluation", outcome.state - outcome.parameters)
    assert (reference.name, reference.beside) == ("reference pass", 0)


def test_fsdp_communicates_along_its_axis_and_sums_over_both(planned):
    rows = {(row.kind, row.axes) for row in planned.outcome.collectives}
    assert ("all-gather", ("fsdp",)) in rows
    assert rows & {("reduce-scatter", ("fsdp",)), ("all-reduce", ("fsdp",)), ("all-reduce", ("data", "fsdp"))}
    assert all("tensor" not in axes for _, axes in rows)


def test_the_data_are_read_where_they_are(planned, folder):
    found = planned.outcome.sizes
    inputs = run_inputs.prepare(tiny.config(folder / "model", folder / "pairs.jsonl"))
    rows = inputs.train.prepared
    assert found.groups == rows.groups == 24 and found.steps == 3
    assert found.valid.tokens == round(rows.lengths_N.sum() * 8 / 24)
    assert found.train_step.scored == max(8, math.ceil((rows.lengths_N - rows.prompt_lengths_N).max() / 8) * 8)
    assert "measured on the data: 24 groups" in planned.text and "valid tokens" in planned.text


def test_the_text_has_everything(planned):
    text = planned.text
    for part in (
        "plan for here: 8 x cpu; mesh data 4, fsdp 2, tensor 1",
        "step: 8 groups x 2 = 16 rows of T=40",
        "capacity: 3.00 GiB of 4.00 per device",
        "fits: 0.00 GiB, 100% free",
        "collectives of a step",
        "GiB sent per device",
        "recomputation included",
        "if everything overlaps",
        "a step takes about",
        "MFU: padded",
        "the run of 3 steps: about",
        "the reference pass over 24 groups",
        "assumed: the devices share the matrix products evenly",
    ):
        assert part in text, text


def test_one_device_communicates_nothing(folder):
    config = bare(folder, mesh__data=1, mesh__fsdp=1, data__eval="", **REFERENCE_FREE)
    report = plan.run(config, "here", devices=lambda _: jax.devices()[:1], capacity=lambda _: None)
    assert report.fits and report.limit is None
    assert "capacity: unknown" in report.text and "collectives: none" in report.text
    assert [program.name for program in report.outcome.programs] == ["step"]  # no data to evaluate, no reference
    assert "hub/name is not a file here; plan.groups is unset" in report.text


@pytest.mark.slow  # compiles five programs
def test_what_does_not_fit_is_said_with_the_first_remedy_that_does(folder):
    config = bare(
        folder,
        train__micro_batch_per_device=4,
        mesh__data=1,
        mesh__fsdp=2,
        plan__groups=100,
        data__eval="",
        **REFERENCE_FREE,
    )

    def at_most(peak):
        held = HELD._replace(memory=math.ceil(peak / hardware.JAX_SHARE))
        return plan.run(config, "here", devices=lambda _: jax.devices()[:2], capacity=lambda _: held)

    whole = at_most(10**9)
    assert whole.fits and whole.suggestion is None
    half = compilation.compile_all(suggestions.changed(config, {"train.micro_batch_per_device": 2}), jax.devices()[:2])
    assert half.peak < whole.outcome.peak
    report = at_most(half.peak)
    assert not report.fits
    assert report.suggestion == suggestions.Suggestion("here", {"train.micro_batch_per_device": 2})
    assert f"does not fit: step by {(whole.outcome.peak - half.peak) / GIB:.2f} GiB" in report.text
    assert "remedy that fits: --target here --config.train.micro_batch_per_device=2" in report.text


def test_what_cannot_fit_is_said_with_what_was_tried(folder, monkeypatch):
    seen = []

    def refuse(config, devices, **options):
        seen.append((config.train.micro_batch_per_device, config.model.remat, config.optim.offload, len(devices)))
        program = compilation.Program("step", 100, 5 * GIB - 100, 0, 0, 1.0, compiled=False)
        return compilation.Outcome(config, layout, found, 1, [], 1, 1, 1, [program], [], 0, 0, 0, 0, [])

    config = bare(folder, train__micro_batch_per_device=2, train__batch_size=16)
    layout = sharding.make_layout(**config.mesh, devices=jax.devices())
    found = batch_shapes.sizes(config, batch_shapes.read(config), ways=8)
    monkeypatch.setattr(compilation, "compile_all", refuse)
    report = plan.run(config, "h100:4", devices=lambda _: jax.devices(), capacity=lambda _: HELD)
    assert not report.fits and report.suggestion is None
    assert seen[0] == (2, "none", False, 8) and seen[-1] == (1, "none", False, 8)
    assert "does not fit: step by 2.00 GiB" in report.text and "nothing that was tried fits" in report.text
    assert (
        "nor does --target h100:4 --config.train.micro_batch_per_device=1 --config.model.remat=full: 5.00"
        in report.text
    )
    assert "nor does --target h100:4x8" in report.text


def test_remedies_come_in_their_order_and_keep_what_came_before(folder):
    config = bare(folder, train__micro_batch_per_device=4)
    micro, remat = ("train.micro_batch_per_device", "model.remat")
    steps = list(suggestions.ladder(config, "v5e-16", ["step"]))
    assert [(step.target, dict(step.changes)) for step in steps] == [
        ("v5e-16", {micro: 2}),
        ("v5e-16", {micro: 1}),
        ("v5e-16", {micro: 1, remat: "full"}),
        ("v5e-16", {micro: 1, remat: "full", "optim.state_dtype": "bfloat16"}),
        ("v5e-16", {micro: 1, remat: "full", "optim.state_dtype": "bfloat16", "optim.offload": True}),
        ("v5e-32", {micro: 1}),
        ("v5e-64", {micro: 1}),
        ("v5e-128", {micro: 1}),
    ]
    without = [dict(step.changes) for step in suggestions.ladder(config, "h100:4", ["step"], host_memory=False)]
    assert not any("optim.offload" in changes for changes in without)
    evaluation = next(
        suggestions.ladder(suggestions.changed(config, {"train.eval_batch_per_device": 3}), "here", ["evaluation"])
    )
    assert dict(evaluation.changes) == {"train.eval_batch_per_device": 1}
    assert config.train.micro_batch_per_device == 4  # copies are changed


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("h100:4", "h100:8"),
        ("h100:8", "h100:2x8"),
        ("h100:2x8", "h100:4x8"),
        ("v5e-16", "v5e-32"),
        ("v5p-8", "v5p-16"),
        ("v5e-256", "v5e-2x256"),
        ("v5e-2x16", "v5e-4x16"),
        ("v5p-3x8", "v5p-6x8"),
        ("b200:8", "b200:2x8"),
        ("gb200:2", "gb200:4"),
        ("gb200:4", "gb200:2x4"),
        ("gb200:18x4", "gb200:36x4"),
        ("l40s:2x4", "l40s:2x8"),
        ("here", None),
    ],
)
def test_the_next_larger_target(target, more):
    assert hardware.larger(target) == more


def test_every_gpu_and_tpu_has_a_capacity():
    assert {gpu.description for gpu in hardware.GPUS.values()} < set(hardware.CAPACITIES)
    assert all(gpu.memory_bytes == hardware.CAPACITIES[gpu.description].memory for gpu in hardware.GPUS.values())


def test_the_bounds_and_the_prediction_by_hand(planned):
    row = Collective("all-gather", ("fsdp",), 1, 2 * 10**10, 10**10, hidden=4 * 10**9)
    outcome = planned.outcome._replace(operations=8 * 63 * 10**10, collectives=[row], moved=2 * 10**10)
    seconds = roofline.estimate(outcome, HELD)
    assert (seconds.compute, seconds.links) == (0.63, 1.0)
    assert (seconds.products, seconds.kernels, seconds.exposed) == pytest.approx((1.0, 0.2, 0.6))
    assert (seconds.best, seconds.predicted, seconds.most) == pytest.approx((1.0, 1.8, 2.2))
    config = outcome.sizes.blueprint.model_config
    matrices = flops.forward(config, flops.Work(1, 0, 0)) // 2
    traffic = 3 * 4 * matrices + 2 * outcome.gradients  # one micro-batch: forward and two products; float32
    assert roofline.memory_traffic(outcome) == traffic + 2 * outcome.state + outcome.gradients


def test_what_is_hidden_takes_its_time_where_the_work_is_shorter(planned):
    """4 s behind work of 1.2 s, and 1 s behind nothing."""
    row = Collective("all-gather", ("fsdp",), 1, 10**11, 5 * 10**10, hidden=4 * 10**10)
    outcome = planned.outcome._replace(operations=8 * 63 * 10**10, collectives=[row], moved=2 * 10**10)
    seconds = roofline.estimate(outcome, HELD)
    assert (seconds.best, seconds.predicted, seconds.most) == pytest.approx((5.0, 5.0, 6.2))


def test_a_compiled_step_moves_more_than_its_weights_and_moments(planned):
    assert planned.outcome.moved > 2 * planned.outcome.state


def test_a_refusal_of_the_tpu_s_compiler_is_read():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (16.29G) exceeds available HBM (15.75G)."
    )
    match = compilation._TOO_LARGE.search(text)
    assert match.groups() == ("16.29", "G")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__fsdp": 3}, "mesh data=4 fsdp=3 tensor=1 needs 12 devices, 8 are present"),
        (
            {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 8},
            "4 attention heads are not divisible by mesh.tensor=8",
        ),
        ({"train__batch_size": 12}, "train.batch_size=12 is not divisible by .* x 8 devices = 8; use 8 or 16"),
        ({"loss__name": "kl"}, "'kl'"),
        ({"model__path": "nobody/nothing"}, "nobody/nothing is no directory here, and its config.json could not be"),
    ],
)
def test_what_cannot_run_is_an_error_before_anything_is_compiled(folder, changes, message, monkeypatch):
    monkeypatch.setattr(compilation, "_compile", None)
    with pytest.raises(ValueError, match=message):
        plan.run(bare(folder, **changes), "here")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("b300:8", "target 'b300:8' is unknown; use one of v5e-N, .*, h100:N, .*, here"),
        ("v5e-12", "there is no v5e slice of 12; use one of 1, 4, 8"),
        ("v5e-2x12", "there is no v5e slice of 12; use one of 1, 4, 8"),
        ("v5p-x8", "does not say how many slices of 8; write v5p-2x8 for two"),
        ("v5p-0x8", "does not say how many slices of 8; write v5p-2x8 for two"),
        ("h100:many", "does not end in a number of GPUs"),
    ],
)
def test_unknown_targets(folder, target, message):
    with pytest.raises(ValueError, match=message):
        plan.run(bare(folder), target)


@pytest.mark.parametrize(
    ("target", "module", "extra"), [("v5e-16", "libtpu", "tpu"), ("h100:4", "xla_cuda13", "cuda13")]
)
def test_a_missing_compiler_names_what_pip_can_install(folder, target, module, extra, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    hardware.tpu_devices.cache_clear()
    hardware.gpu_devices.cache_clear()
    with pytest.raises(
        ValueError, match=rf"needs its compiler, and .*{module} is not installed; run pip install 'jax\[{extra}\]"
    ):
        plan.run(bare(folder), target)


@pytest.mark.slow  # a fresh interpreter, twice
def test_the_command_prints_a_plan_and_needs_no_workdir(folder):
    command = [
        sys.executable,
        "-m",
        "fpo_jax.cli",
        "plan",
        "--config",
        "quickstart",
        f"--config.model.path={folder / 'bare'}",
    ]
    command += ["--config.model.remat=full", "--config.data.eval=", "--config.train.micro_batch_per_device=4"]
    done = subprocess.run([*command, "--target", "here"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plan for here: " in done.stdout and "remat full" in done.stdout
    done = subprocess.run([*command, "--target", "b300:8"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("h200:N, b200:N, gb200:N, l40s:N, here\n"), done.stderr


STAGES = {
    "sft": {"stage": "sft", "loss__name": "sft", "data__group_size": 1, "data__packing": True},
    "reward": {"stage": "reward", "loss__name": "bradley_terry"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_plan_and_no_reference_pass(folder, stage):
    changed = {"mesh__data": 1, "mesh__fsdp": 1, "loss__alpha": None, "loss__beta_pi": None} | STAGES[stage]
    config = tiny.config(folder / "model", folder / "pairs.jsonl", **changed)
    report = plan.run(config, "here", devices=lambda _: jax.devices()[:1], capacity=lambda _: HELD)
    assert [program.name for program in report.outcome.programs] == ["step", "evaluation"] and report.fits
    K, found = config.data.group_size, report.outcome.sizes
    assert f"step: 8 groups x {K} = {8 * K} rows of T=40" in report.text
    rows = run_inputs.prepare(config).train.prepared
    assert found.groups == rows.groups and (rows.groups < 24) == (stage == "sft"), "packed rows are fewer than texts"
    texts = rows.text_lengths(np.arange(len(rows.lengths_N))).astype(int)
    assert found.valid.pairs == round((texts * (texts + 1) // 2).sum() * 8 / rows.groups), "of texts, not of rows"
    language_model = models.from_hf_config(json.loads((folder / "bare" / "config.json").read_text()))
    count = params.count(found.blueprint.model_config)
    assert (count < params.count(language_model)) == (stage == "reward"), "a score in the place of the LM head"

"""Whether a run keeps its logits: by the data sheet, by what its step leaves free, and as it is told."""

import jax
import pytest

from fpo_jax import sharding
from fpo_jax.perf import hardware
from fpo_jax.trainer import batch_shapes, kept_logits, run_inputs, run_schedule
from tests import tiny

GIB = 2**30


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    tiny.write_model(folder)
    tiny.write_pairs(folder / "pairs.jsonl", count=40)
    return folder


def settled(root, *, memory: float | None = GIB, flops=1e12, bandwidth=1e12, **changed):
    """The forward function of train steps, and what was said of the logits, on two devices with such a data sheet."""
    config = tiny.config(root, root / "pairs.jsonl", mesh__data=1, kernel__workspace_mib=1, **changed)
    inputs = run_inputs.prepare(config)
    layout = sharding.make_layout(**config.mesh, devices=jax.devices()[:2])
    plan = run_schedule.build(config, inputs, devices=layout.data_parallel_degree)
    made = kept_logits.steps_of(
        config,
        run_schedule.blueprint(config, inputs, plan),
        layout,
        largest=batch_shapes.largest(plan.schedule, plan.steps),
        accumulation=plan.accumulation,
        capacity=None if memory is None else hardware.Capacity(int(memory), flops, bandwidth, 1e9, 1e9),
    )
    return made.forward_fn, [line for line in made.choices if line.startswith("logits: ")]


def test_kept_where_it_is_faster_and_fits(root):
    forward_fn, said = settled(root)
    (line,) = said
    assert line.startswith("logits: kept for the backward pass, ") and forward_fn.kept_bytes > 0


@pytest.mark.parametrize(
    ("sheet", "reason"),
    [
        ({"flops": 1e15}, "keeping them pays from a width of 8,000 on here, and the model's is "),
        ({"memory": 2**20}, " MiB are free beside the step"),
    ],
    ids=str,
)
def test_computed_again_where_not_and_the_reason_is_said(root, sheet, reason):
    forward_fn, (line,) = settled(root, **sheet)
    assert line.startswith("logits: computed again in the backward pass; ") and reason in line
    assert not forward_fn.kept_bytes


@pytest.mark.parametrize(
    ("changed", "kept_bytes"),
    [
        ({"kernel__kept_logits_mib": 0}, 0),
        ({"kernel__kept_logits_mib": 3}, 3 * 2**20),
        ({"memory": None}, None),  # a device without a data sheet
        ({"lora__rank": 2}, None),  # a frozen head needs as few products without
    ],
    ids=str,
)
def test_nothing_is_decided_where_it_is_told_or_cannot_be_known(root, changed, kept_bytes):
    forward_fn, said = settled(root, **changed)
    assert said == [] and forward_fn.kept_bytes == kept_bytes

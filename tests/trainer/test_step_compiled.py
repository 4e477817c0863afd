"""The training step, with the head that `select` picks, compiled for devices that are not here."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plans
from fpo_jax import logprobs, losses, models, sharding, types
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from fpo_jax.perf import hardware
from fpo_jax.plan import hlo
from fpo_jax.trainer import batch_shapes, kept_logits, steps, train_step
from tests import batches

pytestmark = pytest.mark.deviceless


@pytest.mark.parametrize(
    ("target", "sizes", "kernel"),
    [
        ("v5e-4", (1, 1, 1), "token_stats"),
        ("v5e-4", (4, 1, 1), "token_stats"),
        ("v5e-4", (1, 4, 1), "token_stats"),
        ("v5e-4", (1, 2, 2), "token_stats"),
        ("h100:4", (1, 1, 1), "mosaic_gpu"),
        ("h100:4", (1, 4, 1), "mosaic_gpu"),
        ("h100:4", (1, 2, 2), "mosaic_gpu"),
    ],
    ids=str,
)
def test_the_training_step_runs_the_kernel_by_default(target, sizes, kernel):
    compiler = "libtpu" if target == "v5e-4" else "jax_cuda13_plugin"
    pytest.importorskip(compiler, reason=f"the compiler for {target} is not installed (make test-deviceless)")
    devices = list(hardware.mesh(target).devices.flat)[: np.prod(sizes)]
    mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=devices)
    config = models.ModelConfig(
        family="llama", vocab_size=512, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=256, max_positions=64
    )
    loss, rows = losses.resolve("jspo-pref"), 16 * mesh.size
    head = {"target": logprobs.Target.of(devices[0]), "dtype": "bfloat16", "head_dtype": "float32"}
    shapes_ = logprobs.HeadShapes(rows * 29, config.width, config.vocab_size)
    choice = logprobs.select(**head, shapes=shapes_, placement=sharding.Layout(mesh).head)
    assert choice.implementation == ("pallas_tpu" if target == "v5e-4" else "pallas_gpu") and not choice.interpret
    forward_fn = batches.forward_fn(
        config,
        compute_dtype="bfloat16",
        implementation=choice.implementation,
        fuse_loss=choice.fuse_loss,
        layout=sharding.Layout(mesh),
    )
    rate = adamw.schedule(kind="constant", peak=1e-3, warmup=0, total_steps=9)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0, decay_mask=params.decay_mask(config)
    )
    weights = params.abstract(config, "float32")
    places = params.shardings(config, mesh=mesh)
    alone = sharding.replicated(mesh)

    def put(tree, place):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    weights = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), weights, places)
    moments = put(jax.eval_shape(optimizer.init, weights), alone)
    state = types.TrainState(weights, moments, jax.ShapeDtypeStruct((), jnp.int32, sharding=alone))
    batch = batches.random_batch(groups=rows // 2, completions=2, length=32, vocab=512)
    batch = put(train_step.stack_micro_batches(batch, accumulation=2), sharding.batch_sharding(mesh, stacked=True))
    update = functools.partial(train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate)
    text = hardware.compile_for(update, state, batch).as_text()
    assert kernel in text and "group_loss" in text


def traced_step(recipe, target, folder, changes):
    """Return the traced step of a recipe, at micro-batches of two, and its mesh."""
    compiler = "libtpu" if "-" in target else "jax_cuda13_plugin"
    pytest.importorskip(compiler, reason=f"the compiler for {target} is not installed (make test-deviceless)")
    config = importlib.import_module(f"fpo_jax.configs.{recipe}").get_config()
    described = json.dumps(models.to_hf_config(plans.MODELS[plans.RECIPES[recipe]]))
    folder.joinpath("config.json").write_text(described)
    changes = {**changes, "model.path": str(folder), "plan.groups": 1000, "train.micro_batch_per_device": 2}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    mesh = sharding.make_layout(**config.mesh, devices=hardware.all_devices(target))
    found = batch_shapes.sizes(config, batch_shapes.read(config), ways=mesh.data_parallel_degree)
    made = steps.build(config, found.blueprint, mesh)
    per_device = config.train.micro_batch_per_device
    batch = kept_logits.abstract_batch(made, config, found.train_step, per_device, accumulation=found.accumulation)
    return kept_logits.traced(made.train, made.state.abstract(), batch), made.mesh


TENSOR = {"mesh.fsdp": 1, "mesh.tensor": 8}


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize(("target", "changes"), [("h100:8", {}), ("v5p-8", {}), ("v6e-8", TENSOR)], ids=str)
@pytest.mark.parametrize("recipe", ["llama3_base", "pythia_hh_rw"])
def test_the_update_of_a_recipe_holds_the_loss_kernel(recipe, target, changes, layout, tmp_path):
    update, _ = traced_step(recipe, target, tmp_path, changes | {"data.layout": layout, "model.remat": "full"})
    platform = "cuda" if target.startswith("h") else "tpu"
    text = update.lower(lowering_platforms=(platform,)).as_text()
    assert "group_loss" in text and ("mosaic_gpu" if platform == "cuda" else "token_stats") in text


@pytest.mark.parametrize("target", ["h100:8", "b200:8"])
def test_the_layers_multiply_8_bit_numbers_and_gather_them(target, tmp_path):
    changes = {"data.layout": "shared", "model.remat": "dots", "model.matmul_dtype": "fp8"}
    update, mesh = traced_step("llama3_base", target, tmp_path, changes)
    computations, _ = hlo.parse(hardware.compile_traced(update, mesh).as_text())
    instructions = [
        (instruction, computation)
        for computation in computations.values()
        for instruction in computation.instructions.values()
    ]
    products = [
        sorted(computation.instructions[name].result.split("[")[0] for name in instruction.operands)
        for instruction, computation in instructions
        if instruction.opcode == "dot"
    ]
    matrices = 7  # of a layer
    assert products.count(["f8e4m3fn", "f8e4m3fn"]) == matrices
    assert products.count(["f8e4m3fn", "f8e5m2"]) == 2 * matrices
    gathered = [instruction.result for instruction, _ in instructions if instruction.opcode == "all-gather-start"]
    assert sum("f8e4m3fn" in result for result in gathered) >= 2  # forward and backward, one or several at once

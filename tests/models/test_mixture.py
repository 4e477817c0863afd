"""Mixtures of experts: grouped products against every expert by itself, the router's loss, meshes, counts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import losses, models, sharding, types
from fpo_jax.kernels.experts import grouped_product
from fpo_jax.models import mixture, params, routing
from fpo_jax.optimizer import adamw
from fpo_jax.perf import flops
from fpo_jax.trainer import forward, run_inputs, train_step
from tests import batches, tiny, tolerances
from tests.models import test_dropout, test_model

N, T, D, F, E, U = 3, 7, 6, 10, 5, 2
MIXTRAL = models.from_hf_config(
    test_model.MIXTRAL | {"hidden_size": 16, "num_local_experts": 4, "vocab_size": 24, "initializer_range": 0.3}
)
GPT_OSS = models.from_hf_config(
    test_model.GPT_OSS | {"hidden_size": 16, "num_local_experts": 4, "vocab_size": 24, "initializer_range": 0.3}
)
GPT_OSS = dataclasses.replace(GPT_OSS, layers=1)
DEEPSEEK = models.from_hf_config(
    test_model.DEEPSEEK_V2
    | {"hidden_size": 16, "n_routed_experts": 4, "vocab_size": 24, "initializer_range": 0.3, "intermediate_size": 24}
)


def drawn(seed=0):
    """Tokens, their experts and weights, and the experts' matrices; one expert has no token."""
    random = np.random.default_rng(seed)
    chosen_NTU = np.argsort(random.normal(size=(N, T, E - 1)), axis=-1)[..., :U].astype(np.int32)
    shapes = ((N, T, D), (N, T, U), (E, D, F), (E, D, F), (E, F, D))
    x, weights, *matrices = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    return x, jnp.asarray(chosen_NTU), weights, *matrices


def one_by_one(x_NTD, chosen_NTU, weights_NTU, gate_EDF, up_EDF, down_EFD):
    """Every expert on every token, then the chosen ones."""
    gate, up = (jnp.einsum("NTD,EDF->NTEF", x_NTD, matrix) for matrix in (gate_EDF, up_EDF))
    out_NTED = jnp.einsum("NTEF,EFD->NTED", jax.nn.silu(gate) * up, down_EFD)
    weights_NTE = jnp.einsum("NTUE,NTU->NTE", jax.nn.one_hot(chosen_NTU, E), weights_NTU)
    return jnp.einsum("NTED,NTE->NTD", out_NTED, weights_NTE)


def test_grouped_experts_are_those_one_by_one_with_their_gradients():
    x, chosen, *floats = drawn()

    def run(x, chosen, weights, gate, up, down):
        return mixture.apply_experts(
            x, chosen, weights, (mixture.Linear(gate), mixture.Linear(up)), mixture.Linear(down), activation="silu",
            layout=sharding.ONE_DEVICE,
        )  # fmt: skip

    def total(apply, x, *floats):
        return jnp.sum(jnp.sin(apply(x, chosen, *floats)))

    assert_allclose(run(x, chosen, *floats), one_by_one(x, chosen, *floats), rtol=0, atol=tolerances.SAME_MATHS)
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, apply), argnums=(0, 1, 2, 3, 4)))(x, *floats)
        for apply in (run, one_by_one)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        assert_allclose(ours, theirs, rtol=0, atol=tolerances.SAME_MATHS * np.abs(theirs).max())


def test_experts_in_the_kernel_are_those_in_xla_on_one_device_and_on_a_mesh(monkeypatch):
    random = np.random.default_rng(0)
    shapes = ((4, 3, 16), (4, 3, U), (E, 16, 32), (E, 16, 32), (E, 32, 16))
    x, weights, gate, up, down = (jnp.asarray(0.3 * random.normal(size=shape), jnp.float32) for shape in shapes)
    chosen = jnp.asarray(np.argsort(random.normal(size=(4, 3, E)), axis=-1)[..., :U].astype(np.int32))

    def total(layout, x, weights, gate, up, down):
        inwards = (mixture.Linear(gate), mixture.Linear(up))
        return jnp.sum(
            jnp.sin(
                mixture.apply_experts(
                    x, chosen, weights, inwards, mixture.Linear(down), activation="silu", layout=layout
                )
            )
        )

    def run(layout):
        gradients = jax.jit(jax.value_and_grad(functools.partial(total, layout), argnums=(0, 1, 2, 3, 4)))
        return jax.tree.leaves(gradients(x, weights, gate, up, down))

    mesh = sharding.make_layout(preset="fsdp", data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    expected = run(sharding.ONE_DEVICE)
    emulated = functools.partial(grouped_product.grouped_product, interpret=True)
    monkeypatch.setattr(grouped_product, "select", lambda *_: "triton")
    monkeypatch.setattr(grouped_product, "grouped_product", emulated)
    for layout in (sharding.ONE_DEVICE, mesh):
        for ours, theirs in zip(run(layout), expected, strict=True):
            assert_allclose(ours, theirs, rtol=0, atol=tolerances.SAME_MATHS * np.abs(theirs).max())


def test_biases_and_one_matrix_of_gate_and_up_are_those_of_experts_one_by_one_with_their_gradients():
    """And the clamped gating, whose bounds some of the values pass."""
    x, chosen, weights, gate, up, down = drawn()
    random = np.random.default_rng(1)
    both_ED2F = 3 * jnp.stack([gate, up], axis=2)
    bias_E2F, bias_ED = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((E, 2, F), (E, D)))

    def grouped(x, weights, both_ED2F, down, bias_E2F, bias_ED):
        inwards = (mixture.Linear(both_ED2F, bias_E2F),)
        return mixture.apply_experts(
            x, chosen, weights, inwards, mixture.Linear(down, bias_ED), activation="clamped_swiglu",
            layout=sharding.ONE_DEVICE,
        )  # fmt: skip

    def dense(x, weights, both_ED2F, down, bias_E2F, bias_ED):
        gate_up = jnp.einsum("NTD,EDSF->NTESF", x, both_ED2F) + bias_E2F
        gate, up = jnp.where(gate_up[..., 0, :] > 7, 7, gate_up[..., 0, :]), jnp.clip(gate_up[..., 1, :], -7, 7)
        hidden = (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))
        out_NTED = jnp.einsum("NTEF,EFD->NTED", hidden, down) + bias_ED
        return jnp.einsum("NTED,NTUE,NTU->NTD", out_NTED, jax.nn.one_hot(chosen, E), weights)

    operands = (x, weights, both_ED2F, down, bias_E2F, bias_ED)
    gate_up = jnp.einsum("NTD,EDSF->NTESF", x, both_ED2F) + bias_E2F
    assert gate_up.max() > 7 and gate_up.min() < -7
    scale = np.abs(dense(*operands)).max()
    assert_allclose(grouped(*operands), dense(*operands), rtol=0, atol=tolerances.SAME_MATHS * scale)
    found, expected = (
        jax.jit(jax.grad(lambda *given, run=run: jnp.sum(jnp.sin(run(*given) / scale)), argnums=tuple(range(6))))(
            *operands
        )
        for run in (grouped, dense)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.01
        assert_allclose(ours, theirs, rtol=0, atol=tolerances.SAME_MATHS * np.abs(theirs).max())


def test_no_array_has_tokens_and_experts_and_width():
    jaxpr = test_model.gradient_jaxpr(models.from_hf_config(test_model.QWEN3_MOE | {"num_experts": 11}))
    shapes = {out.aval.shape for equation in test_model.equations(jaxpr) for out in equation.outvars}
    tokens = 3 * test_model.T
    assert any(tokens * 2 in shape for shape in shapes)  # tokens with their two experts
    assert not [shape for shape in shapes if 11 in shape and math.prod(shape) >= tokens * 11 * 16]


def test_operations_of_a_mixture_are_those_of_a_tokens_own_experts():
    config = dataclasses.replace(MIXTRAL, vocab_size=24)
    dense = dataclasses.replace(config, family="mistral", experts=0, experts_per_token=0, router_aux_weight=0.0)
    expert = 3 * config.width * config.ffn
    router = config.width * config.experts
    assert flops.layer_weights(config) == flops.layer_weights(dense) + config.layers * (expert + router)
    assert params.count(config) == params.count(dense) + config.layers * (3 * expert + router)
    assert params.active(config) == params.count(dense) + config.layers * (expert + router)
    with jax.default_matmul_precision("default"):
        traced = [flops.traced(test_model.gradient_jaxpr(one)) for one in (config, dense)]
    assert traced[0] - traced[1] == 3 * 2 * 3 * test_model.T * config.layers * (expert + router)


def test_operations_and_active_parameters_of_gpt_oss_by_hand():
    """Biases and sinks are no products; a token meets its own experts' biases alone."""
    D, F, E, U, H, G, C = (
        getattr(GPT_OSS, name)
        for name in ("width", "ffn", "experts", "experts_per_token", "heads", "kv_heads", "head_dim")
    )
    attention, router, expert = D * C * (2 * H + 2 * G), D * E, 3 * D * F
    assert flops.layer_weights(GPT_OSS) == attention + router + U * expert
    biases = C * (H + 2 * G) + D + E
    others = attention + router + biases + H + 2 * D + D + 2 * GPT_OSS.vocab_size * D
    assert params.count(GPT_OSS) == others + E * (expert + 2 * F + D)
    assert params.active(GPT_OSS) == others + U * (expert + 2 * F + D)
    one, two = (dataclasses.replace(GPT_OSS, experts_per_token=count) for count in (1, 2))
    with jax.default_matmul_precision("default"):
        traced = [flops.traced(test_model.gradient_jaxpr(config)) for config in (one, two)]
    assert traced[1] - traced[0] == 3 * 2 * 3 * test_model.T * expert


def test_operations_and_active_parameters_of_deepseek_by_hand():
    """Layers of two kinds, latent attention, whose values are padded in the product that is traced."""
    D, H, C, P, M, Z, F, E, U, S, V = (
        getattr(DEEPSEEK, name)
        for name in (
            "width", "heads", "head_dim", "rope_dim", "value_dim", "kv_rank", "ffn", "experts", "experts_per_token",
            "shared_ffn", "vocab_size",
        )
    )  # fmt: skip
    attention = D * H * C + D * (Z + P) + Z * H * (C - P + M) + H * M * D
    dense, shared, expert = 3 * D * DEEPSEEK.dense_ffn, 3 * D * S, 3 * D * F
    layers = 3 * attention + dense + 2 * (D * E + shared)
    norms = 3 * (Z + 2 * D) + D
    assert flops.layer_weights(DEEPSEEK) == layers + 2 * U * expert
    assert params.count(DEEPSEEK) == layers + norms + 2 * V * D + 2 * E * expert
    assert params.active(DEEPSEEK) == layers + norms + 2 * V * D + 2 * U * expert
    work = flops.work([5], [0], sliding_window=None)
    assert flops.forward(DEEPSEEK, work) == 2 * flops.layer_weights(DEEPSEEK) * 5 + 2 * 3 * H * (C + M) * 15
    one, two = (dataclasses.replace(DEEPSEEK, experts_per_token=count) for count in (1, 2))
    with jax.default_matmul_precision("default"):
        traced = [flops.traced(test_model.gradient_jaxpr(config)) for config in (one, two)]
    assert traced[1] - traced[0] == 2 * 3 * 2 * 3 * test_model.T * expert


def test_experts_outside_of_the_best_groups_have_no_score():
    scores_NTE = jnp.array([[[0.1, 0.3, 0.05, 0.2, 0.25, 0.1]]])
    found = routing.within_groups(scores_NTE, groups=3, kept=2)
    np.testing.assert_array_equal(found, jnp.array([[[0.1, 0.3, 0, 0, 0.25, 0.1]]]))


# --- the load-balancing loss


@pytest.mark.sampled(4)
@pytest.mark.parity
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_load_balancing_loss_and_its_gradients_equal_transformers(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    config = models.from_hf_config(test_model.VARIANTS[name])
    tree = test_model.random_params(config)
    twin = test_model.torch_twin(tmp_path, test_model.VARIANTS[name], tree, config)
    tokens, valid = torch.tensor(test_model.TOKENS_NT), torch.tensor(test_model.VALID_NT)
    expected = twin(input_ids=tokens, attention_mask=valid.long(), use_cache=False, output_router_logits=True).aux_loss
    expected.backward()

    def balancing(tree):
        _, routes = models.hidden_states_and_routing(
            tree, jnp.asarray(test_model.TOKENS_NT), jnp.asarray(test_model.VALID_NT), config=config,
            compute_dtype="float32", remat="full",
        )  # fmt: skip
        return routing.balancing_loss(routes)

    value, grads = jax.jit(jax.value_and_grad(balancing), compiler_options=test_model.QUICK)(tree)
    assert_allclose(value, expected.item(), rtol=tolerances.PARITY_GRADIENT)
    assert value > config.experts_per_token
    theirs = {key: p.grad.numpy() for key, p in twin.named_parameters() if p.grad is not None}
    theirs = test_model.one_by_one(theirs, config)
    flat = params.flatten(grads)
    paths = ["layers/mlp/router", "layers/attention/query", "layers/mlp_norm/scale"]
    for path in paths + ["layers/attention/sinks", "layers/mlp/router_bias"] * config.of_family.sinks:
        entry = next(entry for entry in params.entries(config) if entry.path == path)
        for hf_name, place in entry.tensors():
            wanted = params.from_hf(entry, theirs[hf_name])
            scale = np.abs(wanted).max()
            assert scale > 0
            assert_allclose(flat[path][place] / scale, wanted / scale, rtol=0, atol=tolerances.PARITY_GRADIENT)


def test_the_z_loss_and_its_gradients_equal_torch(tmp_path):
    """ST-MoE (arXiv 2202.08906), eq. 5, on the logits of torch's routers; padding counts nowhere."""
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    config = models.from_hf_config(test_model.MIXTRAL)
    tree = test_model.random_params(config)
    twin = test_model.torch_twin(tmp_path, test_model.MIXTRAL, tree, config)
    logits = []
    for layer in twin.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda gate, given, _: logits.append(given[0].reshape(-1, config.width) @ gate.weight.T)
        )
    tokens, valid = torch.tensor(test_model.TOKENS_NT), torch.tensor(test_model.VALID_NT)
    twin(input_ids=tokens, attention_mask=valid.long(), use_cache=False)
    assert len(logits) == config.layers
    expected = torch.stack([torch.logsumexp(x, dim=-1)[valid.reshape(-1)].square().mean() for x in logits]).mean()
    expected.backward()

    def z_loss(tree):
        _, routes = models.hidden_states_and_routing(
            tree, jnp.asarray(test_model.TOKENS_NT), jnp.asarray(test_model.VALID_NT), config=config,
            compute_dtype="float32", remat="full",
        )  # fmt: skip
        return routing.z_loss(routes)

    value, grads = jax.jit(jax.value_and_grad(z_loss), compiler_options=test_model.QUICK)(tree)
    assert_allclose(value, expected.item(), rtol=tolerances.PARITY_GRADIENT)
    theirs = {key: p.grad.numpy() for key, p in twin.named_parameters() if p.grad is not None}
    theirs, flat = test_model.one_by_one(theirs, config), params.flatten(grads)
    for entry in params.entries(config):
        if entry.path in ("layers/mlp/router", "layers/attention/query", "layers/mlp_norm/scale"):
            for hf_name, place in entry.tensors():
                wanted = params.from_hf(entry, theirs[hf_name])
                scale = np.abs(wanted).max()
                assert scale > 0
                assert_allclose(
                    flat[entry.path][place] / scale, wanted / scale, rtol=0, atol=tolerances.PARITY_GRADIENT
                )


def test_the_metrics_of_the_router_by_hand():
    """Two tokens that count and one that does not; a layer that sends all to one expert, and one that spreads them."""
    recorders = [routing.Recorder(), routing.Recorder()]
    even = np.full((1, 3, 4), 0.25, np.float32)
    sure = np.array([[[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]], np.float32)
    valid = jnp.array([[True, True, False]])
    recorders[0].record(jnp.asarray(100 * sure), jnp.array([[[0], [0], [3]]]), valid)
    recorders[1].record(jnp.asarray(even - 0.25), jnp.array([[[1], [2], [3]]]), valid)
    whole = jax.tree.map(lambda *layers: jnp.stack(layers), *(one.found for one in recorders))
    found = {name: float(total / count) for name, (total, count) in routing.metrics(whole).items()}
    assert found["router/busiest_expert"] == 0.75
    assert_allclose(found["router/entropy"], math.log(4) / 2, rtol=1e-6)
    assert "router/z_loss" not in found
    total, count = routing.metrics(whole, z_weight=0.1)["router/z_loss"]
    assert_allclose(total / count, (100**2 + math.log(4) ** 2) / 2, rtol=1e-6)
    # shares 1/2, 1/4, 1/4, 0 and mean probabilities 5/8, 1/8, 1/8, 1/8
    assert_allclose(found["router/balancing_loss"], 4 * (5 / 16 + 1 / 32 + 1 / 32), rtol=1e-6)


# --- the step


def stepped(
    batch, *, config=MIXTRAL, accumulation=1, mesh=None, layout=sharding.ONE_DEVICE, weight=0.5, z=0.01, steps=2
):
    """Steps of DPO from fixed weights: parameters and metrics."""
    weights, loss = params.init(config, jax.random.key(0), "float32"), losses.resolve("dpo")
    rate = adamw.schedule(kind="constant", peak=1e-2, warmup=0, total_steps=9)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.0, clip_norm=1.0, decay_mask=params.decay_mask(config)
    )
    forward_fn = batches.forward_fn(config, layout=layout, router_aux_weight=weight, router_z_weight=z)
    replicas = None
    if mesh is not None and mesh.shape["data"] > 1 and mesh.shape["tensor"] == 1:
        specs = jax.tree.map(lambda place: place.spec, params.shardings(config, mesh=mesh))
        within = dataclasses.replace(layout, within_replica=True)
        replicas = train_step.Replicas(
            mesh,
            dataclasses.replace(forward_fn, layout=within),
            lambda grads: jax.lax.with_sharding_constraint(grads, specs),
        )
    update = functools.partial(
        train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate, replicas=replicas
    )
    state = types.TrainState(weights, optimizer.init(weights), jnp.int32(0))
    jitted = jax.jit(update, compiler_options=test_model.QUICK)
    if mesh is not None:
        places = params.shardings(config, mesh=mesh)
        moments = jax.tree.map(lambda _: sharding.replicated(mesh), state.opt_state)
        jitted = train_step.jit_train_step(
            update, mesh=mesh, state_shardings=types.TrainState(places, moments, sharding.replicated(mesh))
        )
    found = []
    for _ in range(steps):
        state, pairs = jitted(state, train_step.stack_micro_batches(batch, accumulation=accumulation))
        found.append({name: float(total) / float(count) for name, (total, count) in pairs.items() if float(count)})
    return jax.device_get(state.params), found


def batch_of(groups=8):
    batch = batches.random_batch(groups=groups, completions=2, length=13, vocab=24, seed=0)
    noise = np.random.default_rng(0).normal(size=batch.rewards_BK.shape)
    return batch._replace(reference_logps_BK=(-20.0 + noise).astype(np.float32))


def test_the_objective_has_the_loss_with_its_weight_and_the_mean_of_the_micro_batches():
    batch = batch_of(4)
    (_, (with_it,)), (_, (without,)) = (stepped(batch, weight=weight, z=0, steps=1) for weight in (0.5, 0.0))
    assert_allclose(with_it["loss"] - without["loss"], 0.5 * with_it["router/balancing_loss"], rtol=1e-5)
    assert with_it["router/balancing_loss"] == without["router/balancing_loss"] > 1
    assert with_it["grad_norm"] != without["grad_norm"]
    halves = [jax.tree.map(lambda x: x[: len(x) // 2], batch), jax.tree.map(lambda x: x[len(x) // 2 :], batch)]
    weights = params.init(MIXTRAL, jax.random.key(0), "float32")
    run = jax.jit(
        functools.partial(models.hidden_states_and_routing, config=MIXTRAL, compute_dtype="float32"),
        compiler_options=test_model.QUICK,
    )
    each = [float(routing.balancing_loss(run(weights, half.tokens_NT, half.valid_NT)[1])) for half in halves]
    tokens = [half.valid_NT.sum() for half in halves]
    (_, (both,)) = stepped(batch, accumulation=2, z=0, steps=1)
    assert_allclose(both["router/balancing_loss"], np.average(each, weights=tokens), rtol=1e-5)
    assert_allclose(both["loss"] - without["loss"], 0.5 * both["router/balancing_loss"], rtol=1e-5)
    (_, (of_z,)) = stepped(batch, accumulation=2, weight=0.0, z=0.1, steps=1)
    each = [float(routing.z_loss(run(weights, half.tokens_NT, half.valid_NT)[1])) for half in halves]
    assert_allclose(of_z["router/z_loss"], np.average(each, weights=tokens), rtol=1e-5)
    assert_allclose(of_z["loss"] - without["loss"], 0.1 * of_z["router/z_loss"], rtol=1e-5)
    assert "router/z_loss" not in without and "router/z_loss" not in both


@pytest.mark.sampled(2)
@pytest.mark.slow  # compiles for eight virtual devices
@pytest.mark.parametrize(
    ("config", "steps", "sizes"),
    [
        (MIXTRAL, 2, (2, 2, 1, 2)),
        (MIXTRAL, 2, (2, 4, 1, 1)),
        (GPT_OSS, 2, (2, 2, 1, 2)),
        (MIXTRAL, 2, (1, 8, 1, 1)),
        (MIXTRAL, 20, (1, 2, 4, 1)),
        (MIXTRAL, 2, (2, 2, 2, 1)),
        (GPT_OSS, 2, (1, 2, 2, 2)),
        (DEEPSEEK, 2, (2, 2, 1, 2)),
        (DEEPSEEK, 2, (1, 2, 2, 2)),
    ],
    ids=[
        "data, fsdp, tensor",
        "replicas",
        "gpt_oss",
        "fsdp",
        "experts",
        "replicas, experts",
        "gpt_oss, experts",
        "deepseek_v2",
        "deepseek_v2, experts",
    ],
)
def test_any_mesh_gives_the_same_steps(config, steps, sizes):
    axes = dict(zip(sharding.MESH_AXES, sizes, strict=True))
    mesh = sharding.make_mesh(**axes, devices=jax.devices())
    alone, numbers = stepped(batch_of(), config=config, steps=steps)
    found, theirs = stepped(batch_of(), config=config, steps=steps, mesh=mesh, layout=sharding.Layout(mesh))
    for one, other in zip(numbers, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_allclose(other[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: assert_allclose(b, a, rtol=0, atol=1e-5), alone, found)


# --- what a run says and refuses


@pytest.mark.parametrize(
    ("given", "published", "weight", "said"),
    [
        (None, {"output_router_logits": True}, 0.02, r"weight 0\.02, config\.json's router_aux_loss_coef"),
        (None, {}, 0.0, r"no load-balancing loss, .*; model\.router_aux_weight=0\.02 adds it"),
        (0.1, {}, 0.1, r"weight 0\.1, by model\.router_aux_weight"),
        (0.0, {"output_router_logits": True}, 0.0, r"weight 0, by model\.router_aux_weight"),
    ],
)
def test_the_weight_is_settled_and_said(tmp_path, given, published, weight, said):
    config = models.from_hf_config(test_model.MIXTRAL | published)
    run = tiny.config(tmp_path, tmp_path / "pairs.jsonl", model__router_aux_weight=given)
    experts = params.adapter(config, rank=2, alpha=4.0, dropout=0.0, modules="experts")
    plain = params.adapter(config, rank=2, alpha=4.0, dropout=0.0, modules="all-linear")
    found, lines = forward.router_weights(run, config, adapter=plain)
    assert found == {"router_aux_weight": weight, "router_z_weight": 0.0}
    with pytest.raises(AssertionError, match=said):  # one line of them
        raise AssertionError("\n".join(lines))
    assert "the router and the experts have none" in lines[1]
    assert "the router has none" in forward.router_weights(run, config, adapter=experts)[1][1]


@pytest.mark.parametrize(
    ("given", "published", "weight", "said"),
    [
        (None, {}, 0.0, None),
        (
            None,
            {"router_z_loss_coef": 0.001},
            0.001,
            "router: z-loss with weight 0.001, by config.json's router_z_loss_coef",
        ),
        (0.1, {"router_z_loss_coef": 0.001}, 0.1, "router: z-loss with weight 0.1, by model.router_z_weight"),
        (0.0, {"router_z_loss_coef": 0.001}, 0.0, None),
    ],
)
def test_the_weight_of_the_z_loss_is_settled_and_said(tmp_path, given, published, weight, said):
    config = models.from_hf_config(test_model.MIXTRAL | published)
    run = tiny.config(tmp_path, tmp_path / "pairs.jsonl", model__router_z_weight=given)
    found, lines = forward.router_weights(run, config, adapter=None)
    assert found["router_z_weight"] == weight
    assert lines[1:] == ([] if said is None else [said])


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        (
            {},
            {"model__router_aux_weight": 0.1},
            r"router_aux_weight=0\.1 is not used by .*, which has no experts; unset",
        ),
        ({}, {"model__router_z_weight": 0.1}, r"router_z_weight=0\.1 is not used by .*, which has no experts; unset"),
        ({}, {"mesh__expert": 2}, r"mesh\.expert=2 is not used by .*, which has no experts; give"),
        (
            {"family": "mixtral", "experts": 3, "experts_per_token": 1},
            {"model__matmul_dtype": "fp8"},
            r"is a mixture of experts, .* not done in 8 bits; unset",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, family, changed, message):
    tiny.write_model(tmp_path / "model", **family)
    run = test_dropout.run_config(tmp_path / "model", **changed)
    with pytest.raises(ValueError, match=message):
        run_inputs.read_model(run, tmp_path / "model")


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ("qwen3_moe", {"use_sliding_window": True}, r"use_sliding_window=True is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 is not supported"),
        ("mixtral", {"num_experts_per_tok": 6}, r"a token has 6 experts, and there are 5"),
        ("mixtral", {"num_local_experts": 0}, r"experts=0 must be between 1 and"),
        ("mixtral", {"router_aux_loss_coef": -1.0}, r"router_aux_weight=-1\.0 must be 0 or larger"),
        ("mixtral", {"router_z_loss_coef": -1.0}, r"router_z_weight=-1\.0 must be 0 or larger"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused_by_name(variant, change, message):
    with pytest.raises(ValueError, match=message):
        models.from_hf_config(test_model.VARIANTS[variant] | change)

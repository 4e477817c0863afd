"""Forward functions: batch -> log-probs or scores of its completions, for a policy and for a reward model.

    PolicyForward   hidden states -> LM head kernel -> log-probs, and the losses where the kernel has them
    RewardForward   hidden states -> scores in the place of log-probs

`for_steps` and `for_passes` make those of a run: which attention and which head run, and why. No device is asked but
for its description.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fpo_jax import attention, logprobs, losses, models, sharding, types
from fpo_jax import config as configuration
from fpo_jax.models import params, routing
from fpo_jax.perf import hardware
from fpo_jax.trainer import run_schedule


@dataclasses.dataclass(frozen=True)
class _Forward:
    """Everything static about turning a batch into hidden states."""

    config: models.ModelConfig
    compute_dtype: str
    remat: str
    attention: attention.Selection
    layout: sharding.Layout = sharding.ONE_DEVICE  # where activations and the head live on a mesh
    adapter: models.Adapter | None = None
    fp8: bool = False  # products of the layers with their weights in 8 bits
    router_aux_weight: float = 0.0  # of the load-balancing loss that the train step adds
    router_z_weight: float = 0.0  # of the router z-loss, the same

    def _hidden_states(
        self, params: types.PyTree, batch: types.Batch, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, routing.Routing | None]:
        with jax.named_scope("model"):
            return models.hidden_states_and_routing(
                params,
                jnp.asarray(batch.tokens_NT),
                jnp.asarray(batch.valid_NT),
                config=self.config,
                compute_dtype=jnp.dtype(self.compute_dtype),
                remat=self.remat,
                attention=self.attention,
                layout=self.layout,
                adapter=self.adapter,
                dropout_key=dropout_key,
                segments=batch.segments,
                fp8=self.fp8,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyForward(_Forward):
    """Everything static about turning a batch into log-probs; calling it gives CompletionLogps of the N completions."""

    implementation: str
    workspace_bytes: int
    temperature: float
    kept_bytes: int | None = None  # for logits that stay from the forward to the backward pass
    fuse_loss: bool = False  # run the loss in the kernel of the log-probs, where it is differentiated
    interpret: bool = False  # emulate that kernel

    def __call__(self, params: types.PyTree, batch: types.Batch) -> logprobs.CompletionLogps:
        """Run the model and read the log-probs of the scored tokens, at the sampling temperature."""
        inputs, _ = self._inputs(params, batch)
        with jax.named_scope("logps"):
            return logprobs.completion_logps(
                *inputs, slots_NR=batch.slots_NR, slots=slots_per_sequence(batch), **self._options()
            )

    def group_losses(
        self,
        params: types.PyTree,
        batch: types.Batch,
        operands: losses.Completions,
        *,
        loss: losses.Loss,
        dropout_key: jax.Array | None = None,
    ) -> tuple[types.Array, logprobs.CompletionLogps, routing.Routing | None]:
        """Run the model to the losses [B] of the groups, the log-probs they come from, and its routing."""
        inputs, routes = self._inputs(params, batch, dropout_key)
        with jax.named_scope("loss"):
            losses_B, completion = logprobs.completion_losses(
                *inputs,
                operands,
                group_loss=loss.of_logps,
                groups=(batch.rewards_BK.shape[0], batch.rewards_BK.shape[1]),
                slots_NR=batch.slots_NR,
                fuse_loss=self.fuse_loss,
                **self._options(),
            )
            return losses_B, completion, routes

    def _options(self) -> dict:
        return {
            "temperature": self.temperature,
            "softcap": self.config.final_soft_cap,
            "implementation": self.implementation,
            "interpret": self.interpret,
            "workspace_bytes": self.workspace_bytes,
            "kept_bytes": self.kept_bytes,
            "placement": self.layout.head,
        }

    def _inputs(
        self, params: types.PyTree, batch: types.Batch, dropout_key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, jax.Array, types.Array, types.Array, types.Array], routing.Routing | None]:
        """Hidden states, head and scored positions: what every function of `logprobs` starts with; and the routing."""
        hidden_NTD, routes = self._hidden_states(params, batch, dropout_key)
        head_VD = models.head(params, config=self.config)
        return (hidden_NTD, head_VD, batch.predictors_NR, batch.targets_NR, batch.loss_mask_NR), routes


class RewardForward(_Forward):
    """Everything static about turning a batch into scores; calling it gives them in the place of log-probs."""

    def __call__(self, params: types.PyTree, batch: types.Batch) -> logprobs.CompletionLogps:
        """Run the model and read the score of every row in the place of its log-prob."""
        return self._scored(params, batch, None)[0]

    def _scored(
        self, params: types.PyTree, batch: types.Batch, dropout_key: jax.Array | None
    ) -> tuple[logprobs.CompletionLogps, routing.Routing | None]:
        if batch.ends_NP is None:
            last_NP = jnp.max(jnp.where(batch.loss_mask_NR, batch.predictors_NR + 1, 0), axis=1)[:, None]
        else:
            last_NP = jnp.asarray(batch.ends_NP)
        hidden_NTD, routes = self._hidden_states(params, batch, dropout_key)
        with jax.named_scope("score"):
            scores_NP = models.scores(params, hidden_NTD, last_NP)
        counts_NP = logprobs.sum_slots(
            jnp.asarray(batch.loss_mask_NR, scores_NP.dtype), batch.slots_NR, slots=scores_NP.shape[1]
        )
        return logprobs.CompletionLogps(scores_NP.reshape(-1), counts_NP.reshape(-1), None), routes

    def group_losses(
        self,
        params: types.PyTree,
        batch: types.Batch,
        operands: losses.Completions,
        *,
        loss: losses.Loss,
        dropout_key: jax.Array | None = None,
    ) -> tuple[types.Array, logprobs.CompletionLogps, routing.Routing | None]:
        """Run the model to the losses [B] of the groups, the scores they come from, and its routing."""
        completion, routes = self._scored(params, batch, dropout_key)
        scores_BK = jnp.asarray(completion.sum_N).reshape(batch.rewards_BK.shape)
        return loss.of_logps(scores_BK, operands), completion, routes


AnyForward = PolicyForward | RewardForward


def for_steps(
    config: configuration.Config, blueprint: run_schedule.Blueprint, layout: sharding.Layout
) -> tuple[AnyForward, list[str]]:
    """Settle the forward function of train steps; returns the choices and their reasons as text."""
    model_config, dtype = blueprint.model_config, config.model.compute_dtype
    attends = attention_of(config, model_config, blueprint.lengths, layout)
    gathered = f"weights: {sharding.GATHER[layout.gather]}"
    attended = f"attention: {attends.implementation} ({attends.reason})"
    fp8 = config.model.matmul_dtype == "fp8"
    routers, routed = router_weights(config, model_config, adapter=blueprint.adapter)
    choices = [gathered, attended, *_products(layout, fp8=fp8), *_left_out(model_config), *routed]
    shared = {"adapter": blueprint.adapter, "fp8": fp8, **routers}
    if model_config.reward_head:
        forward_fn = RewardForward(model_config, dtype, config.model.remat, attends, layout, **shared)
        return forward_fn, [*choices, "head: one score at the last token of a row, float32"]
    head, kept = _head(config, blueprint, model_config, layout), config.kernel.kept_logits_mib
    sizes = {
        "workspace_bytes": config.kernel.workspace_mib * 2**20,
        "kept_bytes": None if kept is None else kept * 2**20,
    }
    frozen = not params.trains_head(model_config, blueprint.adapter)
    explained = logprobs.explain(**head, fuse_loss=config.kernel.fuse_loss, frozen=frozen, **sizes)
    choice = logprobs.select(**head, fuse_loss=config.kernel.fuse_loss)
    forward_fn = PolicyForward(
        config=model_config,
        compute_dtype=dtype,
        remat=config.model.remat,
        attention=attends,
        implementation=choice.implementation,
        fuse_loss=choice.fuse_loss,
        interpret=choice.interpret,
        **sizes,
        temperature=blueprint.loss.temperature,
        layout=layout,
        **shared,
    )
    return forward_fn, [*choices, explained]


def kept_logits(config: configuration.Config, blueprint: run_schedule.Blueprint, layout: sharding.Layout) -> int | None:
    """Return the bytes on each device that keeping the logits of a step takes; None where they cannot be kept."""
    if blueprint.model_config.reward_head:
        return None
    return logprobs.kept_if_unlimited(**_head(config, blueprint, blueprint.model_config, layout))


def _products(layout: sharding.Layout, *, fp8: bool) -> list[str]:
    """Say that matrices are multiplied in 8 bits, and where that is slower and not faster."""
    assert layout.mesh is not None
    device = layout.mesh.devices.flat[0]
    capacity = hardware.capacity(device)
    native = capacity is not None and capacity.fp8_flops is not None
    where = "" if native else f"; emulated, and slow: a {device.device_kind} multiplies no 8-bit floating-point numbers"
    return [f"products of the layers: fp8, e4m3 forward and e5m2 for gradients{where}"] if fp8 else []


def _left_out(model_config: models.ModelConfig) -> list[str]:
    """Say which drop-out of config.json is not done; `run_inputs` has refused it where nobody asked for that."""
    named = ", ".join(f"{key}={share:g}" for key, share in model_config.dropout)
    return [f"drop-out: none, by model.dropout=off; config.json names {named}"] if named else []


def router_weights(
    config: configuration.Config, model_config: models.ModelConfig, *, adapter: models.Adapter | None
) -> tuple[dict[str, float], list[str]]:
    """Settle the weights of the load-balancing loss and the router z-loss; returns them and their origin, as text."""
    if not model_config.experts:
        return {}, []
    given, own = config.model.router_aux_weight, model_config.router_aux_weight
    if given is not None:
        weight, described = given, f"load-balancing loss with weight {given:g}, by model.router_aux_weight"
    elif "router_aux_weight" not in model_config.of_family.keys:
        name = model_config.family
        weight, described = (
            0.0,
            f"no load-balancing loss: transformers has none of {name}; model.router_aux_weight adds it",
        )
    elif model_config.router_aux_loss:
        weight, described = own, f"load-balancing loss with weight {own:g}, config.json's router_aux_loss_coef"
    else:
        weight, described = (
            0.0,
            "no load-balancing loss, as config.json has output_router_logits=false;"
            f" model.router_aux_weight={own:g} adds it with config.json's router_aux_loss_coef",
        )
    z_weight, origin = config.model.router_z_weight, "model.router_z_weight"
    if z_weight is None:
        z_weight, origin = model_config.router_z_weight, "config.json's router_z_loss_coef"
    of_z = [f"router: z-loss with weight {z_weight:g}, by {origin}"] if z_weight else []
    without = []
    if adapter is not None:
        has = any(entry.routed and entry.path in adapter.targets for entry in params.entries(model_config))
        frozen = "the router has none, and is" if has else "the router and the experts have none, and are"
        without = [f"adapter: {frozen} not trained"]
    weights = {"router_aux_weight": weight, "router_z_weight": z_weight}
    return weights, [f"router: {described}", *of_z, *without]


def for_passes(
    config: configuration.Config,
    blueprint: run_schedule.Blueprint,
    layout: sharding.Layout,
    forward_fn: AnyForward,
) -> tuple[AnyForward, AnyForward, list[str]]:
    """Settle those of evaluations and of reference log-probs; describes what differs from train steps."""
    notes = []

    def of_pass(name: str, model_config: models.ModelConfig, lengths: tuple[int, ...]) -> attention.Selection:
        choice = attention_of(config, model_config, lengths or blueprint.lengths, layout)
        if choice != forward_fn.attention:
            notes.append(f"{name}: attention: {choice.implementation} ({choice.reason})")
        return choice

    with configuration.about("evaluations"):
        attends = of_pass("evaluations", blueprint.model_config, blueprint.evaluation_lengths)
    eval_forward_fn = dataclasses.replace(forward_fn, attention=attends)
    other = blueprint.reference
    described = other or blueprint.model_config
    adapter = blueprint.adapter if blueprint.reference_adapted else None
    with configuration.about("reference pass" if other is None else "reference.path"):
        attends = of_pass("reference pass", described, blueprint.reference_lengths)
        reference_forward_fn = dataclasses.replace(forward_fn, config=described, attention=attends, adapter=adapter)
        if isinstance(reference_forward_fn, PolicyForward) and other is not None:
            head = logprobs.select(**_head(config, blueprint, other, layout), fuse_loss="off")
            if head.implementation != reference_forward_fn.implementation:
                notes.append(f"reference pass: log-probs: {head.implementation} ({head.reason})")
            reference_forward_fn = dataclasses.replace(
                reference_forward_fn, implementation=head.implementation, interpret=head.interpret
            )
    return eval_forward_fn, reference_forward_fn, notes


def attention_of(
    config: configuration.Config, model_config: models.ModelConfig, lengths: tuple[int, ...], layout: sharding.Layout
) -> attention.Selection:
    """Return the attention of sequences of these lengths.

    Raises:
        ValueError: the one that was asked for cannot run.
    """
    assert layout.mesh is not None
    target = logprobs.Target.of(layout.mesh.devices.flat[0])
    return attention.select(
        config.model.attention,
        platform=target.platform,
        dtype=config.model.compute_dtype,
        head_dim=model_config.head_dim,
        heads=model_config.heads,
        kv_heads=model_config.kv_heads,
        positions=lengths,
        sliding_window=model_config.sliding_window,
        soft_cap=model_config.attention_soft_cap,
        sinks=model_config.of_family.sinks,
        segments=config.data.packing or config.data.layout != "padded",
        shared=config.data.layout == "shared",
        compute_capability=target.compute_capability,
        layout=layout,
    )


def _head(
    config: configuration.Config,
    blueprint: run_schedule.Blueprint,
    model_config: models.ModelConfig,
    layout: sharding.Layout,
) -> dict[str, Any]:
    """Facts for the choice of the head, at the sizes of a step."""
    assert layout.mesh is not None
    slotted = config.data.layout != "padded"
    rows = (
        config.train.micro_batch_per_device * layout.data_parallel_degree * (1 if slotted else config.data.group_size)
    )
    return {
        "target": logprobs.Target.of(layout.mesh.devices.flat[0]),
        "shapes": logprobs.HeadShapes(
            tokens=rows * blueprint.scored, width=model_config.width, vocab=model_config.vocab_size
        ),
        "dtype": config.model.compute_dtype,
        "head_dtype": config.model.param_dtype,
        "requested": config.kernel.implementation,
        "placement": layout.head,
    }


def slots_per_sequence(batch: types.Batch) -> int:
    """Completions that a row has places for."""
    return batch.rewards_BK.size // math.prod(batch.loss_mask_NR.shape[:-1])

"""Every kind of adapter against PEFT: forward, gradients, one optimizer step, both exports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from fpo_jax import hf, models
from fpo_jax.models import params
from fpo_jax.optimizer import adamw
from tests import tolerances
from tests.models import test_lora, test_model

torch = pytest.importorskip("torch", reason="PyTorch is absent")
peft = pytest.importorskip("peft", reason="peft is absent")

KINDS = {"rslora": {"use_rslora": True}}
RATE, RATIO = 1e-2, 16.0


@functools.cache
def both_sides(family: str, kind: str, folder):
    """Return the base, a random adapter of a kind, and the model with it as PEFT reads it from our export."""
    published = test_model.VARIANTS[family]
    c, adapter = test_lora.adapter_of(published, **KINDS[kind])
    tree = test_model.random_params(c)
    added = test_lora.random_adapter(c, adapter)
    theirs = test_model.torch_twin(folder, published, tree, c)
    base = folder / "model"
    hf.write_peft(added, c, adapter, out_dir=folder / "peft", base_name=str(base), revision=None, source_dir=base)
    return c, adapter, tree, added, peft.PeftModel.from_pretrained(theirs, folder / "peft", is_trainable=True).eval()


def mean_square(added, tree, *, c, adapter):
    both = {**params.flatten(tree), **params.flatten(added)}
    found = test_lora.logits(params.nest(both), jnp.asarray(test_lora.TOKENS_NT), config=c, adapter=adapter)
    return jnp.mean(jnp.square(found)), found


def named(added, c, adapter):
    """Yield PEFT's names with our values in PEFT's layout."""
    flat = params.flatten(added)
    for entry in params.trained_entries(c, adapter):
        for name, place in entry.tensors():
            prefix = "" if name.startswith("base_model.model.") else "base_model.model."
            yield prefix + name, params.to_hf(entry, np.asarray(flat[entry.path][place]))


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama GQA", "gpt2"])
def test_logits_gradients_and_a_step_are_those_of_peft(family, kind, tmp_path):
    c, adapter, tree, added, wrapped = both_sides(family, kind, tmp_path)
    (_, ours), grads = jax.value_and_grad(mean_square, has_aux=True)(added, tree, c=c, adapter=adapter)
    expected = wrapped(torch.tensor(test_lora.TOKENS_NT).long()).logits
    assert_allclose(ours, expected.detach().numpy(), rtol=0, atol=tolerances.PARITY_LOGITS)

    expected.square().mean().backward()
    theirs = {
        key.replace(".default", "").replace("modules_to_save.", ""): value
        for key, value in wrapped.named_parameters()
        if value.requires_grad
    }
    found = dict(named(grads, c, adapter))
    assert found.keys() == theirs.keys()
    for key, value in found.items():
        wanted = theirs[key].grad.numpy()
        assert_allclose(value, wanted, rtol=0, atol=tolerances.PARITY_GRADIENT * np.abs(wanted).max(), err_msg=key)

    # A step with LoRA+'s rates: from equal gradients, that Adam's first step may turn on the last bit of small ones.
    given = {key: value.grad for key, value in theirs.items()}
    torch_step(wrapped)
    stepped = dict(named(our_step(added, grads_like(added, given, c, adapter), c, adapter), c, adapter))
    for key, value in stepped.items():
        assert_allclose(
            value, theirs[key].detach().numpy(), rtol=0, atol=tolerances.FIRST_STEP * RATE * RATIO, err_msg=key
        )


def grads_like(added, theirs, c, adapter):
    """Return PEFT's gradients in our layout."""
    flat = {path: np.array(leaf) for path, leaf in params.flatten(added).items()}
    for entry in params.trained_entries(c, adapter):
        for name, place in entry.tensors():
            prefix = "" if name.startswith("base_model.model.") else "base_model.model."
            flat[entry.path][place] = params.from_hf(entry, theirs[prefix + name].numpy())
    return params.nest(flat)


def torch_step(wrapped):
    from peft.optimizers import create_loraplus_optimizer

    create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
    ).step()


def our_step(added, grads, c, adapter):
    trained = params.trained_entries(c, adapter)
    optimizer = adamw.optimizer(
        adamw.schedule(kind="constant", peak=RATE, warmup=0, total_steps=1),
        b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0, clip_norm=0.0,
        decay_mask=params.nest({entry.path: entry.decay for entry in trained}),
        faster=(RATIO, params.nest({entry.path: params.is_b(entry.path) for entry in trained})),
    )  # fmt: skip
    updates, _ = optimizer.update(grads, optimizer.init(added), added)
    return optax.apply_updates(added, updates)


def test_a_scale_by_the_root_of_the_rank():
    assert models.Adapter(16, 8.0, 0.0, ()).scale == 0.5
    assert models.Adapter(16, 8.0, 0.0, (), rslora=True).scale == 2.0

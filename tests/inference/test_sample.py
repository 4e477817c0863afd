"""The sampler against exact probabilities, a step-by-step argmax, and a real model's published greedy text."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fpo_jax import attention, hf, models, sharding
from fpo_jax.inference import sampler
from fpo_jax.models import kv_cache, params
from tests import paths, sampling_oracle, tolerances

PAD, EOS = 0, 2
PROMPTS = [[1, 4, 5], [3], [6, 7, 8, 9, 10], [1, 9]]


@functools.cache
def tiny(seed=0, spread=0.5):
    """A random model over V=11 tokens; `spread` makes its distributions far from uniform."""
    config = models.ModelConfig(
        family="llama",
        vocab_size=11,
        width=8,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=2,
        ffn=12,
        max_positions=24,
        initializer_range=spread,
    )
    return config, jax.jit(params.init, static_argnums=(0, 2))(config, jax.random.key(seed), "float32")


def draw(prompts=PROMPTS, **changed):
    """Sample from the tiny model; tests share these sizes where they can, for each other one is a compilation."""
    config, weights = tiny()
    fields = {"max_new_tokens": 5, "temperature": 1.0, "stop_ids": (EOS,)}
    fields |= {key: changed.pop(key) for key in list(changed) if key in sampler.Decoding.__dataclass_fields__}
    options = {"seed": 7, "batch_size": 12, "window": 20} | changed
    weights = options.pop("params", weights)
    return sampler.sample(weights, prompts, config=config, decoding=sampler.Decoding(**fields), **options)


@functools.partial(jax.jit, static_argnames="config")
def _logits(weights, tokens_NT, *, config):
    valid_NT = jnp.ones(tokens_NT.shape, bool)  # causal: what stands behind a position does not matter
    hidden_NTD = models.hidden_states(weights, tokens_NT, valid_NT, config=config, compute_dtype="float32")
    return jnp.einsum("NTD,VD->NTV", hidden_NTD, models.head(weights, config=config), precision="highest")


def next_probabilities(tokens, *, temperature):
    """softmax(logits / temperature) after `tokens`, in float64."""
    config, weights = tiny()
    tokens_NT = np.full((1, 13), 8, np.int32)
    tokens_NT[0, : len(tokens)] = tokens
    logits = np.asarray(_logits(weights, tokens_NT, config=config))[0, len(tokens) - 1].astype(np.float64) / temperature
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_greedy_is_the_argmax_of_the_logits_at_every_step():
    for prompt, (completion,) in zip(PROMPTS, draw(temperature=0.0), strict=True):
        tokens = list(prompt)
        for token in completion:
            assert token == next_probabilities(tokens, temperature=1.0).argmax()
            tokens.append(token)
        assert len(completion) == 5 or completion[-1] == EOS
    assert len({tuple(completion) for (completion,) in draw(temperature=0.0)}) > 1


def cut(probabilities, *, temperature=1.0, top_k=0, top_p=1.0):
    """What is drawn from, in float64: the k most probable tokens, of these the fewest that have p together."""
    order = np.argsort(-probabilities)[: top_k or None]
    shares = np.cumsum(probabilities[order] / probabilities[order].sum())
    kept = order[: int(np.searchsorted(shares, top_p)) + 1] if top_p < 1 else order
    found = np.zeros_like(probabilities)
    found[kept] = probabilities[kept] / probabilities[kept].sum()
    return found


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({"temperature": 1.0}, 15),
        ({"temperature": 0.6}, 15),
        ({"top_k": 3}, 7),
        ({"temperature": 2.0, "top_k": 6, "top_p": 0.8}, 12),
    ],
)
def test_frequencies_match_the_exact_probabilities_of_two_tokens(options, cells):
    prompt, count, vocab = PROMPTS[0], 6000, 11
    (completions,) = draw([prompt], num_return=count, batch_size=2000, max_new_tokens=2, seed=1, window=None, **options)

    def exact(tokens):
        return cut(next_probabilities(tokens, temperature=options.get("temperature", 1.0)), **options)

    first = exact(prompt)
    expected = {(EOS,): first[EOS]}
    for a in set(range(vocab)) - {EOS}:
        second = exact([*prompt, a])
        expected |= {(a, b): first[a] * second[b] for b in range(vocab)}
    assert sum(expected.values()) == pytest.approx(1.0)
    seen = {key: 0 for key in expected}
    for completion in completions:
        seen[tuple(completion)] += 1
    # cells too rare for the chi-squared distribution are counted as one
    common = [key for key in expected if count * expected[key] >= 5]
    observed, wanted = [seen[key] for key in common], [count * expected[key] for key in common]
    if (rest := count - sum(wanted)) > 1e-6 * count:
        observed, wanted = [*observed, count - sum(observed)], [*wanted, rest]
    assert len(common) >= cells
    assert all(seen[key] == 0 for key in expected if expected[key] == 0)
    # one in a thousand of all seeds would fail; the seed is fixed
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_completions_do_not_depend_on_batch_size_window_or_number_of_returns():
    whole = draw(num_return=3)
    assert draw(num_return=3, batch_size=1) == whole
    ragged = {"batch_size": 5, "window": 16}
    assert draw(num_return=3, **ragged) == whole
    assert draw(num_return=2, **ragged) == [returns[:2] for returns in whole]
    assert draw(PROMPTS[:2], num_return=3, **ragged) == whole[:2]


def test_the_other_prompts_and_their_order_change_not_a_bit(caplog):
    """Each prompt is padded by its own length, so that its rows are the same program's whatever stands beside it."""
    config, weights = tiny()
    config = dataclasses.replace(config, max_positions=96)  # prompts are padded to 16, 32, 64 and 91 tokens
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 11, size).tolist() for size in (4, 20, 17, 60, 5, 33, 1, 90)]
    described = []

    def answers(order):
        found = sampler.sample(
            weights,
            [prompts[index] for index in order],
            config=config,
            decoding=sampler.Decoding(5, stop_ids=(EOS,)),
            seed=3,
            num_return=2,
            batch_size=4,
            numbers=order,
            done=described.append,
        )
        return dict(zip(order, found, strict=True))

    with caplog.at_level("INFO", logger="fpo_jax"):
        whole = answers(range(8))
    assert described == [{0: whole[0], 4: whole[4]}, {6: whole[6]}, {1: whole[1], 2: whole[2]}, {3: whole[3],
                    5: whole[5]}, {7: whole[7]}]  # fmt: skip
    numbers = [tuple(map(int, re.findall(r"\d+", record.getMessage()))) for record in caplog.records]
    assert numbers == [(3, 16, 2), (2, 32, 2), (2, 64, 2), (1, 91, 2)]
    assert answers([5, 2, 7, 0, 6, 1, 4, 3]) == whole
    assert answers([0, 7]) == {0: whole[0], 7: whole[7]}


def test_noise_differs_between_seeds_prompts_returns_and_steps():
    same = [[1, 4, 5]] * 2
    (a, b), (c, d) = draw(same, num_return=2)
    assert len({tuple(completion) for completion in (a, b, c, d)}) == 4
    assert draw(same, num_return=2, seed=8) != [[a, b], [c, d]]
    _, weights = tiny()
    uniform = dict(weights, head=jnp.zeros_like(weights["head"]))  # a noise shared by all steps would repeat a token
    (completions,) = draw([[1]], params=uniform, num_return=6, stop_ids=(10,))
    assert min(len(set(completion)) for completion in completions if len(completion) == 5) > 1


def test_a_completion_ends_with_eos_or_at_the_limit():
    lengths = set()
    for (completion,) in draw([[1, 4, 5]] * 300):
        assert EOS not in completion[:-1]
        assert len(completion) == 5 or completion[-1] == EOS
        lengths.add(len(completion))
    assert lengths == {1, 2, 3, 4, 5}


def test_it_stops_as_soon_as_all_rows_have_ended():
    config, weights = tiny()
    first = int(next_probabilities([1], temperature=1.0).argmax())  # greedy decoding ends at its first token
    drawn_PKS, finite_P = sampler._respond(
        weights,
        *(np.array([[1] + [PAD] * 15] * 2 + [[PAD] * 16], np.int32), np.array([1, 1, 0], np.int32)),  # a filler row
        np.zeros(3, np.int32),
        np.int32(0),
        jax.random.key(0),
        config=config,
        decoding=sampler.Decoding(8, temperature=0.0, stop_ids=(first,)),
        returns=1,
        compute_dtype="float32",
        attention=None,
        layout=sharding.ONE_DEVICE,
    )
    np.testing.assert_array_equal(drawn_PKS[:2, 0], [[first] + [0] * 7] * 2)
    assert finite_P.all()


def test_stories_greedy_text_is_reproduced():
    folder = paths.shared_data("stories260K")
    expected = json.loads((folder / "expected_greedy.json").read_text())["greedy_ids"]
    config = hf.read_config(folder)
    weights = hf.load_params(folder, config, dtype="float32")
    ((completion,),) = sampler.sample(
        weights,
        [expected[:1]],
        config=config,
        decoding=sampler.Decoding(len(expected) - 1, temperature=0.0, stop_ids=(2,)),
        seed=0,
        batch_size=1,
    )
    assert completion == expected[1:]


def test_logits_that_are_not_finite_are_an_error_that_names_the_prompts():
    _, weights = tiny()
    broken = dict(weights, head=weights["head"].at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"logits that are not finite for prompts \[0, 1, 2, 3\]; check"):
        draw(params=broken)
    broken = dict(weights, embed=weights["embed"].at[3].set(jnp.nan))  # a token that one prompt has
    with pytest.raises(ValueError, match=r"logits that are not finite for prompts \[70\]; check"):
        draw(params=broken, temperature=0.0, max_new_tokens=1, numbers=[50, 70, 60, 80])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 11]]}, "prompt 0 holds ids from 1 to 11, the model's vocabulary has 11 tokens"),
        ({"prompts": [[-1]]}, "ids from -1 to -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"num_return": 0}, "num_return=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 2\*\*32\)"),
        ({"stop_ids": (2, 11)}, "stop id 11 lies outside the model's vocabulary of 11 tokens"),
        ({"max_new_tokens": 20, "window": None}, "need 25 positions, window=24 and the model has 24"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"temperature": 0.0, "top_k": 3}, "temperature=0 is greedy, where top_k and top_p change nothing"),
        ({"min_new_tokens": 6}, "min_new_tokens=6 must lie between 0 and max_new_tokens=5"),
        (
            {
                "layout": sharding.make_layout(preset="fsdp", data=None, fsdp=None, tensor=None, devices=jax.devices()),
                "batch_size": 12,
            },
            "batch_size=12 is not divisible by 8 devices",
        ),
        ({"window": 9}, "need 10 positions, window=9"),
        ({"compute_dtype": "int8"}, "compute_dtype int8 is not one of"),
        ({"attention": attention.Selection("flash", "for the test")}, "flash"),
    ],
)
def test_bad_input_is_named(changed, message):
    changed = dict(changed)
    prompts = changed.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=message):
        draw(prompts, **changed)


# --- the cache


def test_the_cache_changes_no_token():
    """Against the sampler that recomputes every window: the same noise, the same tokens."""
    config, weights = tiny()
    for temperature in (0.0, 1.0):
        expected = sampling_oracle.sample(
            weights, PROMPTS, config=config, max_new_tokens=5, temperature=temperature, eos_id=EOS, pad_id=PAD, seed=7,
            num_return=3, batch_size=12, window=20,
        )  # fmt: skip
        assert draw(temperature=temperature, num_return=3) == expected


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}])
def test_hidden_states_against_the_cache_are_those_of_whole_rows(window, mesh):
    config, weights = tiny()
    family = "llama" if window is None else "mistral"
    config = dataclasses.replace(config, family=family, sliding_window=window)
    layout = sharding.ONE_DEVICE
    if mesh is not None:
        layout = sharding.make_layout(preset="fsdp", data=1, **mesh, devices=jax.devices()[:4])
    random = np.random.default_rng(0)
    tokens_NT, lengths_N = random.integers(3, 11, size=(4, 12)).astype(np.int32), np.array([1, 5, 7, 2], np.int32)
    whole_NTD = models.hidden_states(
        weights, jnp.asarray(tokens_NT), jnp.ones((4, 12), bool), config=config, compute_dtype="float32"
    )
    options = {"config": config, "compute_dtype": "float32", "layout": layout}
    hidden_ND, cache = jax.jit(functools.partial(models.prefill, positions=12, **options))(
        weights, tokens_NT[:, :8], lengths_N
    )
    step = jax.jit(functools.partial(models.decode, **options))
    for count in range(4):
        expected_ND = np.take_along_axis(np.asarray(whole_NTD), (lengths_N + count - 1)[:, None, None], axis=1)[:, 0]
        np.testing.assert_allclose(hidden_ND, expected_ND, rtol=0, atol=tolerances.CACHED)
        tokens_N = np.take_along_axis(tokens_NT, (lengths_N + count)[:, None], axis=1)[:, 0]
        hidden_ND, cache = step(weights, tokens_N, lengths_N + count, cache)


def test_a_token_on_a_mesh_moves_no_row_of_the_cache():
    """A layer gathers its weights over fsdp; what it writes to the cache stays where it is."""
    config, weights = tiny()
    layout = sharding.make_layout(preset="fsdp", data=1, fsdp=4, tensor=2, devices=jax.devices())
    config = dataclasses.replace(config, vocab_size=12)
    weights = params.init(config, jax.random.key(0), "float32")
    placed = jax.device_put(weights, params.shardings(config, mesh=layout.mesh))
    rows = sharding.batch_sharding(layout.mesh, stacked=False)
    place = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp"), None, "tensor"))
    room = jax.ShapeDtypeStruct((2, 20, 24, 2, 2), "float32", sharding=place)
    one = jax.ShapeDtypeStruct((20,), "int32", sharding=rows)
    step = functools.partial(models.decode, config=config, compute_dtype="float32", layout=layout)
    text = jax.jit(step).lower(placed, one, one, kv_cache.Cache(room, room)).compile().as_text()
    moves = re.findall(r"= \w+\[(\d+).* (?:all-gather|all-to-all|collective-permute)\(.*/while/body/(.*)", text)
    assert moves and not [place for first, place in moves if first == "20"]


def test_a_mesh_changes_no_token():
    config, weights = tiny()
    layout = sharding.make_layout(preset="fsdp", data=2, fsdp=4, tensor=1, devices=jax.devices())  # V = 11 is odd
    places = params.shardings(config, mesh=layout.mesh)
    placed = jax.device_put(weights, places)
    assert draw(params=placed, num_return=3, layout=layout, batch_size=16) == draw(num_return=3)


# --- decoding options


CUTS = [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7}, {"temperature": 0.5, "top_p": 0.9}]


@pytest.mark.parametrize("options", CUTS)
@pytest.mark.parity
def test_what_is_cut_is_what_transformers_cuts(options):
    torch = pytest.importorskip("torch", reason="PyTorch is absent")
    from transformers import generation

    random = np.random.default_rng(1)
    logits_NV = (random.normal(size=(50, 11)) * 3).astype(np.float32)
    theirs = torch.tensor(logits_NV)
    if "temperature" in options:
        theirs = generation.TemperatureLogitsWarper(options["temperature"])(None, theirs)
    if "top_k" in options:
        theirs = generation.TopKLogitsWarper(options["top_k"])(None, theirs)
    if "top_p" in options:
        theirs = generation.TopPLogitsWarper(options["top_p"])(None, theirs)
    ours = sampler._cut(
        jnp.asarray(logits_NV / options.get("temperature", 1.0)),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
    )
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    kept = np.isfinite(ours)
    np.testing.assert_allclose(np.asarray(ours)[kept], theirs.numpy()[kept], rtol=1e-6)


def test_no_stop_token_before_the_minimum_and_any_of_several_stops():
    _, weights = tiny()
    uniform, stops = dict(weights, head=jnp.zeros_like(weights["head"])), (EOS, 3, 4, 5)
    completions = [tokens for (tokens,) in draw([[1]] * 100, params=uniform, stop_ids=stops, min_new_tokens=3)]
    assert {len(tokens) for tokens in completions} == {4, 5}  # stop tokens are not counted, as in transformers
    assert not any(set(tokens[:-1]) & set(stops) for tokens in completions)
    assert {tokens[-1] for tokens in completions if len(tokens) < 5} == set(stops)


def test_each_prompt_is_reported_when_it_is_done_and_has_its_own_number():
    whole, described = draw(num_return=2), {}
    again = draw(PROMPTS[2:], num_return=2, numbers=[2, 3], batch_size=2, done=described.update)
    assert again == whole[2:] and described == dict(enumerate(whole[2:]))

import importlib
import itertools
import subprocess
import sys

import pytest

from fpo_jax import config
from tests.paths import REPO

RECIPES = sorted(path.stem for path in (REPO / "configs").glob("*.py"))


def valid():
    c = config.default()
    c.model.path = c.data.train = "somewhere"
    return c


def flat(tree, prefix=""):
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if hasattr(value, "items") else [(f"{prefix}{key}", value)]


def set_path(c, path, value):
    *parents, last = path.split(".")
    for parent in parents:
        c = c[parent]
    c[last] = value


def test_default_has_only_the_required_problems():
    assert len(config.problems(config.default())) == 2
    assert config.problems(valid()) == []


def test_unknown_key_and_wrong_type_are_errors():
    c = valid()
    with pytest.raises(AttributeError, match="learning_rate"):
        c.optim.learning_rat = 1.0
    with pytest.raises(TypeError, match="batch_size"):
        c.train.batch_size = "many"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.param_dtype", "float16", "model.param_dtype='float16' is not one of float32, bfloat16"),
        ("model.dropout", "on", "model.dropout='on' is not one of refuse, off"),
        ("data.rule", "chatty", "data.rule='chatty' is not one of chat, raw"),
        ("data.train_rows", "9:3", "selects no row"),
        ("data.train_rows", "a:b", "is not a row slice"),
        ("data.max_prompt_length", 4000, "use at most 2047"),
        ("data.max_completion_length", 5, "is not used by data.rule='chat'"),
        ("data.buckets", (512, 256, 2048), "must ascend"),
        ("optim.learning_rate", float("nan"), "must be finite and greater than 0"),
        ("optim.b2", 1.5, "less than 1"),
        ("optim.b2", 1.0, "at least 0 and less than 1"),
        ("optim.b1", 1.0, "at least 0 and less than 1"),
        ("optim.warmup_steps", -3, "at least 0"),
        ("train.batch_size", 0, "at least 1"),
        ("train.on_nonfinite", "hope", "stop, skip"),
        ("mesh.data", 0, "each axis is a number of devices"),
        ("kernel.implementation", "magic", "auto, reference, chunked, pallas_tpu"),
        ("stage", "rlhf", "stage='rlhf' is not one of sft, reward, align"),
    ],
)
def test_each_problem_names_fact_and_remedy(path, value, message):
    c = valid()
    set_path(c, path, value)
    with pytest.raises(ValueError, match="1 problem") as raised:
        config.validate(c)
    assert message in str(raised.value)


def test_all_problems_at_once_numbered():
    c = valid()
    c.optim.warmup_steps, c.optim.warmup_fraction, c.train.epochs = 3, 0.1, -1.0
    with pytest.raises(ValueError, match="has 3 problems") as raised:
        config.validate(c, extra=["the loss is odd"])
    assert [line.split(".")[0].strip() for line in str(raised.value).splitlines()[1:]] == ["1", "2", "3"]


def test_raw_rule_needs_a_completion_length():
    c = valid()
    c.data.rule = "raw"
    assert "data.max_completion_length=None" in config.problems(c)[0]


def test_difference_names_dotted_keys_and_ignores_the_resumable():
    old, new = valid().to_dict(), valid().to_dict()
    new["optim"]["learning_rate"], new["train"]["log_every"] = 1.0, 99
    assert config.difference(old, new, ignore=config.RESUMABLE) == ["optim.learning_rate: 1e-06 -> 1.0"]


def test_resumable_keys_exist():
    assert {path for path, _ in flat(valid())} >= config.RESUMABLE


def test_every_loss_option_has_a_knob_and_every_knob_an_option():
    losses = importlib.import_module("fpo_jax.losses")
    assert set(valid().loss) - {"name"} == set(losses.OPTIONS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_validates_and_resolves_its_loss(name):
    losses = importlib.import_module("fpo_jax.losses")
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    assert c.is_locked
    config.validate(c)
    losses.resolve(c.loss.name, **config.loss_options(c))
    if name != "quickstart":  # what the machine decides is left to the run
        assert (c.data.layout, c.model.remat, c.train.micro_batch_per_device) == ("auto", "auto", None)


SPEC_3_1 = {  # spec 3.1: max_length, max_prompt_length, beta, gamma/beta, learning rate, alpha
    "llama3_base": (2048, 1800, 2.0, 0.5, 7e-7, 0.99),
    "llama3_instruct": (2048, 1800, 2.6, 0.55, 1e-6, 0.99),
    "mistral_base": (1024, 512, 2.0, 0.8, 3e-7, 0.99),
    "mistral_instruct": (2048, 1800, 2.5, 0.12, 6e-7, 0.925),
}
SPEC_2_8 = {  # spec 2.8: max_length, max_completion_length, group size, alpha, beta_r, beta_pi, loss, max_steps
    "pythia_hh_pref": (512, 200, 2, 0.1, None, 0.5, "alphapo-pref", None),
    "pythia_hh_rw": (512, 200, 4, 0.1, 0.1, 0.35, "alphapo-rw", None),
    "pythia_tldr_pref": (650, 75, 2, 0.025, None, 0.3, "alphapo-pref", 350),
    "pythia_tldr_rw": (650, 75, 4, 0.025, 0.1, 0.5, "alphapo-rw", 350),
}
SPEC_3_1_SIMPO = {  # the same of SimPO's own configurations, without alpha
    "simpo_llama3_base": (2048, 1800, 2.0, 0.5, 6e-7),
    "simpo_llama3_instruct": (2048, 1800, 2.5, 0.55, 1e-6),
    "simpo_llama3_instruct_v2": (2048, 1800, 10.0, 0.3, 1e-6),
    "simpo_mistral_base": (1024, 512, 2.0, 0.8, 3e-7),
    "simpo_mistral_instruct": (2048, 1800, 2.5, 0.1, 5e-7),
    "simpo_gemma2_it": (2048, 1800, 10.0, 0.5, 8e-7),
}
SPEC_2_12 = {  # spec 2.12: stage, loss, learning rate, batch, epochs, max_steps, group size
    "imdb_sft": ("sft", "sft", 1e-5, 128, 5.0, None, 1),
    "imdb_reward": ("reward", "binary_cross_entropy", 1e-5, 256, 5.0, None, 1),
    "imdb_rw": ("align", "alphapo-rw", 1e-6, 64, 1.0, 200, 2),
}
SPEC_2_5 = {  # spec 2.5, 2.6, 3.1: stage, loss, learning rate, max_length, completion, batch, group size
    "pythia_hh_sft": ("sft", "sft", 1e-5, 512, 200, 128, 1),
    "pythia_tldr_sft": ("sft", "sft", 1e-5, 650, 75, 128, 1),
    "pythia_hh_reward": ("reward", "bradley_terry", 1e-5, 512, 200, 128, 2),
    "pythia_tldr_reward": ("reward", "bradley_terry", 1e-5, 650, 75, 128, 2),
    "llama3_base_sft": ("sft", "sft", 2e-5, 2048, None, 128, 1),
}


@pytest.mark.parametrize("name", SPEC_2_5)
def test_recipes_of_the_stages_before_to_the_digit(name):
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    found = (c.stage, c.loss.name, c.optim.learning_rate, c.data.max_length, c.data.max_completion_length)
    assert (*found, c.train.batch_size, c.data.group_size) == SPEC_2_5[name]
    assert (c.optim.schedule, c.optim.weight_decay, c.optim.clip_norm, c.train.epochs) == ("cosine", 0.0, 1.0, 1.0)
    if name.startswith("pythia"):
        assert (c.optim.b2, c.optim.warmup_fraction, c.seed, c.train.eval_groups) == (0.95, 0.0, 1234, 3200)
    assert (c.train.keep_best == "eval_rewards/accuracies") == (c.stage == "reward")


@pytest.mark.parametrize("name", SPEC_3_1_SIMPO)
def test_simpo_recipes_to_the_digit(name):
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    d, loss, o, t = c.data, c.loss, c.optim, c.train
    found = (d.max_length, d.max_prompt_length, loss.beta, loss.gamma_beta_ratio, o.learning_rate)
    assert found == SPEC_3_1_SIMPO[name]
    assert (loss.name, loss.alpha, o.schedule, o.warmup_fraction, t.batch_size) == ("sigmoid", None, "cosine", 0.1, 128)
    assert (name == "simpo_gemma2_it") == (c.tokenizer.chat_template == "gemma2")
    assert c.data.train.endswith("-armorm") == name.endswith(("_v2", "_it"))


@pytest.mark.parametrize("name", SPEC_3_1)
def test_alpha_po_recipes_to_the_digit(name):
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    d, loss, o, t = c.data, c.loss, c.optim, c.train
    found = (d.max_length, d.max_prompt_length, loss.beta, loss.gamma_beta_ratio, o.learning_rate, loss.alpha)
    assert found == SPEC_3_1[name]
    assert (loss.name, d.rule, o.schedule, o.warmup_fraction) == ("alphapo", "chat", "cosine", 0.1)
    assert (t.batch_size, t.epochs, t.eval_every, c.seed) == (128, 1.0, 400, 42)
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.999, 1e-8, 0.0, 1.0)


@pytest.mark.parametrize("name", SPEC_2_8)
def test_pythia_recipes_to_the_digit(name):
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    d, loss, o = c.data, c.loss, c.optim
    found = (d.max_length, d.max_completion_length, d.group_size, loss.alpha, loss.beta_r, loss.beta_pi, loss.name)
    assert (*found, c.train.max_steps) == SPEC_2_8[name]
    assert (d.rule, loss.temperature, o.b2, o.clip_norm, o.warmup_fraction, c.seed) == (
        "raw",
        0.8,
        0.95,
        1.0,
        0.0,
        1234,
    )
    assert (o.learning_rate, o.schedule, c.train.batch_size) == (1e-6, "cosine", 128)


@pytest.mark.parametrize("name", SPEC_2_12)
def test_imdb_recipes_to_the_digit(name):
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    found = (c.stage, c.loss.name, c.optim.learning_rate, c.train.batch_size, c.train.epochs, c.train.max_steps)
    assert (*found, c.data.group_size) == SPEC_2_12[name]
    assert (c.data.rule, c.data.max_length, c.data.max_completion_length, c.seed) == ("raw", 512, 500, 1234)
    assert c.data.format == ("json" if c.stage == "align" else "imdb")
    assert c.model.dropout == "off"  # GPT-2's config.json names drop-out of 0.1, which is not built
    if c.stage == "align":
        assert (c.loss.beta_r, c.loss.beta_pi, c.loss.temperature) == (0.1, 0.1, 0.8)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.optim.learning_rat=1", "did you mean --config.optim.learning_rate?"),
        ("--config.train.batch_size=many", "--config.train.batch_size=many: 'many' is not a whole number"),
        ("--confg.seed=1", "Unknown command line flag"),
        ("stray", "unexpected arguments"),
        ("--profile=9:1", "--profile=9:1 is not first:last"),
    ],
)
def test_command_line_errors_are_one_sentence(option, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "configs/mistral_base.py", "--workdir", str(tmp_path / "w"), option],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


REFERENCE_FREE = ["sigmoid", "hinge", "alphapo", "exo", "jensen_shannon", "alphapo_length", "alpha", "simpo"]
OTHERS = ["dpo", "ipo", "kto", "cpo", "r_dpo", "orpo", "rrhf", "slic", "f_dpo_alpha", "exo-pref", "cdpo"]
SETTINGS = [*SPEC_3_1, *SPEC_3_1_SIMPO, *SPEC_2_8, "imdb_rw"]
FAMILY = ["alphapo", "exo", "dpo", "jspo", "jeffpo", "shpo"]


@pytest.mark.parametrize("name", [*SPEC_3_1, *SPEC_2_8])
def test_recipe_takes_every_loss_of_its_family(name):
    losses = importlib.import_module("fpo_jax.losses")
    suffix = name.rsplit("_", 1)[-1]
    for loss in REFERENCE_FREE if name in SPEC_3_1 else [f"{member}-{suffix}" for member in FAMILY]:
        c = importlib.import_module(f"fpo_jax.configs.{name}").get_config(loss)
        resolved = losses.resolve(c.loss.name, **config.loss_options(c))
        assert resolved.needs_reference == (name in SPEC_2_8), loss


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_with_any_loss_has_that_losses_own_options(name):
    """A reference where the loss has one, and never the β of another family."""
    losses = importlib.import_module("fpo_jax.losses")
    recipe = importlib.import_module(f"fpo_jax.configs.{name}")
    own = losses.resolve(recipe.get_config().loss.name)
    for loss in losses.PRESETS:
        c = recipe.get_config(loss)
        resolved, alone = losses.resolve(c.loss.name, **config.loss_options(c)), losses.resolve(loss)
        if loss in OTHERS and not (name in (*SPEC_2_8, "imdb_rw") and alone.family == own.family):
            assert resolved == alone, loss
        assert resolved.needs_reference == alone.needs_reference or loss in (*losses.DIVERGENCES, "exo"), loss
        if resolved.family == own.family and "beta" in resolved.options:
            assert resolved.options["beta"] == recipe.get_config().loss.beta, loss


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("own_")])
def test_recipes_of_the_original_keep_its_ties_and_say_so(name):
    losses = importlib.import_module("fpo_jax.losses")
    recipe = importlib.import_module(f"fpo_jax.configs.{name}")
    c = recipe.get_config()
    takes = "tie_policy" in losses.resolve(c.loss.name, **config.loss_options(c)).options
    kept = takes and c.stage == "align" and name != "quickstart"
    assert c.loss.tie_policy == ("second" if kept else "")
    assert ("tie_policy=second" in recipe.__doc__) == kept


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pythia_hh_pref", "pythia_hh_sft", "pythia_hh_reward"], ["342", "343", "last_batch=pad", "float32 master"]),
        (["pythia_hh_pref"], ["first_difference", "26 of 2,312"]),
        (["pythia_hh_reward", "pythia_tldr_reward"], ["every 100", "kept"]),
        (["imdb_sft", "imdb_reward", "imdb_rw", "pipelines.imdb"], ["dropout of 0.1 is", "not applied here"]),
        (["pipelines.on_policy_ultrafeedback"], ["4,096", "1,024", "max_new_tokens"]),
        (["mistral_base"], ["the master weights stay float32"]),
    ],
)
def test_recipes_say_where_they_differ_from_the_original(names, words):
    for name in names:
        said = " ".join(importlib.import_module(f"fpo_jax.configs.{name}").__doc__.split("Original")[1].split())
        for word in words:
            assert word in said, (name, word)


def test_dpo_in_a_reference_free_recipe_is_dpo():
    losses = importlib.import_module("fpo_jax.losses")
    c = importlib.import_module("fpo_jax.configs.mistral_base").get_config("dpo")
    assert (c.loss.score, c.loss.beta, c.loss.gamma_beta_ratio, c.loss.alpha) == ("", None, None, None)
    resolved = losses.resolve(c.loss.name, **config.loss_options(c))
    assert (resolved.name, resolved.needs_reference) == ("kl_target_policy", True)
    assert (resolved.options["score"], resolved.options["epsilon"]) == ("log_ratio", 0.0)


def test_recipes_are_lab_notes():
    for name, word in itertools.product(set(RECIPES) - {"quickstart"}, ("Command", "Data", "Expect")):
        assert word in (importlib.import_module(f"fpo_jax.configs.{name}").__doc__ or ""), (name, word)


def test_unset_knobs_are_independent():
    c = valid()
    c.loss.alpha = 0.5
    assert c.loss.beta_pi is None and config.loss_options(c) == {"alpha": 0.5}


def test_loss_and_group_follow_the_stage_until_they_are_set():
    c = valid()
    assert (c.loss.name, c.data.group_size) == ("alpha", 2)
    c.stage = "sft"
    assert (c.loss.name, c.data.group_size) == ("sft", 1)
    c.stage = "reward"
    assert (c.loss.name, c.data.group_size, c.to_dict()["loss"]["name"]) == ("bradley_terry", 2, "bradley_terry")
    c.loss.name, c.data.group_size = "binary_cross_entropy", 1
    c.stage = "align"
    assert (c.loss.name, c.data.group_size) == ("binary_cross_entropy", 1)


def test_the_prompts_limit_follows_short_sequences_until_it_is_set():
    c = valid()
    assert c.data.max_prompt_length == 1800
    c.data.max_length = 512
    assert c.data.max_prompt_length == 448 and not config.problems(c)
    c.data.max_prompt_length = 100
    c.data.max_length = 1024
    assert c.data.max_prompt_length == 100
    raw = valid()
    raw.data.rule, raw.data.max_length, raw.data.max_completion_length = "raw", 64, 16
    assert not config.problems(raw)  # nothing was set that the rule would not read

"""Every config field: where it changes nothing and is refused if set, or why it always says something."""

import pytest

from fpo_jax import config
from fpo_jax.config import effects
from fpo_jax.trainer import run_inputs, run_schedule
from tests import tiny

ALWAYS = "the model, the data or the numbers depend on it beside any other field"
CHECKED = "a value that does not fit is refused where model or data are read: "
SHARED = "recipes state it for a family of runs, in some of which there is nothing that it could change: "
MACHINE = "how passes fit a machine, which may be stated whether they are made or not: "
OPTION = "losses.resolve refuses an option that the loss does not use (tests/losses/test_losses_names.py)"
EVEN_SO = "it does what it says: "

RAW = {"data.rule": "raw", "data.max_completion_length": 16}
NO_LORA = "is not used while lora.rank is 0; set lora.rank"
NO_ANSWERS = "is not used while completions.count is 0; set it"
NO_EVAL = "is not used without data.eval; set that, or unset this"
CONVERSATIONS = "is not used by data.rule='raw', which renders no conversation"
FREE = {"loss.name": "sigmoid"}
REWARD = {"stage": "reward", "loss.name": "bradley_terry"}

# field -> (value, the other fields under which it changes nothing, the message), or why it always says something
FIELDS = {
    "seed": EVEN_SO + "it names the run's randomness, also where nothing is drawn",
    "stage": ALWAYS,
    "model.path": ALWAYS,
    "model.revision": CHECKED + "a revision of a directory",
    "model.param_dtype": ALWAYS,
    "model.compute_dtype": ALWAYS,
    "model.matmul_dtype": ALWAYS,
    "model.dropout": SHARED + "a model may name no drop-out (tests/models/test_dropout.py)",
    "model.router_aux_weight": CHECKED + "a model without experts (tests/models/test_mixture.py)",
    "model.router_z_weight": CHECKED + "a model without experts (tests/models/test_mixture.py)",
    "model.remat": ALWAYS,
    "model.attention": ALWAYS,
    "lora.rank": ALWAYS,
    "lora.path": ALWAYS,
    "lora.alpha": (8.0, {}, NO_LORA),
    "lora.dropout": (0.1, {}, NO_LORA),
    "lora.modules": ("q_proj", {}, NO_LORA),
    "lora.use_rslora": (True, {}, NO_LORA),
    "lora.use_dora": (True, {}, NO_LORA),
    "lora.modules_to_save": (("norm",), {}, NO_LORA),
    "lora.base_dtype": ("nf4", {}, NO_LORA),
    "lora.loraplus_lr_ratio": (16.0, {}, NO_LORA),
    "tokenizer.path": ALWAYS,
    "tokenizer.chat_template": ("zephyr", RAW, CONVERSATIONS),
    "tokenizer.chat_template_kwargs": ('{"a": 1}', RAW, CONVERSATIONS),
    "tokenizer.eos_token": ALWAYS,
    "data.format": ALWAYS,
    "data.train": ("b", {"data.mixer": ("a=1",)}, "exclude each other"),
    "data.train_split": ("b", {"data.train": "", "data.mixer": ("a=1",)}, "exclude each other"),
    "data.train_rows": ("0:9", {"data.train": "", "data.mixer": ("a=1",)}, "exclude each other"),
    "data.mixer": ALWAYS,
    "data.decontaminate": CHECKED + "a benchmark of which no text can be compared (tests/data/test_decontamination.py)",
    "data.eval": ALWAYS,
    "data.eval_split": ("test", {}, NO_EVAL),
    "data.eval_rows": ("0:9", {}, NO_EVAL),
    "data.subfolder": CHECKED + "a folder of a local source",
    "data.revision": CHECKED + "a revision of a local source",
    "data.on_bad_row": EVEN_SO + "rows that are bad may or may not be there",
    "data.rule": ALWAYS,
    "data.assistant_turns": ("last", REWARD, "is not used by stage='reward', whose score stands at the end"),
    "data.max_length": ALWAYS,
    "data.max_prompt_length": (9, RAW, "is not used by data.rule='raw' (prompts get what"),
    "data.max_completion_length": (9, {}, "is not used by data.rule='chat' (completions get"),
    "data.truncation": ("keep_start", {"data.on_long_prompt": "drop"}, "is not used by data.on_long_prompt='drop'"),
    "data.truncate_together": (True, RAW, CONVERSATIONS),
    "data.cut_prompts_together": (False, {}, "is not used by data.rule='chat'"),
    "data.assistant_header": ("completion", RAW, CONVERSATIONS),
    "data.append_eos": ("unless_last", RAW, CONVERSATIONS),
    "data.auto_insert_empty_system": (True, RAW, CONVERSATIONS),
    "data.prepend_bos": (True, RAW, CONVERSATIONS),
    "data.thoughts": ("drop", RAW, CONVERSATIONS),
    "data.hh_split": ("first_difference", {}, "is not used by data.format='auto', only by 'hh'"),
    "data.group_size": ALWAYS,
    "data.on_empty_completion": EVEN_SO + "rows may or may not be empty",
    "data.on_long_prompt": EVEN_SO + "prompts may or may not be too long",
    "data.on_identical": SHARED + "of one completion there are no identical ones (pythia_hh_sft)",
    "data.packing": (True, {}, "is for stage 'sft', not 'align'; unset it"),
    "data.layout": ALWAYS,
    "data.row_length": (64, {"data.layout": "padded"}, "is not used by data.layout='padded'"),
    "data.buckets": ((9, 2048), {"data.layout": "packed"}, "is not used by data.layout='packed'"),
    "data.cache_dir": EVEN_SO + "data are kept there, however few",
    "data.shuffle": ALWAYS,
    "data.last_batch": EVEN_SO + "a last batch may or may not be ragged",
    "loss.name": ALWAYS,
    **{f"loss.{name}": OPTION for name in config.default().loss if name not in ("name", "tie_policy")},
    "loss.tie_policy": (
        "first",
        {"stage": "sft", "loss.name": "sft", "data.group_size": 1},
        "is not used by stage 'sft'",
    ),
    "optim.learning_rate": ALWAYS,
    "optim.schedule": ALWAYS,
    "optim.warmup_fraction": CHECKED + "a warm-up that does not end within the run (below)",
    "optim.warmup_steps": CHECKED + "a warm-up that does not end within the run (below)",
    "optim.decay_over": ("epochs", {"optim.schedule": "constant"}, "is not used by optim.schedule='constant' without"),
    "optim.b1": ALWAYS,
    "optim.b2": ALWAYS,
    "optim.eps": ALWAYS,
    "optim.weight_decay": ALWAYS,
    "optim.clip_norm": ALWAYS,
    "optim.state_dtype": ALWAYS,
    "optim.offload": ALWAYS,
    "train.batch_size": ALWAYS,
    "train.micro_batch_per_device": ALWAYS,
    "train.epochs": EVEN_SO + "the most that max_steps may ask for",
    "train.max_steps": CHECKED + "more steps than the epochs have (below)",
    "train.eval_every": SHARED + "data.eval= alone takes all evaluations away, and the first lines say so (below)",
    "train.eval_batch_per_device": MACHINE + "evaluations",
    "train.eval_groups": SHARED + "a bound; a stage of a pipeline may have no evaluation data",
    "train.save_every": EVEN_SO + "beyond the run, only its end is saved",
    "train.async_save": EVEN_SO + "a save at the end is waited for either way",
    "train.keep_checkpoints": EVEN_SO + "so many at most",
    "train.compilation_cache": ALWAYS,
    "train.keep_best": CHECKED + "what no evaluation of the run writes, or has no best (below)",
    "train.log_every": EVEN_SO + "beyond the run, no line comes to the terminal",
    "train.on_nonfinite": EVEN_SO + "numbers may or may not be finite",
    "train.hang_timeout": EVEN_SO + "a run may or may not hang",
    "train.max_nonfinite": (3, {}, "is not used while train.on_nonfinite='stop' ends the run"),
    "train.skip_spikes": CHECKED + "a window that is never full (below)",
    "train.spike_window": (64, {}, "is not used while train.skip_spikes is 0; set it too"),
    "completions.count": ALWAYS,
    "completions.prompts": ("p", {}, NO_ANSWERS),
    "completions.max_new_tokens": (9, {}, NO_ANSWERS),
    "completions.temperature": (0.0, {}, NO_ANSWERS),
    "completions.batch_per_device": (9, {}, NO_ANSWERS),
    "completions.reward_model": ("r", {}, NO_ANSWERS),
    "reference.path": ("m", FREE, "is not used by loss 'sigmoid'"),
    "reference.adapter": ("off", {}, "is not used without lora.path, as a new adapter adds nothing"),
    "reference.batch_per_device": (9, FREE, "is not used by loss 'sigmoid'"),
    "reference.cache_dir": ("d", FREE, "is not used by loss 'sigmoid'"),
    "kernel.implementation": ("chunked", REWARD, "is not used by stage 'reward'"),
    "kernel.fuse_loss": ("off", REWARD, "is not used by stage 'reward'"),
    "kernel.workspace_mib": (9, {"kernel.implementation": "reference"}, "which holds all logits at once"),
    "kernel.kept_logits_mib": (9, {"kernel.implementation": "reference"}, "which holds all logits at once"),
    "mesh.preset": EVEN_SO + "beside axes of the user's own it says when weights are gathered",
    "mesh.data": ALWAYS,
    "mesh.fsdp": ALWAYS,
    "mesh.tensor": ALWAYS,
    "mesh.expert": CHECKED + "a model without experts (tests/models/test_mixture.py)",
    "plan.groups": SHARED + "`fpo plan` alone reads it, and a run may be planned before it is made",
    "logging.tensorboard": ALWAYS,
    "logging.wandb_project": ALWAYS,
}  # fmt: skip
REFUSED = {path: entry for path, entry in FIELDS.items() if not isinstance(entry, str)}
ALSO = [  # other fields under which the same fields change nothing
    ("data.assistant_turns", "last", RAW, CONVERSATIONS),
    ("data.truncation", "keep_start", {"data.on_long_prompt": "error"}, "by data.on_long_prompt='error'"),
    ("reference.adapter", "off", {"lora.path": "a"} | FREE, "is not used by loss 'sigmoid'"),
    ("reference.adapter", "off", {"lora.path": "a", "reference.path": "m"}, "is not used by reference.path='m'"),
    ("kernel.workspace_mib", 9, REWARD, "is not used by stage 'reward'"),
    ("kernel.kept_logits_mib", 9, REWARD, "is not used by stage 'reward'"),
    ("kernel.kept_logits_mib", 9, {"kernel.implementation": "reference"}, "which holds all logits at once"),
    (
        "optim.decay_over",
        "epochs",
        {"optim.schedule": "constant", "optim.warmup_steps": 9},
        "without a warmup_fraction",
    ),
]
USED = [  # beside these, the same values have an effect
    ("train.max_nonfinite", 3, {"train.on_nonfinite": "skip"}),
    ("train.max_nonfinite", 3, {"train.skip_spikes": 6.0}),
    ("train.eval_groups", 9, {}),
    ("train.eval_every", 9, {}),
    ("optim.decay_over", "epochs", {"optim.schedule": "constant", "optim.warmup_fraction": 0.1}),
    ("optim.decay_over", "epochs", {}),
    ("data.hh_split", "first_difference", {"data.format": "hh"}),
    ("data.truncation", "keep_start", RAW),
    ("data.assistant_turns", "last", {}),
    ("reference.batch_per_device", 9, {"loss.name": "dpo"}),
    ("lora.alpha", 8.0, {"lora.path": "a"}),
]


def configured(changed):
    c = config.default()
    c.model.path = "model"
    c.data.train = "train.jsonl" if "data.mixer" not in changed else ""
    c.update_from_flattened_dict(changed)
    return c


def test_every_field_has_an_entry():
    assert FIELDS.keys() == config.flatten(config.default().to_dict()).keys()


@pytest.mark.parametrize("path", REFUSED)
def test_a_value_without_effect_is_refused_by_name_and_its_default_is_not(path):
    value, others, message = REFUSED[path]
    run_inputs.check(configured(others))
    with pytest.raises(ValueError, match="1 problem:") as raised:
        run_inputs.check(configured({**others, path: value}))
    described = str(raised.value).splitlines()[1]
    assert f"{path}={value!r} " in described and message in described


def durations(steps_per_epoch=10, **changed):
    return run_schedule.durations(
        configured({key.replace("__", "."): value for key, value in changed.items()}), steps_per_epoch=steps_per_epoch
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"train__max_steps": 11},
            r"max_steps=11 exceeds the 10 steps of train.epochs=1 \(10 an epoch\); use at most 10, or train.epochs=1.1",
        ),
        (
            {"train__max_steps": 7, "train__epochs": 0.5},
            r"exceeds the 5 steps of train.epochs=0.5 .*; use at most 5, or train.epochs=0.7",
        ),
        (
            {"train__max_steps": 1000, "steps_per_epoch": 62, "train__epochs": 2.0},
            r"exceeds the 124 steps of train.epochs=2 .* or train.epochs=16.13",
        ),
        (
            {"optim__warmup_steps": 10},
            r"optim.warmup_steps=10 is a warm-up of 10 steps in a run of 10, .*; use at most 9",
        ),
        ({"optim__warmup_steps": 4, "train__max_steps": 4}, r"a warm-up of 4 steps in a run of 4, .*; use at most 3"),
        (
            {"optim__warmup_fraction": 1.0},
            r"optim.warmup_fraction=1 is a warm-up of 10 steps in a run of 10, .*; use at most 0.9",
        ),
        (
            {"optim__warmup_fraction": 0.5, "optim__decay_over": "epochs", "train__max_steps": 5},
            r"a warm-up of 5 steps in a run of 5, .*; use at most 0.4",
        ),
        (
            {"train__skip_spikes": 6.0},
            r"skip_spikes=6 skips nothing in a run of 10 steps: .*spike_window=128 .*; use a window of at most 9",
        ),
        ({"train__skip_spikes": 6.0, "train__spike_window": 10}, r"use a window of at most 9"),
    ],
)
def test_what_never_comes_within_the_run_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        durations(**changed)


def test_the_remedies_are_the_bounds():
    assert durations(train__max_steps=10) == (10, 0, 10)
    assert durations(train__max_steps=11, train__epochs=1.1)[0] == 11
    assert durations(train__max_steps=1000, train__epochs=16.13, steps_per_epoch=62)[0] == 1000
    assert durations(optim__warmup_steps=9) == (10, 9, 10)
    assert durations(optim__warmup_fraction=0.9) == (10, 9, 10)
    assert durations(optim__warmup_fraction=0.4, optim__decay_over="epochs", train__max_steps=5) == (5, 4, 10)
    assert durations(train__skip_spikes=6.0, train__spike_window=9) == (10, 0, 10)


def test_a_share_that_rounds_up_to_the_only_step_is_said_and_not_refused(caplog):
    caplog.set_level("WARNING", "fpo_jax")
    assert durations(train__max_steps=1, optim__warmup_fraction=0.1) == (1, 1, 1)
    assert "the learning rate of the only step is 0" in caplog.text


@pytest.mark.parametrize(("path", "value", "others", "message"), ALSO)
def test_also_without_effect(path, value, others, message):
    run_inputs.check(configured(others))
    with pytest.raises(ValueError, match="1 problem:") as raised:
        run_inputs.check(configured({**others, path: value}))
    assert f"{path}={value!r} is not used" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(("path", "value", "others"), USED)
def test_with_an_effect(path, value, others):
    run_inputs.check(configured({**others, path: value}))


def test_a_run_without_evaluation_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "fpo_jax")
    tiny.write_model(tmp_path / "model", layers=1)
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", count=16)
    for source, said in (("", True), (str(pairs), False)):
        c = tiny.config(tmp_path / "model", pairs, data__eval=source, train__eval_every=7)
        caplog.clear()
        run_schedule.build(c, run_inputs.prepare(c), devices=1)
        assert ("no evaluation: neither data.eval nor completions.count is set" in caplog.text) == said


def test_a_field_that_is_not_used_is_told_with_the_value_that_unsets_it():
    c = config.default()
    c.data.rule, c.data.max_completion_length, c.data.max_prompt_length = "raw", 16, None
    [problem] = effects.idle_problems(c)
    assert problem.endswith("unset it or use rule='chat' (unset means data.max_prompt_length=1800).")
    c.data.max_prompt_length = 1800
    assert not effects.idle_problems(c)

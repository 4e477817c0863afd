"""Every knob of a run, once: typed, with its unit and reason. Experiment files in configs/ only override.

`default()` returns the locked ConfigDict; a key that is not here is an error, and so is a value of another type.
`problems()` lists everything wrong with a config, each with the nearest legal value, without touching a device.
A knob whose default is None or "" is unset; setting a loss option that the chosen loss does not use is an error.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types

DTYPES = ("float32", "bfloat16")
FORMATS = (
    "hh",
    "chat_pairs",
    "chat_groups",
    "json",
    "tldr",
    "tldr_sft",
    "imdb",
    "messages",
    "demonstrations",
)  # readers of data/records.py
STAGES = ("sft", "reward", "align")

# Knobs that may change between a checkpoint and its resumption: they do not change the mathematics of any step. Those
# of FITTING fit a run to its machine and may change the last bits of a sum, a micro-batch also what lora.dropout drops.
FITTING = frozenset(
    {
        "mesh.preset",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "train.micro_batch_per_device",
        "model.attention",
        "model.remat",
        "optim.offload",
        "kernel.implementation",
        "kernel.fuse_loss",
        "kernel.workspace_mib",
    }
)
RESUMABLE = FITTING | frozenset(
    {
        "train.save_every",
        "train.async_save",
        "train.keep_checkpoints",
        "train.compilation_cache",
        "train.log_every",
        "train.on_nonfinite",
        "train.max_nonfinite",
        "logging.tensorboard",
        "logging.wandb_project",
        "reference.batch_per_device",
        "reference.cache_dir",
        "plan.groups",
    }
)


def default() -> Config:
    """Return the locked default configuration; it needs model.path, data.train and loss options to run."""
    c: Config = ml_collections.ConfigDict()
    c.seed = 42  # data order; the model has no dropout
    c.stage = "align"  # sft | reward | align

    c.model = ml_collections.ConfigDict()
    c.model.path = ""  # Hugging Face directory or hub name: weights, config and tokenizer
    c.model.revision = ""  # hub commit; "" = the hub's main
    c.model.param_dtype = "float32"  # master weights; bfloat16 ones are rounded stochastically
    c.model.compute_dtype = "bfloat16"  # matmul operands; softmax, norms and losses are always float32
    c.model.remat = "full"  # none | dots | full | offload: what the backward pass recomputes, from nothing to all
    c.model.attention = "auto"  # auto | xla | chunked | cudnn | splash

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0  # r of the adapters that are trained instead of the weights; 0 = train the weights
    c.lora.alpha = 16.0  # what an adapter adds is scaled by alpha / rank
    c.lora.dropout = 0.0  # share of an adapter's inputs that is dropped in training
    c.lora.modules = "all-linear"  # regular expression over Hugging Face's names of the layers' matrices: q_proj|v_proj

    c.tokenizer = ml_collections.ConfigDict()
    c.tokenizer.path = ""  # "" = model.path
    c.tokenizer.chat_template = ""  # named key, Jinja file or Jinja text; "" = tokenizer's

    c.tokenizer.eos_token = ""  # spelling, where the tokenizer's files name none

    c.data = ml_collections.ConfigDict()
    c.data.format = "json"  # one of FORMATS
    c.data.train = ""  # file, directory or hub name
    c.data.train_split = ""  # split of a hub or saved data set; "" for a file
    c.data.train_rows = ""  # slice of the rows, "0:1600"; "" = all
    c.data.mixer = ()  # instead of train: several sources, each "source=fraction" or "source@split=fraction"
    c.data.decontaminate = ()  # benchmarks, each "source=column" or "source@split=column": what repeats one is dropped
    c.data.eval = ""  # as train; "" = no evaluation
    c.data.eval_split = ""
    c.data.eval_rows = ""
    c.data.subfolder = ""  # folder inside the hub repository ("helpful-base")
    c.data.revision = ""  # commit of the hub repository; pin it for a repeatable run
    c.data.on_bad_row = "error"  # error | skip rows that are not what the format says (at most 1 in 1,000)
    c.data.rule = "chat"  # chat (templates, spec 3.3) | raw (plain text, spec 2.4)
    c.data.max_length = 2048  # tokens of prompt + response
    c.data.max_prompt_length = 1800  # tokens kept of a prompt when the row is too long (rule chat)
    c.data.max_response_length = config_dict.placeholder(int)  # tokens of a response incl. EOS (rule raw)
    c.data.truncation = "keep_end"  # keep_end | keep_start of an over-long prompt
    c.data.truncate_together = True  # the original cuts every response of a group when the longest overflows
    c.data.auto_insert_empty_system = True  # the original adds an empty system turn where the template has one
    c.data.hh_split = "last_turn"  # last_turn | first_difference (the original's construction)
    c.data.group_size = 2  # K: candidates per group; records with more are cut in consecutive groups; 1: the best one
    c.data.on_empty_response = "drop"  # drop | error
    c.data.on_long_prompt = "truncate"  # truncate | drop | error
    c.data.on_identical = "keep"  # keep | drop groups whose responses are all the same text
    c.data.packing = False  # several short texts in a row of max_length, each seeing itself alone (stage sft)
    # padded: a candidate a row | packed: whole groups in rows | shared: the same, and a prompt stands once
    c.data.layout = "padded"
    c.data.row_length = config_dict.placeholder(int)  # tokens of a row of groups; unset = the length that costs least
    c.data.buckets = ()  # row lengths to compile for, ascending; () = max_length alone
    c.data.shuffle = True
    c.data.last_batch = "drop"  # drop | pad the ragged last batch of an epoch

    c.loss = ml_collections.ConfigDict()
    c.loss.name = "alpha"  # `python -m fpo_jax.losses` lists names, aliases and the options each one takes
    # Unset options take the loss's own default; setting one that the loss does not use is an error.
    c.loss.temperature = config_dict.placeholder(
        float
    )  # logits, the reference's too, are divided by it before the log-softmax
    c.loss.sft_weight = config_dict.placeholder(float)  # weight of an added token-mean NLL of the chosen response
    c.loss.target = ""  # preference | rewards: where q comes from
    c.loss.score = ""  # log_ratio | mean_logp: what p is the softmax of
    c.loss.alpha = config_dict.placeholder(float)  # of the alpha-divergence; 0 = EXO, 1 = DPO
    c.loss.weight = config_dict.placeholder(float)  # of p in the Jensen-Shannon mixture
    c.loss.epsilon = config_dict.placeholder(
        float
    )  # label of a rejected candidate; the authors' code has exp(-10), their paper 1e-3
    c.loss.normalize = config_dict.placeholder(bool)  # labels (1-epsilon, epsilon) instead of (1, epsilon)
    c.loss.tie_policy = ""  # second (the authors' code) | first | uniform: who is chosen among equal rewards
    c.loss.beta_pi = config_dict.placeholder(float)  # scale of the log-ratio score
    c.loss.beta_r = config_dict.placeholder(float)  # temperature of the reward target; unit of a reward
    c.loss.log_clamp = config_dict.placeholder(float)  # floor of log q in nats; -inf = none
    c.loss.beta = config_dict.placeholder(float)  # scale of a log-prob without reference
    c.loss.gamma_beta_ratio = config_dict.placeholder(
        float
    )  # gamma/beta, nats per token taken off the chosen response before beta
    c.loss.label_smoothing = config_dict.placeholder(
        float
    )  # CPO, R-DPO, ...; the divergences have epsilon and normalize
    c.loss.tau = config_dict.placeholder(float)  # IPO
    c.loss.delta = config_dict.placeholder(float)  # margin of the hinge losses, nats
    c.loss.chosen_nll_weight = config_dict.placeholder(
        float
    )  # RRHF, SLiC, CPO: weight of the chosen response's summed NLL
    c.loss.odds_weight = config_dict.placeholder(float)  # ORPO
    c.loss.length_penalty = config_dict.placeholder(float)  # R-DPO, logits per token
    c.loss.desirable_weight = config_dict.placeholder(float)  # KTO
    c.loss.undesirable_weight = config_dict.placeholder(float)  # KTO
    c.loss.reward_alpha = config_dict.placeholder(float)  # AlphaPO of arXiv 2501.03884
    c.loss.constraint_alpha = config_dict.placeholder(float)  # f-DPO

    c.optim = ml_collections.ConfigDict()
    c.optim.learning_rate = 1e-6  # peak
    c.optim.schedule = "cosine"  # cosine | linear | constant; all after a linear warm-up from 0
    c.optim.warmup_fraction = 0.0  # of the decay horizon, rounded up to steps
    c.optim.warmup_steps = config_dict.placeholder(int)  # instead of warmup_fraction
    c.optim.decay_over = "run"  # run | epochs: horizon when max_steps stops the run before the epochs end
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # never on norms and biases
    c.optim.clip_norm = 1.0  # global gradient norm; 0 = off
    c.optim.state_dtype = "float32"  # of AdamW's moments; bfloat16 ones are rounded stochastically
    c.optim.offload = False  # keep the moments in the host's memory between updates

    c.train = ml_collections.ConfigDict()
    c.train.batch_size = 128  # groups (with data.packing rows) per update, over all devices
    # Groups (with data.layout packed or shared: rows of groups) per device and forward pass; accumulation follows.
    c.train.micro_batch_per_device = 2
    c.train.epochs = 1.0
    c.train.max_steps = config_dict.placeholder(int)  # updates; stops the run earlier
    c.train.eval_every = 400  # updates; 0 = only at the start and the end
    c.train.eval_batch_per_device = 4  # groups or rows per device
    c.train.eval_batches = config_dict.placeholder(int)  # of an evaluation, at most; unset = all
    c.train.save_every = 100  # updates
    # Write checkpoints beside the updates that follow. Off, the run waits for each: a SIGKILL then costs save_every
    # updates at most, and on, twice as many while a save is under way.
    c.train.async_save = True
    c.train.keep_checkpoints = 2  # newest ones
    c.train.compilation_cache = ""  # folder of compiled programs that later starts read instead; "" = compile anew
    c.train.keep_best = (
        ""  # metric of an evaluation whose best checkpoint stays too: eval_loss (least) or another (most)
    )
    c.train.log_every = 5  # updates between lines on the terminal; metrics.jsonl has every update
    c.train.on_nonfinite = "stop"  # stop | skip an update whose loss or gradient is not finite
    c.train.max_nonfinite = 10  # skipped updates in a row, spikes too, before the run stops anyway
    # Skip an update whose loss or gradient norm lies so many standard deviations above the mean of the last applied
    # ones; 0 = off. 6 is rare by chance: one normal number in 10^9.
    c.train.skip_spikes = 0.0
    c.train.spike_window = 128  # applied updates that mean and deviation are taken over; none is skipped before them

    c.answers = ml_collections.ConfigDict()
    c.answers.count = 0  # prompts that the model answers at every evaluation, into answers/ of the workdir; 0 = none
    c.answers.prompts = ""  # file or hub name with a column prompt; "" = the prompts of data.eval
    c.answers.max_new_tokens = 128
    c.answers.temperature = 0.8  # 0 = greedy
    c.answers.batch_per_device = 16  # answers of a pass
    c.answers.reward_model = ""  # whose scores tell how often an answer beats the start's; loaded for that time only

    c.reference = ml_collections.ConfigDict()
    c.reference.path = ""  # "" = model.path before training
    c.reference.batch_per_device = 8  # groups or rows per device in the reference pass
    c.reference.cache_dir = ""  # "" = inside the workdir; share it between sweeps

    c.kernel = ml_collections.ConfigDict()
    c.kernel.implementation = "auto"  # auto | reference | chunked | pallas_tpu | pallas_tpu_lean | pallas_gpu
    c.kernel.fuse_loss = "auto"  # auto | on | off: the loss in the kernel of the log-probs; pallas_tpu alone can
    c.kernel.workspace_mib = 192  # logits of one vocabulary block, per device

    c.mesh = ml_collections.ConfigDict()
    c.mesh.preset = "fsdp"  # fsdp | zero3 | zero2 | multi_gpu | hybrid; the axes below replace the preset's
    c.mesh.data = config_dict.placeholder(int)  # devices along each axis; -1 = all that remain (at most one axis)
    c.mesh.fsdp = config_dict.placeholder(int)
    c.mesh.tensor = config_dict.placeholder(int)

    c.plan = ml_collections.ConfigDict()
    c.plan.groups = config_dict.placeholder(
        int
    )  # of the training data (rows of packed ones), for `--plan` where they are not at hand

    c.logging = ml_collections.ConfigDict()
    c.logging.tensorboard = True  # where tensorboardX is installed
    c.logging.wandb_project = ""  # "" = no W&B
    c.lock()
    return c


def loss_options(config: Config) -> dict[str, object]:
    """Return the loss options that are set, without the name."""
    return {key: value for key, value in config.loss.items() if key != "name" and value not in (None, "")}


def problems(config: Config) -> list[str]:
    """List what is wrong with the values, one sentence each: fact, limit, remedy."""
    found: list[str] = []

    def choice(path: str, allowed: Sequence[str]) -> None:
        value = value_at(config, path)
        if value not in allowed:
            found.append(f"{path}={value!r} is not one of {', '.join(allowed)}.")

    def number(path: str, low: float, *, exclusive: bool = False, high: float = math.inf) -> None:
        value = value_at(config, path)
        if value is None:
            return
        inside = (value > low if exclusive else value >= low) and value <= high
        if not math.isfinite(value) or not inside:
            bound = f"{'greater than' if exclusive else 'at least'} {low:g}"
            bound += "" if high == math.inf else f" and at most {high:g}"
            found.append(f"{path}={value!r} must be finite and {bound}.")

    def required(path: str, what: str) -> None:
        if not value_at(config, path):
            found.append(f"{path} is empty; give {what}.")

    choice("stage", STAGES)
    required("model.path", "a Hugging Face directory or hub name, e.g. --config.model.path=...")
    if not config.data.mixer:
        required("data.train", "a file, a directory or a hub name, e.g. --config.data.train=...")
    for name in ("train", "train_split", "train_rows") if config.data.mixer else ():
        if config.data[name]:
            found.append(f"data.{name}={config.data[name]!r} and data.mixer exclude each other; unset one.")
    choice("model.param_dtype", DTYPES)
    choice("model.compute_dtype", DTYPES)
    choice("model.remat", ("none", "dots", "full", "offload"))
    choice("model.attention", ("auto", "xla", "chunked", "cudnn", "splash"))
    number("lora.rank", 0)
    number("lora.alpha", 0.0, exclusive=True)
    if not 0 <= config.lora.dropout < 1:
        found.append(f"lora.dropout={config.lora.dropout} must lie in [0, 1).")
    try:
        re.compile(config.lora.modules)
    except re.error as error:
        found.append(f"lora.modules={config.lora.modules!r} is no regular expression: {error}.")
    unchanged = {"alpha": 16.0, "dropout": 0.0, "modules": "all-linear"}
    if config.lora.rank == 0:
        found += [
            f"lora.{key}={config.lora[key]!r} is not used while lora.rank is 0; set lora.rank."
            for key, value in unchanged.items()
            if config.lora[key] != value
        ]
    choice("data.format", FORMATS)
    choice("data.rule", ("chat", "raw"))
    choice("data.truncation", ("keep_end", "keep_start"))
    choice("data.hh_split", ("last_turn", "first_difference"))
    choice("data.on_empty_response", ("drop", "error"))
    choice("data.on_long_prompt", ("truncate", "drop", "error"))
    choice("data.on_identical", ("keep", "drop"))
    choice("data.on_bad_row", ("error", "skip"))
    choice("data.last_batch", ("drop", "pad"))
    choice("data.layout", ("padded", "packed", "shared"))
    number("data.row_length", 2)
    for path in ("data.train_rows", "data.eval_rows"):
        try:
            row_slice(value_at(config, path))
        except ValueError as error:
            found.append(f"{path}: {error}")
    number("data.max_length", 2)
    number("data.group_size", 1)
    if config.data.packing and config.stage != "sft":
        found.append(f"data.packing=True is for stage 'sft', not {config.stage!r}; unset it.")
    found += _layout_problems(config)
    found += _length_problems(config)
    choice("optim.schedule", ("cosine", "linear", "constant"))
    choice("optim.decay_over", ("run", "epochs"))
    number("optim.learning_rate", 0.0, exclusive=True)
    number("optim.warmup_fraction", 0.0, high=1.0)
    number("optim.warmup_steps", 0)
    if config.optim.warmup_steps is not None and config.optim.warmup_fraction:
        found.append(
            f"optim.warmup_steps={config.optim.warmup_steps} and optim.warmup_fraction={config.optim.warmup_fraction:g}"
            " are both set; set one (warmup_fraction=0 or warmup_steps=None)."
        )
    choice("optim.state_dtype", DTYPES)
    for path in ("optim.b1", "optim.b2"):
        number(path, 0.0, high=1.0)
    number("optim.eps", 0.0, exclusive=True)
    number("optim.weight_decay", 0.0)
    number("optim.clip_norm", 0.0)
    number("train.epochs", 0.0, exclusive=True)
    for path in ("batch_size", "micro_batch_per_device", "eval_batch_per_device", "save_every", "keep_checkpoints"):
        number(f"train.{path}", 1)
    for path in ("log_every", "max_nonfinite", "max_steps", "eval_batches"):
        number(f"train.{path}", 1)
    number("train.skip_spikes", 0.0)
    number("train.spike_window", 2)
    if config.train.spike_window != default().train.spike_window and not config.train.skip_spikes:
        found.append(
            f"train.spike_window={config.train.spike_window} is not used while train.skip_spikes is 0; set it too."
        )
    number("train.eval_every", 0)
    choice("train.on_nonfinite", ("stop", "skip"))
    if config.train.keep_best and not (config.data.eval or config.answers.count):
        found.append(f"train.keep_best={config.train.keep_best!r} needs an evaluation; set data.eval.")
    if config.train.keep_best and not config.train.keep_best.startswith("eval_"):
        found.append(f"train.keep_best={config.train.keep_best!r} must name a metric of an evaluation, e.g. eval_loss.")
    found += _answers_problems(config)
    number("answers.count", 0)
    number("answers.max_new_tokens", 1)
    number("answers.temperature", 0.0)
    number("answers.batch_per_device", 1)
    number("reference.batch_per_device", 1)
    choice("kernel.implementation", ("auto", "reference", "chunked", "pallas_tpu", "pallas_tpu_lean", "pallas_gpu"))
    choice("kernel.fuse_loss", ("auto", "on", "off"))
    number("kernel.workspace_mib", 1)
    number("plan.groups", 1)
    choice("mesh.preset", ("fsdp", "zero3", "zero2", "multi_gpu", "hybrid"))
    axes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if any(axis is not None and (axis == 0 or axis < -1) for axis in axes) or axes.count(-1) > 1:
        found.append(
            f"mesh data={axes[0]} fsdp={axes[1]} tensor={axes[2]}: each axis is a number of devices, and at most one is"
            " -1 (all that remain)."
        )
    return found


def _layout_problems(config: Config) -> list[str]:
    """List what does not go with the layout of rows."""
    found, layout = [], config.data.layout
    if layout == "padded":
        if config.data.row_length is not None:
            found.append(
                f"data.row_length={config.data.row_length} is not used by data.layout='padded'; set data.layout to"
                " packed or shared, or unset it."
            )
        return found
    if config.data.buckets:
        found.append(
            f"data.buckets={tuple(config.data.buckets)} is not used by data.layout={layout!r}, whose rows have one"
            " length; unset it."
        )
    if config.data.packing:
        found.append(f"data.packing=True and data.layout={layout!r} exclude each other; unset one.")
    if layout == "shared" and config.data.group_size == 1:
        found.append("data.layout='shared' needs responses that share a prompt, and data.group_size is 1; use packed.")
    if config.kernel.fuse_loss == "on":
        found.append(f"kernel.fuse_loss='on' reads one candidate a row, and data.layout={layout!r} puts several there.")
    return found


def _answers_problems(config: Config) -> list[str]:
    """List what keeps the model from answering prompts, and settings of answers that nobody asks for."""
    found, options = [], config.answers
    if not options.count:
        initial = default().answers
        changed = [name for name in initial if options[name] != initial[name]]
        return [f"answers.{name}={options[name]!r} is not used while answers.count is 0; set it." for name in changed]
    if not options.prompts and not config.data.eval:
        found.append(f"answers.count={options.count} needs prompts; set answers.prompts or data.eval.")
    if config.stage == "reward":
        found.append(f"answers.count={options.count}: stage 'reward' trains a model that writes no answers; use 0.")
    if config.lora.rank:
        found.append(
            f"answers.count={options.count}: answers are written by whole models, and"
            f" lora.rank={config.lora.rank} trains an adapter; use 0, and eval.generate on the export."
        )
    return found


def validate(config: Config, *, extra: Iterable[str] = ()) -> None:
    """Raise ValueError with every problem at once, numbered; `extra` adds problems other modules found."""
    raise_problems([*problems(config), *extra])


def raise_problems(found: Sequence[str]) -> None:
    """Raise ValueError with a numbered list, or return when it is empty."""
    if found:
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(found, 1))
        raise ValueError(f"the configuration has {len(found)} problem{'s' * (len(found) > 1)}:\n{lines}")


def row_slice(text: str) -> slice:
    """Parse "first:last" (either may be empty; "" = all rows) into a slice.

    >>> row_slice("0:1600")
    slice(0, 1600, None)
    """
    if not text:
        return slice(None)
    parts = text.split(":")
    try:
        first, last = (int(part) if part else None for part in parts)
    except ValueError:
        raise ValueError(f"{text!r} is not a row slice; write first:last, e.g. 0:1600 or 1600:") from None
    if (first or 0) < 0 or (last is not None and last <= (first or 0)):
        raise ValueError(f"{text!r} selects no row; write first:last with 0 <= first < last, e.g. 0:1600.")
    return slice(first, last)


def difference(old: dict, new: dict, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """List the dotted keys whose values differ between two nested dicts, as "key: old -> new"."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = sorted((flat_old.keys() | flat_new.keys()) - ignore)
    missing = "(absent)"
    pairs = ((key, flat_old.get(key, missing), flat_new.get(key, missing)) for key in keys)
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in pairs if a != b]


def _length_problems(config: Config) -> list[str]:
    data, found = config.data, []
    if data.rule == "chat":
        if data.max_response_length is not None:
            found.append(
                "data.max_response_length is not used by data.rule='chat' (responses get max_length -"
                " max_prompt_length tokens); unset it or use rule='raw'."
            )
        if not 0 < data.max_prompt_length < data.max_length:
            found.append(
                f"data.max_prompt_length={data.max_prompt_length} leaves no room for a response in"
                f" data.max_length={data.max_length}; use at most {data.max_length - 1}."
            )
    elif data.rule == "raw":
        limit = data.max_response_length
        if limit is None or not 0 < limit < data.max_length:
            found.append(
                f"data.max_response_length={limit} must lie between 1 and data.max_length - 1 ="
                f" {data.max_length - 1} for data.rule='raw'."
            )
    buckets = tuple(data.buckets)
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[-1] != data.max_length or buckets[0] < 2):
        found.append(
            f"data.buckets={buckets} must ascend and end with data.max_length={data.max_length}, e.g."
            f" {(data.max_length // 4, data.max_length // 2, data.max_length)}."
        )
    return found


def value_at(config: Config, path: str) -> Any:
    """Return the value of a dotted key."""
    value = config
    for part in path.split("."):
        value = value[part]
    return value


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Return a nested dict as one, with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat

"""Every knob of a run, once: typed, with its unit and reason. Experiment files in configs/ only override.

`default()` returns the locked ConfigDict; a key that is not here is an error, and so is a value of another type.
A knob whose default is None or "" is unset; setting a loss option that the chosen loss does not use is an error.
"""

import contextlib
from collections.abc import Iterator
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
# of FITTING fit a run to its machine and may change the last bits of a sum, layout and micro-batch also what
# lora.dropout drops.
FITTING = frozenset(
    {
        "data.layout",
        "data.row_length",
        "data.buckets",
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
        "kernel.kept_logits_mib",
    }
)
RESUMABLE = FITTING | frozenset(
    {
        "model.dropout",  # nothing is dropped either way
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
    # refuse | off: drop-out that config.json names (GPT-2's embd_pdrop, ...) is not built; refuse the model, or train
    # it without. Sampling, scores and references never drop.
    c.model.dropout = "refuse"
    c.model.attention = "auto"  # auto | xla | chunked | cudnn | mosaic | splash

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0  # r of the adapters that are trained instead of the weights; 0 = train the weights
    c.lora.alpha = 16.0  # what an adapter adds is scaled by alpha / rank
    c.lora.dropout = 0.0  # share of an adapter's inputs that is dropped in training
    c.lora.modules = "all-linear"  # regular expression over Hugging Face's names of the layers' matrices: q_proj|v_proj

    c.tokenizer = ml_collections.ConfigDict()
    c.tokenizer.path = ""  # "" = model.path
    c.tokenizer.chat_template = ""  # named key, Jinja file or Jinja text; "" = tokenizer's
    c.tokenizer.chat_template_kwargs = ""  # JSON object of template variables: {"enable_thinking": false}
    c.tokenizer.eos_token = ""  # spelling; "" = the tokenizer's

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
    c.data.truncate_together = False  # rule chat: cut every response of a group when the longest overflows (original)
    c.data.cut_prompts_together = True  # rule raw: one prompt for all candidates of a group; the original cuts each
    # How a conversation is rendered (rule chat); a run keeps it with its tokenizer, and its export carries it. The
    # defaults are the way of transformers and vLLM, what the recipes of the original set is marked.
    c.data.assistant_header = "prompt"  # prompt: what add_generation_prompt writes | completion: trained (original)
    c.data.append_eos = "where_missing"  # where the template writes no end token | unless_last (original)
    c.data.auto_insert_empty_system = False  # put an empty system turn first where the template has one (original)
    c.data.prepend_bos = False  # BOS first where the tokenizer opens texts with it and the template does not (original)
    c.data.thoughts = "refuse"  # refuse | keep (trained and scored) | drop the <think> parts of completions
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
    c.loss.tie_policy = ""  # uniform | first | second (the authors' code): who is chosen among equal rewards
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
    c.train.eval_groups = config_dict.placeholder(int)  # of the evaluation data, at equal distances; unset = all
    c.train.save_every = 100  # updates
    # Write checkpoints beside the updates that follow. Off, the run waits for each: a SIGKILL then costs save_every
    # updates at most, and on, twice as many while a save is under way.
    c.train.async_save = True
    c.train.keep_checkpoints = 2  # newest ones
    c.train.compilation_cache = ""  # folder of compiled programs that later starts read instead; "" = compile anew
    c.train.keep_best = ""  # metric of an evaluation whose best checkpoint stays too; job/best.py says which way is up
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
    c.kernel.implementation = "auto"  # auto | reference | chunked | pallas_tpu, _tpu_lean, _gpu or _triton
    c.kernel.fuse_loss = "auto"  # auto | on | off: the loss in a kernel too; the pallas_* implementations can
    c.kernel.workspace_mib = 192  # logits of one vocabulary block, per device; if all fit, one device keeps them
    # logits that stay from the forward to the backward pass, per device; 0 = none, None = where that is faster and the
    # device's memory has room
    c.kernel.kept_logits_mib = config_dict.placeholder(int)

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


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Put the name of what an error is about in front of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def loss_options(config: Config) -> dict[str, object]:
    """Return the loss options that are set, without the name."""
    return {key: value for key, value in config.loss.items() if key != "name" and value not in (None, "")}


def difference(old: dict, new: dict, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """List the dotted keys whose values differ between two nested dicts, as "key: old -> new"."""
    flat_old, flat_new = flatten(old), flatten(new)
    keys = sorted((flat_old.keys() | flat_new.keys()) - ignore)
    missing = "(absent)"
    pairs = ((key, flat_old.get(key, missing), flat_new.get(key, missing)) for key in keys)
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in pairs if a != b]


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

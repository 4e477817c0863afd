"""Every config field, once: type, default, what it means with its unit, its choices. Recipes in configs/ only override.

`default()` returns the locked ConfigDict; a key that is not here is an error, and so is a value of another type.
A field whose default is None or "" is unset; setting a loss option that the chosen loss does not use is an error.
`fpo config` prints this table and docs/config.md holds it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


class Field(NamedTuple):
    """One config field."""

    name: str  # dotted
    kind: type
    default: object  # None = unset until a recipe or a user sets it
    about: str
    choices: tuple[str, ...] = ()  # of a str
    resumes: str = ""  # MACHINE or HOST where a run may resume with another value

    def shown(self) -> str:
        """Return the default in words."""
        return "unset" if self.default in (None, "", ()) else f"default {self.default}"

    def meaning(self) -> str:
        """Return what the field means, with its choices."""
        return self.about + (f" One of {', '.join(self.choices)}." if self.choices else "")


MACHINE = "machine"  # fits a run to its devices; the last bits of a sum may change, and what lora.dropout drops
HOST = "host"  # changes no number of any step
DTYPES = ("float32", "bfloat16")
STATE_DTYPES = (*DTYPES, "int8")
MATMUL_DTYPES = ("compute_dtype", "fp8")
FORMATS = ("auto", "hh", "chat_pairs", "chat_groups", "json", "tldr", "tldr_sft", "imdb", "messages", "demonstrations")
FORMATS += ("sharegpt", "alpaca", "text", "labelled", "liked", "rankings", "scored_pairs", "text_pairs")
FORMATS += ("transcript_chats",)
STAGES = ("sft", "reward", "align")
REMAT = ("auto", "none", "dots_and_attention", "dots", "full", "offload")
ATTENTION = ("auto", "xla", "chunked", "cudnn", "mosaic", "splash")
KERNELS = ("auto", "reference", "chunked", "pallas_tpu", "pallas_gpu", "pallas_triton")
SCHEDULES = ("cosine", "linear", "constant")
PRESETS = ("fsdp", "zero3", "zero2", "multi_gpu", "hybrid")

# "(original)" marks what recipes of the original set; the defaults render conversations as transformers and vLLM do.
FIELDS = (
    Field("seed", int, 42, "Order of the data, and what is drawn: a new head, adapters, dropout."),
    Field("stage", str, "align", "What is trained.", STAGES),
    Field("model.path", str, "", "Hugging Face directory or hub name: weights, config and tokenizer."),
    Field("model.revision", str, "", "Hub commit; empty = the hub's main."),
    Field("model.param_dtype", str, "float32", "Master weights; bfloat16 ones are rounded stochastically.", DTYPES),
    Field("model.compute_dtype", str, "bfloat16", "Matmul operands; softmax, norms and losses are float32.", DTYPES),
    Field(
        "model.matmul_dtype",
        str,
        "compute_dtype",
        "Of the layers' products with weights; fp8: 8-bit floating point, a scale per array, for H100 and later.",
        MATMUL_DTYPES,
    ),
    Field(
        "model.remat",
        str,
        "auto",
        "What the backward pass recomputes, from nothing to everything; auto: the fastest that fits.",
        REMAT,
        MACHINE,
    ),
    Field(
        "model.dropout",
        str,
        "refuse",
        "Drop-out that config.json names (GPT-2's embd_pdrop, ...) is not built: refuse the model, or train without.",
        ("refuse", "off"),
        HOST,
    ),
    Field(
        "model.router_aux_weight",
        float,
        None,
        "Weight of a mixture of experts' load-balancing loss; unset: config.json's, if it has output_router_logits.",
    ),
    Field(
        "model.router_z_weight",
        float,
        None,
        "Weight of a mixture of experts' router z-loss; unset: config.json's router_z_loss_coef, mostly none.",
    ),
    Field("model.attention", str, "auto", "Implementation of attention.", ATTENTION, MACHINE),
    Field("lora.rank", int, 0, "r of the adapters that are trained instead of the weights; 0 = train the weights."),
    Field(
        "lora.path",
        str,
        "",
        "Adapter of PEFT to start from, a directory or hub name; fields of lora that are unset are as it is.",
    ),
    Field("lora.alpha", float, None, "What an adapter adds is scaled by alpha / rank; unset = 16."),
    Field("lora.use_rslora", bool, None, "Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."),
    Field("lora.use_dora", bool, None, "Train the magnitude of each output too (DoRA, arXiv 2402.09353)."),
    Field("lora.dropout", float, None, "Share of an adapter's inputs that is dropped in training; unset = 0."),
    Field(
        "lora.modules",
        str,
        "",
        "Regular expression over Hugging Face's matrix names: q_proj|v_proj, experts; empty = all-linear, of a layer.",
    ),
    Field(
        "lora.modules_to_save",
        tuple,
        (),
        "Modules that are trained whole beside the adapter, by ends of their names as in PEFT: embed_tokens, norm.",
    ),
    Field(
        "lora.base_dtype",
        str,
        "",
        "How the frozen matrices of the layers are held: nf4 = in four bits (QLoRA, arXiv 2305.14314); empty = as"
        " model.param_dtype says.",
        ("", "nf4"),
    ),
    Field(
        "lora.loraplus_lr_ratio",
        float,
        1.0,
        "Learning rate of B over that of A, which is optim.learning_rate (LoRA+, arXiv 2402.12354, advises 16).",
    ),
    Field("tokenizer.path", str, "", "Directory or hub name; empty = model.path."),
    Field("tokenizer.chat_template", str, "", "Named key, Jinja file or Jinja text; empty = the tokenizer's."),
    Field("tokenizer.chat_template_kwargs", str, "", 'JSON object of template variables: {"enable_thinking": false}.'),
    Field("tokenizer.eos_token", str, "", "Spelling; empty = the tokenizer's."),
    Field(
        "data.format",
        str,
        "auto",
        "What the examples look like; auto: what their columns say (docs/datasets.md).",
        FORMATS,
    ),
    Field("data.train", str, "", "File, directory or hub name."),
    Field("data.train_split", str, "", "Split of a hub or saved data set; empty for a file."),
    Field("data.train_rows", str, "", "Slice of the examples, 0:1600; empty = all."),
    Field("data.mixer", tuple, (), "Instead of train, several sources: each source=fraction or source@split=fraction."),
    Field(
        "data.decontaminate",
        tuple,
        (),
        "Benchmarks, each source=column or source@split=column: examples that repeat one are dropped.",
    ),
    Field("data.eval", str, "", "As data.train; empty = no evaluation on data."),
    Field("data.eval_split", str, "", "As data.train_split."),
    Field("data.eval_rows", str, "", "As data.train_rows."),
    Field("data.subfolder", str, "", "Folder inside the hub repository (helpful-base)."),
    Field("data.revision", str, "", "Commit of the hub repository; pin it for a repeatable run."),
    Field(
        "data.on_bad_row",
        str,
        "error",
        "Examples that are not what the format says; at most 1 in 1,000 is skipped.",
        ("error", "skip"),
    ),
    Field("data.rule", str, "chat", "Completions by a chat template, or as plain text.", ("chat", "raw")),
    Field("data.max_length", int, 2048, "Tokens of prompt and completion."),
    Field(
        "data.max_prompt_length",
        int,
        1800,
        "Tokens kept of a prompt when the sequence is too long (rule chat); where max_length is short, 7/8 of it.",
    ),
    Field("data.max_completion_length", int, None, "Tokens of a completion with its EOS (rule raw)."),
    Field("data.truncation", str, "keep_end", "What stays of an over-long prompt.", ("keep_end", "keep_start")),
    Field(
        "data.truncate_together",
        bool,
        False,
        "Rule chat: cut every completion of a group when the longest is too long (original).",
    ),
    Field(
        "data.cut_prompts_together",
        bool,
        True,
        "Rule raw: one prompt for all completions of a group; the original cuts each.",
    ),
    Field(
        "data.assistant_header",
        str,
        "prompt",
        "prompt: what add_generation_prompt writes belongs to it; completion: it is trained (original).",
        ("prompt", "completion"),
    ),
    Field(
        "data.append_eos",
        str,
        "where_missing",
        "Where the template writes no end token, or unless it is the very last token (original).",
        ("where_missing", "unless_last"),
    ),
    Field(
        "data.auto_insert_empty_system",
        bool,
        False,
        "Put an empty system turn first where the template has one (original).",
    ),
    Field(
        "data.prepend_bos",
        bool,
        False,
        "BOS first where the tokenizer opens texts with it and the template does not (original).",
    ),
    Field(
        "data.assistant_turns",
        str,
        "all",
        "Which assistant turns of a conversation (stage sft), and of completions of several turns, are trained.",
        ("all", "last"),
    ),
    Field(
        "data.thoughts",
        str,
        "refuse",
        "The <think> parts of completions: keep trains them as part of the completion.",
        ("refuse", "keep", "drop"),
    ),
    Field(
        "data.hh_split",
        str,
        "last_turn",
        "Where HH transcripts part; first_difference is the original's construction.",
        ("last_turn", "first_difference"),
    ),
    Field(
        "data.group_size",
        int,
        2,
        "K: completions per group; examples with more are cut in consecutive groups; 1 = the best one. Unless set,"
        " stage sft has 1.",
    ),
    Field("data.on_empty_completion", str, "drop", "Groups with an empty completion.", ("drop", "error")),
    Field("data.on_long_prompt", str, "truncate", "Groups with a long prompt.", ("truncate", "drop", "error")),
    Field("data.on_identical", str, "keep", "Groups whose completions are all the same text.", ("keep", "drop")),
    Field(
        "data.packing",
        bool,
        False,
        "Several short examples in a sequence of max_length, each attending to itself alone (stage sft).",
    ),
    Field(
        "data.layout",
        str,
        "auto",
        "padded: a completion per sequence; packed: whole groups; shared: the same, and a prompt stands once; auto:"
        " shared, or packed where no prompt is shared, as far as model and attention allow.",
        ("auto", "padded", "packed", "shared"),
        MACHINE,
    ),
    Field(
        "data.row_length",
        int,
        None,
        "Tokens of a sequence that holds groups; unset = the length that costs least.",
        resumes=MACHINE,
    ),
    Field(
        "data.buckets",
        tuple,
        (),
        "Sequence lengths to compile for, ascending; empty = max_length alone, with data.layout=auto its halves too.",
        resumes=MACHINE,
    ),
    Field(
        "data.cache_dir",
        str,
        "",
        "Folder of tokenised data, to share; empty = in the workdir, where the sources have 16 MiB or more.",
        resumes=HOST,
    ),
    Field("data.shuffle", bool, True, "Draw a new order of the groups for every epoch."),
    Field("data.last_batch", str, "drop", "The ragged last batch of an epoch.", ("drop", "pad")),
    # An unset option takes the loss's own default; setting one that the loss does not use is an error.
    Field(
        "loss.name",
        str,
        "alpha",
        "What is minimised; `fpo losses` lists names, aliases and options. Unless set, stage sft has sft, stage reward"
        " bradley_terry.",
    ),
    Field("loss.temperature", float, None, "Logits, the reference's too, are divided by it before the log-softmax."),
    Field("loss.sft_weight", float, None, "Weight of an added token-mean NLL of the chosen completion."),
    Field("loss.target", str, "", "Where q comes from: preference | rewards."),
    Field("loss.score", str, "", "What p is the softmax of: log_ratio | mean_logp."),
    Field("loss.alpha", float, None, "α of the alpha-divergence; 0 = EXO, 1 = DPO."),
    Field("loss.weight", float, None, "Weight of p in the Jensen-Shannon mixture."),
    Field(
        "loss.epsilon", float, None, "Label of a rejected completion; the authors' code has exp(-10), their paper 1e-3."
    ),
    Field("loss.normalize", bool, None, "Labels (1-epsilon, epsilon) instead of (1, epsilon)."),
    Field(
        "loss.tie_policy", str, "", "Who is chosen among equal rewards: uniform | first | second (the authors' code)."
    ),
    Field("loss.beta_pi", float, None, "Scale of the log-ratio score."),
    Field("loss.beta_r", float, None, "Temperature of the reward target; unit of a reward."),
    Field("loss.log_clamp", float, None, "Floor of log q in nats; -inf = none."),
    Field("loss.beta", float, None, "β of any loss that has one: beta_pi with a reference, tau of IPO."),
    Field("loss.gamma_beta_ratio", float, None, "gamma/beta, nats per token taken off the chosen one before beta."),
    Field("loss.label_smoothing", float, None, "CPO, R-DPO, ...; the divergences have epsilon and normalize."),
    Field("loss.tau", float, None, "IPO's regularisation."),
    Field("loss.delta", float, None, "Margin of the hinge losses, nats."),
    Field("loss.chosen_nll_weight", float, None, "RRHF, SLiC, CPO: weight of the chosen completion's summed NLL."),
    Field("loss.odds_weight", float, None, "ORPO's weight of the odds ratio."),
    Field("loss.length_penalty", float, None, "R-DPO's, logits per token."),
    Field("loss.desirable_weight", float, None, "KTO's, of chosen completions."),
    Field("loss.undesirable_weight", float, None, "KTO's, of rejected completions."),
    Field("loss.reward_alpha", float, None, "α of AlphaPO (arXiv 2501.03884)."),
    Field("loss.basu_lambda", float, None, "λ of BPO's divergence."),
    Field("loss.gradient_scale", float, None, "What BPO's loss is divided by."),
    Field("loss.constraint_alpha", float, None, "α of f-DPO's constraint."),
    Field("optim.learning_rate", float, 1e-6, "Peak."),
    Field("optim.schedule", str, "cosine", "After a linear warm-up from 0.", SCHEDULES),
    Field("optim.warmup_fraction", float, 0.0, "Of the total steps that the decay is over, rounded up to steps."),
    Field("optim.warmup_steps", int, None, "Steps; instead of warmup_fraction."),
    Field(
        "optim.decay_over",
        str,
        "run",
        "What the decay is over when max_steps stops the run before the epochs end.",
        ("run", "epochs"),
    ),
    Field("optim.b1", float, 0.9, "Decay of AdamW's first moment."),
    Field("optim.b2", float, 0.999, "Decay of AdamW's second moment."),
    Field("optim.eps", float, 1e-8, "AdamW's, beside the root of the second moment."),
    Field("optim.weight_decay", float, 0.0, "Decoupled; never on norms and biases."),
    Field("optim.clip_norm", float, 1.0, "Largest global gradient norm; 0 = off."),
    Field(
        "optim.state_dtype",
        str,
        "float32",
        "AdamW's moments; bfloat16 ones are rounded stochastically, int8 has a scale per block of 256.",
        STATE_DTYPES,
    ),
    Field("optim.offload", bool, False, "Keep the moments in the host's memory between steps.", resumes=MACHINE),
    Field("train.batch_size", int, 128, "Groups (with data.packing sequences) per step, over all devices."),
    Field(
        "train.micro_batch_per_device",
        int,
        None,
        "Groups (with data.layout packed or shared: sequences of groups) per device and forward pass; accumulation"
        " follows; unset = the fastest that fits.",
        resumes=MACHINE,
    ),
    Field("train.epochs", float, 1.0, "Epochs of the training data."),
    Field("train.max_steps", int, None, "Steps; stops the run earlier."),
    Field("train.eval_every", int, 400, "Steps; 0 = only at the start and the end."),
    Field("train.eval_batch_per_device", int, 4, "Groups or sequences per device."),
    Field("train.eval_groups", int, None, "Groups of the evaluation data, at equal distances; unset = all."),
    Field("train.save_every", int, 100, "Steps between checkpoints.", resumes=HOST),
    Field(
        "train.async_save",
        bool,
        True,
        "Write checkpoints beside the steps that follow. A SIGKILL then costs up to twice save_every steps, else once.",
        resumes=HOST,
    ),
    Field("train.keep_checkpoints", int, 2, "Newest checkpoints that stay.", resumes=HOST),
    Field(
        "train.compilation_cache",
        str,
        "",
        "Folder of compiled programs that later starts read; empty = compile anew.",
        resumes=HOST,
    ),
    Field("train.keep_best", str, "", "Metric of an evaluation, such as eval_loss, whose best checkpoint stays too."),
    Field(
        "train.log_every", int, 5, "Steps between lines on the terminal; metrics.jsonl has every step.", resumes=HOST
    ),
    Field(
        "train.on_nonfinite",
        str,
        "stop",
        "What follows a loss or a gradient that is not finite: skip leaves the state as it was.",
        ("stop", "skip"),
        HOST,
    ),
    Field(
        "train.hang_timeout",
        int,
        None,
        "Seconds without a step or a batch of an evaluation after which a run shows its stacks and ends with exit"
        " code 70; 0 = never; unset = 20 times its slowest step, at least 600.",
        resumes=HOST,
    ),
    Field("train.max_nonfinite", int, 10, "Skipped steps in a row, spikes too, before the run stops.", resumes=HOST),
    Field(
        "train.skip_spikes",
        float,
        0.0,
        "Skip a step whose loss or gradient norm lies so many standard deviations above the mean; 0 = off. 6 is rare by"
        " chance: one normal number in 10^9.",
    ),
    Field("train.spike_window", int, 128, "Applied steps of that mean; none is skipped before them."),
    Field("completions.count", int, 0, "Prompts that are answered at every evaluation, into completions/; 0 = none."),
    Field("completions.prompts", str, "", "File or hub name with a column prompt; empty = the prompts of data.eval."),
    Field("completions.max_new_tokens", int, 128, "Tokens of a sample completion."),
    Field("completions.temperature", float, 0.8, "Of the sampling; 0 = greedy."),
    Field("completions.batch_per_device", int, 16, "Sample completions that a device draws together."),
    Field(
        "completions.reward_model",
        str,
        "",
        "Its scores tell how often an answer beats the start's; loaded for that time only.",
    ),
    Field("reference.path", str, "", "Directory or hub name; empty = model.path before training."),
    Field(
        "reference.adapter",
        str,
        "start",
        "With lora.path. start: the reference is the model that training starts from, adapter included, as DPO has it"
        " after SFT; off: the base without the adapter.",
        ("start", "off"),
    ),
    Field("reference.batch_per_device", int, 8, "Groups or sequences per device for its log-probs.", resumes=HOST),
    Field("reference.cache_dir", str, "", "Folder of its log-probs, to share; empty = in the workdir.", resumes=HOST),
    Field("kernel.implementation", str, "auto", "Kernel of the LM head's log-probs.", KERNELS, MACHINE),
    Field(
        "kernel.fuse_loss",
        str,
        "auto",
        "The loss in that kernel too; the pallas_* implementations can.",
        ("auto", "on", "off"),
        MACHINE,
    ),
    Field(
        "kernel.workspace_mib",
        int,
        192,
        "Logits of one vocabulary block, per device; if all fit, one device keeps them.",
        resumes=MACHINE,
    ),
    Field(
        "kernel.kept_logits_mib",
        int,
        None,
        "Logits that stay from the forward to the backward pass, per device; 0 = none, unset = where that is faster and"
        " fits.",
        resumes=MACHINE,
    ),
    Field("mesh.preset", str, "fsdp", "Axes of the mesh; those below replace the preset's.", PRESETS, MACHINE),
    Field("mesh.data", int, None, "Devices along data; -1 = all that remain (at most one axis).", resumes=MACHINE),
    Field("mesh.fsdp", int, None, "Devices along fsdp: parameters are sharded.", resumes=MACHINE),
    Field(
        "mesh.expert",
        int,
        None,
        "Devices along expert: as fsdp, but each has experts of its own, to which the tokens are sent.",
        resumes=MACHINE,
    ),
    Field("mesh.tensor", int, None, "Devices along tensor: heads and MLPs are sharded.", resumes=MACHINE),
    Field(
        "plan.groups",
        int,
        None,
        "Of the training data (sequences of packed ones), for `fpo plan` where they are not at hand.",
        resumes=HOST,
    ),
    Field("logging.tensorboard", bool, True, "Write event files, where tensorboardX is installed.", resumes=HOST),
    Field("logging.wandb_project", str, "", "Project of Weights & Biases; empty = none.", resumes=HOST),
)
FITTING = frozenset(field.name for field in FIELDS if field.resumes == MACHINE)
RESUMABLE = frozenset(field.name for field in FIELDS if field.resumes)
# field -> stage -> its default there
OF_STAGE = {"loss.name": {"sft": "sft", "reward": "bradley_terry"}, "data.group_size": {"sft": 1}}
_PAGE = """# Config fields

`--config NAME_OR_FILE` takes a recipe, and `--config.FIELD=VALUE` changes one field of it; `=None` unsets a field whose
default is unset and not text. A key that is not here is an error, and so is a field that the run would not read. This
page is what `fpo config --markdown` prints; `(original)` marks what the recipes of the original code set.
"""


def default() -> Config:
    """Return the locked default configuration; it needs model.path, data.train and loss options to run."""
    config: Config = ml_collections.ConfigDict()
    for field in FIELDS:
        *section, name = field.name.split(".")
        place = config
        for part in section:
            if part not in place:
                place[part] = ml_collections.ConfigDict()
            place = place[part]
        place[name] = config_dict.placeholder(field.kind) if field.default is None else field.default
    for path, defaults in OF_STAGE.items():
        _follow(config, path, functools.partial(_at_stage, defaults), config.get_ref("stage"))
    _follow(config, "data.max_prompt_length", _prompt_length, config.data.get_ref("max_length"))
    config.lock()
    return config


def _follow(config: Config, path: str, fn: Callable[[Any, Any], Any], reference: Any) -> None:
    """Let a field be `fn(its default, another field)` until it is set."""
    section, _, name = path.partition(".")
    otherwise = config[section][name]
    del config[section][name]
    config[section][name] = config_dict.FieldReference(otherwise, op=_Follow(fn, (reference,)))


class _Follow(NamedTuple):
    """How a reference of ml_collections gets its value, until one is set."""

    fn: Callable[[Any, str], Any]
    args: tuple[Any, ...]


def _at_stage(defaults: dict[str, Any], otherwise: Any, stage: str) -> Any:
    return defaults.get(stage, otherwise)


def _prompt_length(otherwise: int, max_length: int) -> int:
    """Leave an eighth of short sequences to the completion."""
    return otherwise if max_length > otherwise else max_length * 7 // 8


def page() -> str:
    """Return docs/config.md."""
    lines = [_PAGE, "| field | type | default | meaning |", "|---|---|---|---|"]
    for field in FIELDS:
        default = field.shown().replace("default ", "")
        meaning = field.meaning().replace("|", "\\|")
        lines.append(f"| `{field.name}` | {field.kind.__name__} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


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

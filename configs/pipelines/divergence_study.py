"""Does it matter which f? Nine divergences, BPO, DPO and SimPO with one tuning budget on a small chat model.

Command   fpo pipeline --config configs/pipelines/divergence_study.py --workdir runs/which-f --config.base=MODEL
          --config.sources.hh=... --config.sources.chats=...; `divergence_study.py:full` is the version for one GPU
Stages    prompts of HH, of chats and of tasks that a program checks; two reward models on two halves of the pairs; K
          samples of the start, labelled; every point of the grid trained and measured on validation prompts; the best
          point of each objective with every seed, measured on test prompts; results.json, tables and plots
Original  none: docs/studies/which-f.md says what is asked, and how each outcome would be read
Expect    `small` two to two and a half hours on two CPU cores, in parts that resume
"""

from fpo_jax import config as configuration
from fpo_jax.configs.pipelines import common

DIVERGENCES = ("kl_policy_target", "kl_target_policy", "alpha", "jensen_shannon", "jeffreys", "squared_hellinger")
DIVERGENCES += ("total_variation", "pearson_chi2", "neyman_chi2")


def get_config(size: str = "small"):
    """Return the locked study; size is `small` or `full`."""
    if size not in ("small", "full"):
        raise ValueError(f"divergence_study.py:{size} is no size; give small or full.")
    full = size == "full"
    prompt_tokens, completion_tokens = (192, 96) if full else (80, 24)
    c = common.pipeline(
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        align=_section(full, tokens=prompt_tokens + completion_tokens, align=True),
        reward=_section(full, tokens=prompt_tokens + completion_tokens, align=False),
    )
    with c.unlocked():
        for key in ("reward_model", "losses", "pairing", "measure_kl", "demonstrations", "judgements"):
            del c[key]
        for key in common.SOURCE:
            del c.data[key]
        c.objectives = (*DIVERGENCES, "bpo", "dpo", "simpo")
        c.seeds = (1, 2, 3, 4, 5) if full else (1, 2, 3)  # of the chosen points; the grid has tuning_seed
        c.tuning_seed = 0
        c.sources = common.section(
            hh="Anthropic/hh-rlhf",  # format hh
            hh_split="train",
            hh_subfolder="harmless-base",
            chats="HuggingFaceH4/ultrafeedback_binarized",  # format chat_pairs
            chats_split="train_prefs",
        )
        # prompts of each of three kinds; pairs of each of two kinds, for each reward model and for both's evaluation
        c.sizes = common.section(train=24, validation=8, test=16, pairs=160, judged_pairs=32)
        if full:
            c.sizes.update({"train": 160, "validation": 40, "test": 100, "pairs": 1000, "judged_pairs": 200})
        c.grid = common.section(
            beta=(0.1, 1.0),  # of a log-ratio
            beta_without_reference=(2.0, 10.0),  # of SimPO's mean log-prob
            learning_rate=(3e-4, 1e-3),  # of adapters
        )
        c.completions = common.section(per_prompt=4, tokens=completion_tokens, prompt_tokens=prompt_tokens, seed=0)
        c.batch_size = (
            64 if full else 24
        )  # rows of a pass of sampling and scoring, per device; each pass is filled up to it
    c.lock()
    return c


def _section(full: bool, *, tokens: int, align: bool):
    """Return a training section; everything but the loss, β, rate and seed is the same for all objectives."""
    c = configuration.default()
    c.data.max_length = tokens + 1  # with the end token behind a completion that was cut
    c.data.max_prompt_length = tokens * 2 // 3
    c.data.layout = "shared"
    c.train.micro_batch_per_device = 8 if full else 4  # sequences that hold groups
    c.data.on_identical = "keep"
    c.model.compute_dtype = "bfloat16" if full else "float32"  # bfloat16 is slower on a CPU
    c.model.remat = "none"
    c.lora.rank = 16 if full else 8
    c.optim.warmup_fraction = 0.0  # its first step has rate 0, a sixth of a small run
    c.train.eval_every = 0
    c.train.save_every = 1000  # a run is shorter than what a checkpoint would save
    c.train.keep_checkpoints = 1
    c.logging.tensorboard = False
    if align:
        c.reference.batch_per_device = 2  # each start verifies three of its batches
        c.data.group_size = 4
        c.loss.name, c.loss.alpha = "alpha", 0.1
        c.loss.target, c.loss.beta_r = "rewards", 0.5  # rewards have standard deviation 1
        c.train.batch_size, c.train.max_steps = (16, 40) if full else (8, 6)
        c.train.epochs = 20.0  # max_steps ends it: runs of pairs have as many steps as those of groups
    else:
        c.stage, c.seed = "reward", 0
        c.loss.name, c.loss.alpha = "bradley_terry", None
        c.optim.learning_rate = 3e-4
        c.train.batch_size, c.train.epochs = 16, 1.0
    return c

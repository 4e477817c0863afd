"""What every pipeline has: a section for each of its stages, and what they share stated once.

A pipeline is a ConfigDict. `sft`, `reward` and `align` are configurations of train.py without the keys that it fills in
itself: where the data lie and how rows are cut (section `data`; where SFT or the reward model has other data,
`demonstrations` or `judgements`), the tokenizer, which model a stage starts from, and the seed of the alignment
(`seeds`). `sample` and `generate` are options of `fpo generate`. A stage is run if its section is there.
`fpo pipeline` runs it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import ml_collections

SOURCE = ("format", "train", "train_split", "train_rows", "eval", "eval_split", "eval_rows", "subfolder", "revision")
ROWS = ("hh_split", "rule", "max_length", "max_prompt_length", "max_completion_length")
ROWS += ("assistant_header", "append_eos", "auto_insert_empty_system", "prepend_bos", "thoughts")


def pipeline(*, base: str, align: Any, sft: Any = None, reward: Any = None, reward_model: str = "") -> Any:
    """Return a locked pipeline without sampling, on the data of `align`.

    Args:
        base: model that SFT and the reward model start from; that of `align` where there is no SFT.
        align: configuration of the alignment.
        sft: of the supervised fine-tuning; None = align `base` itself.
        reward: of the reward model; None = `reward_model` is one already.
        reward_model: directory or hub name of a sequence-classification model.
    """
    c: Any = ml_collections.ConfigDict()
    c.base = base  # Hugging Face directory or hub name
    c.reward_model = reward_model  # "" = the one that stage `reward` trains
    # one alignment each; another loss than the recipe's has the options that mean the same
    c.losses = (align.loss.name,)
    c.seeds = (align.seed,)  # one alignment each: order of the data, and of nothing else
    # "" = align to all samples with their rewards | best_worst = to the best and the worst of each prompt
    c.pairing = ""
    c.measure_kl = False  # KL(aligned || start) of every alignment, on its answers; they must be drawn untruncated
    c.tokenizer = copy.deepcopy(align.tokenizer)
    c.data = _only(align.data, (*SOURCE, *ROWS))
    c.demonstrations = ml_collections.ConfigDict(dict.fromkeys(SOURCE, ""))  # of SFT; all "" = as `data`
    c.judgements = ml_collections.ConfigDict(dict.fromkeys(SOURCE, ""))  # of the reward model; all "" = as `data`
    for name, section in (("sft", sft), ("reward", reward), ("align", align)):
        if section is not None:
            c[name] = trimmed(section, seed=name != "align")
    c.lock()
    return c


def sampling(**options: Any) -> Any:
    """Return a section `sample` or `generate`: how many completions are drawn to how many prompts, and how."""
    c: Any = ml_collections.ConfigDict()
    c.num_prompts = 0  # 0 = all
    c.num_return = 4  # K, per prompt and seed
    c.seeds = (0,)  # one draw of num_return each
    c.temperature = 0.8
    c.top_k = 0  # 0 = off
    c.top_p = 1.0  # 1 = off
    c.max_new_tokens = 200
    c.batch_size = 64  # rows at once, per device
    c.dedup = "none"  # none | consecutive | all: which repeated prompts are left out
    c.update(options)
    return c


def section(**values: Any) -> Any:
    """Return a section with these keys."""
    return ml_collections.ConfigDict(values)


def add(c: Any, name: str, section: Any) -> None:
    """Give a locked pipeline one more section."""
    with c.unlocked():
        c[name] = section
    c.lock()


def replace_align(c: Any, align: Any) -> None:
    """Give a locked pipeline another alignment on the same data."""
    add(c, "align", trimmed(align, seed=False))
    c.losses, c.seeds = (align.loss.name,), (align.seed,)


def _only(section: Any, keys: Sequence[str]) -> Any:
    """Return a section with these keys alone, placeholders kept."""
    c = copy.deepcopy(section)
    with c.unlocked():
        for key in set(c) - set(keys):
            del c[key]
    return c


def trimmed(section: Any, *, seed: bool) -> Any:
    """Take out what the pipeline fills in, so that setting it is an error and not ignored."""
    own = copy.deepcopy(section)  # with the placeholders of unset fields, which know their types
    with own.unlocked():
        for key in (*SOURCE, *ROWS):
            del own.data[key]
        del own.model["path"], own["tokenizer"], own.data["mixer"]
        if not seed:
            del own["seed"]
    own.lock()
    return own

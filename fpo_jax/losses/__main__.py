"""Print every loss: names, equations, the options each one reads with their defaults, and what the options mean.

`fpo losses NAME [key=value ...]` prints what one name stands for, with every option filled in.
"""

import sys
from collections.abc import Sequence

from fpo_jax.io import terminal
from fpo_jax.losses.described import IN_TRL, in_words, settings
from fpo_jax.losses.f_divergences import DIVERGENCES
from fpo_jax.losses.loss import Loss
from fpo_jax.losses.options import GENERAL, OPTIONS, Option, options_of
from fpo_jax.losses.preference_losses import LETTERS, OBJECTIVES
from fpo_jax.losses.registry import PRESETS, names_of, resolve
from fpo_jax.losses.scores import SCORES
from fpo_jax.losses.targets import TARGETS


def table() -> str:
    """Return the whole table as text."""
    lines = ["Divergences: D_f(p‖q) = Σ_i q_i f(p_i/q_i), p = softmax(scores), q the target"]
    for row in DIVERGENCES.values():
        labels = {key: OPTIONS[key].default for key in row.parameters} | dict(row.parameters)
        labels |= {"epsilon": row.epsilon, "log_clamp": row.log_clamp}
        lines += ["", f"{row.name}  ({', '.join(names_of(row.name)) or 'no other name'})", f"    {row.equation}"]
        lines += [f"    limits: {row.limits}", f"    defaults: {settings(labels)}"]
    lines += ["", "each takes", f"    {', '.join((*GENERAL, 'target', 'score'))}"]
    lines += [f"    with target={name}: {', '.join(target.options)}" for name, target in TARGETS.items()]
    lines += [f"    with score={name}: {', '.join(score.options)}" for name, score in SCORES.items()]
    lines += ["", f"Objectives ({LETTERS})"]
    for row in OBJECTIVES.values():
        lines += ["", f"{row.name}  ({row.source})", f"    {row.equation}"]
        own = {key: value for key, value in options_of(row.name).items() if key not in GENERAL}
        lines += [f"    options: {settings(own)}"]
    lines += ["", "Names that fix options"]
    for name, preset in PRESETS.items():
        if preset.fixed:
            lines.append(f"    {name:<13} {preset.name}: {settings(preset.fixed)}")
    lines += ["", "Not what TRL calls"]
    lines += [f"    {name:<13} {meaning}" for name, meaning in IN_TRL.items()]
    lines += ["", "Options"]
    lines += [f"    {row.name:<18} {row.range or 'True | False':<31} {row.meaning}" for row in OPTIONS.values()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table or one loss; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        print(in_words(arguments[0], _resolved(*arguments)) if arguments else table())
    except ValueError as error:
        terminal.refuse("losses", error)
        return 2
    return 0


def _resolved(name: str, *words: str) -> Loss:
    """Return the loss of a name and of options as `key=value`."""
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise ValueError(f"{' '.join(wrong)} is no option; write key=value, e.g. beta=2.0.")
    given = dict(word.split("=", 1) for word in words)
    return resolve(name, **{key: _value(OPTIONS.get(key), text) for key, text in given.items()})


def _value(option: Option | None, text: str) -> object:
    """Return the text in the option's type, or as it is for `resolve` to refuse."""
    if option is not None and option.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return float(text) if option is not None and option.type is float else text
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

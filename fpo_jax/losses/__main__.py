"""Print every loss: names, equations, the options each one reads with their defaults, and what the options mean."""

from fpo_jax.losses.divergences import DIVERGENCES
from fpo_jax.losses.names import PRESETS, names_of
from fpo_jax.losses.objectives import OBJECTIVES
from fpo_jax.losses.options import GENERAL, OPTIONS, options_of
from fpo_jax.losses.scores import SCORES
from fpo_jax.losses.targets import TARGETS


def table() -> str:
    """Return the whole table as text."""
    lines = ["Divergences: D_f(p‖q) = Σ_i q_i f(p_i/q_i), p = softmax(scores), q the target"]
    for row in DIVERGENCES.values():
        labels = {key: OPTIONS[key].default for key in row.parameters} | dict(row.parameters)
        labels |= {"epsilon": row.epsilon, "log_clamp": row.log_clamp}
        lines += ["", f"{row.name}  ({', '.join(names_of(row.name)) or 'no other name'})", f"    {row.equation}"]
        lines += [f"    limits: {row.limits}", f"    defaults: {_settings(labels)}"]
    lines += ["", "each takes", f"    {', '.join((*GENERAL, 'target', 'score'))}"]
    lines += [f"    with target={name}: {', '.join(target.options)}" for name, target in TARGETS.items()]
    lines += [f"    with score={name}: {', '.join(score.options)}" for name, score in SCORES.items()]
    lines += ["", "Objectives (w chosen, l other; logp sum, ℓ mean per token, Δ = logp - logp_ref)"]
    for row in OBJECTIVES.values():
        lines += ["", f"{row.name}  ({row.source})", f"    {row.equation}"]
        own = {key: value for key, value in options_of(row.name).items() if key not in GENERAL}
        lines += [f"    options: {_settings(own)}"]
    lines += ["", "Names that fix options"]
    for name, preset in PRESETS.items():
        if preset.fixed:
            lines.append(f"    {name:<13} {preset.name}: {_settings(preset.fixed)}")
    lines += ["", "Options"]
    lines += [f"    {row.name:<18} {row.range or 'True | False':<31} {row.meaning}" for row in OPTIONS.values()]
    return "\n".join(lines)


def _settings(options) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    )


if __name__ == "__main__":
    print(table())

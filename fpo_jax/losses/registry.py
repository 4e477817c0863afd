"""From a loss's name and options to a `Loss`; every name of the original code, and nothing else, resolves.

The original dispatches on substrings ("js" anywhere in the name; no suffix trains on raw rewards). Here each of its
names is one row of PRESETS: a canonical row of the tables, options that the name fixes, and defaults of its own. A name
that means one thing everywhere fixes what it means; `exo` alone is free, as the original has it with a reference and
without.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from fpo_jax.losses.f_divergences import DIVERGENCES, NO_CLAMP
from fpo_jax.losses.loss import Loss
from fpo_jax.losses.options import OPTIONS, Value, options_of
from fpo_jax.losses.preference_losses import OBJECTIVES


@dataclasses.dataclass(frozen=True, eq=False)
class Preset:
    """What a name stands for."""

    name: str  # canonical, a key of DIVERGENCES or OBJECTIVES
    fixed: Mapping[str, Value] = dataclasses.field(default_factory=dict)  # given otherwise: an error
    defaults: Mapping[str, Value] = dataclasses.field(default_factory=dict)


_PAIRS = {"target": "preference", "score": "log_ratio"}
_REWARDS = {"target": "rewards", "score": "log_ratio"}
_PAIRS_WITHOUT_REFERENCE = {"target": "preference", "score": "mean_logp"}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # The authors' Pythia pipeline. Labels of a pair: hard in dpo, else (1, ε). Floor of log q: none in dpo and exo.
        "dpo-pref": Preset("kl_target_policy", {**_PAIRS, "epsilon": 0.0, "normalize": False}),
        "dpo-rw": Preset("kl_target_policy", {**_REWARDS, "log_clamp": NO_CLAMP}),
        "exo-pref": Preset("kl_policy_target", _PAIRS),
        "exo-rw": Preset("kl_policy_target", {**_REWARDS, "log_clamp": NO_CLAMP}),
        "alphapo-pref": Preset("alpha", _PAIRS),
        "alphapo-rw": Preset("alpha", _REWARDS),
        "jspo-pref": Preset("jensen_shannon", {**_PAIRS, "weight": 0.5}),
        "jspo-rw": Preset("jensen_shannon", {**_REWARDS, "weight": 0.5}),
        "jeffpo-pref": Preset("jeffreys", _PAIRS),
        "jeffpo-rw": Preset("jeffreys", _REWARDS),
        "shpo-pref": Preset("squared_hellinger", _PAIRS),
        "shpo-rw": Preset("squared_hellinger", _REWARDS),
        # The authors' SimPO-side trainer; its `hinge` is a row of OBJECTIVES, its `exo` is exo with score="mean_logp".
        "exo": Preset("kl_policy_target"),
        "sigmoid": Preset("kl_target_policy", _PAIRS_WITHOUT_REFERENCE),
        "alphapo": Preset("alpha", _PAIRS_WITHOUT_REFERENCE),
        # Other people's names.
        "simpo": Preset("kl_target_policy", _PAIRS_WITHOUT_REFERENCE),
        "dpo": Preset("kl_target_policy", _PAIRS),
        "cdpo": Preset("kl_target_policy", {**_PAIRS, "normalize": True}, {"epsilon": 0.1}),
        **{name: Preset(name) for name in (*DIVERGENCES, *OBJECTIVES)},
    }
)


BETA = "beta"  # also stands for what a loss has instead of an option of that name
_BETAS = ("beta_pi", "tau")  # DPO's β, scale of a log-ratio; IPO's, which TRL calls β


def resolve(name: str, **options: object) -> Loss:
    """Return the loss of that name with every option filled in.

    Args:
        name: a key of PRESETS: a row of DIVERGENCES or OBJECTIVES, an alias, or a name of the original code.
        **options: rows of OPTIONS; None counts as not given. Divergences take `target` ("preference" | "rewards") and
            `score` ("log_ratio" | "mean_logp"), and the options of those two. `beta` is the β of any loss that has
            one: `beta_pi` with a reference, `tau` of IPO.

    Raises:
        ValueError: unknown name; or a numbered list of all problems: unknown options, options that this loss does not
            read, values outside their range or against the name, labels of 0 where the divergence is infinite.

    >>> loss = resolve("alphapo-rw", alpha=0.025, beta_r=0.1)
    >>> loss.name, loss.options["target"], loss.options["log_clamp"], loss.options["beta_r"]
    ('alpha', 'rewards', -10.0, 0.1)
    >>> resolve("alphapo-wr")
    Traceback (most recent call last):
    ValueError: unknown loss 'alphapo-wr'; nearest: alphapo-rw, alphapo, alphapo-pref; ...
    """
    preset = _preset(name)
    given = {key: value for key, value in options.items() if value is not None}
    parsed, problems = _parse(given)
    settings = {**preset.defaults, **parsed, **preset.fixed}
    choices = {key: str(settings[key]) for key in ("target", "score") if key in settings}
    defaults = options_of(preset.name, **choices)
    own = _own_beta(defaults)
    if BETA in parsed and own not in (BETA, None):
        if own in parsed:
            problems.append(f"beta={parsed[BETA]!r} is {own} of {name!r}, which is given too; leave one out")
        parsed[own] = settings[own] = parsed.pop(BETA)
    for key, value in parsed.items():
        if key not in defaults:
            problems.append(_unused(name, key, defaults))
        elif preset.fixed.get(key, value) != value:
            problems.append(
                f"{key}={value!r} contradicts {name!r}, which fixes {key}={preset.fixed[key]!r}; leave it out, or use "
                f"the name {preset.name!r}"
            )
    filled = {key: settings.get(key, default) for key, default in defaults.items()}
    problems += _hard_label_problems(preset.name, filled)
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise ValueError(f"loss {name!r}, {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")
    return Loss(preset.name, MappingProxyType(filled))


def _own_beta(defaults: Mapping[str, Value]) -> str | None:
    """Return the option that is the β of a loss with these options; None where it has none."""
    return next((key for key in (BETA, *_BETAS) if key in defaults), None)


def carried_over(options: Mapping[str, object], *, of: str, to: str) -> dict[str, Value]:
    """Return those options of one loss that mean the same for another, which has its own defaults for the rest.

    Options mean the same within a family, the losses of one score: a β of CPO's log-probs is not SimPO's, nor KTO's
    DPO's. There a loss keeps what its name fixes and what it has a default of its own for, as DPO has its hard labels.

    Args:
        options: given to `of`; None counts as not given.
        of: the name of the loss that has them.
        to: the name of the other one. Where it leaves target or score free, it gets those of `of`.

    Raises:
        ValueError: an unknown name, or options that `of` does not take.

    >>> carried_over({"alpha": 0.99, "beta": 2.5}, of="alphapo", to="exo")
    {'score': 'mean_logp', 'beta': 2.5}
    >>> carried_over({"alpha": 0.99, "beta": 2.5}, of="alphapo", to="dpo")
    {}
    """
    own, preset = resolve(of, **options), _preset(to)
    named = {key: _own_beta(own.options) or key if key == BETA else key for key in options}
    given = {named[key]: own.options[named[key]] for key, value in options.items() if value is not None}
    if to == of:
        return given
    choices: dict[str, Value] = {}
    if preset.name in DIVERGENCES:
        choices = {"target": own.options.get("target", "preference"), "score": own.family}
        choices = {key: value for key, value in choices.items() if value in OPTIONS[key].choices}
        choices = {key: value for key, value in choices.items() if key not in preset.fixed}
    alone, other = resolve(to), resolve(to, **choices)
    if other.family != own.family:
        return {}
    defaults = resolve(of, **{key: given[key] for key in ("target", "score") if key in given}).options
    taken = {key: value for key, value in choices.items() if value != alone.options[key]}
    return taken | {
        key: value
        for key, value in given.items()
        if key not in ("target", "score", *preset.fixed) and other.options.get(key) == defaults[key]
    }


def names_of(canonical: str) -> tuple[str, ...]:
    """Return the other names that resolve to a canonical row.

    >>> names_of("kl_policy_target")
    ('exo-pref', 'exo-rw', 'exo')
    """
    return tuple(name for name, preset in PRESETS.items() if preset.name == canonical and name != canonical)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown loss {name!r}; {_nearest(name, PRESETS)}known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def _parse(given: Mapping[str, object]) -> tuple[dict[str, Value], list[str]]:
    parsed, problems = {}, []
    for key, value in given.items():
        if key not in OPTIONS:
            problems.append(f"unknown option {key!r}; {_nearest(key, OPTIONS)}known: {', '.join(OPTIONS)}")
            continue
        try:
            parsed[key] = OPTIONS[key].parse(value)
        except ValueError as error:
            problems.append(str(error))
    return parsed, problems


def _unused(name: str, key: str, defaults: Mapping[str, Value]) -> str:
    setting = ", ".join(f"{choice}={defaults[choice]!r}" for choice in ("target", "score") if choice in defaults)
    hint = "; label smoothing ls is epsilon=ls with normalize=True here" if key == "label_smoothing" and setting else ""
    return (
        f"{key!r} is not used by {name!r}{f' with {setting}' if setting else ''}; it uses: "
        f"{', '.join(defaults) or 'no option'}{hint}"
    )


def _hard_label_problems(name: str, filled: Mapping[str, Value]) -> list[str]:
    if filled.get("epsilon") != 0.0:
        return []
    row = DIVERGENCES[name]
    problems = []
    if row.slope_at_infinity(**{key: filled[key] for key in row.parameters}) == float("inf"):
        shown = "".join(f" with {key}={filled[key]}" for key in row.parameters)
        problems.append(
            f"epsilon=0 makes {name!r}{shown} infinite (f(u)/u grows without bound); give epsilon=1e-3, say"
        )
    if filled["normalize"]:
        problems.append("normalize=True changes nothing at epsilon=0; give an epsilon in (0, 0.5), or leave it out")
    return problems


def _nearest(word: str, known: Mapping[str, object]) -> str:
    nearest = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(nearest)}; " if nearest else ""

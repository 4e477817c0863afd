"""AlpacaEval's length-controlled win rate: what the judge would have preferred had both answers been equally long.

Length-Controlled AlpacaEval (arXiv 2404.04475) fits, per model, a logistic regression of the judge's preference

    P(model preferred) = sigmoid(w_l tanh((len_1 - len_2) / std) + w_d difficulty + w_m)

and averages it over the instructions with the first term left out. Rows of two baselines that were gamed to be brief or
verbose, without the third term, hold w_l and w_d down at a fifth of the weight of the model's own rows. `difficulty` of
each instruction and those rows are the file df_gamed.csv of the hub data set tatsu-lab/alpaca_eval; nothing of it is
here. The regression is scikit-learn's, asked as the alpaca_eval package asks it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from fpo_jax.eval.benchmarks import judgement_files
from fpo_jax.io import terminal

HUB, HUB_NAME, HUB_FILE = "hub", "tatsu-lab/alpaca_eval", "df_gamed.csv"
# the weights in the order of the features, by the names that published tables give them
WEIGHTS = ("np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)")
GAMED_WEIGHT = 0.2  # of both gamed baselines together
FOLDS = 5
STRENGTHS = np.logspace(-4, 4, 10)  # inverse strengths of the L1 penalty that cross-validation chooses from
SEED = 123  # liblinear visits the coordinates in an order drawn from it


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What is known of the instructions beforehand."""

    difficulty: dict[int, float]  # by the number of the instruction
    gamed_GF: np.ndarray  # features of the gamed baselines' rows; G = 0 in a file of difficulties alone
    gamed_preference_G: np.ndarray  # in [0, 1]
    gamed_weight_G: np.ndarray
    source: str


@dataclasses.dataclass(frozen=True)
class Controlled:
    """A length-controlled win rate in percent, its standard error, and the weights it comes from."""

    win_rate: float
    standard_error: float
    weights: dict[str, float]


def read_instructions(source: str) -> Instructions:
    """Read df_gamed.csv, or a table `index, instruction_difficulty` of difficulties alone.

    Args:
        source: a path, or "hub" for the published file, which is kept in the hub cache.

    Raises:
        ValueError: it is not there, or no such table.
    """
    path = _from_hub() if source == HUB else Path(source)
    if not path.is_file():
        raise ValueError(
            f"--difficulty={source} is no file; give the {HUB_FILE} of the hub data set {HUB_NAME}, or --difficulty=hub"
            " to fetch it."
        )
    rows = judgement_files.read(path, fields=("instruction_difficulty",))
    key = "index" if "index" in rows[0][1] else next(iter(rows[0][1]))  # pandas leaves the name of an index empty
    difficulty: dict[int, float] = {}
    for place, row in rows:
        difficulty.setdefault(
            judgement_files.whole(place, row, key), judgement_files.number(place, row, "instruction_difficulty")
        )
    gamed = [(place, row) for place, row in rows if row.get("preference")] if "not_gamed_baseline" in rows[0][1] else []
    features = [_gamed_features(place, row) for place, row in gamed]
    preferences = np.array([judgement_files.number(place, row, "preference") for place, row in gamed])
    if len(gamed) and not ((preferences >= 0) & (preferences <= 1)).all():
        raise ValueError(f"{path}: preferences of the gamed baselines must lie in [0, 1]; this is not {HUB_FILE}.")
    features_GF = np.array(features).reshape(-1, 3)
    weights_G = np.where(features_GF[:, 2] == 1, 1.0, GAMED_WEIGHT / 2)
    return Instructions(difficulty, features_GF, preferences, weights_G, str(path))


def fit(
    preferences: Sequence[float | None], extra_lengths: Sequence[int], indices: Sequence[int], known: Instructions
) -> Controlled:
    """Fit the regression to a model's judgements and return its win rate at equal lengths.

    Args:
        preferences: per instruction, of the model over the baseline, in [0, 1]; None = not judged.
        extra_lengths: characters of the baseline's answer less those of the model's.
        indices: number of each instruction.
        known: with the rows of the gamed baselines.

    Raises:
        ValueError: scikit-learn or the gamed rows are missing, an instruction is unknown, the lengths all differ alike.
    """
    if not len(known.gamed_GF):
        raise ValueError(
            f"{known.source} holds difficulties alone, and a fit also needs the gamed baselines' rows; give {HUB_FILE}"
            f" of the hub data set {HUB_NAME}, or take fitted weights with --weights."
        )
    difficulty_N = _difficulties(indices, known)
    lengths_N = np.array(extra_lengths, np.float64)
    spread = lengths_N.std(ddof=1) if len(lengths_N) > 1 else 0.0
    if not spread:
        raise ValueError(
            f"all {len(lengths_N)} answers differ from the baseline's by {lengths_N[0]:.0f} characters, so that length"
            " cannot be told from quality; leave --difficulty out."
        )
    features_NF = np.stack([np.tanh(lengths_N / spread), difficulty_N, np.ones_like(lengths_N)], 1)
    judged_N = np.array([preference is not None for preference in preferences])
    own_N = np.array([preference for preference in preferences if preference is not None], np.float64)
    weights_F = _regress(
        np.concatenate([known.gamed_GF, features_NF[judged_N]]),
        np.concatenate([known.gamed_preference_G, own_N]),
        np.concatenate([known.gamed_weight_G, np.ones(len(own_N))]),
    )
    return _controlled(dict(zip(WEIGHTS, weights_F.tolist(), strict=True)), difficulty_N)


def predict(weights: Mapping[str, float], indices: Sequence[int], known: Instructions) -> Controlled:
    """Return the win rate that fitted weights stand for; those of two models' difference compare the two."""
    return _controlled(dict(weights), _difficulties(indices, known))


def read_weights(path: Path) -> dict[str, dict[str, float]]:
    """Read a table of published weights: model -> weight of each feature.

    Raises:
        ValueError: the table is missing or has other columns.
    """
    rows = judgement_files.read(path, fields=WEIGHTS)
    return {
        next(iter(row.values())): {name: judgement_files.number(place, row, name) for name in WEIGHTS}
        for place, row in rows
    }


def _from_hub() -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(HUB_NAME, HUB_FILE, repo_type="dataset"))
    except OSError as error:
        raise ValueError(
            f"{HUB_FILE} of the hub data set {HUB_NAME} could not be fetched ({type(error).__name__}:"
            f" {terminal.first_line(error)}); check the network, or download it elsewhere and give its path with"
            " --difficulty."
        ) from error


def _gamed_features(place: str, row: Mapping[str, Any]) -> tuple[float, float, float]:
    if row["not_gamed_baseline"] not in ("True", "False"):
        raise ValueError(f"{place}: not_gamed_baseline={row['not_gamed_baseline']!r} is neither True nor False.")
    length = judgement_files.number(place, row, "std_delta_len")
    difficulty = judgement_files.number(place, row, "instruction_difficulty")
    return math.tanh(length), difficulty, float(row["not_gamed_baseline"] == "True")


def _difficulties(indices: Sequence[int], known: Instructions) -> np.ndarray:
    unknown = [index for index in indices if index not in known.difficulty]
    if unknown:
        raise ValueError(
            f"{known.source} knows {len(known.difficulty)} instructions and not number {unknown[0]}"
            f" ({len(unknown)} in all); length control is for the instructions of AlpacaEval 2."
        )
    return np.array([known.difficulty[index] for index in indices])


def _controlled(weights: dict[str, float], difficulty_N: np.ndarray) -> Controlled:
    logits_N = weights[WEIGHTS[2]] + weights[WEIGHTS[1]] * difficulty_N
    rates_N = np.exp(-np.logaddexp(0, -logits_N))
    error = rates_N.std(ddof=1) / math.sqrt(len(rates_N)) if len(rates_N) > 1 else 0.0
    return Controlled(100 * float(rates_N.mean()), 100 * float(error), weights)


def _regress(features_NF: np.ndarray, targets_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Return the weights of a logistic regression on probabilities, its L1 penalty chosen by cross-validated log loss.

    A row of target t is a row of class 1 with weight t and one of class 0 with weight 1 - t, both in one fold.
    """
    try:
        from sklearn import linear_model, model_selection
    except ImportError as error:
        raise ValueError(
            "length control fits a logistic regression with scikit-learn, which is not installed; run pip"
            " install 'scikit-learn>=1.8'."
        ) from error
    count = len(targets_N)
    features_MF = np.concatenate([features_NF, features_NF])  # M = 2 N
    classes_M = np.repeat([1, 0], count)
    weights_M = np.concatenate([targets_N * weights_N, (1 - targets_N) * weights_N])

    def fitted(rows_R: np.ndarray, strength: float) -> Any:
        regression = linear_model.LogisticRegression(
            C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=SEED
        )
        return regression.fit(features_MF[rows_R], classes_M[rows_R], sample_weight=weights_M[rows_R])

    scores_KC = []
    folds = model_selection.GroupKFold(FOLDS).split(features_MF, classes_M, groups=np.tile(np.arange(count), 2))
    for train_R, held_R in folds:
        own_R = held_R[held_R < count]
        scores_KC.append(
            [
                _log_loss(
                    fitted(train_R, strength).predict_proba(features_NF[own_R])[:, 1],
                    targets_N[own_R],
                    weights_N[own_R],
                )
                for strength in STRENGTHS
            ]
        )
    best = STRENGTHS[np.argmin(np.mean(scores_KC, 0))]
    return fitted(np.arange(2 * count), best).coef_[0]


def _log_loss(rates_N: np.ndarray, targets_N: np.ndarray, weights_N: np.ndarray) -> float:
    rates_N = np.clip(rates_N, 1e-15, 1 - 1e-15)
    return -float(np.mean(weights_N * (targets_N * np.log(rates_N) + (1 - targets_N) * np.log1p(-rates_N))))

"""The four panels: fitted numbers against closed forms and against what the original's figure shows."""

import json

import numpy as np
import pytest

from fpo_jax.eval.report import divergence_figure
from tests import tolerances

# Heights and places of the peaks, read off the figure of f-PO's repository (two or three digits; places to 0.3).
PUBLISHED = {
    ("kl_policy_target", None): (2.0, 0.255),
    ("kl_target_policy", None): (0.3, 0.152),
    ("jeffreys", None): (1.0, 0.177),
    ("alpha", 0.2): (1.5, 0.196),
    ("alpha", 0.5): (1.0, 0.168),
    ("alpha", 0.8): (0.5, 0.157),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    out = tmp_path_factory.mktemp("figure")
    assert divergence_figure.main(["--out", str(out)]) == 0
    return out


def test_the_fits_peak_where_the_published_curves_do(written):
    fits = json.loads((written / "divergences.json").read_text())["fits"]
    assert len(fits) == len(PUBLISHED)
    for one in fits:
        mean, peak = PUBLISHED[one["loss"], one["options"].get("alpha")]
        assert abs(one["peak"] - peak) < tolerances.FIGURE_PEAK, one
        assert abs(one["mean"] - mean) < tolerances.FIGURE_PLACE, one


def test_the_mass_covering_fit_matches_the_moments_of_the_target(written):
    """KL(target, policy) over Gaussians is least at the target's own mean and variance."""
    fits = json.loads((written / "divergences.json").read_text())["fits"]
    (fit,) = [one for one in fits if one["loss"] == "kl_target_policy"]
    weights, means, deviations = np.array(divergence_figure.TARGET).T
    mean = weights @ means
    deviation = np.sqrt(weights @ (deviations**2 + (means - mean) ** 2))
    np.testing.assert_allclose([fit["mean"], fit["deviation"]], [mean, deviation], rtol=tolerances.FIGURE_MOMENTS)


def test_alpha_moves_from_one_kl_to_the_other(written):
    """Between zero-forcing (alpha 0) and mass-covering (alpha 1), the wider the larger alpha is."""
    fits = json.loads((written / "divergences.json").read_text())["fits"]
    by_name = {(one["loss"], one["options"].get("alpha")): one["deviation"] for one in fits}
    order = [("kl_policy_target", None), ("alpha", 0.2), ("alpha", 0.5), ("alpha", 0.8), ("kl_target_policy", None)]
    assert np.all(np.diff([by_name[name] for name in order]) > 0)


def test_the_picture_is_there(written):
    assert (written / "divergences.png").read_bytes().startswith(b"\x89PNG")

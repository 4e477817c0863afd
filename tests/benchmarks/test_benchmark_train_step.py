"""What `benchmarks/train_step_sides.py` reports of a trainer."""

import json
import subprocess
import sys

from tests.paths import REPO

ROUNDS = """
from benchmarks.train_step_sides import Case, Turns
turns = Turns(Case("", 9, layers=1, groups=1, candidates=2, prompt=4, completion=4, updates=1))
for step, mib in enumerate([256, 64, 32]):
    turns.before(step)
    b"x" * (mib * 2**20)
turns.done()
"""


def test_the_peak_is_that_of_the_updates_after_the_first_round():
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS], cwd=REPO, input="go\n" * 3, capture_output=True, text=True, check=True
    )
    *_, last = map(json.loads, done.stdout.splitlines())
    assert 60 * 2**20 < last["peak_bytes"] < 100 * 2**20, last

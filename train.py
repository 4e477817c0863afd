"""Train a model: `python train.py --config configs/mistral_base.py --workdir runs/mistral [--config.key=value ...]`.

The program is `fpo_jax/cli/train.py`, with its flags and exit codes; where the package is installed it is `fpo train`.
"""

import sys

from fpo_jax.cli import process, train

if __name__ == "__main__":
    process.without_torch()
    sys.exit(train.main())

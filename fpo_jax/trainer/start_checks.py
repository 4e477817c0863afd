"""What a run needs beside its configuration, found before anything expensive: places to write to, and W&B's account."""

import importlib.util
import netrc
import os
import tempfile
import urllib.parse
from pathlib import Path

from fpo_jax import config as configuration

PLACES = ("reference.cache_dir", "data.cache_dir", "train.compilation_cache")
_OFFLINE = ("offline", "disabled", "dryrun")


def problems(config: configuration.Config, workdir: Path) -> list[str]:
    """List what keeps a run from writing, one sentence each."""
    found = place_problems("--workdir", workdir)
    for name in PLACES:
        if value := configuration.value_at(config, name):
            found += place_problems(f"--config.{name}", Path(value).expanduser())
    return found + wandb_problems(config.logging.wandb_project)


def place_problems(option: str, folder: Path) -> list[str]:
    """Return why a folder cannot be written or made, in a list of none or one; a file is made in it and taken away."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        return [f"{option}={folder}: {there} is no folder; give a folder, or the path of a new one."]
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [f"{option}={folder}: {there} cannot be written ({error.strerror}); give a folder of your own."]


def wandb_problems(project: str) -> list[str]:
    """Return what W&B lacks, in a list of none or one."""
    if not project or os.environ.get("WANDB_MODE", "") in _OFFLINE:
        return []
    option = f"--config.logging.wandb_project={project}"
    if importlib.util.find_spec("wandb") is None:
        return [f"{option} needs the package wandb; run pip install wandb, or unset it."]
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if os.environ.get("WANDB_API_KEY") or _has_login(host):
        return []
    return [f"{option} needs an account of {host}; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline."]


def _has_login(host: str) -> bool:
    try:
        file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

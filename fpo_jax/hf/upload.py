"""An exported directory -> a model repository of the Hugging Face hub, checked before anything is computed.

What flows in: a directory, the name of a repository, and whether everybody may see it. What flows out: the address of
the repository. The token is that of the hub's own library (HF_TOKEN, or what `hf auth login` keeps); it is read there
alone, and stands in no message.
"""

import shlex
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.utils

from fpo_jax.io import terminal


class Failed(ValueError):
    """An upload that did not succeed; what was to be uploaded lies where it was."""


def check(repo: str, *, public: bool) -> None:
    """Refuse an upload that cannot succeed, or would show a model to others than was asked for.

    Args:
        repo: `OWNER/NAME`, or `NAME` for the token's own account.
        public: whether everybody may see the repository.

    Raises:
        ValueError: no such name, offline mode, no token or one that the hub does not take, a hub that cannot be
            reached, or a repository that is there and is public where a private one was asked for, or the reverse.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except huggingface_hub.errors.HFValidationError as error:
        raise ValueError(
            f"--push-to-hub={repo!r} is no name of a repository ({terminal.first_line(error)}); write OWNER/NAME."
        ) from error
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"--push-to-hub={repo} needs the hub, and HF_HUB_OFFLINE forbids the network; unset it, or leave"
            " --push-to-hub out."
        )
    if not huggingface_hub.get_token():
        raise ValueError(
            f"--push-to-hub={repo} needs a token of the hub, and there is none; set HF_TOKEN, or log in with"
            " `hf auth login`."
        )
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        found = _is_private(api, repo)
    except Exception as error:  # of the hub's library and of the network's, a dozen types
        if terminal.is_ours(error):
            raise
        raise ValueError(
            f"the hub does not let --push-to-hub={repo} begin ({_fact(error)}); check the network, and that the token"
            " is valid."
        ) from error
    if found is not None and found == public:
        seen, remedy = ("private", "leave --public out") if found else ("public", "give --public")
        raise ValueError(f"{repo} is on the hub and is {seen}; {remedy}, or give another name.")


def push(directory: Path, repo: str, *, public: bool) -> str:
    """Upload a directory in one commit, into a repository that is made where there is none; return its address.

    Args:
        directory: what is uploaded, all of it.
        repo: as for `check`.
        public: as for `check`.

    Raises:
        Failed: the hub or the network did; says how to upload alone.
    """
    try:
        api = huggingface_hub.HfApi()
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message="Upload of fpo export")
    except Exception as error:  # as above
        if terminal.is_ours(error):
            raise
        command = f"hf upload {shlex.quote(repo)} {shlex.quote(str(directory))} .{' --private' * (not public)}"
        raise Failed(
            f"{directory} is written, and was not uploaded to {repo} ({_fact(error)}); upload it alone with: {command}"
        ) from error
    return str(made)


def _is_private(api: huggingface_hub.HfApi, repo: str) -> bool | None:
    """Return whether a repository is private; None where there is none."""
    try:
        return bool(api.model_info(repo).private)
    except huggingface_hub.errors.RepositoryNotFoundError:
        return None


def _fact(error: Exception) -> str:
    return f"{type(error).__name__}: {terminal.first_line(error)}"

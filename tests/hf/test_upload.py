"""Uploads to the hub: what is refused before any work, what is sent, and what is left when it fails. No network."""

import shlex
import types
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from fpo_jax.cli import export as program
from fpo_jax.trainer import export

REPO = "me/mine"


@pytest.fixture
def hub(monkeypatch):
    """The hub's client with its own signatures; no repository is there."""
    client = mock.create_autospec(huggingface_hub.HfApi, instance=True)
    client.model_info.side_effect = errors.RepositoryNotFoundError("404", response=mock.Mock())
    address = huggingface_hub.RepoUrl(f"https://huggingface.co/{REPO}")
    client.create_repo.return_value = address
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return client


@pytest.fixture
def exported(monkeypatch):
    """What was asked of `export.export`, which writes a file here instead of a model."""
    asked = []

    def write(workdir, out, **settings):
        asked.append(settings)
        out.mkdir()
        (out / "config.json").write_text("{}")
        return f"{out}: written"

    monkeypatch.setattr(export, "export", write)
    return asked


def run(tmp_path, *more):
    return program.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "an export"), *more])


@pytest.mark.parametrize("public", [False, True])
def test_the_directory_goes_into_a_private_repository_unless_it_is_public(hub, exported, tmp_path, capsys, public):
    assert run(tmp_path, "--push-to-hub", REPO, *["--public"] * public) == 0
    hub.create_repo.assert_called_once_with(REPO, private=not public, exist_ok=True)
    sent = hub.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == (REPO, tmp_path / "an export")
    assert exported == [{"step": None, "dtype": None, "lora": "merged", "card": True}]
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/an export: written", f"https://huggingface.co/{REPO}"]


def test_without_a_repository_nothing_is_asked_of_the_hub(hub, exported, tmp_path):
    assert run(tmp_path) == 0 and not hub.mock_calls and "card" not in exported[0]


@pytest.mark.parametrize(
    ("repo", "change", "message"),
    [
        ("a/b/c", {}, "--push-to-hub='a/b/c' is no name of a repository"),
        ("a--b", {}, "'a--b' is no name of a repository (Cannot have -- or .. in repo_id"),
        (REPO, {"constants.HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE forbids the network; unset it, or leave --push"),
        (REPO, {"get_token": lambda: None}, "there is none; set HF_TOKEN, or log in with `hf auth login`."),
    ],
)
def test_what_cannot_succeed_is_refused_before_any_work(
    hub, exported, tmp_path, monkeypatch, capsys, repo, change, message
):
    for name, value in change.items():
        monkeypatch.setattr(f"huggingface_hub.{name}", value)
    assert run(tmp_path, "--push-to-hub", repo) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not exported and not hub.mock_calls


@pytest.mark.parametrize(
    "error", [OSError("401 hf_no"), ConnectionError("no route"), errors.HfHubHTTPError("403", response=mock.Mock())]
)
def test_a_hub_that_does_not_take_the_token_is_named_before_any_work(hub, exported, tmp_path, capsys, error):
    hub.whoami.side_effect = error
    assert run(tmp_path, "--push-to-hub", REPO) == 2 and not exported
    assert (
        f"the hub does not let --push-to-hub={REPO} begin ({type(error).__name__}: {error})" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("private", "public", "message"),
    [
        (True, True, "me/mine is on the hub and is private; leave --public out"),
        (False, False, "is public; give --public"),
    ],
)
def test_a_repository_that_is_seen_by_others_than_was_asked_for_is_refused(
    hub, exported, tmp_path, capsys, private, public, message
):
    hub.model_info.side_effect, hub.model_info.return_value = None, types.SimpleNamespace(private=private)
    assert run(tmp_path, "--push-to-hub", REPO, *["--public"] * public) == 2 and not exported
    assert message in capsys.readouterr().err
    assert run(tmp_path, "--push-to-hub", REPO, *["--public"] * (not public)) == 0


def test_public_alone_is_refused(hub, exported, tmp_path, capsys):
    assert run(tmp_path, "--public") == 2 and not exported
    assert "--public says who may see an upload, and there is none" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_leaves_the_export_and_says_how_to_upload_it_alone(hub, exported, tmp_path, capsys, step):
    getattr(hub, step).side_effect = ConnectionError("the line is cut\nand more")
    assert run(tmp_path, "--push-to-hub", REPO) == 1
    assert (tmp_path / "an export" / "config.json").is_file()
    said = capsys.readouterr().err
    assert "is written, and was not uploaded to me/mine (ConnectionError: the line is cut)" in said
    command = shlex.split(said.strip().partition("upload it alone with: ")[2])
    assert command == ["hf", "upload", REPO, str(tmp_path / "an export"), ".", "--private"] and "hf_secret" not in said

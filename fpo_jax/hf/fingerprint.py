"""Which weights a directory of a model or of an adapter holds: one digest of its config and weight files.

In a run of several processes those that see the same files read a share of them each, and tell each other its digests.
Hosts with copies of their own read each copy, once a host: only then does a copy that differs show.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fpo_jax import distributed
from fpo_jax.checkpoint import integrity
from fpo_jax.hf import hub
from fpo_jax.io import file_identity, json_digest

_ALGORITHM = "sha256"
_OF_MODELS = (hub.SINGLE, hub.INDEX)


def weights_fingerprint(directory: Path) -> str:
    """Return the sha256 (hex) over config.json and the weight files, names and contents, in name order.

    Raises:
        ValueError: no safetensors, or a missing shard.
    """
    paths = _files(directory)
    return _of(paths, _digests(paths))


def weights_fingerprints(directories: Mapping[str, Path]) -> dict[str, str]:
    """Return the fingerprint of each directory; every process of a run calls this, and reads its share of the files.

    Args:
        directories: by names of the caller's; another process may have others.

    Raises:
        ValueError: no safetensors, or a missing shard, in some process.
    """
    with distributed.together():
        files = {name: _files(directory) for name, directory in directories.items()}
        paths = [path for found in files.values() for path in found]
        identities = [file_identity.of(path) for path in paths]
    seen = json_digest.of(identities)
    peers = [index for index, other in enumerate(distributed.share(seen)) if other == seen]
    sizes = {str(place): identity.bytes for place, identity in enumerate(identities)}
    mine = distributed.balanced(sizes, count=len(peers))[peers.index(distributed.process_index())]
    with distributed.together():
        own = dict(zip(mine, _digests([paths[int(place)] for place in mine]), strict=True))
    digests: dict[str, str] = {}
    for index, text in enumerate(distributed.share(json.dumps(own))):
        digests |= json.loads(text) if index in peers else {}
    found = iter([digests[str(place)] for place in range(len(paths))])
    return {name: _of(paths, [next(found) for _ in paths]) for name, paths in files.items()}


def _files(directory: Path) -> list[Path]:
    adapter = [directory / name for name in (hub.ADAPTER_CONFIG, hub.ADAPTER)]
    if all(path.is_file() for path in adapter) and not any((directory / name).exists() for name in _OF_MODELS):
        return adapter
    paths = sorted([*hub.weight_files(directory), directory / "config.json"])
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
    return paths


def _digests(paths: Sequence[Path]) -> list[str]:
    return integrity.each(lambda path: integrity.digest(path, _ALGORITHM)[_ALGORITHM], paths)


def _of(paths: Sequence[Path], digests: Sequence[str]) -> str:
    lines = (f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Digests of what was written, so that what is read can be trusted: of a checkpoint's files and of an exported model's.

A manifest is one JSON file in the folder that it describes, with the length and the digest of every other file and with
a digest of itself: a flipped bit in either is noticed. Of a checkpoint each process digests the files that it wrote
itself (`digest_own`), into a manifest of their folder; `seal` makes one of them all, once orbax has committed the step
and before orbax removes older ones. `newest_good` is what may be restored. `clear` removes unfinished manifests;
nothing else here deletes or repairs.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tensorstore
import xxhash

from fpo_jax.io import atomic_io, json_digest

log = logging.getLogger("fpo_jax")

MANIFEST = "digests.json"
_UNFINISHED = f".{MANIFEST}.tmp"
_NUMBER = re.compile("0|[1-9][0-9]*")
DAMAGED = ".damaged"  # behind the number of a step that is set aside
FAST = "xxh3_128"  # finds faults of disks and memory, not forgers
ALGORITHMS = {FAST: xxhash.xxh3_128, "sha256": hashlib.sha256}
READERS = 8  # files that are read at a time
_OWN = "ocdbt.process_"  # begins the name of the folder of an item in which orbax has one process write
NAMED = 3  # files, and leaves of a file, that a message names; the rest are counted

_F = TypeVar("_F")
_T = TypeVar("_T")
Compare = Callable[[Path, Mapping[str, Mapping[str, Any]]], dict[str, str]]
_ITEMS = ("meta/metadata", "params/manifest.ocdbt", "optimizer/manifest.ocdbt")  # without which nothing is a checkpoint


class Choice(NamedTuple):
    """Which step to restore, and why not a newer one."""

    step: int | None  # None = there is no checkpoint
    verified: bool  # False = the step has no digests to compare with
    rejected: dict[int, str]  # newer steps, with what is wrong


def digest(path: Path, algorithm: str) -> dict[str, Any]:
    """Return length and digest of a file, streamed; not mapped, where a bad sector would be a signal."""
    with path.open("rb", buffering=0) as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            algorithm: hashlib.file_digest(file, ALGORITHMS[algorithm]).hexdigest(),
        }


def render(content: Mapping[str, Any]) -> str:
    """Return a manifest's text, which ends with the digest of the rest."""
    return json.dumps({**content, "self": json_digest.of(content)}, indent=1) + "\n"


def parse(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: it is missing, or one of its bytes is not what was written.
    """
    try:
        text = path.read_text()
        content = json.loads(text)
        del content["self"]
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{path.name} cannot be read") from None
    if render(content) != text:
        raise ValueError(f"{path.name} is not what was written: it does not match its own digest")
    return content


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write a folder's manifest; it appears whole or not at all, and stays when the power goes."""
    temporary = folder / _UNFINISHED
    temporary.write_text(render(content))
    atomic_io.sync(temporary)
    temporary.rename(folder / MANIFEST)
    atomic_io.sync(folder)


def compare(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what is wrong with a folder's files, by name; nothing where all is well."""

    def fault(name: str) -> str:
        path, expected = folder / name, files[name]
        algorithm = next(key for key in expected if key != "bytes")
        try:
            if path.stat().st_size != expected["bytes"]:
                return f"has {path.stat().st_size} bytes, {expected['bytes']} were written"
            if digest(path, algorithm) != expected:
                return "is not what was written: it does not match its digest"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        return ""

    return {name: described for name, described in zip(files, each(fault, files), strict=True) if described}


def digest_own(item: Path, process: int) -> None:
    """Write the digests of the files of an item that a process wrote, all of which is brought to the disk first.

    Args:
        item: folder of the item, in a step that is not committed yet.
        process: number of the process, which is this one.
    """
    folder = item / f"{_OWN}{process}"
    if folder.is_dir():  # one that holds copies alone writes nothing
        atomic_io.sync_tree(folder)
        write(folder, {"files": _digests(folder, _names(folder))})


def seal(step: Path) -> None:
    """Write the digests of every file of a committed step, all of which is brought to the disk first.

    What has digests from `digest_own` is not read again: their manifests become a part of this one and are removed.

    Raises:
        OSError: a file that another process wrote is missing or has another length here: the disk lost something.
        ValueError: a manifest of another process is damaged.
    """
    atomic_io.sync_tree(step)
    atomic_io.sync(step.parent)
    parts = {path.relative_to(step).parent: path for path in step.glob(f"*/{_OWN}*/{MANIFEST}")}
    files = {
        f"{folder}/{name}": entry for folder, path in parts.items() for name, entry in parse(path)["files"].items()
    }
    for name, entry in files.items():
        if (size := (step / name).stat().st_size) != entry["bytes"]:
            raise OSError(f"{step / name} has {size} bytes, its process wrote {entry['bytes']}")
    others = {str(folder / MANIFEST) for folder in parts} | files.keys()
    files |= _digests(step, [name for name in _names(step) if name not in others])
    write(step, {"files": dict(sorted(files.items()))})
    for path in parts.values():
        path.unlink()


def clear(folder: Path) -> None:
    """Remove the manifests that a run left unfinished as it was killed; for the one that may write into the folder."""
    for path in folder.glob(f"*/{_UNFINISHED}"):
        path.unlink()


def sealed(step: Path) -> bool:
    """Return whether a step has digests, sound or not."""
    return (step / MANIFEST).exists()


def steps(folder: Path) -> list[int]:
    """Return the numbers of the committed steps, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if _NUMBER.fullmatch(path.name))


def faults(step: Path, *, only: Sequence[str] = (), compare: Compare = compare) -> str:
    """Say what is wrong with a sealed step: the files, and whose values they hold; empty where all is well.

    Args:
        step: folder of the step.
        only: items that are going to be read, where not all are; the step's own files are always compared.
        compare: what compares the files.
    """
    try:
        files = parse(step / MANIFEST)["files"]
    except ValueError as error:
        return str(error)
    kept = {name: entry for name, entry in files.items() if not only or "/" not in name or name.split("/")[0] in only}
    wrong = compare(step, kept)
    described = [f"{name} {fault}{_whose(step, name)}" for name, fault in list(wrong.items())[:NAMED]]
    described += [f"and {len(wrong) - NAMED} more files"] if len(wrong) > NAMED else []
    return "; ".join(described) or of_another(step)


def newest_good(folder: Path, *, only: Sequence[str] = (), compare: Compare = compare) -> Choice:
    """Choose the newest step whose files are what was written.

    A step without digests is used only where no sealed one is good: orbax removes older steps only after the seal, so
    that a run killed between commit and seal has a sealed one behind it, and goes back by one save at most. A folder of
    before there were digests has no sealed step, and its newest step is used unverified.

    Args:
        folder: with a folder of every step.
        only: items that are going to be read, where not all are; the step's own files are always compared.
        compare: what compares the files of a step.

    Raises:
        ValueError: there are steps, and none can be used; says what is wrong with each.
    """
    found, wrong = steps(folder)[::-1], {}
    unsealed = [number for number in found if not sealed(folder / str(number))]
    for number in found:
        if number in unsealed:
            wrong[number] = f"{MANIFEST} is missing: its run ended before the step was sealed"
        elif not (text := faults(folder / str(number), only=only, compare=compare)):
            return Choice(number, True, wrong)
        else:
            wrong[number] = text
    for number in unsealed:
        lacking = [name for name in _ITEMS if not (folder / str(number) / name).exists()]
        fault = f"{', '.join(lacking)} missing" if lacking else of_another(folder / str(number))
        if not fault:
            return Choice(number, False, {newer: text for newer, text in wrong.items() if newer > number})
        wrong[number] = fault
    if wrong:
        listed = "\n  ".join(f"step {number}: {text}" for number, text in sorted(wrong.items()))
        raise ValueError(
            f"no checkpoint of {folder} can be used:\n  {listed}\nput back a copy of one of them, or move the folder"
            " away to begin again."
        )
    return Choice(None, True, {})


def set_aside(folder: Path, number: int) -> Path:
    """Rename a step so that nothing takes it for a checkpoint any more."""
    target, again = folder / f"{number}{DAMAGED}", 2
    while target.exists():
        target, again = folder / f"{number}{DAMAGED}-{again}", again + 1
    return (folder / str(number)).rename(target)


def of_another(step: Path) -> str:
    """Say whether a step lies under another number than it was saved with; empty where it does not, or does not say."""
    try:
        number = json.loads((step / "meta" / "metadata").read_bytes()).get("step")
    except (OSError, ValueError, AttributeError):
        return ""
    return "" if number in (None, int(step.name)) else f"it is step {number} under another number"


def each(act: Callable[[_F], _T], files: Iterable[_F]) -> list[_T]:
    """Call for every file, some at a time: digests release the interpreter's lock."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(act, files))


def _digests(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return dict(zip(names, each(lambda name: digest(folder / name, FAST), names), strict=True))


def _names(folder: Path) -> list[str]:
    """List the files of a folder, without its manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    return sorted(str(path.relative_to(folder)) for path in paths)


def _whose(step: Path, name: str) -> str:
    """Name the parameters whose values lie in a file, where orbax's index can still be read."""
    item, _, inside = name.partition("/")
    if item not in ("params", "optimizer") or "/d/" not in f"/{inside}":
        return ""
    try:
        leaves = _leaves(step / item, inside)
    except ValueError:  # the index is damaged
        return ""
    if not leaves:
        return ""
    more = f" and {len(leaves) - NAMED} more" if len(leaves) > NAMED else ""
    return f" (holds {item} {', '.join(leaves[:NAMED])}{more})"


def _leaves(item: Path, inside: str) -> list[str]:
    """Return the arrays of which an item's index says that they lie in one of its files."""
    base = tensorstore.KvStore.open(f"file://{item.absolute()}/").result()
    root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    found = set()
    for entry in tensorstore.ocdbt.dump(base, root).result()["entries"]:
        place = re.fullmatch(r"value:(.*):(.*):\d+:\d+", entry.get("indirect_value", ""))
        if place and place[1] + place[2] == inside:
            found.add(entry["key"].decode().rpartition("/")[0])
    return sorted(found)

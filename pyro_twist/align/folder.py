# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The folder of the results: one run at a time, and nobody else's files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_twist.align.learned import KINDS
from pyro_twist.align.options import OptionError

__all__ = ["alone_in", "prepare_folder", "write_whole"]


def write_whole(path: Path, content: str | bytes) -> Path:
    """
    Writes a file that is there as a whole or not at all, also if the process is killed.

    :param ~pathlib.Path path: The file; what is there is replaced.
    :param content: Text, or bytes.
    :returns: The file.
    """
    # hidden, so that one that is left behind is nobody else's file
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return partial.replace(path)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """
    Keeps other processes out of a folder, where the operating system can do that.

    :param ~pathlib.Path folder: The folder; made if it is not there.
    :raises OptionError: If another process is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / ".running"
    with mark.open("w") as file:
        if not _locked(file):
            raise OptionError(
                f"another process is writing to {str(folder)!r}; wait for it, or give another --out"
            )
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)
            # if nothing has come of it
            with suppress(OSError):
                folder.rmdir()


def _locked(file: Any) -> bool:
    """Locks a file until it is closed or the process ends; ``False`` if another one has it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # systems and file systems without locks
        pass
    return True


def prepare_folder(folder: Path) -> None:
    """
    Makes the folder of the results, and removes those of an earlier run from it.

    Only files that such a run writes are removed, and only if its ``results.json`` is there.

    :param ~pathlib.Path folder: The folder.
    :raises OptionError: If nothing can be written there, or it holds other files but no results.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        _clear(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OptionError(
            f"--out {str(folder)!r} cannot be written to ({reason}); choose another folder"
        ) from None


def _clear(folder: Path) -> None:
    found = _own_results(folder)
    if found is not None:
        for path in _artefacts(folder, found):
            path.unlink(missing_ok=True)
        for place in (*(folder / "samples").glob("*/"), folder / "samples"):
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OptionError(
            f"--out {str(folder)!r} holds files that are no results of this command; choose "
            "another folder, or empty this one"
        )


def _own_results(folder: Path) -> dict[str, Any] | None:
    """What an earlier run wrote to ``results.json``, if one did."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found if "pyro_twist" in found["versions"] and found["options"]["methods"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _artefacts(folder: Path, found: dict[str, Any]) -> Iterator[Path]:
    """The files of that run, the mark that they are ours last."""
    own = ("report.html", "grid.png", "rewards.png", "twist.safetensors")
    for name in own:
        yield folder / name
    for method in map(str, found["options"]["methods"]):
        for kind in ("steps", *KINDS):
            yield folder / f"{kind}-{method}.png"
        yield folder / f"twist-{method}.safetensors"
        yield folder / "samples" / f"{method}.npz"
        yield folder / "samples" / f"{method}.csv"
        yield from sorted((folder / "samples" / method).glob("*.png"))
    yield folder / "results.json"

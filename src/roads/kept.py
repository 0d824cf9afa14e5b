"""Arrays that stages keep for others in runs/.kept, each by a hash of all that it follows from: completions, reference
log-probs, embeddings. What was used longest ago is dropped when there is no room left."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np

from roads import stage

FOLDER = Path("runs/.kept")
ROOM = 2**31  # bytes


def load(key: str) -> np.ndarray | None:
    """The array that was kept under a key, if it still is."""
    return read(FOLDER / f"{key}.npy")


def save(key: str, array: np.ndarray) -> None:
    """Keep an array, and drop those that were used longest ago until all of them take no more than ROOM."""
    write(FOLDER / f"{key}.npy", array)
    files = []
    for file in FOLDER.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # another run may just have dropped it
            files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    size = 0
    for _, bytes_, file in sorted(files, reverse=True):
        size += bytes_
        if size > ROOM:
            file.unlink(missing_ok=True)


def read(file: Path) -> np.ndarray | None:
    """The array of a file, if there is one; it counts as used now."""
    try:
        _touch(file)
        return np.load(file)
    except FileNotFoundError:
        return None


def write(file: Path, array: np.ndarray) -> None:
    """Write an array; it is whole or not there, also where another run writes the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with stage.writing(file, shared=True) as scratch:
        np.save(scratch, array)
    with contextlib.suppress(FileNotFoundError):  # another run may have had no room for it
        _touch(file)


def _touch(file: Path) -> None:
    """Note when a file was used; the system's own note is too coarse to tell one file from the next."""
    os.utime(file, ns=(time.time_ns(), time.time_ns()))

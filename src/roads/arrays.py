"""The .npz files that stages leave each other, checked where they are read. A file that was cut, edited or made by
another tool gives a one-line error there, instead of wrong numbers or an index error hours later."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from roads.stage import UserError, read_json


def load(path: Path, *names: str, empty: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a file that are named, or all; each has rows, unless it may be empty, and all of them as many.

    Raises:
        UserError: no such file or array, one without rows, or with others than numbers or with infinite ones.
    """
    try:
        with np.load(path) as file:
            there = file.files
            names = names or tuple(there)
            found = {name: file[name] for name in names if name in there}
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `dvc repro` makes the inputs of a stage in order") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole .npz file ({str(error).splitlines()[0][:80]})") from None
    for name in names:
        if name not in found:
            raise UserError(f"{path}: no array {name!r}; it has {', '.join(there) or 'none'}")
        if not found[name].ndim or not (len(found[name]) or empty):
            raise UserError(f"{path}: array {name!r}: no rows")
        if found[name].dtype.kind not in "biuf" or not np.isfinite(found[name]).all():
            raise UserError(f"{path}: array {name!r}: expected finite numbers, got {found[name].dtype}"
                            + " with some that are not" * (found[name].dtype.kind == "f"))
    if len({len(array) for array in found.values()}) > 1:
        raise UserError(f"{path}: expected as many rows in each array, got "
                        + ", ".join(f"{len(array)} of {name}" for name, array in found.items()))
    return found


def stacked(paths: list[Path], name: str) -> np.ndarray:
    """An array of several files, one for each seed: [seeds, rows, ...].

    Raises:
        UserError: as `load`.
    """
    return np.stack([load(path, name)[name] for path in paths])


def tokens(path: Path, *names: str, model: Path | None = None, empty: bool = False) -> dict[str, np.ndarray]:
    """`load` of arrays of token ids [N, length], or [N, n, length]; `model`: a folder whose model is to read them.

    Raises:
        UserError: also where there is one that is no token id, or that the model does not have.
    """
    found = load(path, *names, empty=empty)
    size = vocabulary(model) if model else None
    for name, array in found.items():
        if array.dtype.kind in "bf" or array.ndim < 2:
            raise UserError(f"{path}: array {name!r}: expected token ids [rows, length], got {array.dtype} of shape "
                            f"{array.shape}")
        if array.min(initial=0) < 0 or size is not None and array.max(initial=0) >= size:
            most = "…" if size is None else f"{size - 1}, which the model of {model} has"
            raise UserError(f"{path}: array {name!r}: expected token ids from 0 to {most}; got {array.min()} to "
                            f"{array.max()}")
    return found


def vocabulary(folder: Path) -> int | None:
    """How many tokens the model of a folder has, as far as its config.json says so."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.exists() else {}
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def posts(query: np.ndarray, name: str = "post") -> dict[str, np.ndarray]:
    """Which post each row of queries [N, Q] is about, as an array [N] of that name; none where no two rows share one.

    Rows of a post are not independent: intervals resample posts (stats.py).

    >>> posts(np.array([[3, 4], [5, 6], [3, 4]]))["post"].tolist(), posts(np.array([[3], [4]]))
    ([0, 1, 0], {})
    """
    unique, number = np.unique(query, axis=0, return_inverse=True)
    return {name: number.ravel()} if len(unique) < len(query) else {}


def beside(key: str, name: str) -> str:
    """What a measure that stands beside an array is called: itself beside `score`, or `<key>.<name>`, as an arm has
    several in one file."""
    return name if key == "score" else f"{key}.{name}"


def post_of(file: Mapping[str, np.ndarray], key: str) -> np.ndarray | None:
    """The post of every row of an array (`posts`), of the file that has it; None where no two rows share one."""
    found = [file[name] for name in (f"{key}.post", "post") if name in file]
    return found[0] if found and len(found[0]) == len(file[key]) else None

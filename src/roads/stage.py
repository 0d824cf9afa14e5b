"""What every stage does the same way: strict errors, atomic output, a record beside the result.

A stage is a plain function from inputs to one output folder. `stage.output` gives it a temporary folder, writes
`params.json` (exactly the parameters it used) and renames the folder into place only when everything is written, so a
killed run never leaves half an output.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roads.process import end_with_parent

SCRATCH = Path("runs/.scratch")  # what a killed run leaves, for the same run to continue
STAGES_PER_GPU = "ROADS_STAGES_PER_GPU"  # how many stages share this one's GPU: the runner says it
LAUNCH = "ROADS_LAUNCH"  # the file of configs/accelerate that training stages are started with; `make … LAUNCH=name`


class UserError(Exception):
    """Bad input: one line that names the file, line or key and what was expected. Exit code 2."""


def write_json(path: Path, value: object) -> None:
    """Write `value` as sorted, indented JSON; the same value gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def expect_file(path: Path) -> None:
    """Raises UserError where something else than a file is there: a FIFO would be waited for, /dev/zero has no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: expected a file")


def read_json(path: Path) -> Any:
    expect_file(path)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def metrics_of(folder: Path, *names: str) -> dict:
    """What there is of some metrics of a stage's folder."""
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").exists() else {}
    return {name: metrics[name] for name in names if name in metrics}


def training(folder: Path) -> dict[str, int]:
    """Of a trained model's metrics: steps of the optimiser that were taken, rows, pairs dropped as ties."""
    return metrics_of(folder, "steps", "rows", "dropped_as_ties")


@contextmanager
def writing_all(*paths: Path, own: str = "") -> Iterator[list[Path]]:
    """A file to write for each path: they take its place, all of them, when the block ends without an error, and else
    none does. `own` keeps the files of several processes apart."""
    scratch = [path.with_name(f".{path.stem}.writing{own}{path.suffix}") for path in paths]
    try:
        yield scratch
        for written, path in zip(scratch, paths, strict=True):
            os.replace(written, path)
    finally:
        for written in scratch:
            written.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """`writing_all` of one path; shared: other processes may be writing the same one."""
    with writing_all(path, own=f"-{os.getpid()}" if shared else "") as (scratch,):
        yield scratch


def sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(config: dict, inputs: list[Path], *more: object) -> str:
    """Hash of a stage's configuration and of the arrays and weights that it reads: the name of its scratch folder."""
    digest = hashlib.sha256(json.dumps([config, *map(str, more)], sort_keys=True).encode())
    for path in inputs:
        for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
            if file.is_file() and file.suffix in (".npz", ".safetensors"):
                digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()[:20]


def code(*modules: object) -> str:
    """A hash of the source of some modules, or of all that stages compute with. It is part of the name of what is kept
    for other runs and of what a killed run left: changed code finds neither."""
    package = Path(__file__).parent
    files = [Path(module.__file__) for module in modules] or [
        file for folder in (package, package / "stages", package / "judge") for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def output(out: Path, config: dict, reads: list[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends without an error.

    Args:
        out: the stage's output folder; an older one is replaced.
        config: the parameters the stage used, written as `params.json`.
        reads: what it read, named in the one line printed at the end.
    """
    out = Path(out)
    if out.exists() and not out.is_dir() or out.is_symlink():  # found out now, not when everything is computed
        raise UserError(f"{out}: expected a folder that this stage may replace")
    for path in reads:
        if not Path(path).exists():
            raise UserError(f"{path}: not found; `dvc repro` makes the inputs of a stage in order")
    rank = int(os.environ.get("RANK", 0))  # of `accelerate launch`: the first process alone writes `out`
    scratch = out.with_name(f".{out.name}.writing{f'-{rank}' if rank else ''}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    start = time.perf_counter()
    try:
        yield scratch
        if not rank:
            write_json(scratch / "params.json", config)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if rank:
        return
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    read = ", ".join(str(p) for p in reads) or "params.yaml"
    print(f"{read} -> {out} ({size / 2**20:.1f} MiB) in {time.perf_counter() - start:.1f} s", flush=True)


def arguments(doc: str, *paths: str) -> argparse.ArgumentParser:
    """A stage's command line: paths by position, "[name]" for one that may be left out, and the scale whose block of
    params.yaml it reads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for path in paths:
        parser.add_argument(path.strip("[]"), type=Path, nargs="?" if path.startswith("[") else None)
    parser.add_argument("--scale", required=True, help="a block of params.yaml, or an arm as SCALE.FIGURE.ARM")
    return parser


def seed(text: str) -> int:
    """A seed, as a number or as the graph names it.

    >>> seed("s2"), seed("2")
    (2, 2)
    """
    return int(text.removeprefix("s"))


def _launch() -> None:
    """Become `accelerate launch` of this very command line; of several machines NODE_RANK and MASTER_ADDR say which.

    Raises:
        UserError: no such configuration.
    """
    path = os.environ.pop(LAUNCH, "")  # the processes that it starts find none
    if not path:
        return
    if not Path(path).exists():
        known = ", ".join(sorted(str(file) for file in Path("configs/accelerate").glob("*.yaml")))
        raise UserError(f"{LAUNCH}={path}: not found; expected one of: {known}")
    names = {"NODE_RANK": "--machine_rank", "MASTER_ADDR": "--main_process_ip", "MASTER_PORT": "--main_process_port"}
    options = [word for name, option in names.items() if name in os.environ for word in (option, os.environ[name])]
    module = sys.modules["__main__"].__spec__.name
    os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *options,
                              "--module", module, *sys.argv[1:]])


def main(command: Callable[[], int | None], launch: bool = False) -> None:
    """Run a command line and exit with its code; a `UserError`, a full disk, or a file or folder that is missing, of
    another kind, or may not be read or written is one line and exit code 2.

    With `launch` it starts itself again under `accelerate launch` where ROADS_LAUNCH names a configuration.
    """
    try:
        if launch:
            _launch()
        if "LOCAL_RANK" in os.environ:  # torch starts us in a session of our own, which a killed launcher does not end
            end_with_parent(os.getppid())
        sys.exit(command())
    except UserError as error:
        message = str(error)
    except Exception as error:
        # ENOSPC; safetensors and tokenizers raise errors of their own that say it in words.
        if os.strerror(errno.ENOSPC) in str(error) or getattr(error, "errno", None) == errno.EDQUOT:
            message = f"no space left ({error}): free some disk and run the same command again"
        elif isinstance(error, OSError) and error.strerror:
            place = error.filename2 or error.filename  # of a file that takes another's place, the other
            message = f"{place}: {error.strerror.lower()}" if place else f"{error.strerror.lower()}; no file is named"
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

"""A kit for machines without a network: what a scale needs in one archive, and what comes home from it.

    python scripts/kit.py build --scale real           # `make kit SCALE=real`: build/kit, in parts of 45 MB
    python scripts/kit.py pack --scale real OUT        # there: what comes home, in one archive (scripts/run.sh does it)
    python scripts/kit.py unpack ARCHIVE               # `make unpack ARCHIVE=…`: puts it in place at home

The other machine has Python, torch, transformers and accelerate. The kit brings the wheels of all else, each with the
hash that requirements/ names; scipy and matplotlib, which such a machine often has, come in an archive of their own.
"""

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from roads import lockfile

ROOT = Path(__file__).resolve().parent.parent
PART = 45_000_000  # bytes
HOME = 16_000_000  # of what comes home
THERE = ("torch", "transformers", "accelerate")  # with all that they want, but for what not every version does
NOT_THERE = {"pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"}
EXTRA = ("scipy", "matplotlib")
LEFT_OUT = ("datasets", "openai")  # rows from a hub, and a judge's endpoint: there is no network
SOURCE_ONLY = ("antlr4-python3-runtime", "rouge-score")
LINUX = ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64",
         *(f"manylinux_2_{n}_x86_64" for n in range(5, 35))]
SMALL = "metrics.json", "params.json", "curves.csv", "scores.npz", "examples.json"
NOT_NEEDED = ("reports/", "docs/", "tests/", "cloud/", "data/tldr_sample/", "data/rehearsal/")

JOIN = """#!/bin/sh
# Joins the parts beside it into the folder roads-kit here; then: roads-kit/run.sh fig11 --minutes 9
set -e
from=$(cd "$(dirname "$0")" && pwd)
(cd "$from" && sha256sum --quiet --ignore-missing -c SHA256SUMS)
for name in kit extra; do
  if ls "$from/$name".tar.* >/dev/null 2>&1; then cat "$from/$name".tar.* | tar xf -; fi
done
"""


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def closure(requirements) -> set[str]:
    """The packages and all that they want, as far as this environment has them."""
    from packaging.requirements import Requirement

    seen, todo = set(), [Requirement(text) for text in requirements]
    while todo:
        it = todo.pop()
        key = name_of(it.name), frozenset(it.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            wanted = map(Requirement, metadata.requires(it.name) or ())
        except metadata.PackageNotFoundError:
            continue
        todo += [w for w in wanted if not w.marker or any(w.marker.evaluate({"extra": e}) for e in ("", *it.extras))]
    return {name for name, _ in seen}


def entries(file: str) -> dict[str, str]:
    """Package -> its pin and hashes, of a file of requirements/."""
    parts = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements" / file).read_text(encoding="utf-8"), flags=re.M)[1:]
    return {name_of(part): part for part in parts}


def pip(verb: str, pins: list[str], folder: Path, *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(pins))
        file.flush()
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", verb, "-q", "--no-deps",
                   "--require-hashes", *options, "-r", file.name]
        subprocess.run(command, check=True, cwd=folder)


def wheels(names: set[str], pins: dict[str, str], folder: Path, python: str) -> None:
    """Wheels of the packages, for Linux on x86-64 and a version of Python."""
    folder.mkdir(parents=True)
    names = {name for name in names if name in pins}
    platforms = [f"--platform={name}" for name in LINUX]
    pip("download", [pins[name] for name in sorted(names - set(SOURCE_ONLY))], folder, "--only-binary=:all:",
        f"--python-version={python}", "--implementation=cp", *platforms, "-d", ".")
    if sources := sorted(names & set(SOURCE_ONLY)):
        pip("wheel", [pins[name] for name in sources], folder, "--no-build-isolation", "-w", ".")


def split(folder: Path, name: str, out: Path) -> list[Path]:
    """A tar of the folder in parts, out/name.tar.00 and so on."""
    whole = out / f"{name}.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(folder, "roads-kit")
    parts = []
    with whole.open("rb") as file:
        while chunk := file.read(PART):
            parts.append(out / f"{name}.tar.{len(parts):02d}")
            parts[-1].write_bytes(chunk)
    whole.unlink()
    return parts


def refuse(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def build(out: Path, scale: str, python: str) -> None:
    from roads import config, stage  # not at the top: `unpack` and `pack` need none of them

    try:
        kind = config.load_scale(scale).model.kind
    except stage.UserError as error:
        refuse(str(error))
    if kind == "pretrained":
        refuse(f"{scale}: its model comes from a hub, which a machine without a network does not reach; expected a "
               "scale whose model comes from packages, such as real")
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / "join.sh").exists()):
        refuse(f"{out}: it is there, and no kit; expected an empty folder, or an older kit to replace")
    pins = entries("cpu.txt") | entries("real.txt")
    there = closure(THERE) - NOT_THERE
    elsewhere = {*THERE, *EXTRA, *LEFT_OUT}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = closure(it for it in project if name_of(it) not in elsewhere) - there | set(entries("real.txt"))
    extra = closure(EXTRA) - there - wanted
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        kit, more = Path(scratch, "kit"), Path(scratch, "extra")
        wheels(wanted, pins, kit / "wheels", python)
        wheels(extra, pins, more / "extra", python)
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            if not name.startswith(NOT_NEEDED):
                (kit / "roads" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, kit / "roads" / name)
        shutil.copy2(ROOT / "scripts/run.sh", kit / "run.sh")
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        (kit / "kit.json").write_text(json.dumps({"scale": scale, "python": python, "commit": commit}) + "\n")
        parts = split(kit, "kit", out) + split(more, "extra", out)
    write_join(out, parts)
    for part in parts:
        print(f"{part}: {part.stat().st_size / 1e6:.1f} MB")
    print(f"Copy {out} to the machine (extra.tar.* only where scipy or matplotlib is missing), run join.sh there, then "
          "roads-kit/run.sh fig11 --minutes 9")


def write_join(out: Path, parts: list[Path]) -> None:
    """The script that joins the parts, and their checksums."""
    (out / "join.sh").write_text(JOIN, encoding="utf-8")
    (out / "join.sh").chmod(0o755)
    sums = "".join(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")


def pack(out: Path, scale: str) -> None:
    """Everything small that a run has made: reports, scores, metrics, dvc.lock, times, some completions as text."""
    runs = Path("runs", scale)
    folders = [runs, *sorted(Path("runs").glob(f"{scale}.*"))]  # and those of arms with an SFT checkpoint of their own
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()
             and path.name in SMALL
             and not any(part.startswith(".") for part in path.parts)]
    files += [path for path in sorted(Path("reports", scale).rglob("*")) if path.is_file()]
    also = "dvc.lock", "params.yaml", "active.yaml", "runs/times.csv", f"docs/search_{scale}.csv"
    files += [path for path in map(Path, also) if path.exists()]
    with tarfile.open(out, "w:xz") as tar:
        for path in files:
            tar.add(path)
        for name, text in ((f"reports/{scale}/completions.jsonl", completions(runs)),
                           (f"reports/{scale}/machine.txt", "".join(f"{k}: {v}\n" for k, v in machine().items()))):
            info, data = tarfile.TarInfo(name), text.encode()
            info.size, info.mtime = len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    size = out.stat().st_size
    print(f"{out}: {len(files)} files, {size / 1e6:.1f} MB to take home")
    if size > HOME:
        sys.exit(f"{out}: over {HOME / 1e6:.0f} MB")


def completions(runs: Path, rows: int = 20) -> str:
    """The first completions of every policy as jsonl."""
    import numpy as np
    from tokenizers import Tokenizer

    lines = []
    for file in sorted(runs.glob("*/completions/**/completions.npz")):
        tokenizer = Tokenizer.from_file(str(runs / "data/tokenizer.json"))
        for i, ids in enumerate(np.load(file)["completions"][:rows, 0].tolist()):
            policy = file.parent.relative_to(runs).as_posix()
            lines.append(json.dumps({"policy": policy, "row": i, "text": tokenizer.decode(ids)}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def machine() -> dict:
    """What the run ran on."""
    import torch
    import transformers

    kit = Path("../kit.json")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    about = json.loads(kit.read_text(encoding="utf-8")) if kit.exists() else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    return about | {"gpus": ", ".join(gpus) or "none"} | versions


def unpack(archive: Path) -> None:
    """Put what came home in its place; of dvc.lock, the entries of its scale alone."""
    if not archive.is_file():
        refuse(f"ARCHIVE={archive}: expected the home.tar.xz that a kit's run has packed")
    try:
        _unpack(archive)
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        refuse(f"{archive}: {str(error).splitlines()[0]}; expected the whole home.tar.xz that a kit's run has packed")


def _unpack(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        scale = next((name.split("/")[1] for name in names if re.match(r"reports/[\w-]+/", name)), None)
        if scale is None or "dvc.lock" not in names:
            refuse(f"{archive}: no archive of a kit's run (its home.tar.xz)")
        mine = f"reports/{scale}/", f"runs/{scale}/", f"runs/{scale}.", f"docs/search_{scale}.csv"
        inside = [m for m in tar.getmembers() if m.name.startswith(mine)]
        tar.extractall(ROOT, inside, filter="data")
        there = tar.extractfile("dvc.lock").read().decode()
    lock = ROOT / "dvc.lock"
    text = lock.read_text(encoding="utf-8")
    mine = re.compile(rf"\n    outs:\n    - path: (runs|reports)/{scale}[./]")
    for name, entry in lockfile.entries(there).items():
        if mine.search(entry):
            text = lockfile.with_entry(name, entry, text)
    lock.write_text(text, encoding="utf-8")
    print(f"{archive}: {len(inside)} files of scale {scale} put in place")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("build")
    verb.add_argument("--scale", default="real")
    verb.add_argument("--out", type=Path, default=ROOT / "build/kit")
    verb.add_argument("--python", default="3.12", help="the other machine's version of Python")
    verb = verbs.add_parser("pack")
    verb.add_argument("--scale", required=True)
    verb.add_argument("out", type=Path)
    verb = verbs.add_parser("unpack")
    verb.add_argument("archive", type=Path)
    args = parser.parse_args()
    if args.verb == "build":
        build(args.out, args.scale, args.python)
    elif args.verb == "pack":
        pack(args.out, args.scale)
    else:
        unpack(args.archive)


if __name__ == "__main__":
    main()

"""What a figure was drawn from."""

import contextlib
import hashlib
import subprocess
from pathlib import Path

from ruamel.yaml import YAML

from roads import lockfile, stage


def provenance(files: list[Path]) -> dict:
    """What the figure was drawn from: files, commit, what dvc.lock has of the runs behind them, and their params."""
    def git(*args: str) -> str:
        with contextlib.suppress(FileNotFoundError):  # a tarball needs no git
            return subprocess.run(["git", *args], capture_output=True, text=True).stdout.strip()
        return ""

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--", "src", "data", "dvc.yaml", "params.yaml", "figures.yaml"):
        commit += ", with changes"
    lock, params = Path("dvc.lock"), {}
    digest = hashlib.sha256()
    if lock.exists():
        entries = lockfile.entries(lock.read_text(encoding="utf-8"))
        makers = {path: name for name, entry in entries.items() for path in lockfile.paths("outs", entry)}
        seen, todo = [], [path.as_posix() for path in files]
        while todo:
            path = Path(todo.pop())
            name = next((makers[p.as_posix()] for p in (path, *path.parents) if p.as_posix() in makers), None)
            if name and name not in seen:
                seen.append(name)
                todo += lockfile.paths("deps", entries[name])
        behind = YAML(typ="safe").load(lockfile.LOCK + "".join(entries[name] for name in seen))["stages"] or {}
        for name in seen:
            params |= behind[name].get("params", {}).get("params.yaml", {})
        for name in sorted(seen):
            digest.update(f"{name} {behind[name]}".encode())
    return {"files": {path.as_posix(): stage.sha256(path) for path in files},
            "commit": commit or None, "params": params, "lock": digest.hexdigest() if params else None}

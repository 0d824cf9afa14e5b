"""Stop `make fig11 SCALE=tiny` at random times and in every way; what comes of it in the end are the same bits.

    python tests/kills.py KILLS SIGNALS [SEED]      # 50 and 30: some twenty minutes

A kill is `kill -9` of the runner, or of everything at once. A signal is INT, TERM, HUP or QUIT, to make alone (as
`docker stop` does) or to its process group (as a terminal does). Half of them come in the first four seconds, when
Python, DVC and the server of forks import. After each, nothing may be left after five seconds, and every line with
FAILED must say why.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from conftest import ENV, clone

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
SECONDS = 5.0  # until nothing may be left


def processes(mark: str) -> dict[int, str]:
    """Process id -> command line of all that have the mark in the environment they were started with."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                found |= {int(entry.name): command} if state != "Z" else {}
        except OSError:  # it has just ended
            pass
    return found


def left(mark: str) -> tuple[float, dict[int, str]]:
    """Seconds until nothing was left, and what was after SECONDS."""
    start = time.monotonic()
    while (rest := processes(mark)) and time.monotonic() - start < SECONDS:
        time.sleep(0.05)
    return time.monotonic() - start, rest


def bits(where: Path) -> dict[str, bytes]:
    return {str(path.relative_to(where)): path.read_bytes() for folder in ("runs/tiny", "reports/tiny")
            for path in sorted((where / folder).rglob("*")) if path.is_file()}


def start(where: Path, mark: str, log: Path, figure: str) -> subprocess.Popen:
    command = ["make", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", "-o", f"{sys.prefix}/.dev", figure,
               "JOBS=2"]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=where, env=ENV | {"MARK": mark}, stdout=file, stderr=file,
                                start_new_session=True)


def strike(kind: str, rng: random.Random, make: subprocess.Popen, mark: str) -> str:
    """End a run in one way; its name."""
    if kind == "signal":
        sig, group = rng.choice(SIGNALS), rng.random() < 0.5
        (os.killpg if group else os.kill)(make.pid, sig)
        return f"{sig.name} to {'the group' if group else 'make'}"
    runner = [pid for pid, command in processes(mark).items() if "roads.runner.repro --make" in command]
    victims = runner if runner and rng.random() < 0.7 else list(processes(mark))
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return "kill -9 of the runner" if victims == runner else f"kill -9 of all {len(victims)}"


def campaign(where: Path, kills: int, signals: int, seed: int = 0, figure: str = "fig11") -> list[str]:
    """What went wrong, a line each; prints a line for every stop. `where` is an empty folder."""
    for sig in SIGNALS:
        if signal.getsignal(sig) == signal.SIG_IGN:  # as a shell has it for what runs in the background, and for theirs
            signal.signal(sig, signal.SIG_DFL)
    rng, wrong, whole, ended = random.Random(seed), [], None, 0
    checkout, log = clone(where / "checkout"), where / "log"
    assert start(checkout, uuid.uuid4().hex, log, figure).wait() == 0, log.read_text()[-3000:]
    whole = bits(checkout)

    def afresh() -> None:
        for name in ("runs", "reports/tiny", "dvc.lock", ".dvc/cache", ".dvc/tmp"):
            path = checkout / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def finished() -> None:
        nonlocal ended
        ended += 1
        if (found := bits(checkout)) != whole:
            others = [name for name in found | whole if found.get(name) != whole.get(name)]
            wrong.append(f"run {ended} ended with other bits: {others}")
        afresh()

    afresh()
    kinds = ["kill"] * kills + ["signal"] * signals
    rng.shuffle(kinds)
    for kind in kinds:
        mark = uuid.uuid4().hex
        make, wait = start(checkout, mark, log, figure), rng.uniform(0, 4 if rng.random() < 0.5 else 20)
        try:
            if make.wait(wait) == 0:
                finished()
                make = start(checkout, mark, log, figure)
                time.sleep(wait := rng.uniform(0, 4))
        except subprocess.TimeoutExpired:
            pass
        name = strike(kind, rng, make, mark)
        seconds, rest = left(mark)
        make.wait() if make.pid not in rest else None
        said = log.read_text(errors="replace")
        silent = [line for line in said.splitlines() if "FAILED" in line and not re.search(r"FAILED \S+: \S", line)]
        wrong += [f"{name} after {wait:.1f} s: left {rest}"] * bool(rest) + [f"{name}: {line}" for line in silent]
        print(f"{name} after {wait:.1f} s: {'LEFT ' + str(rest) if rest else f'nothing left after {seconds:.1f} s'}",
              *silent, flush=True)
        for pid in rest:
            os.kill(pid, signal.SIGKILL)
    if start(checkout, uuid.uuid4().hex, log, figure).wait() != 0:
        wrong.append(f"the last run failed: {log.read_text()[-1000:]}")
    finished()
    print(f"{kills} kills, {signals} signals, {ended} runs to their end")
    return wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), *map(int, sys.argv[1:]))
    print(*found or ["nothing went wrong"], sep="\n")
    sys.exit(bool(found))

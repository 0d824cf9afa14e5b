"""`dvc repro TARGET...`, with stages that do not wait for each other run at the same time.

DVC decides what is out of date and runs every stage (single.py); this only keeps N of those going, in the order of
DVC's graph. A plain `dvc repro` does the same work, one stage at a time.
"""

import argparse
import contextlib
import csv
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from roads import active, config, schema
from roads.active import Active
from roads.figures.check import check
from roads.runner import dvc_patches, preflight, prefork, single
from roads.runner.devices import cores
from roads.runner.progress import Progress, clock, weights
from roads.stage import LAUNCH, STAGES_PER_GPU, UserError, main

if TYPE_CHECKING:
    from dvc.repo import Repo

TMP = Path(".dvc/tmp")
TIMES = Path("runs/times.csv")  # stage, seconds: a line for every run of a stage; `make times` sums it up
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
running: dict[str, subprocess.Popen] = {}
stopping = threading.Event()


def checkout_lock() -> int:
    """Wait for other runs in this checkout to end, and forget the files that a killed one had reserved."""
    if not TMP.parent.is_dir():
        raise UserError(f"{TMP.parent}: not found; run from the root of the project (`git checkout .dvc` restores it)")
    if TMP.exists() and not TMP.is_dir():
        raise UserError(f"{TMP}: expected a folder; move that file away")
    TMP.mkdir(exist_ok=True)
    lock = os.open(TMP / "repro.lock", os.O_CREAT | os.O_RDWR)  # stages keep it too, should this be killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another run is at work in this checkout; waiting for it to end.", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    reserved = TMP / "rwlock"  # names process ids; later ones, in a container say, may be the same
    if reserved.exists() and (single.IN_RWLOCK in (text := reserved.read_text()) or not text.endswith("}")):
        reserved.unlink()
    return lock


def graph_of(repo: "Repo", targets: list[str]) -> tuple[dict, set]:
    """Every stage behind the targets -> all that it waits for; and those that may have to run. DVC's Stage objects.

    Raises:
        UserError: the active scale has no stage of a target.
    """
    import networkx as nx

    # Not repo.status(targets): for each target that reads dvc.lock anew and checks all that lies behind it again.
    graph = repo.index.graph
    known = {stage.addressing: [stage] for stage in graph}
    found = {target: known.get(target) or repo.stage.collect(target) for target in targets or known}
    if without := [target for target in found if not found[target]]:
        raise UserError(f"{', '.join(without)}: the active scale has no stage of that; another may, by SCALE=")
    roots = [stage for stages in found.values() for stage in stages]
    needs = {s: nx.descendants(graph, s) for s in graph}
    wanted = set(roots).union(*(needs[stage] for stage in roots))
    with repo.lock, dvc_patches.params_read_once():
        stale = {stage for stage in wanted if stage.status()}
    return {s: needs[s] for s in wanted}, {s for s in wanted if stale & (needs[s] | {s})}


def out_of_date(targets: list[str]) -> tuple[dict[str, set[str]], dict[str, str | list[str]]]:
    """The stages that may have to run for the targets -> those among them that each one waits for, and its command."""
    dvc_patches.check_version()
    from dvc.repo import Repo

    with Repo(_wait_for_lock=True) as repo:
        needs, todo = graph_of(repo, targets)
        return ({s.addressing: {n.addressing for n in needs[s] & todo} for s in todo},
                {s.addressing: s.cmd for s in todo})


def resolve(targets: list[str], now: Active) -> list[str]:
    """Figures by their name alone are those of the active scale; of several, those that it has.

    Raises:
        UserError: the scale has none of them.
    """
    without = [name for name in targets if not now.figures.get(name.split("@")[0], [now.scale])]
    if without:
        params = config.load()
        others = [scale for scale in params.scales if active.follow(scale, None, params).figures[without[0]]]
        message = (f"{', '.join(without)}: not at scale {now.scale}: it has no preferences, or no arms for it in "
                   "params.yaml" + "".join(f"; `make {without[0]} SCALE={other}` has it" for other in others[:1]))
        if len(without) == len(targets):
            raise UserError(message)
        print(message, file=sys.stderr)
    return [f"{name}@{now.scale}" if name in now.figures else name for name in targets if name not in without]


def times(path: Path = TIMES) -> Iterator[tuple[str, float]]:
    """Stage and seconds of every run, oldest first; without lines that a full disk cut."""
    for row in csv.reader(path.open(encoding="utf-8")) if path.exists() else ():
        with contextlib.suppress(ValueError):
            name, seconds = row
            yield name, float(seconds)


def interval(piped: bool) -> str:
    """Seconds between two lines of a progress bar; tqdm reads them where it is imported."""
    return "10" if piped else "0.1"


def run(stage: str, piped: bool, lock: int, gpu: str | None) -> str | None:
    """Run one stage, on a GPU of its own if there is one to give; why it failed, or None. piped: print its lines with
    its name in front."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if piped else {}
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": interval(piped)}
    env |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    if stopping.is_set():
        return "stopped"
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            kept = [lock, theirs.fileno(), *([int(env[prefork.ORDERS])] if prefork.ORDERS in env else [])]
            cmd = [sys.executable, "-m", single.MODULE, stage, str(theirs.fileno())]
            options = {"env": env, "text": True, "errors": "replace", "start_new_session": True, "pass_fds": kept}
            running[stage] = process = subprocess.Popen(cmd, **options, **pipes)
        last = ""
        for line in process.stdout or []:
            if line.strip() and not stopping.is_set():
                last = last if "%|" in line else line.strip()  # a bar of progress says not why it failed
                print(f"[{stage}] {line.rstrip()}", flush=True)
        code = process.wait()
        del running[stage]
        told = ours.recv(1 << 16).decode(errors="replace")
    if not code:
        return None
    reason = told or single.ended(code)
    return f"{reason}: {last}" if last and reason.startswith("exit code") else reason


def stop(signum: int, frame: object) -> None:
    """End what runs: first as Ctrl-C does, then for good. What is left ends with this process."""
    stopping.set()
    for sig in signal.SIGINT, signal.SIGKILL:
        for process in list(running.values()):
            with contextlib.suppress(OSError):  # it may just have ended
                os.killpg(process.pid, sig)
        end = time.monotonic() + 2
        while any(process.poll() is None for process in list(running.values())) and time.monotonic() < end:
            time.sleep(0.05)
    print("Stopped. The same command continues from here.", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def stop_with(make: int) -> None:
    """Stop when make, whose process id is given, has gone or was asked to stop. Of the signals that end it make passes
    on TERM alone, and then waits for us; so it is watched for the others."""

    def asked() -> bool:
        if os.getppid() != make:
            return True
        with contextlib.suppress(OSError):  # Linux's way to tell that make has put its handler of a signal away
            status = Path(f"/proc/{make}/status").read_text()
            kept = [int(re.search(rf"^Sig{kind}:\s*(\w+)", status, re.M)[1], 16) for kind in ("Cgt", "Ign")]
            return any(not (kept[0] | kept[1]) >> (sig - 1) & 1 for sig in STOPS)
        return False

    def watch() -> None:
        while not asked():
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def bring_up_to_date(todo: dict[str, set[str]], jobs: int, lock: int, gpus: list[str], progress: Progress) -> int:
    """Run the stages, `jobs` at once; each of them gets one of the GPUs, or none where the list is empty."""
    order, ready, at_work, failed, begun = TopologicalSorter(todo), [], {}, [], time.monotonic()
    order.prepare()
    TIMES.parent.mkdir(exist_ok=True)
    with TIMES.open("a", encoding="utf-8", buffering=1) as times, ThreadPoolExecutor(jobs) as pool:
        while order.is_active():
            ready += sorted(order.get_ready())
            while ready and len(at_work) < jobs and not failed:
                stage = ready.pop(0)
                print(f"start {stage}", flush=True)
                gpu = gpus.pop(0) if gpus else None
                at_work[pool.submit(run, stage, jobs > 1, lock, gpu)] = stage, time.monotonic(), gpu
            if not at_work:
                break
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                stage, since, gpu = at_work.pop(future)
                gpus += [gpu] if gpu else []
                if (reason := future.result()) is None:
                    order.done(stage)
                    seconds = time.monotonic() - since
                    progress.done(stage, seconds)
                    print(f"done  {stage} ({seconds:.0f} s; {progress.line(len(at_work))})", flush=True)
                    times.write(f"{stage},{seconds:.1f}\n")
                else:
                    failed.append(f"FAILED {stage}: {reason}")
                    others = f"; {len(at_work)} others still run" if at_work else ""
                    print(failed[-1] + others, file=sys.stderr, flush=True)
    took = f"{progress.total - len(progress.left)} of {progress.total} stages in {clock(time.monotonic() - begun)}"
    if not failed:
        print(f"{took}. `make claims report` decides the claims and puts everything on one page.", flush=True)
        return 0
    if len(progress.left) < progress.total and len(failed) > 1:  # they may stand far apart
        print(*failed, sep="\n", file=sys.stderr)
    print(f"{took}; they are kept, and the same command continues. One stage alone, with all that it prints: dvc repro "
          f"--single-item {failed[0].split()[1].rstrip(':')}", file=sys.stderr, flush=True)
    return 1


def workers(scale: schema.Scale, jobs: int | None, per_gpu: int = 1) -> tuple[int, list[str]]:
    """How many stages run at once, and the GPUs that they share out, `tensor_parallel` each and every one `per_gpu`
    times: none where a stage takes all of them (LAUNCH)."""
    if scale.compute.device == "gpu" and not os.environ.get(LAUNCH):
        names, each = [card.visible for card in preflight.cards()], scale.machine.tensor_parallel
        gpus = [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]
        gpus *= per_gpu
        return min(jobs or len(gpus), len(gpus)), gpus
    return jobs or (1 if scale.compute.device == "gpu" else cores()), []


def command() -> int:
    parser = argparse.ArgumentParser(prog="python -m roads.runner.repro", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="what to bring up to date (default: all)")
    parser.add_argument("--jobs", type=int, help="at once (default: one per core, or per GPU)")
    parser.add_argument("--make", type=int, metavar="PID", help="stop when this make, which runs us, is to stop")
    args = parser.parse_args()
    params = active.write()  # a bad params.yaml stops everything before anything runs
    now = active.load(params=params)
    targets = resolve(args.targets, now)
    for sig in STOPS:
        if signal.getsignal(sig) != signal.SIG_IGN:  # as nohup has it, or a shell in the background
            signal.signal(sig, stop)
    if args.make:
        stop_with(args.make)
    lock = checkout_lock()
    with dvc_patches.errors():
        todo, commands = out_of_date(targets)
    if not todo:
        print("Up to date:", *targets or ["every stage"])
        return 0
    check([name for stage in sorted(todo) if (name := stage.split("@")[0]) in params.figures], now.scale, params)
    preflight.check(commands, params, now.scale)
    cfg, names = params.scales[now.scale], {preflight.scale_of(command) for command in commands.values()}
    blocks = [params.blocks[name] for name in sorted(names) if name in params.blocks]
    per_gpu = preflight.stages_per_gpu(cfg, blocks, args.jobs)
    os.environ[STAGES_PER_GPU] = str(per_gpu)
    jobs, gpus = workers(cfg, args.jobs, per_gpu)
    print(f"{len(todo)} stages to bring up to date, {jobs} at once", flush=True)
    if prefork.stays(cfg.compute):
        os.environ[prefork.STAY] = "1"
    with prefork_server(piped=jobs > 1):
        return bring_up_to_date(todo, jobs, lock, gpus, Progress(weights(commands, params, cfg.compute), jobs))


@contextlib.contextmanager
def prefork_server(piped: bool) -> Iterator[None]:
    """A process from which stages are forked (prefork.py), where they are not launched on several GPUs."""
    if os.environ.get(LAUNCH) or sys.platform != "linux":
        yield
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "roads.runner.prefork", str(theirs.fileno()), str(os.getpid())]
    with ours:
        with theirs:
            # One thread: libraries start more as they are imported, and a fork would find their locks taken.
            env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                "TQDM_MININTERVAL": interval(piped)}
            process = subprocess.Popen(command, env=env, start_new_session=True, pass_fds=[theirs.fileno()])
        os.environ[prefork.ORDERS] = str(ours.fileno())
        with process:
            try:
                yield
            finally:
                process.kill()


if __name__ == "__main__":
    main(command)

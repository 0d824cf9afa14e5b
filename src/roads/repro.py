"""`dvc repro TARGET...`, with stages that do not wait for each other run at the same time.

DVC decides what is out of date and runs every stage (`dvc repro --single-item`); this only keeps N of those
going, in the order of DVC's graph. A plain `dvc repro` does the same work, one stage at a time.
"""

import argparse
import contextlib
import fcntl
import functools
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path

from ruamel.yaml import YAML

from roads import config, preflight, prefork
from roads.stage import LAUNCH, UserError, main

TMP = Path(".dvc/tmp")
TIMES = Path("runs/times.csv")  # stage, seconds: a line for every run of a stage; `make times` sums it up
SINGLE = "--single-item"
LOCK = "schema: '2.0'\nstages:\n"
LAYOUT = re.compile(LOCK + r"(?:  .*\n)*")  # as DVC writes dvc.lock, with stages and nothing else in it
running: dict[str, subprocess.Popen] = {}
stopping = threading.Event()


def alone() -> int:
    """Wait for other runs in this checkout to end, and forget the files that a killed one had reserved."""
    TMP.mkdir(exist_ok=True)
    lock = os.open(TMP / "repro.lock", os.O_CREAT | os.O_RDWR)  # stages keep it too, should this be killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another run is at work in this checkout; waiting for it to end.", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    reserved = TMP / "rwlock"  # names process ids; later ones, in a container say, may be the same
    if reserved.exists() and (SINGLE in (text := reserved.read_text()) or not text.endswith("}")):
        reserved.unlink()
    return lock


def graph_of(repo, targets: list[str]) -> tuple[dict, set]:
    """Every stage behind the targets -> all that it waits for; and those that may have to run. DVC's Stage objects."""
    import networkx as nx

    # Not repo.status(targets): for each target that reads dvc.lock anew and checks all that lies behind it again.
    graph = repo.index.graph
    known = {stage.addressing: [stage] for stage in graph}
    roots = [stage for target in targets or known for stage in known.get(target) or repo.stage.collect(target)]
    needs = {s: nx.descendants(graph, s) for s in graph}
    wanted = set(roots).union(*(needs[stage] for stage in roots))
    with repo.lock, params_read_once():
        stale = {stage for stage in wanted if stage.status()}
    return {s: needs[s] for s in wanted}, {s for s in wanted if stale & (needs[s] | {s})}


@contextlib.contextmanager
def params_read_once() -> Iterator[None]:
    """DVC 3.67 parses params.yaml again for every stage and walks through all of it for each of a stage's keys, which
    makes up most of a run with nothing to do."""
    from dvc.dependency import param

    read, files = param.read_param_file, {}

    def read_once(fs, path: str, key_paths: list[str] | None = None, flatten: bool = False) -> dict:
        if path not in files:
            files[path] = read(fs, path)
        try:
            found = {key: functools.reduce(lambda part, name: part[name], key.split("."), files[path])
                     for key in key_paths or ()}
        except (KeyError, TypeError):
            found = {}
        return found if found and flatten else read(fs, path, key_paths, flatten)

    param.read_param_file = read_once
    try:
        yield
    finally:
        param.read_param_file = read


def out_of_date(targets: list[str]) -> tuple[dict[str, set[str]], dict[str, str | list[str]]]:
    """The stages that may have to run for the targets -> those among them that each one waits for, and its command."""
    from dvc.repo import Repo

    with Repo(_wait_for_lock=True) as repo:
        needs, todo = graph_of(repo, targets)
        return ({s.addressing: {n.addressing for n in needs[s] & todo} for s in todo},
                {s.addressing: s.cmd for s in todo})


def resolve(targets: list[str], params: config.Params) -> list[str]:
    """Figures by their name alone are those of the active scale; of several, those that it has.

    Raises:
        UserError: the scale has none of them.
    """
    without = [name for name in targets if not params.figures.get(name.split("@")[0], [params.scale])]
    if without:
        message = (f"{', '.join(without)}: not at scale {params.scale}: real posts come without preference labels, and "
                   f"arms are in `studies`; `make {without[0]} SCALE=mini` has it")
        if len(without) == len(targets):
            raise UserError(message)
        print(message, file=sys.stderr)
    return [f"{name}@{params.scale}" if name in params.figures else name for name in targets if name not in without]


def single_item(stage: str) -> int:
    """`dvc repro --single-item STAGE`, which reads and writes no entry of dvc.lock but the stage's own and replaces the
    file as a whole; its commands are forks of the process that has torch imported already.

    DVC 3.67 parses all of dvc.lock before and after every stage, at mini for two thirds of the seconds that a stage
    takes beside its command. And it writes in place: a kill -9 then would leave half of it.
    """
    from dvc.cli import main
    from dvc.dvcfile import Lockfile
    from dvc.stage import run as stage_run
    from dvc.stage.exceptions import StageCmdFailedError
    from dvc.stage.serialize import to_lockfile

    load_all, dump_all = Lockfile._load, Lockfile.dump_stages

    def text_of(lockfile) -> str | None:
        """None: in the middle of a merge, or changed by hand; DVC will know what to do."""
        text = Path(lockfile.path).read_text(encoding="utf-8") if lockfile.exists() else LOCK
        return text if LAYOUT.fullmatch(text) else None

    def load(lockfile, **kwargs) -> tuple[dict, str]:
        if (text := text_of(lockfile)) is None:
            return load_all(lockfile, **kwargs)
        entry, _ = entry_of(stage, text)
        return YAML(typ="safe").load(LOCK + (entry or "  {}")), text

    def dump(lockfile, stages, **kwargs) -> None:
        if (text := text_of(lockfile)) is None:
            return dump_all(lockfile, stages, **kwargs)
        for done in stages:
            before, at = entry_of(done.name, text)
            text = text[:at] + as_entry(to_lockfile(done, **kwargs)) + text[at + len(before) :]
        new = TMP / "dvc.lock"
        new.write_text(text, encoding="utf-8")
        os.replace(new, lockfile.path)

    as_new_process = stage_run._run

    def run_command(executable, command: str, **kwargs) -> None:
        code = prefork.run(command, kwargs["env"], kwargs["cwd"])
        if code is None:
            as_new_process(executable, command, **kwargs)
        elif code:
            raise StageCmdFailedError(command, code)

    stage_run._run = run_command
    Lockfile._load, Lockfile.dump_stages = load, dump
    return main(["--wait-for-lock", "repro", "--quiet", SINGLE, stage])


def entry_of(stage: str, lock: str) -> tuple[str, int]:
    """The text of a stage's entry in dvc.lock, '' if there is none, and where it begins, or would."""
    found = re.search(rf"^  {re.escape(stage)}:\n(?:    .*\n)+", lock, re.M)
    return (found[0], found.start()) if found else ("", len(lock))


def as_entry(stages: dict) -> str:
    """Stages as dvc.lock has them below `stages:`, in DVC's own layout."""
    yaml, text = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.representer.add_representer(OrderedDict, lambda representer, value: representer.represent_dict(value))
    yaml.dump({"stages": stages}, text)
    return text.getvalue().removeprefix("stages:\n")


def run(stage: str, piped: bool, lock: int, gpu: str | None) -> int:
    """Run one stage, on a GPU of its own if there is one to give, and return its exit code; piped: print its lines with
    its name in front."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if piped else {}
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10" if piped else "0.1"}
    env |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    cmd = [sys.executable, "-m", "roads.repro", SINGLE, stage]
    options = {"env": env, "text": True, "errors": "replace", "start_new_session": True, "pass_fds": [lock]}
    if stopping.is_set():
        return 130
    running[stage] = process = subprocess.Popen(cmd, **options, **pipes)
    for line in process.stdout or []:
        if line.strip():
            print(f"[{stage}] {line.rstrip()}", flush=True)
    code = process.wait()
    del running[stage]
    return code


def stop(signum: int, frame) -> None:
    """End what runs: first as Ctrl-C does, then for good."""
    stopping.set()
    for sig in signal.SIGINT, signal.SIGKILL:
        for process in list(running.values()):
            with contextlib.suppress(OSError):  # it may just have ended
                os.killpg(process.pid, sig)
        end = time.monotonic() + 10
        while running and time.monotonic() < end:
            time.sleep(0.05)
    print("Stopped. The same command goes on from here.", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def bring_up_to_date(todo: dict[str, set[str]], jobs: int, lock: int, gpus: list[str]) -> int:
    """Run the stages, `jobs` at once; each of them gets one of the GPUs, or none where the list is empty."""
    order, ready, at_work, done, failed = TopologicalSorter(todo), [], {}, 0, []
    order.prepare()
    with ThreadPoolExecutor(jobs) as pool:
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
                if future.result() == 0:
                    order.done(stage)
                    done += 1
                    seconds = time.monotonic() - since
                    print(f"done  {stage} ({seconds:.0f} s; {done} of {len(todo)})", flush=True)
                    with TIMES.open("a", encoding="utf-8") as file:
                        file.write(f"{stage},{seconds:.1f}\n")
                else:
                    failed.append(stage)
                    print(f"FAILED {stage}; {len(at_work)} others still run", file=sys.stderr, flush=True)
    if failed:
        print("Failed:", *failed, file=sys.stderr)
    return len(failed) > 0


def workers(scale: config.Scale, jobs: int | None) -> tuple[int, list[str]]:
    """How many stages run at once, and the GPUs that they share out, `tensor_parallel` each: none where a stage takes
    all of them (LAUNCH)."""
    if scale.compute.device == "gpu" and not os.environ.get(LAUNCH):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(preflight.gpus())))))
        names, each = [name for name in visible.split(",") if name], scale.machine.tensor_parallel
        gpus = [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]
        return min(jobs or len(gpus), len(gpus)), gpus
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return jobs or (1 if scale.compute.device == "gpu" else cores), []


def command() -> int:
    from dvc.exceptions import DvcException

    parser = argparse.ArgumentParser(prog="python -m roads.repro", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="what to bring up to date (default: all)")
    parser.add_argument("--jobs", type=int, help="at once (default: one per core, or per GPU)")
    parser.add_argument(SINGLE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.single_item:
        return single_item(args.single_item)

    params = config.load()  # a bad params.yaml stops everything before anything runs
    targets = resolve(args.targets, params)
    for sig in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(sig, stop)
    lock = alone()
    try:
        todo, commands = out_of_date(targets)
    except DvcException as error:
        sys.exit(f"dvc: {error}")
    if not todo:
        print("Up to date:", *targets or ["every stage"])
        return 0
    preflight.check(commands, params)
    jobs, gpus = workers(params.scales[params.scale], args.jobs)
    print(f"{len(todo)} stages to bring up to date, {jobs} at once", flush=True)
    with imported():
        return bring_up_to_date(todo, jobs, lock, gpus)


@contextlib.contextmanager
def imported() -> Iterator[None]:
    """A process from which stages are forked (prefork.py), where they are not launched on several GPUs."""
    if os.environ.get(LAUNCH) or sys.platform != "linux":
        yield
        return
    os.environ[prefork.NAME] = f"roads-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "roads.prefork", os.environ[prefork.NAME]]
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    main(command)

"""What a figure would cost: stages that would run, time, dollars for the judge, disk. Runs and changes nothing.

    python -m roads.runner.plan                                  # every active figure at the active scale
    python -m roads.runner.plan --figure fig3 --scale mini       # or --figure 3, or an extra figure's name

DVC says which stages are up to date, which it would take from its cache and which would have to run. Seconds are those
of the stage's last run in this checkout (measured) or those of the model in cost.py (modelled).
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roads import active, config
from roads.figures.check import check
from roads.runner import cost, dvc_patches, preflight
from roads.runner.devices import DEVICES, cores, cpu_for
from roads.runner.preflight import amount
from roads.runner.repro import TIMES, graph_of, times
from roads.runner.status import STATUSES, TO_RUN, statuses
from roads.runner.work import READ, WRITTEN
from roads.stage import UserError, expect_file, main

if TYPE_CHECKING:
    from dvc.repo import Repo

CACHED = 1.5  # seconds: a "run" as short as this took its output from DVC's cache, and says nothing of the work


def measured(path: Path = TIMES) -> dict[str, float]:
    """Seconds of the last run of every stage that did run."""
    return {name: seconds for name, seconds in times(path) if seconds > CACHED}


@contextlib.contextmanager
def switched(scale: str | None, data: str | None) -> Iterator[tuple]:
    """DVC's view of this checkout with another active scale, its name, and every block; no file is touched.

    active.yaml is switched in a copy, which DVC is given to read where it asks for it.
    """
    from dvc.fs import LocalFileSystem
    from dvc.repo import Repo

    here = Path(active.FILE).absolute()
    with tempfile.TemporaryDirectory() as folder:
        for name in (config.PARAMS, config.FIGURES, active.FILE):
            expect_file(name)
            if name.exists():
                shutil.copyfile(name, Path(folder) / name)
        try:
            params = active.write(scale, data, Path(folder) / config.PARAMS)
            now = active.load(Path(folder) / config.PARAMS, params)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None
        scale, copy = now.scale, Path(folder) / active.FILE

        class Switched(LocalFileSystem):
            def open(self, path: str, mode: str = "r", **kwargs: object) -> Any:
                return super().open(copy if Path(path).absolute() == here else path, mode, **kwargs)

        blocks = {name: block.model_dump(exclude_none=True) for name, block in params.blocks.items()}
        there = dict.fromkeys(blocks[scale]["data"], 10**9)
        there = as_many_as_there_are(Path(now.data_from), there) if now.data_from else there
        for name in (name for name in blocks if name.partition(".")[0] == scale):  # its arms read the same folder
            blocks[name]["data"] = {split: min(n, there[split]) for split, n in blocks[name]["data"].items()}
        with dvc_patches.errors(), Repo(fs=Switched(), _wait_for_lock=True) as repo:
            yield repo, scale, blocks


def as_many_as_there_are(folder: Path, wanted: dict[str, int]) -> dict[str, int]:
    """Rows of every split, where a folder has fewer than a scale wants; of one without a file a tenth of train's."""
    train, *others = (rows_of(folder, split) for split in ("train", "valid", "test"))
    if train is None:
        return wanted
    valid, test = (train // 10 if rows is None else rows for rows in others)
    rows = {"valid": valid, "test": test, "best_of_n": test}
    return {split: min(n, rows.get(split, train)) for split, n in wanted.items()}


def rows_of(folder: Path, split: str) -> int | None:
    """Rows of a split's file, if there is one that can be read; stage data says what is wrong with another."""
    if (path := folder / f"{split}.jsonl").exists():
        return len(path.read_bytes().splitlines())
    if (path := folder / f"{split}.parquet").exists():
        from pyarrow import ArrowException, parquet

        with contextlib.suppress(OSError, ArrowException):
            return parquet.read_metadata(path).num_rows


def targets_of(repo: "Repo", figure: str) -> list[str]:
    """The stages of one figure, or of all: those that write to reports/."""
    drawn = [stage for stage in repo.index.stages
             if any(Path(out.def_path).parts[0] == "reports" for out in stage.outs)]
    wanted = f"fig{figure}" if figure.isdigit() else figure
    names = [stage.addressing for stage in drawn if wanted in ("all", entry_of(stage.addressing))]
    if not names:
        known = sorted({entry_of(stage.addressing) for stage in drawn}, key=lambda name: (len(name), name))
        raise UserError(f"figure {wanted!r}: not at this scale; expected one of: {', '.join(known)}, all")
    return names


def entry_of(stage: str) -> str:
    """The entry of dvc.yaml that a stage is one of."""
    return stage.split("@")[0]


@dataclass
class PlannedStage:
    """One stage of the plan."""

    name: str
    status: str
    seconds: float | None
    source: str  # of the seconds: measured, modelled or unknown
    judged: int  # answers of an outside judge
    dollars: float  # for them
    size: float | None
    needs: set[str]


def plan(figure: str, scale: str | None = None, data: str | None = None,
         device: str | None = None) -> tuple[list["PlannedStage"], str, int]:
    """The stages that a figure needs, the device they are planned on, and how many of it (cores, GPUs) one takes."""
    seconds = {} if device else measured()
    with switched(scale, data) as (repo, scale, blocks):
        targets = targets_of(repo, figure)
        check(sorted(set(map(entry_of, targets))), scale, config.load())  # as `make fig3` will
        needs, todo = graph_of(repo, targets)
        compute = blocks[scale]["compute"]
        device = device or (card_here() if compute["device"] == "gpu" else cpu_for(compute["precision"]))
        stages, drawn = [], set()
        for stage, status in statuses(repo, needs, todo).items():
            done = cost.work(stage.cmd, blocks, drawn if status == TO_RUN else None)
            modelled = done.seconds(DEVICES[device]) if done else None
            at = seconds.get(stage.addressing)
            source = "measured" if at else "modelled" if done else "unknown"
            size = sum(out.meta.size or 0 for out in stage.outs) or (done.size if done else None)
            stages.append(PlannedStage(stage.addressing, status, at or modelled, source, done.judged if done else 0,
                              done.dollars if done else 0, size, {other.addressing for other in needs[stage]}))
        # A card's rates are of all of it: stages that share one (preflight.share) do not add up.
        return stages, device, blocks[scale]["machine"]["threads"] if device.startswith("cpu") else 1


def card_here() -> str:
    """The GPU of this machine, if it was measured (`make check-gpu`), or else an H100."""
    return next((card.name for card in preflight.cards() if card.name in DEVICES), "H100")


def longest(stages: list[PlannedStage]) -> float:
    """Seconds of the longest chain of stages that wait for each other."""
    end: dict[str, float] = {}
    for stage in stages:  # inputs come first
        end[stage.name] = (stage.seconds or 0) + max((end[name] for name in stage.needs if name in end), default=0)
    return max(end.values(), default=0)


def _time(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def table(stages: list[PlannedStage]) -> str:
    """One line for each entry of dvc.yaml: its stages by status, and the cost of those that would run."""
    rows = [("stage", "time is", "stages", *STATUSES, "each", "in all", "disk")]
    entries = defaultdict(list)
    for stage in stages:
        entries[entry_of(stage.name)].append(stage)
    for entry, group in entries.items():
        run = [stage for stage in group if stage.status == TO_RUN]
        counts = [sum(stage.status == status for stage in group) or "-" for status in STATUSES]
        known = [stage.seconds for stage in run if stage.seconds]
        size = sum(stage.size or 0 for stage in run)
        rows.append((entry, ", ".join(sorted({stage.source for stage in run})), len(group), *counts,
                     _time(sum(known) / len(known)) if known else "", _time(sum(known)) if known else "",
                     amount(size) if size else ""))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map("{:{}{}}".format, map(str, row), "<<>>>>>>>", widths)).rstrip() for row in rows)


def totals(stages: list[PlannedStage], device: str, width: int, cores: int, price: float | None = None) -> str:
    """Stages, time, dollars and disk, a line each.

    Args:
        width: how many cores, or GPUs, a stage takes. cores: how many there are.
        price: dollars for an hour of one GPU, if known.
    """
    run = [stage for stage in stages if stage.status == TO_RUN]
    counts = [f"{sum(stage.status == status for stage in stages)} {status}" for status in STATUSES]
    lines = [f"stages   {len(stages)}: {', '.join(counts)}"]
    if not run:
        return lines[0]
    lines[0] += " (at most: what comes out as it was stops there)"
    seconds = sum(stage.seconds or 0 for stage in run)
    here = sum(stage.seconds for stage in run if stage.source == "measured")
    cpu, hours = device.startswith("cpu"), seconds * width / 3600
    at_once = cores // width or 1 if cpu else 1
    wall = max(seconds / at_once, longest(run))
    unit, share = "core-hours" if cpu else f"{device} GPU-hours", here / seconds if here else 0
    lines.append(f"time     {hours:.2f} {unit}, {share:.0%} of them measured here and the rest modelled; "
                 f"about {_time(wall)}, {at_once} at once")
    if not cpu:
        lines[-1] += f" ({device}: {DEVICES[device].source})"
        lines.append(f"GPU      ${hours * price:,.2f} at ${price:g} an hour" if price else
                     "GPU      say --dollars-per-hour for its price; they differ too much to assume one")
    asked, dollars = sum(stage.judged for stage in run), sum(stage.dollars for stage in run)
    what = (f"{asked:,} answers, both orders, {READ} tokens read and {WRITTEN} written each" if asked else
            "nothing that runs asks an outside judge")
    lines.append(f"judge    ${dollars:,.2f}: {what}")
    lines.append(f"disk     {amount(sum(stage.size or 0 for stage in run))}, and as much again in .dvc/cache unless "
                 "the file system shares blocks")
    if unknown := sorted({entry_of(stage.name) for stage in run if stage.source == "unknown"}):
        lines.append(f"unknown  {', '.join(unknown)}: never run here, not among KINDS of cost.py; left out above")
    return "\n".join(lines)


def _command() -> None:
    parser = argparse.ArgumentParser(prog="python -m roads.runner.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="all", help="3, fig3, an extra figure's name, or all (the default)")
    parser.add_argument("--scale", help="a block of params.yaml (default: the active one)")
    parser.add_argument("--data", help="folder of posts, for a scale that reads one")
    parser.add_argument("--device", choices=list(DEVICES), help="default: the GPU here, or H100; or cpu")
    parser.add_argument("--dollars-per-hour", type=float, help="what one GPU costs you")
    a = parser.parse_args()
    stages, device, width = plan(a.figure, a.scale, a.data, a.device)
    print(table(stages), totals(stages, device, width, cores(), a.dollars_per_hour), sep="\n\n")


if __name__ == "__main__":
    main(_command)

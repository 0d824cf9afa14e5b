"""Run every entry of dvc.yaml once, in this process, and write down which parameters each of them read.

    PYTHONPATH=src python tests/reads.py OUT.json      # in a checkout at scale tiny, with one seed

Figures are left out, which read blocks to name what their inputs come from, and `check`, which checks whole files. A
parameter is a block of the scale (`dpo`), one of its samples (`samples.online`), or what an arm changes (`arms`).
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import networkx as nx
from dvc.repo import Repo

from roads import config, schema

seen: set[str] | None = None  # of the stage that runs; none while params.yaml is read and checked


def watch(model: type, prefix: str = "") -> None:
    """Note the fields that are read of a model."""
    plain, fields = model.__getattribute__, set(model.model_fields)

    def noted(self, name: str):
        if name in fields and seen is not None:
            seen.add(prefix + name)
        return plain(self, name)

    model.__getattribute__ = noted


def unseen(load):
    """A function that loads parameters: what it reads to check them does not count."""

    def quiet(*args):
        global seen
        before, seen = seen, None
        try:
            return load(*args)
        finally:
            seen = before

    return quiet


def entry_of(stage) -> str:
    return stage.addressing.split("@")[0]


def main(out: Path) -> None:
    global seen
    with Repo() as repo:
        graph = repo.index.graph
    first = {}
    for stage in graph:
        first.setdefault(entry_of(stage), stage)
    wanted = set(first.values()).union(*(nx.descendants(graph, stage) for stage in first.values()))
    wanted = {stage for stage in wanted if "roads.figures" not in str(stage.cmd)}  # nothing reads what those make
    watch(schema.Scale)
    watch(schema.Samples, "samples.")
    plain = schema.used

    def used(scale: schema.Scale, *blocks: str) -> dict:
        if seen is not None:
            seen.update(blocks)
        return unseen(plain)(scale, *blocks)

    schema.used, config.load, config.load_scale = used, unseen(config.load), unseen(config.load_scale)
    read: dict[str, list[str]] = {}
    listed: dict[str, set[str]] = defaultdict(set)
    for stage in (stage for stage in nx.dfs_postorder_nodes(graph) if stage in wanted):
        seen = set(read.get(entry_of(stage), []))
        for command in [stage.cmd] if isinstance(stage.cmd, str) else stage.cmd:
            sys.argv = re.sub("^python -m ", "", command).split(" ", 1)[:1] + shlex.split(command)[3:]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
                except SystemExit as end:
                    assert not end.code, f"{stage.addressing}: {end.code}"
        read[entry_of(stage)], seen = sorted(seen), None
        # A key is `mini.dpo` there, `mini.arms.fig12.n60` or, in figures.yaml, `fig12.policies`.
        keys = {key.partition(".")[2] for dep in stage.deps for key in getattr(dep, "params", None) or ()}
        listed[entry_of(stage)] |= {"arms" if key.startswith("arms.") else key for key in keys}
        if re.search(r"--scale \w+\.", str(stage.cmd)):  # a scale's block with what the arm's own line says
            read[entry_of(stage)] = sorted({*read[entry_of(stage)], "arms"})
    found = {name: {"read": read[name], "listed": sorted(listed[name])} for name, stage in first.items()
             if "roads.figures" not in stage.cmd and name != "check"}
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

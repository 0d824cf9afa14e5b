"""DVC's experiments, from a clean clone: `dvc exp run -S KEY=VALUE`, in place, aside (--temp) or queued; `exp show`."""

import csv
import io
import subprocess
import time

import pytest
from conftest import clone, run

TARGET = "world_data@tiny"


def dvc(where, *args: str) -> str:
    return run(where, "dvc", *args)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    where = clone(tmp_path_factory.mktemp("experiments"))
    subprocess.run(["git", "config", "user.name", "a"], cwd=where, check=True)
    subprocess.run(["git", "config", "user.email", "a@b"], cwd=where, check=True)
    subprocess.run("git add -A && git commit -qm all", shell=True, cwd=where, check=True)
    return where


def shown(where) -> dict[str, dict[str, str]]:
    """`dvc exp show`: name of an experiment -> its row."""
    text = dvc(where, "exp", "show", "--csv", "--only-changed")
    rows = csv.DictReader(io.StringIO(text[text.index("Experiment,"):]))
    return {row["Experiment"]: row for row in rows if row["Experiment"]}


@pytest.mark.slow
def test_one_value_is_tried_aside_and_shown(committed):
    before = {path: path.read_bytes() for path in committed.iterdir() if path.is_file()}
    dvc(committed, "exp", "run", "--temp", "-n", "aside", "-S", "tiny.source.tau=2.5", TARGET)
    assert {path: path.read_bytes() for path in committed.iterdir() if path.is_file()} == before
    assert not (committed / "runs").exists()
    assert subprocess.run(["git", "status", "--short"], cwd=committed, capture_output=True, text=True).stdout == ""
    dvc(committed, "exp", "run", "--queue", "-n", "queued", "-S", "tiny.source.tau=3.5", TARGET)
    dvc(committed, "queue", "start")
    for _ in range(90):
        if "Success" in (said := dvc(committed, "queue", "status")) or "Failed" in said:
            break
        time.sleep(2)
    assert "Success" in said, said
    found = shown(committed)
    assert {name: row["tiny.source.tau"] for name, row in found.items()} == {"aside": "2.5", "queued": "3.5"}
    dvc(committed, "exp", "branch", "queued", "kept")
    text = subprocess.run(["git", "show", "kept:params.yaml"], cwd=committed, capture_output=True, text=True).stdout
    tiny = "\ntiny:" + text.partition("\ntiny:")[2].partition("\n\n")[0]
    assert "tau: 3.5" in tiny and tiny not in (committed / "params.yaml").read_text(encoding="utf-8")

"""What make is given, and the name of a folder of posts, may hold anything: no shell and no make reads them."""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ENV, ROOT, clone, edit, make, run
from ruamel.yaml import YAML

from roads import config
from roads.runner import cost, preflight

HOSTILE = ["$(touch owned)", "$(shell touch owned)", "x'; touch owned; '", 'x"; touch owned; "', "x;touch owned",
           "`touch owned`", "--help"]
POSTS = "my posts; touch owned; $(touch owned) `touch owned` 'touch owned' \" ${x} #"  # a folder may be called that


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkout in a folder with a space in its name."""
    return clone(tmp_path_factory.mktemp("names") / "my checkout")


@pytest.fixture
def untouched(place):
    """The same; nothing may be run in it, or changed."""
    before = (place / "active.yaml").read_bytes()
    yield place
    assert not list(place.rglob("owned")) and not (place / "runs").exists() and not (place / "dvc.lock").exists()
    assert (place / "active.yaml").read_bytes() == before


def error(said: str) -> str:
    """The one line that says what is wrong."""
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("key, args, message", [
    ("SCALE", ["fig11", "JOBS=1"], "error: params.yaml: no block named {!r}; "),
    ("SCALE", ["report"], "error: reports/{}: no such folder; expected reports/<scale>"),
    ("SCALE", ["plan"], "error: params.yaml: no block named {!r}; "),
    ("FIG", ["plan"], "error: figure {!r}: not at this scale; expected one of: fig3, "),
    ("DATA", ["fig11"], "error: DATA={}: scale tiny makes its own data"),
    ("JOBS", ["fig11", "SCALE=tiny"], "error: JOBS={}: expected a number from 1 on"),
    ("LAUNCH", ["fig11", "SCALE=tiny"], "error: LAUNCH={}: expected one of: 1-gpu "),
])  # fmt: skip
def test_a_value_is_one_word(untouched, key, args, message):
    for value in HOSTILE:
        assert error(make(untouched, *args, f"{key}={value}", code=2)).startswith(message.format(value))


def test_the_environment_gives_values_too(untouched):
    for value in ("$(touch owned)", "x'; touch owned; '"):
        said = make(untouched, "fig11", env={"SCALE": value}, code=2)
        assert error(said).startswith(f"error: params.yaml: no block named {value!r}; ")
    assert "no block named" not in make(untouched, "help", env={"SCALE": "", "DATA": "", "JOBS": "", "LAUNCH": ""})


def test_options_for_lock_are_words(untouched):
    (untouched / "scripts/lock.py").write_text("import sys; print(sys.argv[1:])")
    assert "['--upgrade-package', 'scipy']" in make(untouched, "lock", "ARGS=--upgrade-package scipy")
    assert str(["x;", "$(touch", "owned)", "*"]) in make(untouched, "lock", "ARGS=x; $(touch owned) *")


# An environment of its own


def own(where, *args: str) -> subprocess.CompletedProcess:
    """make, without an environment that is set up."""
    (where / "requirements").mkdir(exist_ok=True)
    (where / "requirements/cpu.txt").touch()
    return subprocess.run(["make", *args], cwd=where, env=ENV, text=True, capture_output=True)


@pytest.mark.parametrize("value", [*HOSTILE, "touch owned"])
def test_python_is_one_word(untouched, value):
    done = own(untouched, "setup", f"PYTHON={value}")
    assert done.returncode == 2 and "say make PYTHON=/path/to/python" in error(done.stderr)
    assert not (untouched / ".venv").exists()


def test_python_may_lie_anywhere(untouched):
    python = untouched / "a 'b; $(x)/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> "{untouched}/asked"; [ "$1" = -c ]\n')
    python.chmod(0o755)
    done = own(untouched, "setup", f"PYTHON={python}")
    assert done.returncode == 2 and f"Setting up .venv with {python}: " in done.stdout
    assert (untouched / "asked").read_text().splitlines()[-1] == "-m venv --clear .venv"


@pytest.mark.parametrize("value", ["", "-x", "+x", "@x", *(f"a{it}b" for it in " ;&|<>()[]{}$`\"'\\*?!~=%:,#")])
def test_an_environment_has_a_plain_name(untouched, value):
    done = own(untouched, "help", f"VENV={value}")
    assert done.returncode == 2 and done.stdout == ""
    assert f"*** VENV={value}: expected a folder without spaces" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("value", [".venv", "/opt/venv", "../first/.venv-3.11", "/opt/python@3.11_x+y"])
def test_a_plain_name_will_do(untouched, value):
    assert own(untouched, "help", f"VENV={value}").returncode == 0


@pytest.mark.parametrize("name", ["report", "figures", "clean"])
def test_no_figure_has_the_name_of_a_command(untouched, name):
    table = untouched / "figures.yaml"
    before = table.read_text(encoding="utf-8")
    table.write_text(before.replace("\nfig4:", f"\n{name}:"), encoding="utf-8")
    done = own(untouched, name)
    table.write_text(before, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"*** figures.yaml: {name}: expected another name, as `make {name}` is a command" in done.stderr


@pytest.mark.parametrize("target", ["setup", "clean"])
def test_a_folder_of_somebody_elses_is_no_environment(untouched, target):
    folder = untouched / "thesis"
    folder.mkdir(exist_ok=True)
    (folder / "chapter.tex").write_text("mine")
    done = own(untouched, target, "VENV=thesis")
    assert done.returncode == 2 and (folder / "chapter.tex").read_text() == "mine"
    assert error(done.stderr) == "error: VENV=thesis: expected a folder that is new or empty or that make setup filled"


def test_an_environment_of_the_same_packages_is_shared(untouched):
    shared = untouched / "shared"
    (shared / "bin").mkdir(parents=True)
    (shared / "bin/python").write_text(f'#!/bin/sh\necho "$@" >> "{shared}/asked"\necho ok\n')
    (shared / "bin/python").chmod(0o755)
    shutil.copy(untouched / "requirements/cpu.txt", shared / ".installed")
    os.utime(shared / ".installed", (0, 0))  # older than the list of a fresh checkout
    done = own(untouched, "setup", "VENV=shared")
    assert done.returncode == 0 and "Setting up" not in done.stdout
    assert (shared / ".installed").stat().st_mtime > 0 and "pip install" not in (shared / "asked").read_text()


# Folders of posts


def test_no_command_of_the_graph_holds_a_name_that_is_given():
    """Names of blocks are letters, digits, _ and - (config.py)."""
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in stages.values():
        known = {f"item.{key}" for key in stage.get("matrix", ())}
        assert set(re.findall(r"\$\{(.*?)\}", json.dumps(stage["cmd"]))) <= known


def test_data_come_from_where_active_yaml_says_unless_the_command_does(place, tmp_path):
    before = (place / "active.yaml").read_bytes()
    run(place, "roads.active", "set", "--scale", "real-cpu")
    run(place, "roads.stages.data", "data/tldr_sample", str(tmp_path / "given"), "--scale", "real-cpu")
    for number, args in enumerate((["OUT", "--scale", "real-cpu"], ["--scale", "real-cpu", "OUT"],
                                   ["--scale", "real-cpu", "data/tldr_sample", "OUT"])):
        out = tmp_path / str(number)
        said = run(place, "roads.stages.data", *(str(out) if arg == "OUT" else arg for arg in args))
        assert f"data/tldr_sample -> {out} (" in said
        for path in (tmp_path / "given").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()
    (place / "active.yaml").write_bytes(before)


def test_what_data_cost_does_not_hang_on_where_they_come_from():
    blocks = {name: block.model_dump() for name, block in config.load(ROOT / "params.yaml").blocks.items()}
    for scale in blocks:
        commands = [f"python -m roads.stages.data {places} --scale {scale}" for places in ("F O", "O")]
        with_source, without = (cost.work(command, blocks) for command in commands)
        assert with_source == without is not None and {preflight.scale_of(command) for command in commands} == {scale}


@pytest.mark.slow
def test_dvc_makes_data_of_a_folder_of_any_name(place):
    """Also by itself, without make and the runner."""
    before = {name: (place / name).read_text(encoding="utf-8") for name in ("params.yaml", "active.yaml")}
    edit(place, "base: 100000, sft: 100000, preferences: 500, more: 0, online: 500, valid: 1000, test: 1000",
         "base: 60, sft: 60, preferences: 40, more: 0, online: 40, valid: 20, test: 20")
    edit(place, "best_of_n: 100}", "best_of_n: 20}")
    shutil.copytree(place / "data/tldr_sample", place / POSTS)
    plan = make(place, "plan", "FIG=11", "SCALE=real-cpu", f"DATA={POSTS}")
    assert re.search(r"^data +modelled +1 ", plan, re.M) and "unknown" not in plan
    run(place, "roads.active", "set", "--scale", "real-cpu", "--data", POSTS)
    run(place, "dvc", "init", "-q", "-f")
    run(place, "dvc", "repro", "-q", "data@real-cpu")
    rows = json.loads((place / "runs/real-cpu/data/metrics.json").read_text(encoding="utf-8"))["rows"]
    assert rows["sft"] == 60 and rows["preferences"] == 40
    lock = YAML(typ="safe").load(place / "dvc.lock")["stages"]["data@real-cpu"]
    assert lock["cmd"] == "python -m roads.stages.data runs/real-cpu/data --scale real-cpu"
    assert lock["deps"][0]["path"] == POSTS
    assert "up to date" in run(place, "dvc", "status", "data@real-cpu")
    with (place / POSTS / "train.jsonl").open("a") as file:
        file.write((place / POSTS / "valid.jsonl").read_text().splitlines()[0] + "\n")
    assert "data@real-cpu" in run(place, "dvc", "status", "data@real-cpu")
    assert not [path for path in place.rglob("*") if path.name == "owned"]
    for name, text in before.items():
        (place / name).write_text(text, encoding="utf-8")
    shutil.rmtree(place / "runs")
    (place / "dvc.lock").unlink()

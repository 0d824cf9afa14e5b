"""A checkout may be copied or moved with its environment, and environments shared: what runs is the source at hand."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

# What `make setup` does after pip. The other lines install packages.
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LINES = re.findall(r"^\t@\$\(PY\) .*(?:roads\.pth|relocatable).*\n", MAKEFILE, re.M)
WHERE = "import os, roads, sys; print(roads.__file__, sys.prefix, sep=os.linesep)"
ENV = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MAKEFLAGS")}
SHELLS = {"bash": "activate", "zsh": "activate", "fish": "activate.fish"}  # that can tell which file they are reading


def output(where: Path, *command: str) -> list[str]:
    done = subprocess.run(command, cwd=where, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def finish(where: Path) -> None:
    (where / "part.mk").write_text("PY := .venv/bin/python\nall:\n" + "".join(LINES))
    output(where, "make", "-f", "part.mk")


@pytest.fixture(params=["python3.11", "python3.12"])
def first(request, tmp_path):
    """A checkout of next to nothing, and its environment with programs as pip writes them."""
    python = shutil.which(request.param)
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no {request.param} here")
    where = tmp_path / "my checkouts/first"
    (where / "src/roads").mkdir(parents=True)
    (where / "src/roads/__init__.py").touch()
    shutil.copytree(ROOT / "scripts", where / "scripts")
    output(where, python, "-m", "venv", "--without-pip", ".venv")
    programs = where / ".venv/bin"
    for name, head in (("short", f"#!{programs}/python\n"),
                       ("long", f"#!/bin/sh\n'''exec' \"{programs}/python3\" \"$0\" \"$@\"\n' '''\n")):
        (programs / name).write_text(f"{head}{WHERE}\nassert sys.argv[1:] == ['a b', '$x']\n")
        (programs / name).chmod(0o755)
    (programs / "other").write_text("#!/bin/sh\necho not Python\n")
    finish(where)
    return where


def source(place: Path) -> str:
    return str(place / "src/roads/__init__.py")


def check(place: Path) -> None:
    """All that is in a checkout runs its source, in its environment, from wherever it is called."""
    ours = [source(place), str(place / ".venv")]
    for where in (place, place / "src", place.parent):
        programs = os.path.relpath(place / ".venv/bin", where)
        assert output(where, f"{programs}/python", "-c", WHERE) == ours
        for program in ("short", "long"):
            assert output(where, f"{programs}/{program}", "a b", "$x") == ours
        for shell, activate in SHELLS.items():
            if shutil.which(shell):
                script = (f"source {programs}/{activate}; short 'a b' '$x'; python -c '{WHERE}'; echo $VIRTUAL_ENV;"
                          "deactivate; echo $VIRTUAL_ENV")
                assert output(where, shell, "-c", script) == [*ours, *ours, ours[1], ""], (shell, where)


def sh(place: Path) -> list[str]:
    """sh cannot tell where the file is that it reads."""
    return output(place, "sh", "-c", f". .venv/bin/activate; short 'a b' '$x'; python -c '{WHERE}'")


def test_a_copy_and_a_moved_checkout_run_their_own_source(first):
    copy, moved = first.with_name("copy"), first.with_name("moved")
    shutil.copytree(first, copy, symlinks=True)
    check(first)
    check(copy)
    assert sh(first) == [source(first), str(first / ".venv")] * 2 and sh(copy)[::2] == [source(copy)] * 2
    first.rename(moved)
    for place in (moved, copy):
        check(place)
        assert sh(place) == [source(place), str(place / ".venv")] * 2
    assert (copy / ".venv/bin/other").read_text() == "#!/bin/sh\necho not Python\n"


def test_a_checkout_that_shares_the_environment_of_another_runs_its_own_source(first):
    second = first.with_name("second")  # or DVC's temporary folder of an experiment
    shutil.copytree(first / "src", second / "src")
    for command in (["python", "-c", WHERE], ["short", "a b", "$x"]):
        assert output(second, f"../first/.venv/bin/{command[0]}", *command[1:])[0] == source(second)
        assert output(second.parent, f"first/.venv/bin/{command[0]}", *command[1:])[0] == source(first)


def test_doing_it_again_changes_nothing(first):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    before = contents()
    finish(first)
    assert contents() == before
    for path in (first / ".venv").rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name not in ("activate", "activate.fish", "pyvenv.cfg"):
            assert str(first).encode() not in path.read_bytes(), path
    assert LINES and not (first / ".venv/bin/activate.csh").exists()

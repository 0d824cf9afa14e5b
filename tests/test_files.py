"""What is no file, or may not be read or written, is one line with exit code 2, and nothing is half-written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from roads import active, stage, tldr
from roads.runner import dvc_patches, plan, preflight, repro
from roads.stage import UserError

FILES = ("params.yaml", "figures.yaml", "active.yaml", "dvc.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The files of the checkout, at scale mini, and nothing that was run."""
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        shutil.copy(ROOT / name, name)
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    return tmp_path


def said(command, capsys) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit, match="2"):
        stage.main(command)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def put(kind: str, name: str) -> None:
    Path(name).unlink(missing_ok=True)
    if kind == "folder":
        Path(name).mkdir()
    elif kind == "fifo":
        os.mkfifo(name)
    else:
        Path(name).symlink_to(kind)


@pytest.mark.parametrize("kind", ["folder", "fifo", "/dev/zero", "/proc/self/mem"])
@pytest.mark.parametrize("name", FILES[:3])
def test_what_is_none_of_our_files_is_named_by_all_that_reads_it(project, capsys, name, kind):
    put(kind, name)
    for command in (active.write, active.load, lambda: active.write("tiny")):
        assert said(command, capsys).startswith(f"error: {name}: ")
    with pytest.raises((UserError, OSError)), plan.switched("tiny", None):
        pass
    assert not list(project.glob(".*writing*"))


@pytest.mark.parametrize("kind", ["folder", "fifo", "/dev/zero"])
@pytest.mark.parametrize("name", dvc_patches.FILES)
def test_what_is_none_of_dvcs_files_is_named(project, name, kind):
    put(kind, name)
    with pytest.raises(UserError, match=f"^{name}: expected a file"), dvc_patches.errors():
        repro.out_of_date([])


def test_what_dvc_cannot_read_is_one_line(project, capsys, monkeypatch):
    def command():
        with dvc_patches.errors():
            repro.out_of_date(["fig3@mini"])

    whole = Path("dvc.yaml").read_text(encoding="utf-8")
    Path("dvc.yaml").write_text(whole.replace("stages:", "stagez:", 1), encoding="utf-8")
    assert said(command, capsys).startswith("error: dvc: './dvc.yaml' validation failed")
    Path("dvc.yaml").write_text(whole, encoding="utf-8")
    Path(".dvcignore").write_bytes(b"\xff\xfe")
    assert said(command, capsys).startswith("error: dvc: 'utf-8' codec")
    Path(".dvcignore").unlink()
    Path("active.yaml").unlink()
    assert said(command, capsys).startswith("error: dvc: failed to parse 'vars' in 'dvc.yaml'")


def test_no_folder_of_dvc(project, capsys):
    shutil.rmtree(".dvc")
    assert "error: .dvc: not found" in said(repro.checkout_lock, capsys)


@pytest.mark.parametrize("name", ["runs", "reports"])
def test_results_need_a_folder_that_may_be_written_to(project, monkeypatch, name):
    Path(name).touch()
    with pytest.raises(UserError, match=f"^{name}: expected a folder"):
        preflight._check_folders()
    Path(name).unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path != ".")
    with pytest.raises(UserError, match="^runs: expected a folder that may be written to"):
        preflight._check_folders()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_a_stage_that_may_not_replace_its_output_does_not_begin(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(UserError, match="out: expected a folder that this stage may replace"):
        with stage.output(tmp_path / "out", {}):
            pytest.fail("it computed")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error, line", [
    (PermissionError(13, "Permission denied", "params.yaml"), "error: params.yaml: permission denied\n"),
    (OSError(30, "Read-only file system", "a", None, "b"), "error: b: read-only file system\n"),
    (OSError(5, "Input/output error"), "error: input/output error; no file is named\n"),
    (OSError(28, "No space left on device", "x"), "error: no space left ([Errno 28] No space left on device: 'x'): "
                                                  "free some disk and run the same command again\n")])  # fmt: skip
def test_what_the_system_refuses_is_one_line(capsys, error, line):
    def command():
        raise error

    assert said(command, capsys) == line


def test_rows_and_tokenizers_are_files(tmp_path):
    for kind in ("fifo", "/dev/zero"):
        put(kind, path := tmp_path / "train.jsonl")
        for read in (tldr.read_rows, tldr.load_tokenizer, stage.read_json):
            with pytest.raises(UserError, match=r"train.jsonl: expected a file"):
                read(path)


def test_a_full_disk_leaves_no_scratch_file(project):
    """A real limit on the size of files: what is written to the disk ends in the middle."""
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    before = Path("active.yaml").read_bytes()
    done = subprocess.run([sys.executable, "-m", "roads.active", "set", "--scale", "tiny"], preexec_fn=limit, text=True,
                          env=ENV | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True)
    assert done.returncode == 2 and "file too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert Path("active.yaml").read_bytes() == before and not list(project.glob(".*writing*"))


def test_a_full_disk_in_the_middle_of_a_stage_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path, value: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, "write_json", full)
    with pytest.raises(OSError, match="No space"), stage.output(tmp_path / "out", {}) as folder:
        (folder / "rows").touch()
    assert not list(tmp_path.iterdir())


def test_a_read_only_checkout_is_one_line(project):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    for what in ("active set --scale tiny", "runner.repro fig3"):
        script = f"mount --bind . . && mount -o remount,ro,bind . && cd $PWD && exec {sys.executable} -m roads.{what}"
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=ENV | {"PYTHONPATH": str(ROOT / "src")},
                              text=True, capture_output=True)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert done.stderr.endswith(": read-only file system\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["folder", "fifo"])
@pytest.mark.parametrize("name", ["figures.yaml", "active.yaml"])
def test_make_does_not_wait_for_what_is_no_file(project, name, kind):
    shutil.copy(ROOT / "Makefile", ".")
    put(kind, name)
    done = subprocess.run(["make", "help"], text=True, capture_output=True, timeout=5, env=ENV)
    if name == "figures.yaml":
        assert done.returncode == 2 and "figures.yaml: expected a file" in done.stderr
    else:
        assert done.returncode == 0

"""The runner: what a failed stage says, a dvc.lock that always parses, and nothing left when it is stopped."""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import kills
import pytest
from conftest import ENV, ROOT, run
from ruamel.yaml import YAML

from roads import active, lockfile
from roads.runner import dvc_patches, repro
from roads.stage import LAUNCH, UserError

pytestmark = pytest.mark.slow  # starts stages, or DVC, many times

DVC_YAML = """
vars: [active.yaml]
stages:
  words:
    matrix: {scale: ["${scale}"]}
    cmd: mkdir -p runs/${item.scale}/words; cp words.txt runs/${item.scale}/words/
    deps: [words.txt]
    outs: ["runs/${item.scale}/words"]
  count:
    matrix: {scale: ["${scale}"], seed: [0, 1]}
    cmd: mkdir -p runs/${item.scale}/counts; wc runs/${item.scale}/words/words.txt
      > runs/${item.scale}/counts/s${item.seed}
    deps: ["runs/${item.scale}/words"]
    outs: ["runs/${item.scale}/counts/s${item.seed}"]
  job:
    matrix: {scale: ["${scale}"]}
    cmd: python -m job runs/${item.scale}/job
    deps: [job.py]
    outs: ["runs/${item.scale}/job"]
"""
PATH = {"PYTHONPATH": f"{ROOT / 'src'}:."}
JOB = "import pathlib, sys\npathlib.Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two stages for a shell and one, `job`, that a fork runs; its code is the test's."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "figures.yaml"):
        shutil.copy(ROOT / name, name)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("words.txt").write_text("one two three\n" * 1000)
    Path("job.py").write_text(JOB + "pathlib.Path(sys.argv[1]).write_text('done')\n")
    Path(".dvc").mkdir()
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    active.write("mini")
    return tmp_path


def reproduce(*targets: str, code: int = 0) -> str:
    targets = targets or ("count@mini-0", "count@mini-1", "job@mini")
    return run(Path(), "roads.runner.repro", *targets, code=code, env=PATH)


def parsed(path: str = "dvc.lock") -> dict:
    return YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))


# What a stage that fails says


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("job, reason", [
    ("import os\nos.kill(os.getpid(), 9)", "killed by signal 9: out of memory?"),
    ("import os\nos.kill(os.getpid(), 11)", "killed by signal 11 (SIGSEGV)"),
    ("raise ValueError('no such thing')", "exit code 1"),
    ("from roads.stage import *\ndef bad(): raise UserError('words.txt:3: expected a word')\nmain(bad)", "exit code 2"),
    ("", "output 'runs/mini/job' does not exist"),
])  # fmt: skip
def test_a_failed_stage_says_why(project, job, reason, jobs):
    Path("job.py").write_text(job)
    said = reproduce("job@mini", "--jobs", jobs, code=1)
    found = next(line for line in said.splitlines() if line.startswith("FAILED"))
    if jobs == "2" and reason.startswith("exit code"):  # its lines are read, and the last one is the reason
        reason += ": ValueError: no such thing" if "1" in reason else ": error: words.txt:3: expected a word"
    assert found == f"FAILED job@mini: {reason}"


def test_a_run_says_how_far_it_is_and_what_comes_next(project):
    said = reproduce("--jobs", "1")
    lines = [re.search(r"\(\d+ s; (\d) of 4(.*)\)$", line) for line in said.splitlines() if line.startswith("done  ")]
    assert [line[1] for line in lines] == ["1", "2", "3", "4"] and not lines[3][2]
    assert all(re.fullmatch(r"; about \d+ s left", line[2]) for line in lines[:3]), said
    assert re.search(r"^4 of 4 stages in \d+ s\. `make claims report` decides", said, re.M)
    Path("job.py").write_text("raise ValueError")
    said = reproduce("job@mini", code=1)
    assert re.search(r"^0 of 1 stages in .*; they are kept, and the same command continues\. One stage alone, with all "
                     r"that it prints: dvc repro --single-item job@mini$", said, re.M)


def test_a_command_in_a_shell_that_is_killed_says_so(project):
    Path("dvc.yaml").write_text(DVC_YAML.replace("wc runs", "kill -9 $$; wc runs"))
    said = reproduce(code=1)
    assert "FAILED count@mini-0: killed by signal 9: out of memory?" in said and "done  job@mini" in said
    assert "done  words@mini" in said


def mounted(script: str) -> subprocess.CompletedProcess:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], env=ENV | PATH, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)


def test_a_full_cache_is_a_reason_and_the_run_goes_on_from_there(project):
    Path(".dvc/cache").mkdir()
    Path("words.txt").write_bytes(os.urandom(300_000))
    done = mounted("mount -t tmpfs -o size=200k none .dvc/cache && "
                   f"exec {sys.executable} -m roads.runner.repro words@mini job@mini --jobs 1")
    assert done.returncode == 1 and "done  job@mini" in done.stdout
    assert re.search(r"^FAILED words@mini: failed to transfer .* No space left on device.*; free some and run the same "
                     "command again", done.stdout, re.M), done.stdout
    assert "words@mini" not in (parsed()["stages"] if Path("dvc.lock").exists() else {})
    reproduce("words@mini", "job@mini")
    assert Path("runs/mini/words/words.txt").read_bytes() == Path("words.txt").read_bytes()
    assert set(parsed()["stages"]) == {"words@mini", "job@mini"}


def test_its_temporary_files_may_be_on_another_disk(project):
    Path(".dvc/tmp").mkdir()
    done = mounted(f"mount -t tmpfs none .dvc/tmp && exec {sys.executable} -m roads.runner.repro job@mini")
    assert done.returncode == 0 and set(parsed()["stages"]) == {"job@mini"}, done.stdout
    assert not list(Path().glob(".*.writing"))


@pytest.mark.parametrize("name", ["runs", "reports"])
def test_results_outside_the_checkout_are_refused_at_once(project, tmp_path_factory, name):
    Path(name).symlink_to(tmp_path_factory.mktemp("elsewhere"))
    said = reproduce("words@mini", code=2)
    assert said.startswith(f"error: {name}: a link to /") and "mount --bind" in said and said.count("\n") == 1


# dvc.lock


def test_a_lock_without_its_last_newline_stays_a_lock(project):
    reproduce()
    whole = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(whole.rstrip("\n"))  # as an editor may leave it
    Path("words.txt").write_text("four\n")
    reproduce()
    assert set(parsed()["stages"]) == set(YAML(typ="safe").load(whole)["stages"])
    assert lockfile.LAYOUT.fullmatch(Path("dvc.lock").read_text())
    assert "Up to date" in reproduce()


def test_wherever_a_lock_is_cut_a_run_leaves_one_that_parses_or_the_same(project):
    def without_sizes(lock: dict) -> dict:  # a size that was cut is no reason for DVC to run a stage again
        return {name: [entry["cmd"], [[item["path"], item["md5"]] for item in entry["deps"] + entry["outs"]]]
                for name, entry in lock["stages"].items()}

    reproduce("words@mini", "job@mini")
    whole = Path("dvc.lock").read_text()
    ends = []
    at_md5, at_outs = whole.rindex("md5: ") + 20, whole.rindex("    outs:\n") + len("    outs:\n")
    start = len(lockfile.LOCK)
    for cut in (start, start + 20, whole.index("hash"), at_outs, at_md5, len(whole) - 1):
        Path("dvc.lock").write_text(whole[:cut])
        done = subprocess.run([sys.executable, "-m", "roads.runner.repro", "words@mini", "job@mini"], env=ENV | PATH,
                              text=True, capture_output=True)
        if done.returncode == 0:
            assert without_sizes(parsed()) == without_sizes(YAML(typ="safe").load(whole)), whole[:cut]
        else:
            assert done.returncode == 2 and Path("dvc.lock").read_text() == whole[:cut]
            assert done.stderr.startswith("error: dvc: ") and "`git checkout dvc.lock`" in done.stderr, done.stderr
        ends.append(done.returncode)
    assert {0, 2} == set(ends)


def test_params_edited_while_a_stage_runs_are_not_taken_for_what_it_used(project):
    Path("dvc.yaml").write_text(DVC_YAML + "    params: [mini.base.lr]\n")
    now = "base: {lr: 3.0e-3, schedule: cosine, batch_size: 128"
    assert now in Path("params.yaml").read_text()
    Path("job.py").write_text(JOB + "file = pathlib.Path('params.yaml')\n"
                              f"file.write_text(file.read_text().replace({now!r}, {now.replace('3.0', '4.0')!r}))\n"
                              "pathlib.Path(sys.argv[1]).write_text('done')\n")
    reproduce("job@mini")
    assert parsed()["stages"]["job@mini"]["params"]["params.yaml"] == {"mini.base.lr": 3e-3}
    assert set(repro.out_of_date(["job@mini"])[0]) == {"job@mini"}
    reproduce("job@mini")
    assert parsed()["stages"]["job@mini"]["params"]["params.yaml"] == {"mini.base.lr": 4e-3}


def test_of_a_lock_that_was_parsed_before_the_new_entry_alone_is(project, monkeypatch):
    class Counted(YAML):
        def parse(self, text: str):
            read.append(text)
            return super().parse(text)

    read, old, new = [], lockfile.LOCK + "  a@mini:\n    cmd: true\n", "  b@mini:\n    cmd: true\n"
    monkeypatch.setattr(dvc_patches, "YAML", Counted)
    dvc_patches.PARSES.parent.mkdir(parents=True)
    dvc_patches.expect_yaml(old)
    with pytest.raises(Exception, match="did not find expected"):
        dvc_patches.expect_yaml(old + new[:-5] + "[true\n", old, new[:-5] + "[true\n")
    dvc_patches.expect_yaml(old + new, old, new)
    dvc_patches.expect_yaml(old + new, old, new)  # not what was parsed last
    one = len(lockfile.LOCK + new)
    assert [len(text) for text in read] == [len(old), one + 1, one, len(old + new)]


def test_another_dvc_is_refused(project, monkeypatch):
    import dvc

    monkeypatch.setattr(dvc, "__version__", "4.0.0")
    with pytest.raises(UserError, match=r"^DVC 4\.0\.0: the runner is made for 3\.67\.x"):
        repro.out_of_date([])


def test_what_would_not_parse_is_not_written(project):
    from dvc.dvcfile import Lockfile
    from dvc.repo import Repo

    reproduce("words@mini", "job@mini")
    broken = Path("dvc.lock").read_text().replace("    cmd: python", "    cmd: [python")
    assert lockfile.LAYOUT.fullmatch(broken)
    _, dump = dvc_patches.own_entry("words@mini", Lockfile._load, Lockfile.dump_stages)
    with Repo() as repo:
        stage = repo.stage.load_one(name="words@mini")
        Path("dvc.lock").write_text(broken)  # by somebody else, since the run has begun
        with pytest.raises(Exception, match="did not find expected"):
            dump(Lockfile(repo, "dvc.lock"), [stage])
    assert Path("dvc.lock").read_text() == broken


# What stops a run


@pytest.mark.slow
def test_stopped_in_every_way_it_leaves_nothing_and_ends_with_the_same_bits(tmp_path):
    """`python tests/kills.py 50 30` is the long form."""
    assert kills.campaign(tmp_path, kills=2, signals=3, figure="fig7") == []


@pytest.mark.slow
def test_training_on_several_processes_ends_with_the_runner(project):
    """torch starts each of them in a session of its own, where no signal to the others comes."""
    Path("job.py").write_text("import os, pathlib, time\nfrom roads import stage\ndef wait():\n"
                              "    pathlib.Path(os.environ['RANK']).write_text('')\n    time.sleep(600)\n"
                              "stage.main(wait, launch=True)\n")
    env = ENV | PATH | {"MARK": (mark := uuid.uuid4().hex), LAUNCH: str(ROOT / "configs/accelerate/2-cpu.yaml")}
    runner = subprocess.Popen([sys.executable, "-m", "roads.runner.repro", "job@mini"], env=env)
    while not (Path("0").exists() and Path("1").exists()):
        assert runner.poll() is None
        time.sleep(0.05)
    assert len(kills.processes(mark)) >= 5  # the runner, DVC, accelerate and two that train
    runner.kill()
    runner.wait()
    assert kills.left(mark)[1] == {}

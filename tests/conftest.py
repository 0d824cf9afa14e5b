"""What several tests share: a tiny policy, rows with padding on both sides, and a checkout with tiny's figures."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads: its threads get in the way of tiny matrices

import pytest
import torch

from roads import config, model, schema
from roads.tldr import EOS, PAD

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)
# `make test` gives its children what it was given, and its depth: what tests start must not inherit either.
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in
         ("MFLAGS", "SCALE", "DATA", "JOBS", "FIG", "LAUNCH", "PYTHON", "ARGS", "VENV", "ARCHIVE", "A", "B",
          "OUTER_PATH", "ROADS_LAUNCH")}
ENV = PLAIN | {"PYTHONPATH": "src", "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg", "DVC_NO_ANALYTICS": "1",
               "TOKENIZERS_PARALLELISM": "false", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
FIGURES = ["fig3@tiny", "fig7@tiny", "fig11@tiny", "fig12@tiny"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests of a file, and of the two that share the checkout: what they share is made once.

    A scheduler of our own, as xdist 3.8 finds no groups in what pytest 9.2 collects.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "checkout" if file.endswith(("test_pipeline.py", "test_readme.py")) else file

    config.option.loadscopereorder = False  # as they are collected: what takes long first, not what has most tests
    return ByFile(config, log)


# What takes minutes begins first, each on a worker of its own; the rest fills up.
LONG = ["test_rehearsal.py", "test_pipeline.py", "test_readme.py", "test_repro.py", "test_train.py"]


def pytest_collection_modifyitems(items):
    """Tests that want the checkout with tiny's figures are slow: it takes minutes to make (`make test-fast`)."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if "checkout" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def run(where: Path, *args: str, code: int = 0, env: dict | None = None) -> str:
    """Run `python -m ARGS`, or `python -c ARGS`, in a checkout; its output, once its exit code is as expected."""
    command = [sys.executable, *["-m"] * (args[0] != "-c"), *args]
    done = subprocess.run(command, cwd=where, env=ENV | (env or {}), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def edit(where: Path, old: str, new: str, file: str = "params.yaml") -> None:
    text = (where / file).read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {file}"
    (where / file).write_text(text.replace(old, new), encoding="utf-8")


def clone(where: Path) -> Path:
    """A checkout of what is in the work tree, with one seed and the scale `tiny`."""
    for name in ("src", "scripts", "data", "docs", "configs", "tests/fake_openai.py", "reports/theory", ".dvc/config",
                 ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "figures.yaml",
                 "active.yaml", "claims.yaml", "Makefile"):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, where / name)
    subprocess.run(["git", "init", "-q"], cwd=where, check=True)
    text = (where / "params.yaml").read_text(encoding="utf-8")
    own = re.search(r"^seeds: \{default: \[0, 1, 2\],(\s+\w+: \[0, 1\],)+", text, re.M)[0]
    edit(where, own, re.sub(r"\[0, 1.*?\]", "[0]", own))
    run(where, "roads.active", "set", "--scale", "tiny")
    return where


def make(where: Path, *args: str, code: int = 0, env: dict | None = None) -> str:
    """make, with the environment that runs the tests taken as set up."""
    command = ["make", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", "-o", f"{sys.prefix}/.dev", *args]
    done = subprocess.run(command, cwd=where, env=ENV | (env or {}), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def tiny() -> schema.Scale:
    """The block `tiny` of params.yaml: mini with small numbers."""
    return config.load(ROOT / "params.yaml").scales["tiny"]


@pytest.fixture
def policy():
    size = schema.FromScratch(kind="new", hidden_size=32, layers=2, heads=2, max_positions=64)
    return model.new_policy(size, 20, seed=3).eval()


@pytest.fixture
def rows():
    """Queries [4, 6] padded left and responses [4, 5] padded right, of unequal lengths."""
    query = torch.tensor([[PAD, PAD, 5, 6, 7, 2], [3, 4, 5, 6, 7, 2], [PAD, PAD, PAD, PAD, 9, 2], [PAD, 8, 8, 3, 4, 2]])
    response = torch.tensor(
        [[10, 11, EOS, PAD, PAD], [12, 13, 14, EOS, PAD], [15, EOS, PAD, PAD, PAD], [5, 5, 5, 5, EOS]])
    return query, response


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    where = clone(tmp_path_factory.mktemp("checkout"))
    where.joinpath("log").write_text(run(where, "roads.runner.repro", *FIGURES), encoding="utf-8")
    return where

"""Curves of a training in TensorBoard and Weights & Biases: what curves.csv has, and no other result for it."""

import csv
import os
import re
import struct
import subprocess
import sys

import pytest
import torch
from conftest import clone, run

from roads import tracking
from roads.stage import UserError

INSTALL = "make test-trackers installs requirements/trackers.txt"


def trained(where, out: str, **env: str) -> str:
    """The SFT checkpoint of scale tiny in a folder, tracked as `env` says."""
    if not (where / "made").exists():
        run(where, "roads.stages.data", "made/data", "--scale", "tiny")
        run(where, "roads.stages.base", "made/data", "made/base", "--scale", "tiny")
    return run(where, "roads.stages.sft", "made/data", "made/base", out, "--scale", "tiny", env=env)


def curves(path) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "step"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkout with a checkpoint that was trained without a tracker, in `plain`."""
    where = clone(tmp_path_factory.mktemp("tracked"))
    trained(where, "plain")
    return where


def same(where, out: str) -> bool:
    names = [path.name for path in (where / "plain").iterdir()]
    return all((where / "plain" / name).read_bytes() == (where / out / name).read_bytes() for name in names)


@pytest.mark.slow
def test_tensorboard_has_the_curves(plain):
    pytest.importorskip("tensorboard", reason=INSTALL)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(plain, "board", ROADS_TRACKER="tensorboard")
    assert same(plain, "board")
    (folder,) = (plain / "runs/.log/tensorboard").glob("sft-s0-*")
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    expected = curves(plain / "board/curves.csv")
    assert set(found.Tags()["scalars"]) == set(expected) and len(expected["loss"]) > 5
    for name, values in expected.items():
        events = found.Scalars(name)
        assert [event.step for event in events] == list(range(1, len(values) + 1))
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)


def records(file) -> list[bytes]:
    """The records of a .wandb file: after 7 bytes, those of LevelDB's log format, in blocks of 32 KiB."""
    data, place, found, part = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            found.append(part)
            part = b""
    return found


@pytest.mark.slow
def test_wandb_has_the_curves_offline(plain):
    pytest.importorskip("wandb", reason=INSTALL)
    from wandb.proto.wandb_internal_pb2 import Record

    trained(plain, "weights", ROADS_TRACKER="wandb", WANDB_MODE="offline")
    assert same(plain, "weights")
    (file,) = (plain / "runs/.log/wandb").glob("offline-run-*/run-*.wandb")
    steps, runs = [], []
    for data in records(file):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            steps.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
        if record.WhichOneof("record_type") == "run":
            runs.append(record.run)
    expected = curves(plain / "weights/curves.csv")
    assert runs[0].project == "roads" and re.fullmatch(r"sft-s0-\w+", runs[0].display_name)
    assert {item.key: item.value_json for item in runs[0].config.update}["batch_size"] == "32"
    assert len(steps) == len(expected["loss"]) > 5
    for name, values in expected.items():
        assert [float(step[name]) for step in steps] == pytest.approx(values, rel=1e-9)


@pytest.mark.slow
def test_a_tracker_that_fails_costs_no_training(plain, tmp_path):
    """One line, and the same result."""
    pytest.importorskip("tensorboard", reason=INSTALL)
    (plain / "runs/.log").mkdir(parents=True, exist_ok=True)
    board = plain / "runs/.log/tensorboard"
    if board.exists():
        board.rename(tmp_path / "kept")
    board.write_text("a file where a folder belongs")
    said = trained(plain, "failed", ROADS_TRACKER="tensorboard")
    assert "ROADS_TRACKER: " in said and "this training is not tracked any further" in said and same(plain, "failed")
    board.unlink()


def test_mlflow_is_given_what_it_takes(tmp_path, monkeypatch):
    """Its store and its artifacts lie under runs/.log, and its paths are texts: it takes no others."""
    from accelerate import tracking as trackers

    made = []

    class Recorder:
        def __init__(self, project, logging_dir, run_name):
            made.append((project, logging_dir.removesuffix("/"), run_name, os.environ["MLFLOW_TRACKING_URI"]))

        def start(self): ...

        def store_init_configuration(self, config):
            made.append(config)

        def log(self, means, step):
            made.append((means, step))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROADS_TRACKER", "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be put back")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(trackers, "MLflowTracker", Recorder)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    watch = tracking.Watch("sft s0", "key", {"lr": 0.1}, 10, torch.tensor([5, 7]), quiet=False)
    watch.note(3, torch.arange(2), {"loss": 0.5})
    store = f"sqlite:///{tmp_path}/runs/.log/mlflow.db"
    assert made == [("roads", "runs/.log/mlflow", "sft-s0-key", store), {"lr": 0.1}, ({"loss": 0.5}, 3)]


def test_a_tracker_that_is_none_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setenv("ROADS_TRACKER", "tensorbord")
    with pytest.raises(UserError, match="ROADS_TRACKER: expected tensorboard, wandb or mlflow, got 'tensorbord'"):
        tracking.wanted()
    monkeypatch.setenv("ROADS_TRACKER", "wandb")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ROADS_TRACKER=wandb: .*pip install .*-r requirements/trackers.txt` installs"):
        tracking.wanted()
    monkeypatch.setenv("ROADS_TRACKER", "mlflow")
    with pytest.raises(UserError, match="the package mlflow is not installed; `.venv/bin/pip install mlflow` installs"):
        tracking.wanted()
    monkeypatch.setenv("ROADS_TRACKER", "")
    assert tracking.wanted() is None


def test_the_runner_asks_for_the_tracker_without_torch():
    code = "import sys; from roads.runner import preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""What a person looks at while a training runs, which no stage reads and no result depends on.

runs/.log/<label>-<key>.csv has its speed. ROADS_TRACKER=tensorboard, wandb or mlflow sends the curves there too, as
they come: to runs/.log/tensorboard, for `tensorboard --logdir`; to the project `roads` of Weights & Biases, whose own
variables hold (WANDB_MODE=offline); to the MLflow that MLFLOW_TRACKING_URI names, or to runs/.log/mlflow.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roads.stage import UserError

if TYPE_CHECKING:
    from torch import Tensor  # the runner, which reads `wanted`, does without torch

LOGS = Path("runs/.log")
LINES = 100  # of a log, at most
VARIABLE = "ROADS_TRACKER"
PACKAGES = ("tensorboard", "wandb", "mlflow")


def wanted() -> str | None:
    """The tracker that ROADS_TRACKER names.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in PACKAGES:
        raise UserError(f"{VARIABLE}: expected {', '.join(PACKAGES[:-1])} or {PACKAGES[-1]}, got {name!r}")
    if importlib.util.find_spec(name) is None:
        what = "mlflow" if name == "mlflow" else "--no-deps --require-hashes -r requirements/trackers.txt"
        raise UserError(f"{VARIABLE}={name}: the package {name} is not installed; `.venv/bin/pip install {what}` "
                        "installs it")
    return name


class Watch:
    """One training: its speed, and its curves in a tracker, where one is wanted.

    Args:
        label: what is trained. key: the fingerprint of its result, by which a run that was killed is the same run.
        config: of the run, for the tracker. lengths: [N], tokens of each row. quiet: another process does it.
    """

    def __init__(self, label: str, key: str, config: dict, steps: int, lengths: "Tensor", *, quiet: bool):
        name = f"{label.replace(' ', '-')}-{key}"
        self.path, self.lengths, self.every, self.quiet = LOGS / f"{name}.csv", lengths, -(-steps // LINES), quiet
        self.tracker = None
        if not quiet and (kind := wanted()):
            self._told(lambda: self._start(kind, name, key, config))
        self.since, self.tokens = time.perf_counter(), 0

    def _start(self, kind: str, name: str, key: str, config: dict) -> None:
        from accelerate import tracking

        makers: dict[str, Callable[[], Any]] = {
            "tensorboard": lambda: tracking.TensorBoardTracker(name, LOGS / "tensorboard"),
            "wandb": lambda: tracking.WandBTracker("roads", name=name, id=key, resume="allow", config=config, dir=LOGS),
            "mlflow": lambda: tracking.MLflowTracker("roads", str(LOGS / "mlflow"), run_name=name)}
        LOGS.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{LOGS.resolve()}/mlflow.db")
        tracker = makers[kind]()
        tracker.main_process_only = False  # this is the process that writes
        tracker.start()
        if kind == "mlflow":
            tracker.store_init_configuration(config)
        self.tracker = tracker

    def note(self, step: int, rows: "Tensor", means: dict[str, float]) -> None:
        """Count a step over some rows, and what it logs; every hundredth part of a run is a line of its speed."""
        if self.tracker:
            self._told(lambda: self.tracker.log(dict(means), step=step))
        self.tokens += int(self.lengths[rows].sum())
        if self.quiet or step % self.every:
            return
        import torch

        seconds = time.perf_counter() - self.since
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        with suppress(OSError):  # it is no result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                file.write("step,seconds,tokens_per_second,gpu_bytes\n" * is_new)
                file.write(f"{step},{seconds:.3f},{self.tokens / seconds:.0f},{memory}\n")
        self.since, self.tokens = time.perf_counter(), 0

    def close(self) -> None:
        if self.tracker:
            self._told(self.tracker.finish)

    def _told(self, do: Callable[[], Any]) -> None:
        """Do something with the tracker. If that fails the training stays, and the tracker goes."""
        try:
            do()
        except Exception as error:
            self.tracker = None
            print(f"{VARIABLE}: {type(error).__name__}: {error}; this training is not tracked any further",
                  file=sys.stderr)

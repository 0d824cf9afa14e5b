"""The curves of every training under runs/<scale>, seeds together: reports/<scale>/curves.csv and curves.png.

    python -m roads.report.curves runs/mini reports/mini

A stage's curves.csv has a line a step. Here every run is averaged into at most POINTS equal parts, as many as a picture
can show; the column `step` says where each ends.
"""

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from roads import stage
from roads.stage import UserError

POINTS = 60
COLUMNS = ["training", "seed", "step", "loss", "accuracy"]
SEED = re.compile(r"^s(\d+)$")
COLOURS = ["#4878a8", "#d1762c", "#5f9e6e", "#8a6fae", "#9a6a5c"]


def read(path: Path) -> list[dict[str, float]]:
    """A curves.csv as means over steps: step, the last of them, loss, and accuracy where pairs are trained on.

    Raises:
        UserError: it is not what a training writes.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        steps, *values = (np.array([float(row[name]) for row in rows])
                          for name in ("step", "loss", *(["accuracy"] if "accuracy" in rows[0] else [])))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; expected a training's step, loss, ...") from None
    parts = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    return [{"step": steps[part[-1]]} | {name: float(of[part].mean()) for name, of in zip(COLUMNS[3:], values)}
            for part in parts]


def found(runs: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Training -> seed -> its curve; a training is a folder without its seed, as `human/dpo`, in order of names."""
    curves = defaultdict(dict)
    for path in sorted(runs.glob("**/curves.csv")):
        parts = path.parent.relative_to(runs).parts
        if not any(part.startswith(".") for part in parts):
            seeds = [part for part in parts if SEED.match(part)]
            curves["/".join(part for part in parts if part not in seeds)][seeds[0][1:] if seeds else "0"] = read(path)
    return dict(curves)


def draw(curves: dict[str, dict[str, list[dict[str, float]]]], where: Path) -> None:
    """A panel for each training: loss by step, a line a seed."""
    import matplotlib.pyplot as plt

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    shown, panels = plt.subplots(rows, columns, figsize=(3 * columns, 2.1 * rows), squeeze=False)
    for axes, (name, seeds) in zip(panels.flat, curves.items()):
        for colour, (seed, curve) in zip(COLOURS * len(seeds), seeds.items()):
            axes.plot([point["step"] for point in curve], [point["loss"] for point in curve], color=colour, lw=1,
                      label=f"seed {seed}")
        axes.set_title(name, fontsize=8.5)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(curves):]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("loss", fontsize=8)
    most = max(range(len(curves)), key=lambda i: len(list(curves.values())[i]))
    panels.flat[most].legend(fontsize=6.5, frameon=False)
    shown.supxlabel(f"step; each point is the mean over one of at most {POINTS} parts of a run", fontsize=8)
    shown.tight_layout()
    shown.savefig(where, dpi=110, metadata={"Software": None})
    plt.close(shown)


def write(runs: Path, out: Path) -> int:
    """Write both files where there are curves; the number of runs."""
    curves = found(runs)
    if not curves:
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with stage.writing(out / "curves.csv") as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for name, seeds in curves.items():
            for seed, curve in seeds.items():
                writer.writerows({"training": name, "seed": seed, "step": f"{point.pop('step'):g}"}
                                 | {key: f"{value:.5g}" for key, value in point.items()} for point in map(dict, curve))
    with stage.writing(out / "curves.png") as scratch:
        draw(curves, scratch)
    return sum(map(len, curves.values()))


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="runs/<scale>")
    parser.add_argument("out", type=Path, help="reports/<scale>")
    a = parser.parse_args()
    count = write(a.runs, a.out)
    print(f"{a.out / 'curves.png'}: {count} trainings" if count else f"{a.runs}: no curves here; the page keeps those "
          "that came with the checkout")


if __name__ == "__main__":
    stage.main(_command)

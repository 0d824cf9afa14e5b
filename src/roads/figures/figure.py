"""What every figure does: read the scores of its bars, draw them, write .png, .csv and .json with provenance."""

import csv
import hashlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from roads import config, stage, stats

SYNTHETIC = "synthetic world: evidence about the mechanism, not about TL;DR"
GREY, BLUE, LIGHT, ORANGE, GREEN = "#9a9a9a", "#4878a8", "#a3bcd4", "#d1762c", "#5f9e6e"


def note(scale: str) -> str:
    return SYNTHETIC if config.load_scale(scale).synthetic else f"real posts, scale {scale}"


def read(runs: Path, places: dict[str, str], seeds: list[int]) -> tuple[dict[str, np.ndarray], list[Path]]:
    """Scores [seeds, prompts] of every bar, and the files they come from.

    Args:
        places: bar -> folder under `runs`, with {seed} where the run depends on it.

    Raises:
        UserError: a cell of the figure is missing.
    """
    files = {bar: [runs / place.format(seed=seed) / "scores.npz" for seed in seeds] for bar, place in places.items()}
    sources = sorted({path for paths in files.values() for path in paths})
    for path in sources:
        if not path.exists():
            raise stage.UserError(f"{path}: not found; the figure's make target (`make help`) makes it")
    return {bar: np.stack([np.load(path)["score"] for path in paths]) for bar, paths in files.items()}, sources


def bar_chart(title: str, ylabel: str, bars: dict[str, np.ndarray], colours: list[str], seeds: list[int],
              note: str, zero: bool = True):
    """One bar per name: mean over seeds and prompts, 95% interval, every seed's point."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for x, ((_, values), colour) in enumerate(zip(bars.items(), colours, strict=True)):
        found = stats.estimate(values)
        axes.bar(x, found["mean"], color=colour, width=0.65, zorder=2)
        axes.errorbar(x, found["mean"], [[found["mean"] - found["low"]], [found["high"] - found["mean"]]],
                      color="black", capsize=4, lw=1.2, zorder=4)
        if len(set(found["by_seed"])) > 1:
            shift = np.linspace(-0.12, 0.12, len(seeds))
            axes.scatter(x + shift, found["by_seed"], s=16, color="white", edgecolor="black", lw=0.8, zorder=3)
        axes.annotate(f"{found['mean']:.3f}", (x, found["high"]), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    if not zero:
        low = min(stats.estimate(v)["low"] for v in bars.values())
        low -= 0.35 * (high - low)
    axes.set_ylim(low, high + 0.05 * (high - low))
    n = next(iter(bars.values())).shape[1]
    figure.text(0.5, 0.005, f"{note}\nbars: mean; lines: 95% bootstrap over prompts and seeds; points: seeds {seeds}; n = {n}",
                ha="center", fontsize=7.5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def save(out: Path, name: str, figure, bars: dict[str, np.ndarray], gaps: dict[str, tuple[str, str]],
         seeds: list[int], note: str, measure: str, sources: list[Path]) -> None:
    """Write name.{png,csv,json} under `out`, each complete or not at all.

    gaps: label -> (treated bar, control bar), paired by prompt and seed.
    sources: the score files, whose hashes are the figure's provenance (dvc.lock has the same runs).
    """
    out.mkdir(parents=True, exist_ok=True)
    table = [{"bar": bar, **stats.estimate(values), "n": values.shape[1]} for bar, values in bars.items()]
    content = {
        "figure": name, "note": note, "measure": measure, "seeds": seeds, "bars": table,
        "gaps": {label: stats.difference(bars[a], bars[b]) for label, (a, b) in gaps.items()},
        "provenance": {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(sources)},
    }
    scratch = {kind: out / f".{name}.writing.{kind}" for kind in ("json", "csv", "png")}
    stage.write_json(scratch["json"], content)
    with scratch["csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bar", "seed", "mean", "low", "high", "n"])
        for row in table:
            writer.writerow([row["bar"], "all", row["mean"], row["low"], row["high"], row["n"]])
            writer.writerows([row["bar"], s, m, "", "", row["n"]] for s, m in zip(seeds, row["by_seed"], strict=True))
    figure.savefig(scratch["png"], dpi=160, metadata={"Software": None})
    plt.close(figure)
    for kind, path in scratch.items():
        path.replace(out / f"{name}.{kind}")
    for label, gap in content["gaps"].items():
        print(f"{name}: {label}: {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")

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


def bar_chart(title: str, content: dict, colours: list[str], floor: float):
    """One bar per name, from `floor` up: mean over seeds and prompts, 95% interval, every seed's point."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    bars, seeds = content["bars"], content["seeds"]
    for x, (bar, colour) in enumerate(zip(bars, colours, strict=True)):
        axes.bar(x, bar["mean"] - floor, bottom=floor, color=colour, width=0.65, zorder=2)
        axes.errorbar(x, bar["mean"], [[bar["mean"] - bar["low"]], [bar["high"] - bar["mean"]]],
                      color="black", capsize=4, lw=1.2, zorder=4)
        if len(set(bar["by_seed"])) > 1:
            shift = np.linspace(-0.2, 0.2, len(seeds))
            axes.scatter(x + shift, bar["by_seed"], s=18, color="white", edgecolor="black", lw=0.8, zorder=5)
        top = max(bar["high"], *bar["by_seed"])
        axes.annotate(f"{bar['mean']:.3f}", (x, top), (0, 5), textcoords="offset points", ha="center")
    labels = ["\n".join([bar["bar"], *(f"{other} {found['bars'][bar['bar']]['mean']:.3f}"
                                       for other, found in content["also"].items())]) for bar in bars]
    axes.set_xticks(range(len(bars)), labels)
    axes.set_title(title, pad=34)
    gaps = [f"{name}: {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
            for name, gap in content["gaps"].items()]
    axes.text(0.5, 1.02, "\n".join(gaps), transform=axes.transAxes, ha="center", fontsize=7.5)
    axes.set_ylabel(content["measure"])
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=floor)
    how = (f"bars: mean; points: seeds {seeds}; n = {bars[0]['n']}\n"
           "lines and brackets: 95% bootstrap over prompts and seeds; above: paired differences")
    figure.text(0.5, 0.005, f"{content['note']}\n{how}", ha="center", fontsize=7.5)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


def save(out: Path, name: str, runs: Path, places: dict[str, str], gaps: dict[str, tuple[str, str]], seeds: list[int],
         note: str, title: str, measure: str, colours: list[str], floor: float = 0.0,
         also: dict | None = None) -> None:
    """Write name.{png,csv,json} under `out`, each complete or not at all.

    Args:
        places: as in `read`.
        gaps: label -> (treated bar, control bar), paired by prompt and seed.
        floor: where the bars start: what chance gives.
        also: name -> function of scores, for measures that the .json has beside the one drawn.
    """
    bars, sources = read(runs, places, seeds)
    table = [{"bar": bar, **stats.estimate(values), "n": values.shape[1]} for bar, values in bars.items()]

    def differences(function=lambda scores: scores) -> dict:
        return {label: stats.difference(function(bars[a]), function(bars[b])) for label, (a, b) in gaps.items()}

    content = {
        "figure": name, "note": note, "measure": measure, "seeds": seeds, "bars": table, "gaps": differences(),
        "also": {other: {"bars": {bar: stats.estimate(function(values)) for bar, values in bars.items()},
                         "gaps": differences(function)} for other, function in (also or {}).items()},
        # What was read; dvc.lock has the runs that wrote it.
        "provenance": {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }
    out.mkdir(parents=True, exist_ok=True)
    scratch = {kind: out / f".{name}.writing.{kind}" for kind in ("json", "csv", "png")}
    stage.write_json(scratch["json"], content)
    with scratch["csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bar", "seed", "mean", "low", "high", "n"])
        for row in table:
            writer.writerow([row["bar"], "all", row["mean"], row["low"], row["high"], row["n"]])
            writer.writerows([row["bar"], s, m, "", "", row["n"]] for s, m in zip(seeds, row["by_seed"], strict=True))
    figure = bar_chart(title, content, colours, floor)
    figure.savefig(scratch["png"], dpi=160, metadata={"Software": None})
    plt.close(figure)
    for kind, path in scratch.items():
        path.replace(out / f"{name}.{kind}")
    for label, gap in content["gaps"].items():
        print(f"{name}: {label}: {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")

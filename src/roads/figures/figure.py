"""What every figure does: read the scores of its bars, draw them, write .png, .csv and .json with provenance."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from roads import arrays, config, stage, stats
from roads.figures import check
from roads.figures.provenance import provenance

SYNTHETIC = "synthetic world: evidence about the mechanism, not about TL;DR"
PAPER = Path("data/paper_numbers.json")
COLOURS = {"SFT": "#9a9a9a", "DPO": "#4878a8", "DPO 2x": "#a3bcd4", "Online(SFT)": "#e9b44c", "Online(DPO)": "#d1762c",
           "Online(DPO) 2x": "#e3a06b", "Global RM": "#d1762c", "Local RM": "#5f9e6e", "DPO RM": "#4878a8",
           "Base": "#9a9a9a", "DPO + KL": "#a3bcd4", "IPO": "#5f9e6e", "SimPO": "#b05a7a", "chi-PO": "#7d6bb0",
           "REBEL": "#222222", "Online(DPO), 2 rounds": "#b3541e", "Online(DPO), 3 rounds": "#7a3512",
           "small": "#a3bcd4", "medium": "#4878a8", "large": "#1f3d5c"}
MARKERS = "osD^v"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Bar:
    """One mean of a figure: a bar, or a point of a line."""

    name: str
    place: str  # folder under runs/, with {seed} where the run depends on it
    key: str = "score"  # array of its scores.npz
    series: str = ""  # the line that it is a point of; a bar is its own
    x: float | None = None
    unit: float = 1.0  # its scores are divided by it
    roles: tuple[str, ...] = ()  # what claims call it where scales name it differently


def note(scale: str) -> str:
    return SYNTHETIC if config.load_scale(scale).synthetic else f"real posts, scale {scale}"


def policy(scale: str, name: str, figure: str = "", arm: str = "") -> tuple[str, str]:
    """Place and key of a policy's scores: the graph's for the scale itself, or those of an arm of a figure."""
    if not arm:
        return f"{scale}/human/scores/{name}" + ("" if name == "sft" else "/s{seed}"), "score"
    return f"{scale}/{figure}/{arm}/s{{seed}}", name


def placed(place: str, seed: int, more: list[int]) -> str:
    """A place for one seed. Seeds beyond the graph's, `more`, have a folder human/more each (stage arm)."""
    if seed in more and "/human/" in place and "{seed}" in place:
        return place.replace("/human/", f"/human/more/s{seed}/").removesuffix("/s{seed}")
    return place.format(seed=seed)


def read(name: str, runs: Path, bars: list[Bar], seeds: list[int],
         more: list[int]) -> tuple[dict[str, np.ndarray], dict[str, list[Path]]]:
    """Scores [seeds, prompts] of every bar, and the files they come from.

    Raises:
        UserError: a bar's scores are missing, or two bars have one name.
    """
    files = {bar.name: [runs / placed(bar.place, seed, more) / "scores.npz" for seed in seeds] for bar in bars}
    check.distinct(name, [bar.name for bar in bars])
    for path in sorted({path for paths in files.values() for path in paths}):
        if not path.exists():
            raise stage.UserError(f"{path}: not found; `make {name}` makes it")
    return {bar.name: arrays.stacked(files[bar.name], bar.key) / bar.unit for bar in bars}, files


def posts_of(paths: list[Path], key: str) -> np.ndarray | None:
    """The post of every row of an array, from the file of the first seed; None where no two rows share one."""
    with np.load(paths[0]) as file:
        return arrays.post_of(file, key)


def metrics_of(paths: list[Path], key: str, with_kl: bool = False) -> list[dict]:
    """The metrics of a bar for each seed: those of its key where a stage has several, with the training's; of scores,
    with the policy's KL from SFT where the figure reads it."""
    found = [stage.read_json(path.with_name("metrics.json")) for path in paths]
    distances = [Path(path.as_posix().replace("/scores/", "/kl/")).with_name("metrics.json") for path in paths]
    if with_kl and all("kl" in path.parts and path.exists() for path in distances):
        found = [metrics | stage.read_json(path) for metrics, path in zip(found, distances, strict=True)]
    return [{"training": whole.get("training", {}), **whole[key]} if isinstance(whole.get(key), dict) else whole
            for whole in found]


def judged(found: list[dict]) -> dict[str, float]:
    """Position consistency, parse failures and lengths of a bar's winrates, mean over seeds; what there is of them."""
    names = ("position_consistency", "parse_failures", "ties", "mean_tokens", "mean_tokens_reference")
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in names if name in found[0]}


def trained(found: list[dict]) -> dict[str, list]:
    """What a bar's models were trained on, for each seed: steps taken, rows, pairs dropped as ties; and how far they
    are from the SFT policy where that was measured (kl, nats)."""
    entries = [metrics.get("training", {}) | {k: metrics[k] for k in ("kl",) if k in metrics} for metrics in found]
    return {name: [entry[name] for entry in entries] for name in entries[0] if all(name in it for it in entries)}


def gap_lines(content: dict) -> str:
    return "\n".join(f"{name}: {gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
                     for name, gap in content["gaps"].items())


def paper_panel(axes: Axes, paper: dict, names: list[str]) -> None:
    """The paper's own bars, hatched and on their own scale: another task, other models, another judge."""
    series = paper["series"]
    width = 0.8 / len(series)
    values = [value for one in series for value in one["values"].values()]
    for k, one in enumerate(series):
        for x, name in enumerate(names):
            if name in one["values"]:
                place = x + (k - (len(series) - 1) / 2) * width
                value = one["values"][name]
                axes.bar(place, value, width * 0.92, color="white", edgecolor="#777777", hatch=["//", ".."][k], lw=0.8)
                axes.annotate(f"{value:g}", (place, value), (0, 3), ha="center", fontsize=6.5,
                              textcoords="offset points", color="#555555")
    axes.set_title("The paper's, on TL;DR: " + ", ".join(
        f"{one['name']} {mark}" for one, mark in zip(series, ["///", "..."])), fontsize=8, color="#555555")
    axes.set_xticks(range(len(names)), names, fontsize=6.5, rotation=20)
    axes.set_ylabel(paper["unit"], fontsize=8, color="#555555")
    axes.tick_params(axis="y", labelsize=7)
    low = min(values)
    axes.set_ylim(0 if low < 0.5 * max(values) else 0.9 * low, 1.08 * max(values))


def judge_line(bars: list[dict]) -> list[str]:
    """What the judge's protocol found, over all bars: one line, or none where no judge was asked."""
    asked = [bar["judge"] for bar in bars if "position_consistency" in bar["judge"]]
    if not asked:
        return []

    def over(name: str, form: str) -> str:
        values = [bar[name] for bar in asked if name in bar]
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    text = f"judge: both orders agree on {over('position_consistency', '.1%')}"
    text += f", unreadable answers {over('parse_failures', '.1%')}"
    if "mean_tokens" in asked[0]:
        text += f"; tokens {over('mean_tokens', '.1f')}, reference {over('mean_tokens_reference', '.1f')}"
    return [text]


def finish(figure: Figure, axes: Axes, content: dict, gaps_above: bool = True) -> None:
    """Title, gaps in words, axes and the lines below."""
    axes.set_title(content["title"], fontsize=11, pad=8 + 10 * len(content["gaps"]) * gaps_above)
    if gaps_above:
        axes.text(0.5, 1.015, gap_lines(content), transform=axes.transAxes, ha="center", fontsize=7.5)
    axes.set_ylabel(content["measure"])
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.margins(y=0.12)
    how = (f"mean over seeds {', '.join(map(str, content['seeds']))} and n = {content['bars'][0]['n']} prompts; "
           "lines and brackets: 95% bootstrap over both; differences are paired by prompt")
    below = [content["note"], how, *judge_line(content["bars"]), *(p["source"] for p in [content["paper"]] if p)]
    figure.text(0.5, 0.008, "\n".join(below), ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.03 + 0.022 * len(below), 1, 1))


def bar_chart(content: dict, floor: float) -> Figure:
    """One bar per name, from `floor` on: mean over seeds and prompts, 95% interval, every seed's point."""
    paper, bars, seeds = content["paper"], content["bars"], content["seeds"]
    beside = bool(paper and paper["series"])
    many = len(bars) * (2 + len(content["also"])) > 30  # names and differences need room of their own
    width, height = (0.7 * len(bars), 5 + 0.16 * len(content["gaps"])) if many else (6.6, 4.6)
    figure, panels = plt.subplots(1, 1 + beside, figsize=(width + 3.2 * beside, height), squeeze=False,
                                  width_ratios=[2, 1.1][: 1 + beside])
    axes = panels[0, 0]
    for x, bar in enumerate(bars):
        colour = COLOURS.get(bar["series"], "#5f9e6e")
        axes.bar(x, bar["mean"] - floor, bottom=floor, color=colour, width=0.65, zorder=2)
        axes.errorbar(x, bar["mean"], [[bar["mean"] - bar["low"]], [bar["high"] - bar["mean"]]],
                      color="black", capsize=4, lw=1.2, zorder=4)
        if len(set(bar["by_seed"])) > 1:
            axes.scatter(x + np.linspace(-0.2, 0.2, len(seeds)), bar["by_seed"], s=16, color="white", edgecolor="black",
                         lw=0.8, zorder=5)
        up = bar["mean"] >= floor
        end = max(bar["high"], *bar["by_seed"]) if up else min(bar["low"], *bar["by_seed"])
        axes.annotate(f"{bar['mean']:.3f}", (x, end), (0, 5 if up else -13),
                      textcoords="offset points", ha="center", fontsize=8)
    labels = ["\n".join([bar["bar"], *(f"{other} {found['bars'][bar['bar']]['mean']:.3f}"
                                       for other, found in content["also"].items()),
                         *(f"KL {np.mean(bar['trained']['kl']):.1f}" for _ in [0] if "kl" in bar["trained"])])
              for bar in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize=8 if len(bars) < 7 else 6.5, rotation=0 if len(bars) < 7 else 30,
                    ha="right" if many else "center")
    if beside:
        paper_panel(panels[0, 1], paper, [bar["bar"] for bar in bars if any(bar["bar"] in one["values"]
                                                                           for one in paper["series"])])
    finish(figure, axes, content)
    low, high = (end(bar["mean"] for bar in bars) for end in (min, max))
    axes.set_ylim(**({"bottom": floor} if low >= floor else {"top": floor + 0.02} if high < floor else {}))
    return figure


def lines(content: dict, x_label: str, log: bool = False, gaps_at: dict | None = None, named: bool = False,
          measured: bool = False) -> Figure:
    """One line per series over x, with 95% intervals and every seed's point.

    Args:
        measured: x is a measurement, so that points have no ticks. named: likewise, and every point has its name.
        gaps_at: label of a gap -> (name of its line, x): they are drawn beside, instead of written above.
    """
    series = list(dict.fromkeys(bar["series"] for bar in content["bars"]))
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(series) > 6 else {}
    size = (10.2 if gaps_at else 6.8) + 1.8 * bool(beside), 4.8
    figure, panels = plt.subplots(1, 2 if gaps_at else 1, figsize=size, squeeze=False)
    groups = list(dict.fromkeys(name.split(",")[0] for name in series))
    for k, name in enumerate(series):
        bars = sorted((bar for bar in content["bars"] if bar["series"] == name), key=lambda bar: bar["x"])
        known = [key for key in sorted(COLOURS, key=len, reverse=True) if name.startswith(key) or f"RM {key}" in name]
        group = groups.index(name.split(",")[0])
        # Fig 8: dashed are samples of DPO. Fig 9: colour by reward model, marker and dashes by policy.
        dashes = ["-", "--", ":"][group % 3] if "," in name else "--" if " on DPO" in name else "-"
        _line(panels[0, 0], [bar["x"] for bar in bars], bars, name, COLOURS[known[0]] if known else f"C{k}",
              MARKERS[group % len(MARKERS)], dashes)
    for bar in content["bars"] if named else []:
        panels[0, 0].annotate(bar["bar"].removeprefix(bar["series"] + " "), (bar["x"], bar["mean"]), (5, -9),
                              textcoords="offset points", fontsize=7)
    families: dict[str, list] = {}
    for label, (name, x) in (gaps_at or {}).items():
        families.setdefault(name, []).append((x, content["gaps"][label]))
    for k, (name, points) in enumerate(families.items()):
        x, gaps = zip(*sorted(points, key=lambda point: point[0]))
        _line(panels[0, 1], list(x), list(gaps), name, ["#d1762c", "#777777"][k % 2], MARKERS[k], "-")
    places = sorted({bar["x"] for bar in content["bars"]})
    for axes in panels[0]:
        if log:
            axes.set_xscale("log")
            axes.minorticks_off()
        if not (named or measured):
            axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xlabel(x_label)
        axes.legend(fontsize=7.5, frameon=False, **beside)
    if gaps_at:
        axes.axhline(0, color="black", lw=0.8, zorder=1)
        axes.set_title("The gap", fontsize=11)
        axes.set_ylabel("difference in " + content["measure"].split(" against")[0])
        axes.grid(axis="y", alpha=0.3, zorder=0)
    finish(figure, panels[0, 0], content, gaps_above=not gaps_at)
    return figure


def _line(axes: Axes, x: list[float], points: list[dict], name: str, colour: str, marker: str, style: str) -> None:
    mean = np.array([point["mean"] for point in points])
    error = [mean - [point["low"] for point in points], [point["high"] for point in points] - mean]
    axes.errorbar(x, mean, error, color=colour, marker=marker, ms=5, capsize=3, lw=1.6, ls=style, label=name, zorder=3)
    for place, point in zip(x, points, strict=True):
        axes.scatter([place] * len(point["by_seed"]), point["by_seed"], s=9, color=colour, alpha=0.45, zorder=2)


def save(out: Path, name: str, runs: Path, bars: list[Bar], gaps: dict[str, dict[str, float]], scale: str,
         caption: str, measure: str, draw: Callable[[dict], object], also: dict | None = None,
         also_keys: dict[str, str] | None = None) -> None:
    """Write name.{png,csv,json} under `out`, each complete or not at all. Its title stands in figures.yaml.

    Args:
        gaps: label -> contrast, a weight for each bar in it; paired by prompt and seed.
        caption: what is to be seen, for the report.
        draw: what is written to the .json -> a matplotlib figure.
        also: measure -> function of scores, for what stands beside the one drawn; also_keys: measure -> array of
            scores.npz, for the same.
    """
    params = config.load()
    seeds, title = params.seeds_of(name, scale), params.figures[name].title
    scores, files = read(name, runs, bars, seeds, params.more_seeds(scale))
    with_kl = "human/kl" in params.figures[name].reads
    metrics = {bar.name: metrics_of(files[bar.name], bar.key, with_kl) for bar in bars}
    posts = {bar.name: posts_of(files[bar.name], bar.key) for bar in bars}
    table = [{"bar": bar.name, "series": bar.series or bar.name, "x": bar.x, "roles": list(bar.roles),
              **stats.estimate(scores[bar.name], posts[bar.name]),
              "n": scores[bar.name].shape[1], "scores": [path.as_posix() for path in files[bar.name]], "key": bar.key,
              "judge": judged(metrics[bar.name]), "trained": trained(metrics[bar.name])}
             for bar in bars]

    def contrasts(values: dict[str, np.ndarray], posts: dict[str, np.ndarray | None]) -> dict:
        found = {}
        for label, weights in gaps.items():
            treated, control = (sum(abs(w) * values[bar] for bar, w in weights.items() if (w > 0) == sign)
                                for sign in (True, False))
            found[label] = stats.difference(treated, control, posts[next(iter(weights))])
        return found

    others = {other: {bar: function(values) for bar, values in scores.items()}
              for other, function in (also or {}).items()}
    posts_of_others = dict.fromkeys(others, posts)
    for other, key in (also_keys or {}).items():
        keys = {bar.name: arrays.beside(bar.key, key) for bar in bars}
        others[other] = {bar: arrays.stacked(paths, keys[bar]) for bar, paths in files.items()}
        posts_of_others[other] = {bar: posts_of(paths, keys[bar]) for bar, paths in files.items()}

    paper = stage.read_json(PAPER).get(name) if PAPER.exists() else None
    content = {
        "figure": name, "title": title, "caption": caption, "note": note(scale), "measure": measure, "seeds": seeds,
        "bars": table, "gaps": contrasts(scores, posts), "paper": paper,
        "also": {other: {"bars": {bar: stats.estimate(found, posts_of_others[other][bar])
                                  for bar, found in values.items()},
                         "gaps": contrasts(values, posts_of_others[other])} for other, values in others.items()},
        "provenance": provenance(sorted({path for paths in files.values() for path in paths})),
    }
    out.mkdir(parents=True, exist_ok=True)
    with stage.writing_all(*(out / f"{name}.{kind}" for kind in ("json", "csv", "png"))) as (as_json, as_csv, as_png):
        stage.write_json(as_json, content)
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["bar", "x", "seed", "mean", "low", "high", "n"])
            for row in table:
                writer.writerow([row["bar"], row["x"], "all", row["mean"], row["low"], row["high"], row["n"]])
                writer.writerows([row["bar"], row["x"], s, m, "", "", row["n"]]
                                 for s, m in zip(seeds, row["by_seed"], strict=True))
        figure = draw(content)
        figure.savefig(as_png, dpi=160, metadata={"Software": None})
        plt.close(figure)
    for label, gap in content["gaps"].items():
        print(f"{name}: {label}: {gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]")

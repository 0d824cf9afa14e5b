"""The gap over worlds drawn at random: every world is one observation.

    python -m roads.figures.worlds runs reports/mini --scale mini --figure worlds

Or over bases of one world, trained from other seeds (bases, bases_rouge, bases_readers).
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from roads import config, stage, stats
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

JUDGES = {"Global RM": "reward", "DPO RM": "dpo", "Base": "base"}
FIGURES = {"worlds": "Worlds drawn at random from stated ranges, none left out, with mini's hyperparameters.",
           "bases": "The scale's own world and documents, with bases whose first weights and order of documents were "
                    "drawn from other seeds; every base has an SFT policy and reward models of its own."}
FIGURES["bases_rouge"] = f"{FIGURES['bases']} ROUGE-L ranks, as in Fig. 11."
FIGURES["bases_readers"] = (f"{FIGURES['bases']} Readers give the summary that they are shown first one logit more, "
                            "and one label in ten is flipped; the judge of winrates is the world's own.")
LEFT = ("what Online(DPO) has over DPO 2x in each, with its bootstrap interval over prompts and seeds; the line and "
        "the band are the mean over all of them and its t interval.")
RIGHT = ("Right: the same against the reward model's lead, how much more often it prefers the truly better summary of "
         "a held-out pair than DPO's own reward does.")
MEASURES = {"human": "winrate against the reference summary; of judges the share of held-out pairs right by quality",
            "rouge": "ROUGE-L F1 against the reference summary"}


def bars_of(scale: str, name: str) -> list[Bar]:
    """Policies and judges of every world, or base; a bar's name ends in its name. What ROUGE-L ranks has no judges."""
    bars, table = [], config.load_figures()
    for x, arm in enumerate(config.load().arms_of(scale, name)):
        for policy in ("dpo", "dpo_2x", "online"):
            bars.append(Bar(f"{NAMES[policy]} {arm}", *figure.policy(scale, policy, name, arm), NAMES[policy], x))
        bars += [Bar(f"{label} {arm}", f"{scale}/{name}/{arm}/s{{seed}}", f"likelihood.{kind}.by_quality", label, x)
                 for label, kind in JUDGES.items() if table[name].task == "human"]
    return bars


def contrasts(bars: list[Bar]) -> dict[str, dict[str, float]]:
    worlds = [bar.name.removeprefix("DPO ") for bar in bars if bar.series == "DPO"]
    return {f"{label}, {world}": {f"{one} {world}": 1, f"{other} {world}": -1} for world in worlds
            for label, one, other in (("Online(DPO) - DPO 2x", "Online(DPO)", "DPO 2x"),
                                      ("Online(DPO) - DPO", "Online(DPO)", "DPO"),
                                      ("RM's lead", "Global RM", "DPO RM"))
            if any(bar.name == f"{one} {world}" for bar in bars)}


def scatter(axes: Axes, x: list[float], gaps: list[dict], names: list[str]) -> None:
    """Gaps with their intervals over x, their names, and the least-squares line with its slope's interval."""
    mean = np.array([gap["mean"] for gap in gaps])
    error = [mean - [gap["low"] for gap in gaps], [gap["high"] for gap in gaps] - mean]
    axes.errorbar(x, mean, error, color="#d1762c", marker="o", ms=5, ls="", capsize=2, lw=1, zorder=3)
    for place, value, name in zip(x, mean, names, strict=True):
        axes.annotate(name, (place, value), (4, 3), textcoords="offset points", fontsize=6.5)
    if len(x) > 2:
        line = stats.regression(np.array(x), mean)
        ends = np.array([min(x), max(x)])
        axes.plot(ends, line["intercept"] + line["slope"] * ends, color="black", lw=1)
        axes.set_title(f"slope {line['slope']:+.2f} [{line['low']:+.2f}, {line['high']:+.2f}], r {line['r']:+.2f}",
                       fontsize=9)
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.grid(alpha=0.3, zorder=0)


def panels(content: dict) -> Figure:
    of = {label: {name.split(", ")[-1]: gap for name, gap in content["gaps"].items() if name.startswith(label + ",")}
          for label in ("Online(DPO) - DPO 2x", "RM's lead")}
    gaps = of["Online(DPO) - DPO 2x"]
    names = sorted(gaps, key=lambda name: gaps[name]["mean"])
    shown, axes = plt.subplots(1, 1 + bool(of["RM's lead"]), figsize=(10.4, 4.9), squeeze=False)
    left, *right = axes[0]
    for y, name in enumerate(names):
        gap = gaps[name]
        left.errorbar(gap["mean"], y, xerr=[[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]], color="#d1762c",
                      marker="o", ms=5, capsize=2, lw=1, zorder=3)
        left.scatter(gap["by_seed"], [y] * len(gap["by_seed"]), s=9, color="#d1762c", alpha=0.45, zorder=2)
    mean = stats.over_units([gap["mean"] for gap in gaps.values()])
    left.axvline(mean["mean"], color="black", lw=1)
    left.axvspan(mean["low"], mean["high"], color="#cccccc", alpha=0.5, zorder=0)
    left.axvline(0, color="black", lw=0.8, ls=":")
    left.set_yticks(range(len(names)), names, fontsize=7.5)
    above = sum(gap["mean"] > 0 for gap in gaps.values())
    left.set_title(f"over all {mean['mean']:+.3f} [{mean['low']:+.3f}, {mean['high']:+.3f}], {above} of "
                   f"{len(gaps)} above 0", fontsize=9)
    measure = content["measure"].split(" against")[0]
    left.set_xlabel(f"Online(DPO) - DPO 2x, {measure}", fontsize=8.5)
    for axes in right:
        scatter(axes, [of["RM's lead"][name]["mean"] for name in names], [gaps[name] for name in names], names)
        axes.set_xlabel("global RM less DPO's own reward: share of held-out pairs right by quality", fontsize=8.5)
        axes.set_ylabel(f"Online(DPO) - DPO 2x, {measure}", fontsize=8.5)
    shown.suptitle(content["title"], fontsize=11)
    how = (f"seeds {', '.join(map(str, content['seeds']))}, {content['bars'][0]['n']} prompts in each; intervals of "
           "each: 95% bootstrap over both; over all: t")
    shown.text(0.5, 0.008, f"{content['note']}\n{how}", ha="center", fontsize=7)
    shown.tight_layout(rect=(0, 0.05, 1, 1))
    return shown


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    bars = bars_of(a.scale, a.figure)
    task = config.load_figures()[a.figure].task
    caption = f"{FIGURES[a.figure]} {'Left' if task == 'human' else 'Shown'}: {LEFT}" + f" {RIGHT}" * (task == "human")
    figure.save(a.out, a.figure, a.runs, bars, contrasts(bars), a.scale, caption, MEASURES[task], panels)


if __name__ == "__main__":
    stage.main(_command)

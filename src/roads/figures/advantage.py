"""One picture of all worlds: the gap against how much better the reward model judges than the policy's own rewards.

    python -m roads.figures.advantage runs reports/mini --scale mini --figure advantage
"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from roads import config, stage
from roads.figures import dials, figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

DIALS = {"fig10": "horizon"}  # a figure whose arms another dial's figure names
CAPTION = ("Every world of the other figures is a point: x is the accuracy of the global reward model on held-out "
           "pairs less that of DPO's own reward, both trained on the same pairs; y is what Online(DPO) wins over "
           "DPO 2x, which sees as many prompts. If online learning pays by what its reward model knows, points rise "
           "from the lower left.")


def accuracy(runs: Path, scale: str, folder: str, arm: str, seeds: list[int]) -> float:
    """Accuracy of the global reward model less that of DPO's own, mean over seeds; of the scale, or of an arm."""
    if not arm:
        place = f"{scale}/human/likelihood/{{kind}}/s{{seed}}/metrics.json"
        kinds = [np.mean([stage.read_json(runs / place.format(kind=kind, seed=seed))["accuracy"] for seed in seeds])
                 for kind in ("reward", "dpo")]
    else:
        found = [stage.read_json(runs / f"{scale}/{folder}/{arm}/s{seed}/metrics.json") for seed in seeds]
        kinds = [np.mean([metrics[kind]["accuracy"] for metrics in found]) for kind in ("global", "dpo_rm")]
    return float(kinds[0] - kinds[1])


def points(content: dict, places: dict[str, float]) -> Figure:
    """The gaps of `content` at their places x, each with its name."""
    shown, axes = plt.subplots(figsize=(6.8, 4.8))
    gaps = content["gaps"]
    rho = spearmanr([places[name] for name in gaps], [gap["mean"] for gap in gaps.values()]) if len(gaps) > 2 else None
    for name, gap in gaps.items():
        error = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
        axes.errorbar(places[name], gap["mean"], error, color="#d1762c", marker="o", ms=6, capsize=3, lw=1.2, zorder=3)
        axes.annotate(name, (places[name], gap["mean"]), (6, 4), textcoords="offset points", fontsize=7.5)
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("accuracy of the global reward model less DPO's own, held-out pairs")
    figure.finish(shown, axes, content, gaps_above=False)
    axes.set_ylabel("Online(DPO) - DPO 2x, winrate")
    if rho is not None:
        axes.set_title(f"{content['title']} (Spearman {rho.statistic:.2f}, {len(gaps)} worlds)", fontsize=11)
    return shown


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=["advantage"])
    a = parser.parse_args()
    params = config.load()
    worlds, seeds = {a.scale: ("", "")}, params.seeds_of(a.figure, a.scale)  # label -> figure and arm
    for folder in params.figures[a.figure].borrows:
        _, x_of, _, short, _, _ = dials.FIGURES[DIALS.get(folder, folder)]
        worlds |= {f"{short}={x_of(cfg):g}": (folder, arm) for arm, cfg in params.arms_of(a.scale, folder).items()}
    bars, gaps, places = [], {}, {}
    for label, (folder, arm) in worlds.items():
        places[label] = accuracy(a.runs, a.scale, folder, arm, seeds)
        both = [Bar(f"{NAMES[policy]} {label}", *figure.policy(a.scale, policy, folder, arm), NAMES[policy],
                    places[label]) for policy in ("dpo_2x", "online")]
        bars += both
        gaps[label] = {both[1].name: 1, both[0].name: -1}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION, "winrate against the reference summary",
                partial(points, places=places))


if __name__ == "__main__":
    stage.main(_command)

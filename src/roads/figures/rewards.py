"""The dial of real posts: the same experiment under judges that like different things.

    python -m roads.figures.rewards runs reports/real --scale real --figure rewards
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from roads import config, stage
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

FIGURES = ("rewards",)
CAPTION = ("Each point is a judge of known quality; its annotators label the same samples, and everything after that "
           "is the same. y is the mean quality of Online(DPO)'s summaries less DPO 2x's, in standard deviations of a "
           "post's samples by that judge. x: how much better the global reward model tells held-out pairs apart than "
           "DPO's own reward; and the share of the judge's quality that no sum over words explains. H6's prediction, "
           "written down before any run: a gap for relevance, little for sentiment, none for ROUGE-L.")
POLICIES = ("sft", "dpo", "dpo_2x", "online_sft", "online")


def spread(runs: Path, scale: str, arm: str, seed: int) -> float:
    """Standard deviation of the quality of a post's samples, by the judge of the scale or of an arm."""
    if not arm:
        return stage.read_json(runs / f"{scale}/human/pairs/preferences/metrics.json")["spread"]
    return stage.read_json(runs / f"{scale}/rewards/{arm}/s{seed}/metrics.json")["pairs"]["spread"]


def accuracy(runs: Path, scale: str, arm: str, seeds: list[int]) -> float:
    """Accuracy of the global reward model less that of DPO's own, mean over seeds; of the scale, or of an arm."""
    if not arm:
        place = f"{scale}/human/likelihood/{{kind}}/s{{seed}}/metrics.json"
        kinds = [np.mean([stage.read_json(runs / place.format(kind=kind, seed=seed))["accuracy"] for seed in seeds])
                 for kind in ("reward", "dpo")]
    else:
        found = [stage.read_json(runs / f"{scale}/rewards/{arm}/s{seed}/metrics.json") for seed in seeds]
        kinds = [np.mean([metrics[kind]["accuracy"] for metrics in found]) for kind in ("global", "dpo_rm")]
    return float(kinds[0] - kinds[1])


def arms_by_judge(scale: str) -> dict[str, str]:
    """Judge -> the arm that it judges, "" for the scale itself."""
    params = config.load()
    arms = params.arms_of(scale, "rewards").items()
    return {params.scales[scale].judge.kind: ""} | {cfg.judge.kind: arm for arm, cfg in arms}


def bars_of(scale: str, name: str) -> list[Bar]:
    """Quality of every policy under every judge, in the judge's own unit."""
    found = []
    for x, (judge, arm) in enumerate(arms_by_judge(scale).items()):
        for policy in POLICIES:
            place, key = figure.policy(scale, policy, name, arm)
            key = f"{key}.quality" if arm else "quality"
            found.append(Bar(f"{NAMES[policy]} {judge}", place, key, NAMES[policy], x))
    return found


def two_panels(content: dict, places: dict[str, tuple[float, float]]) -> Figure:
    """The gaps at their places, the same y over either x."""
    shown, panels = plt.subplots(1, 2, figsize=(10.2, 4.8), sharey=True)
    labels = ("accuracy of the global reward model less DPO's own, held-out pairs",
              "share of quality beyond a sum over words (1 - R²)")
    for axes, label, k in zip(panels, labels, (0, 1), strict=True):
        for judge, place in places.items():
            gap = content["gaps"][f"{judge}: Online(DPO) - DPO 2x"]
            error = [[gap["mean"] - gap["low"]], [gap["high"] - gap["mean"]]]
            axes.errorbar(place[k], gap["mean"], error, color="#d1762c", marker="o", ms=6, capsize=3, lw=1.2, zorder=3)
            axes.annotate(judge, (place[k], gap["mean"]), (6, 4), textcoords="offset points", fontsize=8)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xlabel(label, fontsize=8.5)
        axes.grid(axis="y", alpha=0.3, zorder=0)
        axes.margins(x=0.25)
    figure.finish(shown, panels[0], content, gaps_above=False)
    panels[0].set_ylabel("Online(DPO) - DPO 2x, quality in sd")
    return shown


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=FIGURES)
    a = parser.parse_args()
    seeds, judges = config.load().seeds_of(a.figure, a.scale), arms_by_judge(a.scale)
    units = [spread(a.runs, a.scale, arm, seeds[0]) for arm in judges.values()]
    bars = [replace(bar, unit=units[int(bar.x)]) for bar in bars_of(a.scale, a.figure)]
    places = {judge: (accuracy(a.runs, a.scale, arm, seeds),
                      stage.read_json(a.runs / f"{a.scale}/human/judges/{arm or 'own'}/metrics.json")["beyond_words"])
              for judge, arm in judges.items()}
    gaps = {f"{judge}: {NAMES[online]} - {NAMES[control]}": {f"{NAMES[online]} {judge}": 1,
                                                             f"{NAMES[control]} {judge}": -1}
            for judge in judges for online, control in (("online", "dpo_2x"), ("online", "dpo"), ("online_sft", "dpo"))}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION,
                "quality of summaries, in sd of a post's samples", partial(two_panels, places=places))


if __name__ == "__main__":
    stage.main(_command)

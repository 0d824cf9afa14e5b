"""What the gap is made of: policies from the same pairs, start and number of steps, each one change from its neighbour.

    python -m roads.figures.anatomy runs reports/mini --scale mini --figure anatomy
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from roads import config, stage
from roads.figures import figure
from roads.figures.figure import Bar

FIGURES = ("anatomy",)
LABELS = {"readers": "readers", "rm": "RM", "soft": "RM soft", "gold": "gold", "dpo": "DPO", "local": "local RM"}
# Folder of the stage -> what its policies are trained on, or how they are had without.
GROUPS = {"offline.two": "offline pairs", "online.two": "own pairs", "online.ends": "own best and worst",
          "best": "best of 25", "exact": "exact"}
SHOWN = {"offline.two": ("readers", "rm", "soft", "gold"), "online.two": ("readers", "rm", "gold"),
         "online.ends": ("rm", "gold"), "best": ("rm", "gold"), "exact": ("dpo", "local", "rm", "gold")}
TRAINED = ("offline.two", "online.two", "online.ends")
GAPS = {  # what is changed: from -> to
    "RM's labels for readers'": ("offline pairs, readers", "offline pairs, RM"),
    "soft labels for hard": ("offline pairs, RM", "offline pairs, RM soft"),
    "gold labels for the RM's": ("offline pairs, RM", "offline pairs, gold"),
    "own pairs for offline ones": ("offline pairs, RM", "own pairs, RM"),
    "best and worst for two": ("own pairs, RM", "own best and worst, RM"),
    "division, offline": ("offline pairs, readers", "offline pairs, readers, divided"),
    "division, online": ("own best and worst, RM", "own best and worst, RM, divided"),
    "all together: Online(SFT) - DPO": ("offline pairs, readers", "own best and worst, RM, divided"),
    "the optimum for Online(SFT)": ("own best and worst, RM, divided", "exact, RM"),
    "the RM's optimum for DPO's": ("exact, DPO", "exact, RM"),
}
ALSO = {"quality": "quality", "validity": "validity", "RM's reward": "reward", "before a noisy reader": "noisy",
        "invalid words cost 0": "penalty0", "invalid words cost 1": "penalty1"}
CAPTION = ("Every trained policy starts from the SFT checkpoint and takes as many steps of the same recipe. Offline "
           "pairs: the two samples that readers were shown. Own pairs: two of 25 samples of the SFT policy at online "
           "DPO's temperature; of them all, best and worst. Labels are readers', the global RM's, its probabilities, "
           "or the true quality's. Filled: logits divided by that temperature, as online DPO has it. Best of 25 picks "
           "without training. Exact: the policy that is best under a reward at the same beta, over all valid "
           "summaries. At the right, KL from SFT in nats.")


def key(group: str, label: str, divided: bool = False) -> tuple[str, str]:
    """A policy's key in the stage's scores, and its bar's name."""
    return f"{group}.{label}" + ".divided" * divided, f"{GROUPS[group]}, {LABELS[label]}" + ", divided" * divided


def bars_of(scale: str, name: str) -> list[Bar]:
    """Every policy in the scale's own world, and in that of the arm of `told`, where pretraining told what is liked."""
    worlds = {"": "own"} | {f" ({arm})": arm for arm in config.load().arms_of(scale, "told")}
    policies = [("sft", "SFT")] + [key(group, label, divided) for group, labels in SHOWN.items() for label in labels
                                   for divided in (False, True)[: 1 + (group in TRAINED)]]
    return [Bar(label + suffix, f"{scale}/{name}/{world}/s{{seed}}", of, suffix.strip(" ()") or "own")
            for suffix, world in worlds.items() for of, label in policies]


def panels(content: dict) -> Figure:
    """A panel for each world, a row for each set of pairs."""
    found = {bar["bar"]: bar for bar in content["bars"]}
    worlds = {bar["series"]: "" if bar["series"] == "own" else f" ({bar['series']})" for bar in content["bars"]}
    names = ["SFT", *(key(group, label)[1] for group, labels in SHOWN.items() for label in labels)]
    shown, axes = plt.subplots(1, len(worlds), figsize=(1.8 + 4.6 * len(worlds), 6.2), sharey=True, squeeze=False)
    starts = np.cumsum([1] + [len(labels) for labels in SHOWN.values()])
    for panel, (world, suffix) in zip(axes[0], worlds.items(), strict=True):
        for y, name in enumerate(names):
            for label, filled in ((name, False), (f"{name}, divided", True)):
                if (bar := found.get(label + suffix)) is None:
                    continue
                place = y + 0.16 * filled
                error = [[bar["mean"] - bar["low"]], [bar["high"] - bar["mean"]]]
                colour = "#d1762c" if filled else "#4878a8"
                panel.errorbar(bar["mean"], place, xerr=error, color=colour, marker="o", ms=5,
                               mfc=colour if filled else "white", capsize=2, lw=1.1, zorder=3)
                distance = f"{np.mean(bar['trained']['kl']):.1f}" if "kl" in bar["trained"] else ""
                panel.annotate(distance, (1.01 + 0.06 * filled, place), xycoords=("axes fraction", "data"),
                               fontsize=6.5, va="center", color=colour)
        for start in starts:
            panel.axhline(start - 0.5, color="#cccccc", lw=0.7, zorder=1)
        panel.axvline(found[f"offline pairs, readers{suffix}"]["mean"], color="#777777", lw=0.8, ls=":", zorder=1)
        panel.set_title("the scale's world" if world == "own" else f"arm {world}: pretraining told", fontsize=9)
        panel.set_xlabel("winrate" + "; open: as it is, filled: logits divided" * (world == "own"), fontsize=8.5)
        panel.grid(axis="x", alpha=0.3, zorder=0)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    shown.suptitle(content["title"], fontsize=11)
    how = (f"mean over seeds {', '.join(map(str, content['seeds']))} and n = {content['bars'][0]['n']} prompts; "
           "95% bootstrap over both; at the right of a panel: KL from SFT, nats")
    shown.text(0.5, 0.008, f"{content['note']}\n{how}", ha="center", fontsize=7)
    shown.tight_layout(rect=(0, 0.05, 1, 1))
    return shown


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=FIGURES)
    a = parser.parse_args()
    bars = bars_of(a.scale, a.figure)
    names, suffixes = {bar.name for bar in bars}, {bar.series: bar.name.removeprefix("SFT") for bar in bars
                                                    if bar.name.startswith("SFT")}
    gaps = {f"{label}{suffix}": {f"{after}{suffix}": 1, f"{before}{suffix}": -1}
            for suffix in suffixes.values() for label, (before, after) in GAPS.items()}
    assert {name for weights in gaps.values() for name in weights} <= names
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION, "winrate against the reference summary", panels,
                also_keys=ALSO)


if __name__ == "__main__":
    stage.main(_command)

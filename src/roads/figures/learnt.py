"""Where the verifier is learnt, and whether online wins there: kinds of reward x numbers of pairs.

    python -m roads.figures.learnt runs reports/mini --scale mini --figure learnt
"""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from roads import config, stage
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

# Judges: label -> array of a cell, and how it is drawn.
JUDGES = {"Global RM": "likelihood.reward.by_quality", "DPO RM": "likelihood.dpo.by_quality",
          "Probe": "untrained.probe", "Tag": "untrained.tag", "Likelihood": "untrained.likelihood",
          "Per token": "untrained.per_token"}
STYLES = {"Global RM": ("#d1762c", "o-"), "DPO RM": ("#4878a8", "s-"), "Probe": ("#5f9e6e", "D-"),
          "Tag": ("#9a9a9a", "^:"), "Likelihood": ("#9a9a9a", "v:"), "Per token": ("#9a9a9a", "v:")}
CAPTION = ("Columns: what readers like (params.yaml has each as an arm); x: pairs. Online(SFT) and DPO have the same "
           "start, the same number of prompts as there are pairs, and the same {chosen}. Below: how often a judge "
           "prefers the truly better summary of a held-out pair. Probe: a linear function of the SFT policy's last "
           "hidden state, fitted to the same pairs. Tag and likelihood: what the SFT policy itself says, without a "
           "pair. Pairs of equal quality, of which coherence and counts have some, are half right for every judge.")
EPOCHS = "epochs, chosen for offline DPO at every number of pairs in development worlds"
TUNED = ("learning rate and epochs, chosen in development worlds for offline DPO and each kind of reward; so are the "
         "reward model's own")
FIGURES = {"learnt": EPOCHS, "learnt_bases": EPOCHS, "tuned": TUNED, "tuned_bases": TUNED}


def bars_of(scale: str, name: str) -> list[Bar]:
    """Policies and judges of every cell; a bar's name ends in its cell's, as `two n=375`."""
    bars = []
    for arm, cfg in config.load().arms_of(scale, name).items():
        for n in cfg.sizes:
            place = f"{scale}/{name}/{arm}/s{{seed}}"
            bars += [Bar(f"{NAMES[policy]} {arm} n={n}", place, f"n{n}.{policy}", NAMES[policy], n)
                     for policy in ("sft", "dpo", "online_sft")]
            bars += [Bar(f"{label} {arm} n={n}", place, f"n{n}.{key}", label, n) for label, key in JUDGES.items()]
    return bars


def cells(bars: Iterable[Bar]) -> list[str]:
    return [bar.name.removeprefix("DPO ") for bar in bars if bar.series == "DPO"]


def contrasts(bars: list[Bar]) -> dict[str, dict[str, float]]:
    pairs = (("Online(SFT) - DPO", "Online(SFT)", "DPO"), ("RM's lead", "Global RM", "DPO RM"),
             ("RM - probe", "Global RM", "Probe"), ("RM - tag", "Global RM", "Tag"))
    return {f"{label}, {cell}": {f"{one} {cell}": 1, f"{other} {cell}": -1} for cell in cells(bars)
            for label, one, other in pairs}


def _points(axes: Axes, found: list[tuple[float, dict]], colour: str, style: str, label: str) -> None:
    x, mean = [x for x, _ in found], np.array([point["mean"] for _, point in found])
    error = [mean - [point["low"] for _, point in found], [point["high"] for _, point in found] - mean]
    axes.errorbar(x, mean, error, color=colour, fmt=style, ms=4, capsize=2, lw=1.2, label=label, zorder=3)


def _arms(content: dict) -> list[str]:
    return list(dict.fromkeys(bar["bar"].split()[1] for bar in content["bars"] if bar["series"] == "DPO"))


def row(content: dict) -> Figure:
    """One number of pairs: what readers like is on x; judges stand side by side."""
    arms, n = _arms(content), content["bars"][0]["x"]
    shown, (top, below) = plt.subplots(2, figsize=(2.4 + 1.6 * len(arms), 6), sharex=True)
    _points(top, [(x, content["gaps"][f"Online(SFT) - DPO, {arm} n={n}"]) for x, arm in enumerate(arms)], "#d1762c",
            "o", "Online(SFT) - DPO")
    top.axhline(0, color="black", lw=0.8)
    drawn = [label for label in STYLES if label != "Per token"]
    bars = {bar["bar"]: bar for bar in content["bars"]}
    for k, label in enumerate(drawn):
        colour, style = STYLES[label]
        _points(below, [(x + 0.12 * (k - len(drawn) // 2), bars[f"{label} {arm} n={n}"]) for x, arm in enumerate(arms)],
                colour, style[0], label)
    below.axhline(0.5, color="black", lw=0.8, ls=":")
    below.set_xticks(range(len(arms)), arms)
    below.set_xlabel(f"what readers like, {n:,} pairs", fontsize=8)
    below.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    for axes in (top, below):
        axes.grid(axis="y", alpha=0.3, zorder=0)
        axes.margins(x=0.12)
    return _finish(shown, top, below, content)


def grid(content: dict) -> Figure:
    arms = _arms(content)
    shown, panels = plt.subplots(2, len(arms), figsize=(1.2 + 2.3 * len(arms), 6), sharex=True, sharey="row",
                                 squeeze=False)
    for column, arm in enumerate(arms):
        top, below = panels[:, column]
        gaps = [(float(name.split("n=")[1]), gap) for name, gap in content["gaps"].items()
                if name.startswith(f"Online(SFT) - DPO, {arm} ")]
        _points(top, gaps, "#d1762c", "o-", "Online(SFT) - DPO")
        top.axhline(0, color="black", lw=0.8)
        top.set_title(arm, fontsize=9.5)
        for label, (colour, style) in STYLES.items():
            if label != "Per token":
                _points(below, [(bar["x"], bar) for bar in content["bars"] if bar["series"] == label
                                and bar["bar"].split(" n=")[0] == f"{label} {arm}"], colour, style, label)
        below.axhline(0.5, color="black", lw=0.8, ls=":")
        for axes in (top, below):
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.grid(axis="y", alpha=0.3, zorder=0)
        places = sorted({bar["x"] for bar in content["bars"]})
        below.set_xticks(places, [f"{x:g}" for x in places], fontsize=6.5, rotation=30)
        below.set_xlabel("pairs", fontsize=8)
    panels[1, -1].legend(fontsize=6.5, frameon=False, loc="upper left")
    return _finish(shown, panels[0, 0], panels[1, 0], content)


def _finish(shown: Figure, top: Axes, below: Axes, content: dict) -> Figure:
    top.set_ylabel("Online(SFT) - DPO, winrate", fontsize=8.5)
    below.set_ylabel("held-out pairs right, by quality", fontsize=8.5)
    shown.suptitle(content["title"], fontsize=11)
    how = (f"mean over seeds {', '.join(map(str, content['seeds']))} and n = {content['bars'][0]['n']} prompts; "
           "95% bootstrap over both; same start, same number of steps")
    shown.text(0.5, 0.008, f"{content['note']}\n{how}", ha="center", fontsize=7)
    shown.tight_layout(rect=(0, 0.05, 1, 1))
    return shown


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    bars = bars_of(a.scale, a.figure)
    figure.save(a.out, a.figure, a.runs, bars, contrasts(bars), a.scale,
                CAPTION.format(chosen=FIGURES[a.figure]),
                "winrate against the reference summary; of judges the share of held-out pairs right by quality",
                grid if len({bar.x for bar in bars}) > 1 else row)


if __name__ == "__main__":
    stage.main(_command)

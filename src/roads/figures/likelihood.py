"""Figure 7, also by size and where pretraining told what is liked: how likely reward models find held-out preferences.

The mean probability, which the paper draws, grows with the scale of a reward; accuracy and log loss go with it.

    python -m roads.figures.likelihood runs reports/mini --scale mini --figure fig7
"""

from dataclasses import replace
from functools import partial

import numpy as np

from roads import config, stage
from roads.figures import figure, policies
from roads.figures.figure import Bar

FIGURES = "fig7", "told_judges", "sizes_judges"
KINDS = {"Global RM": "reward", "Local RM": "local", "DPO RM": "dpo", "Base": "base"}
COMPARED = (("Global RM", "Local RM"), ("Local RM", "DPO RM"), ("Global RM", "DPO RM"), ("Global RM", "Base"))
GAPS = {f"{one.removesuffix(' RM')} - {other.removesuffix(' RM')}": {one: 1, other: -1} for one, other in COMPARED}
ALSO = {"accuracy": lambda p: (p > 0.5).astype(float), "log loss": lambda p: -np.log(p)}
CAPTION = ("Bradley-Terry probability of the chosen completion of held-out pairs, from reward models trained from the "
           "same checkpoint on the same pairs. Accuracy and log loss stand beside it because the mean probability also "
           "grows with the mere scale of a reward.")
TOLD = (" Base: what the base, which has seen no preference, expects of the tag at a document's end, each attribute "
        "counting alike; in buckets, so that its accuracy is what to compare. By quality: how often a model prefers "
        "the side that is truly better, which the labels, being noisy, do not say.")


def bars_of(scale: str, name: str) -> list[Bar]:
    """The scale's reward models; with those of other sizes; or those of the arm `told`, which trains no local one."""
    params = config.load()
    synthetic, borrowed = params.scales[scale].synthetic, params.figures[name].borrows
    arms = params.arms_of(scale, borrowed[0]) if borrowed else {}
    if name in ("fig7", "sizes_judges"):
        kinds = {bar: kind for bar, kind in KINDS.items() if synthetic or kind != "base"}
        bars = [Bar(bar, f"{scale}/human/likelihood/{kind}" + "/s{seed}" * (kind != "base"), series=bar)
                for bar, kind in kinds.items()]
        if name == "fig7":
            return bars
        role, own = policies.size_roles(params.scales[scale], arms), policies.size_label(params.scales[scale])
        bars = [replace(bar, name=f"{bar.name} {own}", roles=role(bar.name, own)) for bar in bars]
        sizes = {policies.size_label(cfg): arm for arm, cfg in arms.items() if not arm.endswith("-prompts")}
        return bars + [Bar(f"{bar} {label}", f"{scale}/sizes/{arm}/s{{seed}}/likelihood/{kind}", series=bar,
                           roles=role(bar, label)) for label, arm in sizes.items() for bar, kind in kinds.items()]
    return [Bar(bar, f"{scale}/told/{arm}/s{{seed}}", f"likelihood.{kind}") for arm in arms
            for bar, kind in KINDS.items() if kind != "local"]


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=FIGURES)
    a = parser.parse_args()
    bars, synthetic = bars_of(a.scale, a.figure), config.load_scale(a.scale).synthetic
    gaps = {f"{label}{size}".strip(): {f"{bar}{size}": weight for bar, weight in weights.items()}
            for label, weights in GAPS.items() for size in dict.fromkeys(bar.name.removeprefix(bar.series or bar.name)
                                                                         for bar in bars)
            if {f"{bar}{size}" for bar in weights} <= {bar.name for bar in bars}}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION + TOLD * synthetic,
                "mean probability of the chosen completion", partial(figure.bar_chart, floor=0.5), also=ALSO,
                also_keys={"by quality": "by_quality"} if synthetic else {})


if __name__ == "__main__":
    stage.main(_command)

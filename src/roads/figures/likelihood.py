"""Figure 7, and the same where pretraining told what is liked: how likely reward models find held-out preferences.

The mean probability, which the paper draws, grows with the scale of a reward; accuracy and log loss go with it.

    python -m roads.figures.likelihood runs reports/mini --scale mini --figure fig7
"""

from functools import partial

import numpy as np

from roads import config, stage
from roads.figures import figure
from roads.figures.figure import Bar

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


def bars_of(scale: str, name: str, synthetic: bool, arms: list[str]) -> list[Bar]:
    """The scale's reward models, or those of the arm that is borrowed, which trains no local one."""
    if name == "fig7":
        kinds = {bar: kind for bar, kind in KINDS.items() if synthetic or kind != "base"}
        return [Bar(bar, f"{scale}/human/likelihood/{kind}" + "/s{seed}" * (kind != "base"))
                for bar, kind in kinds.items()]
    return [Bar(bar, f"{scale}/told/{arm}/s{{seed}}", f"likelihood.{kind}") for arm in arms
            for bar, kind in KINDS.items() if kind != "local"]


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=["fig7", "told_judges"])
    a = parser.parse_args()
    params = config.load()
    synthetic = params.scales[a.scale].synthetic
    bars = bars_of(a.scale, a.figure, synthetic, list(params.arms_of(a.scale, "told")))
    names = {bar.name for bar in bars}
    gaps = {label: weights for label, weights in GAPS.items() if set(weights) <= names}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION + TOLD * synthetic,
                "mean probability of the chosen completion", partial(figure.bar_chart, floor=0.5), also=ALSO,
                also_keys={"by quality": "by_quality"} if synthetic else {})


if __name__ == "__main__":
    stage.main(_command)

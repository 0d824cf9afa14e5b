"""Matched budgets: winrate against the distance from the SFT policy, offline and online at several settings.

    python -m roads.figures.budget runs reports/mini --scale mini --figure budget
"""

from functools import partial
from pathlib import Path

import numpy as np

from roads import config, stage
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

CAPTION = ("Each point is one setting of learning rate, beta, epochs or sampling temperature (params.yaml names "
           "them); x is the reverse KL from the SFT policy, estimated from samples. Best against worst of 25 moves a "
           "policy further per step than a human pair does, so equal steps are not equal distances. At matched KL: "
           "Online(DPO) less the DPO line at Online(DPO)'s KL, or DPO's farthest point where it never goes as far.")


def mean_kl(runs: Path, bar: Bar, seeds: list[int]) -> float:
    """Reverse KL from SFT in nats, mean over seeds: from the arm's metrics, or the graph's stage kl."""
    if bar.key != "score":
        return float(np.mean([stage.read_json(runs / bar.place.format(seed=seed) / "metrics.json")[bar.key]["kl"]
                              for seed in seeds]))
    place = bar.place.replace("/scores/", "/kl/")
    return float(np.mean([stage.read_json(runs / place.format(seed=seed) / "metrics.json")["kl"] for seed in seeds]))


def matched(bars: list[Bar], online: Bar) -> dict[str, float]:
    """Contrast: the online policy less DPO's line at its KL, linear between the two DPO points around it."""
    line = sorted((bar for bar in bars if bar.series == "DPO"), key=lambda bar: bar.x)
    places = [bar.x for bar in line]
    weights = {bar.name: float(np.interp(online.x, places, np.eye(len(line))[k])) for k, bar in enumerate(line)}
    return {online.name: 1.0} | {name: -weight for name, weight in weights.items() if weight > 0}


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=["budget"])
    a = parser.parse_args()
    params, bars = config.load(), []
    own, seeds = params.scales[a.scale], params.seeds_of(a.figure, a.scale)
    for arm, cfg in {"": own, **params.arms_of(a.scale, a.figure)}.items():
        for policy in cfg.policies:
            if policy == "dpo" and arm and cfg.dpo == own.dpo:
                continue  # the scale's own point once more
            place = figure.policy(a.scale, policy, a.figure, arm)
            bar = Bar(f"{NAMES[policy]} {arm or 'paper'}", *place, NAMES[policy])
            bars.append(Bar(bar.name, bar.place, bar.key, bar.series, mean_kl(a.runs, bar, seeds)))
    online = [bar for bar in bars if bar.series == "Online(DPO)"]
    gaps = {f"{bar.name} - DPO at its KL ({bar.x:.1f})": matched(bars, bar) for bar in online}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, CAPTION,
                "winrate against the reference summary",
                partial(figure.lines, x_label="reverse KL from the SFT policy, nats", named=True))


if __name__ == "__main__":
    stage.main(_command)

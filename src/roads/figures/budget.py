"""Winrate against the distance from the SFT policy: offline and online DPO at several settings, and other methods.

    python -m roads.figures.budget runs reports/mini --scale mini --figure budget
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from roads import config, schema, stage
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

METHODS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "chi_po": "chi-PO", "dpo_kl": "DPO + KL"}  # by loss
FIGURES = {
    "budget": "Each point is one setting of learning rate, beta, epochs or sampling temperature (params.yaml names "
              "them); x is the reverse KL from the SFT policy, estimated from samples. Best against worst of 25 "
              "moves a policy further per step than a human pair does, so equal steps are not equal distances. At "
              "matched KL: Online(DPO) less the DPO line at Online(DPO)'s KL, or DPO's farthest point where it "
              "never goes as far.",
    "methods": "Each point is one loss at one setting (params.yaml names them), with DPO's learning rate and epochs, "
               "on the same pairs; x is the reverse KL from the SFT policy, estimated from samples. Rounds: "
               "sampling, ranking and training repeated, from where the round before ended. REBEL: online, "
               "differences of rewards regressed on. At matched KL: Online(DPO) less a method's line at "
               "Online(DPO)'s KL, or its farthest point where it never goes as far.",
}


def mean_kl(runs: Path, bar: Bar, seeds: list[int]) -> float:
    """Reverse KL from SFT in nats, mean over seeds: from the arm's metrics, or the graph's stage kl."""
    if bar.key != "score":
        return float(np.mean([stage.read_json(runs / bar.place.format(seed=seed) / "metrics.json")[bar.key]["kl"]
                              for seed in seeds]))
    place = bar.place.replace("/scores/", "/kl/")
    return float(np.mean([stage.read_json(runs / place.format(seed=seed) / "metrics.json")["kl"] for seed in seeds]))


def matched(bars: list[Bar], online: Bar, series: str = "DPO") -> dict[str, float]:
    """Contrast: the online policy less a method's line at its KL, linear between the two points around it."""
    line = sorted((bar for bar in bars if bar.series == series), key=lambda bar: bar.x)
    places = [bar.x for bar in line]
    weights = {bar.name: float(np.interp(online.x, places, np.eye(len(line))[k])) for k, bar in enumerate(line)}
    return {online.name: 1.0} | {name: -weight for name, weight in weights.items() if weight > 0}


def series_of(policy: str, cfg: schema.Scale) -> str:
    """What a policy's method is called."""
    if policy == "dpo":
        return METHODS.get(cfg.dpo.loss, cfg.dpo.loss)
    if cfg.dpo.online_loss == "rebel":
        return "REBEL"
    return NAMES[policy] + f", {cfg.rounds} rounds" * (cfg.rounds > 1)


def bars_of(scale: str, name: str) -> list[Bar]:
    """A bar for every policy of every setting, without its KL."""
    params, bars = config.load(), []
    own = params.scales[scale]
    settings = [("", "", own)] + [(other, arm, cfg) for other in (*params.figures[name].borrows, name)
                                  for arm, cfg in params.arms_of(scale, other).items()]
    for other, arm, cfg in settings:
        for policy in cfg.policies:
            if policy == "dpo" and arm and cfg.dpo.model_copy(update={"online_loss": "dpo"}) == own.dpo or (
                    name == "methods" and policy not in ("dpo", "online")):
                continue  # the scale's own point once more, or a policy that the figure is not about
            series = series_of(policy, cfg)
            bars.append(Bar(f"{series} {arm or 'paper'}", *figure.policy(scale, policy, other, arm), series))
    return bars


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    seeds = config.load().seeds_of(a.figure, a.scale)
    bars = [replace(bar, x=mean_kl(a.runs, bar, seeds)) for bar in bars_of(a.scale, a.figure)]
    online = [bar for bar in bars if bar.series == "Online(DPO)"]
    if a.figure == "methods":
        offline = dict.fromkeys(bar.series for bar in bars if bar.series in METHODS.values())
        gaps = {f"Online(DPO) - {series} at its KL": matched(bars, online[0], series) for series in offline}
    else:
        gaps = {f"{bar.name} - DPO at its KL ({bar.x:.1f})": matched(bars, bar) for bar in online}
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, FIGURES[a.figure],
                "winrate against the reference summary",
                partial(figure.lines, x_label="reverse KL from the SFT policy, nats", named=a.figure == "budget",
                        measured=a.figure == "methods"))


if __name__ == "__main__":
    stage.main(_command)

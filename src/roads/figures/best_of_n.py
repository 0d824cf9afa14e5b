"""Figures 8 and 9: winrate of the best of N samples by global, local and DPO reward models, and across sizes.

    python -m roads.figures.best_of_n runs reports/mini --scale mini --figure fig8
"""

import math
from functools import partial

from roads import config, schema, stage
from roads.figures import figure
from roads.figures.figure import Bar

FIGURES = {
    "fig8": ("Samples of the SFT policy (solid) and of the DPO policy (dashed), ranked by reward models trained on the "
             "same pairs; the judge compares the one ranked first with the reference summary. In the synthetic world "
             "Base is what pretraining alone picks: each attribute counts alike, for no preference has been seen."),
    "fig9": ("Samples of SFT policies, each ranked by global reward models of several sizes. An arm with a model of "
             "its own has a base and an SFT policy of its own; one that only cuts the reward model to its first layers "
             "has the scale's. All reward models are trained on the scale's pairs."),
}
KINDS = {"Global RM": "reward", "Local RM": "local", "DPO RM": "dpo"}


def lines(scale: str, name: str, sizes: list[str], rms: list[str], synthetic: bool) -> dict[str, str]:
    """Name of a line -> place of its scores. sizes: blocks with a policy of their own; rms: with a reward model."""
    if name == "fig8":
        base = {"Base on SFT": f"{scale}/human/best_of_n/sft/base",
                "Base on DPO": f"{scale}/human/best_of_n/dpo/base/s{{seed}}"}
        return {f"{rm} on {policy.upper()}": f"{scale}/human/best_of_n/{policy}/{kind}/s{{seed}}"
                for policy in ("sft", "dpo") for rm, kind in KINDS.items()} | (base if synthetic else {})
    return {f"Policy {size_of(policy, scale)}, RM {size_of(rm, scale)}":
            f"{scale}/human/best_of_n/sft/reward/s{{seed}}" if policy == rm == scale else
            f"{scale}/fig9/{policy}/{rm}/s{{seed}}" for policy in sizes for rm in rms}


def size_of(block: str, scale: str) -> str:
    return "medium" if block == scale else block.removeprefix(f"{scale}.fig9.")


def gaps(name: str, sizes: list[str], rms: list[str], scale: str, most: int) -> dict[str, dict[str, float]]:
    """At the largest N: global - local - DPO (Fig 8); other sizes of the reward model - medium (Fig 9)."""
    if name == "fig8":
        return {f"{a} - {b}, on {policy}, N={most}": {f"{a} on {policy} N={most}": 1, f"{b} on {policy} N={most}": -1}
                for policy in ("SFT", "DPO") for a, b in (("Global RM", "Local RM"), ("Local RM", "DPO RM"))}
    others = [size_of(rm, scale) for rm in rms if rm != scale]
    return {f"RM {other} - medium, policy {policy}, N={most}": {f"Policy {policy}, RM {other} N={most}": 1,
                                                               f"Policy {policy}, RM medium N={most}": -1}
            for policy in map(partial(size_of, scale=scale), sizes) for other in others}


def blocks_of(scale: str) -> tuple[list[str], list[str]]:
    """The blocks with a policy of their own, and those with a reward model of their own, smallest first."""
    params = config.load()
    blocks, own = [scale, *(f"{scale}.fig9.{arm}" for arm in params.arms_of(scale, "fig9"))], params.scales[scale]

    def size(name: str) -> tuple[float, float]:
        block = params.blocks[name]
        return getattr(block.model, "parameters", 0) or block.model.hidden_size, block.reward.layers or math.inf

    rms = sorted(blocks, key=size)
    return [name for name in rms if name == scale or params.blocks[name].made_from() != own.made_from()], rms


def bars_of(scale: str, name: str) -> list[Bar]:
    """A bar for every line and N."""
    (sizes, rms), own = blocks_of(scale), config.load_scale(scale)
    counts = [n for n in schema.BEST_OF if n <= own.samples.best_of_n.n]
    ends, called = {"smallest": sizes[0], "largest": sizes[-1]}, {}
    for which, policy in ends.items():
        rivals = {"own": policy, "smallest": rms[0], "largest": rms[-1]}
        for rank, rm in rivals.items():
            line = f"Policy {size_of(policy, scale)}, RM {size_of(rm, scale)}"
            called[line] = (*called.get(line, ()), f"{which} policy, {rank} RM")
    return [Bar(f"{line} N={n}", place, f"n{n}", line, n, roles=called.get(line, ()) if n == counts[-1] else ())
            for line, place in lines(scale, name, sizes, rms, own.synthetic).items() for n in counts]


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    bars = bars_of(a.scale, a.figure)
    most = int(max(bar.x for bar in bars))
    figure.save(a.out, a.figure, a.runs, bars, gaps(a.figure, *blocks_of(a.scale), a.scale, most), a.scale,
                FIGURES[a.figure], "winrate against the reference summary",
                partial(figure.lines, x_label="N", log=True))


if __name__ == "__main__":
    stage.main(_command)

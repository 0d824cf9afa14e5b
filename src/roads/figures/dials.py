"""Figures that turn one dial: 12 (fractions of the preference set), and what the paper could not turn.

    python -m roads.figures.dials runs reports/mini --scale mini --figure horizon
"""

from functools import partial
from pathlib import Path

from roads import config, schema, stage
from roads.figures import figure
from roads.figures.figure import Bar
from roads.figures.policies import NAMES

WRITES = 0.99  # share of the SFT policy's words that are the prompt's; mini's has 1.00
FIGURES = {  # caption, x of a block, its axis, its label in a bar's name, policies, log axis
    "fig12": ("DPO and Online(SFT) trained on the first pairs of the set; reward model and prompts shrink with it.",
              lambda cfg: cfg.data.preferences, "pairs of the preference set", "n", ["dpo", "online_sft"], True),
    "more_data": ("Fig. 12 carried on to four times the preference set. In the limit H6 predicts no gap. Online DPO "
                  "runs on as many prompts as there are pairs, and so for more steps, and on 6,000 throughout.",
                  lambda cfg: cfg.data.preferences, "pairs of the preference set", "n", ["dpo", "online_sft"], True),
    "horizon": ("K slots, a word each: two of six candidates, four of four, eight and twelve of two. The noise of the"
                " labels is scaled with the spread of quality.",
                lambda cfg: cfg.source.slots, "slots K (horizon K + 1)", "K", ["dpo", "dpo_2x", "online"], False),
    "branching": ("K slots, a word each, with 256 summaries of every prompt and 96 words in all: two of sixteen "
                  "candidates, four of four, eight of two. The labels' noise is scaled with the spread of quality.",
                  lambda cfg: cfg.source.slots, "slots K (horizon K + 1)", "K", ["dpo", "dpo_2x", "online"], False),
    "complexity": ("Weight of coherence, a property of the whole summary, in its quality; at 0 that is a sum of words.",
                   lambda cfg: cfg.source.interaction, "weight of the interaction", "interaction",
                   ["dpo", "dpo_2x", "online"], False),
    "verifier": ("Weight of the tag in pretraining, the only place where the base learns what a summary is like.",
                 lambda cfg: cfg.source.tag_weight, "weight of the tag", "tag", ["dpo", "dpo_2x", "online"], False),
}


def roles(cfg: schema.Scale, points: list[schema.Scale]) -> list[str]:
    """What claims call a point by its pairs, whatever their number at a scale: fewest, all, or a share of all."""
    n, counts = cfg.data.preferences, [point.data.preferences for point in points]
    shares = {"half of the pairs": 2, "a quarter of the pairs": 4}
    return (["fewest pairs"] * (n == min(counts)) + ["all pairs"] * (n == max(counts))
            + [name for name, part in shares.items() if abs(n * part / max(counts) - 1) < 0.01])


def bars_of(scale: str, name: str) -> list[Bar]:
    """A bar for every policy at every point of the dial, in the order of x."""
    params = config.load()
    _, x_of, _, short, policies, _ = FIGURES[name]
    points = [("", "", params.scales[scale])]  # figure, arm and block; none of the former for the scale's own
    for figure_of in (*params.figures[name].borrows, name):
        points += [(figure_of, arm, cfg) for arm, cfg in params.arms_of(scale, figure_of).items()]
    bars = []
    for folder, arm, cfg in sorted(points, key=lambda point: x_of(point[2])):
        for policy in [policy for policy in policies if policy in cfg.policies]:
            fewer = policy.startswith("online") and cfg.data.online != cfg.data.preferences
            series = NAMES[policy] + f", {cfg.data.online} prompts" * fewer
            bars.append(Bar(f"{series} {short}={x_of(cfg):g}", *figure.policy(scale, policy, folder, arm), series,
                            x_of(cfg), roles=tuple(f"{series} {role}" for role in roles(cfg, [p[2] for p in points]))))
    return bars


def cannot_write(runs: Path, bars: list[Bar], short: str, seed: int) -> str:
    """For the caption: the points of a world at which SFT has not learnt to keep to the prompt. What online DPO gains
    there may be no more than that."""
    said = ""
    for place, x in {bar.place: bar.x for bar in bars if bar.key in NAMES}.items():
        file = runs / place.format(seed=seed) / "metrics.json"
        share = stage.read_json(file).get("sft", {}).get("validity", 1.0) if file.exists() else 1.0
        if share < WRITES:
            said += (f" At {short}={x:g} only {share:.0%} of the SFT policy's words are the prompt's: it has not "
                     "learnt to write here, and the point says little.")
    return said


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    caption, _, x_label, short, policies, log = FIGURES[a.figure]
    bars, gaps, gaps_at = bars_of(a.scale, a.figure), {}, {}
    names, seed = {bar.name for bar in bars}, config.load().seeds_of(a.figure, a.scale)[0]
    for online in [bar for bar in bars if bar.series.startswith("Online")]:
        at = f"{short}={online.x:g}"
        for control in [f"{NAMES[policy]} {at}" for policy in policies[:-1]]:
            if control in names:  # an arm may train online DPO alone
                gap = f"{online.series} - {control.removesuffix(f' {at}')}"
                gaps[f"{gap}, {at}"] = {online.name: 1, control: -1}
                gaps_at[f"{gap}, {at}"] = gap, online.x
    figure.save(a.out, a.figure, a.runs, bars, gaps, a.scale, caption + cannot_write(a.runs, bars, short, seed),
                "winrate against the reference summary",
                partial(figure.lines, x_label=x_label, log=log, gaps_at=gaps_at))


if __name__ == "__main__":
    stage.main(_command)

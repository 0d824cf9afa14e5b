"""Figures that compare policies: 3, 4, 5, 6, 10, 11, what Fig 11 leaves, told, sizes and the switches of the recipe.

    python -m roads.figures.policies runs reports/mini --scale mini --figure fig3
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from roads import config, schema, stage
from roads.figures import figure
from roads.figures.figure import Bar

NAMES = {"sft": "SFT", "dpo": "DPO", "dpo_2x": "DPO 2x", "online_sft": "Online(SFT)", "online": "Online(DPO)",
         "online_2x": "Online(DPO) 2x"}
WINRATE, ROUGE = "winrate against the reference summary", "ROUGE-L F1 against the preferred completion"
VALUE = "value of Eq. 2, nats a pair; the SFT policy has -ln 2"
FIGURES = {  # caption, measure, where the bars start
    "fig3": ("Everything starts from the same SFT checkpoint and the same pairs, with the same learning rate, beta "
             "and epochs. DPO and Online(SFT) are trained on as many prompts; so are DPO 2x and DPO with Online(DPO) "
             "on top. A prompt whose 25 samples all tie has no pair, so that online DPO may take fewer steps: the json "
             "has them, under `trained`.",
             WINRATE, 0),
    "fig4": ("Bradley-Terry log-likelihood of the preference set under a policy, less beta times its reverse KL from "
             "the SFT policy, which is estimated from samples of the policy; the interval covers their chance too. No "
             "judge is involved. Below each bar its parts, and the other reading of the first term: the log-likelihood "
             "of the chosen completions. Held-out: the same value on pairs that no policy was fitted to.", VALUE,
             -np.log(2)),
    "fig5": ("Online DPO from the SFT policy on the prompts of the preference set and on more; the reward model "
             "is the same, so no preference is added. More prompts are more steps too, where it does not say "
             "otherwise.", WINRATE, 0),
    "fig6": ("Two samples of the SFT policy at the sampling temperature of online DPO, and the judge says which is "
             "better. Online(SFT) then only labels samples of the same kind again. Noisy: Fig. 3's annotators label "
             "the same samples instead.", WINRATE, 0),
    "fig10": ("Two-word summaries: next to nothing to plan. Of posts the judge writes and labels them (at scale real "
              "they have five tokens at most and are labelled as in Fig. 3); in the synthetic world they are two slots "
              "of six candidates each instead of eight of two, and the noise of the labels is scaled with the spread "
              "of quality.", WINRATE, 0),
    "fig11": ("Pairs are the best and the worst of 25 samples by ROUGE-L against a summary that the policy cannot see: "
              "the reward is no simpler than the policy. Where all samples tie there is no pair, so that online DPO "
              "takes fewer steps; Online(DPO) 2x takes twice its epochs and comes nearer to as many.", ROUGE, 0),
    "rouge_warm": ("Fig. 11's policies, and Online(DPO) on samples at higher temperatures, by which its logits are "
                   "divided too. Prompts whose samples all tie stay, as pairs of equal sides, so that it takes as many "
                   "steps as DPO.", ROUGE, 0),
    "rouge_limits": ("Fig. 11's policies, and what its reward model could do without training. Pick: the best by it of "
                     "the SFT policy's samples, cold (at online DPO's temperature) or warm (at that of the pairs). "
                     "Optimum: the policy that is best under a reward at the same beta, over all valid summaries. "
                     "Consensus: the sample with most ROUGE-L against the others, which takes no pair. The last bar "
                     "picks by the reference summary itself, which nobody can see.", ROUGE, 0),
    "sizes": ("Every policy of Fig. 3, and Online(SFT) on more prompts (Fig. 5), at each size, which base, SFT policy, "
              "reward model and policies all have.", WINRATE, 0),
    "told": ("Fig. 3 in a world whose base was told, by the tag at the end of every document, how good it is: "
             "its verifier was pretrained, and the pairs only show that it is the one to use.", WINRATE, 0),
    "recipe": ("schedule: DPO's learning rate falls as a cosine. rm-batch: twice the reward model's batch. loader: "
               "each of eight GPUs shuffles for itself, so an epoch of DPO has 66% of the pairs. logits: online "
               "training does not divide them by the temperature. author-code: the first three together, as in the "
               "released code. unclipped: no gradient is clipped.",
               WINRATE, 0.5),
    "recipe_data": ("sft-query: SFT counts the tokens of the query too, as REBEL's does. long: responses of up to 169 "
                    "tokens, as people wrote them, and not 53. valid-prompts: winrates on the posts of validation.",
                    WINRATE, 0.5),
}
LIMITS = {"RM's pick, cold": "cold.rm", "RM's pick, warm": "warm.rm", "Consensus, warm": "warm.consensus",
          "Optimum, DPO's reward": "exact.dpo", "Optimum, RM": "exact.rm", "ROUGE-L's pick, warm": "warm.gold"}
ROUGES = "fig11", "rouge_warm", "rouge_limits"
GAPS = {"Online(DPO) - DPO": ("online", "dpo"), "Online(DPO) - DPO 2x": ("online", "dpo_2x"),
        "Online(SFT) - DPO": ("online_sft", "dpo"), "Online(DPO) 2x - DPO": ("online_2x", "dpo"),
        "DPO - SFT": ("dpo", "sft")}


def graph_bars(scale: str, name: str) -> list[Bar]:
    """The bars of Figs 3, 4, 11 and rouge_limits: the scale's own policies."""
    task, folder = ("rouge" if name in ROUGES else "human"), ("value" if name == "fig4" else "scores")
    longer = name == "fig11" and config.load_scale(scale).synthetic
    shown = ["dpo", "dpo_2x", "online_sft", "online", *["online_2x"] * longer]
    without = LIMITS.items() if name == "rouge_limits" else []
    seedless = [] if name == "fig4" else [Bar("SFT", f"{scale}/{task}/{folder}/sft")]
    return seedless + [Bar(NAMES[policy], f"{scale}/{task}/{folder}/{policy}/s{{seed}}") for policy in shown] + [
        Bar(label, f"{scale}/rouge/limits/s{{seed}}", key) for label, key in without]


def arm_bars(scale: str, name: str, arms: dict[str, schema.Scale]) -> list[Bar]:
    """The bars of Figs 5, 6, 10, told and of the recipe: an arm's policies, with the scale's own where compared."""
    if name in ("recipe", "recipe_data"):
        labels = by_label({"": "paper"} | {arm: arm for arm in arms}, name)
        return [Bar(f"{NAMES[policy]} {label}", *figure.policy(scale, policy, name, arm), series=NAMES[policy])
                for label, arm in labels.items() for policy in ("dpo", "online")]
    if name == "sizes":
        return size_bars(scale, arms)
    if name == "rouge_warm":
        warm = [Bar(f"Online(DPO) T={cfg.samples.online.temperature:g}", *figure.policy(scale, "online", name, arm),
                    series="Online(DPO)") for arm, cfg in arms.items()]
        return graph_bars(scale, name) + warm
    if name == "fig5":
        ours = config.load_scale(scale)
        labels = {"Online(SFT)": ""} | by_label({arm: f"Online(SFT) {more_prompts(ours, cfg)}"
                                                 for arm, cfg in arms.items()}, name)
        most = max(labels, key=lambda label: arms[labels[label]].data.online if labels[label] else 0)
        return [Bar(label, *figure.policy(scale, "online_sft", name, arm), series="Online(SFT)",
                    roles=("Online(SFT) more prompts",) * (label == most)) for label, arm in labels.items()]
    shown = {"fig6": ["dpo", "online_sft", "online"], "told": ["dpo", "dpo_2x", "online_sft", "online"]}.get(
        name, ["dpo", "dpo_2x", "online"])
    return [Bar(NAMES[policy] + f", {arm}" * (k > 0), *figure.policy(scale, policy, name, arm), series=NAMES[policy])
            for k, arm in enumerate(arms) for policy in ["sft"] * (k == 0) + shown]


def by_label(labels: dict[str, str], name: str) -> dict[str, str]:
    """The arm of every label, given each arm's label.

    Raises:
        UserError: two arms with one label.
    """
    arms: dict[str, str] = {}
    for arm, label in labels.items():
        if label in arms:
            raise stage.UserError(f"{name}: arms {arms[label] or 'of the scale'!r} and {arm!r} are both {label!r}; let "
                                  "them differ in what the figure shows")
        arms[label] = arm
    return arms


def bars_of(scale: str, name: str) -> list[Bar]:
    arms = config.load().arms_of(scale, name)
    return arm_bars(scale, name, arms) if arms else graph_bars(scale, name)


def size_bars(scale: str, arms: dict[str, schema.Scale]) -> list[Bar]:
    """Fig 3's policies and Fig 5's at the scale's own size and at those of its arms; ARM-prompts is Fig 5's."""
    asked = config.load().arms_of(scale, "fig5")
    more = max(asked, key=lambda arm: asked[arm].data.online, default="")
    labels = by_label({"": size_label(config.load_scale(scale))} | {
        arm: size_label(cfg) for arm, cfg in arms.items() if not arm.endswith("-prompts")}, "sizes")
    sizes = {label: (arm, ("sizes", f"{arm}-prompts") if arm else ("fig5", more)) for label, arm in labels.items()}
    bars, role = [], size_roles(config.load_scale(scale), arms)
    for label, (arm, (folder, prompts)) in sizes.items():
        bars += [Bar(f"{NAMES[policy]} {label}", *figure.policy(scale, policy, "sizes", arm), series=NAMES[policy],
                     roles=role(NAMES[policy], label))
                 for policy in ("sft", "dpo", "dpo_2x", "online_sft", "online")]
        if prompts in (asked if folder == "fig5" else arms):
            more = "Online(SFT) more prompts"
            bars.append(Bar(f"{more} {label}", *figure.policy(scale, "online_sft", folder, prompts),
                            series="Online(SFT)", roles=role(more, label)))
    return bars


def size_roles(ours: schema.Scale, arms: dict[str, schema.Scale]) -> Callable[[str, str], tuple[str, ...]]:
    """What claims call a bar, by its name and its size's label: that of the smallest or of the largest model."""
    def size(cfg: schema.Scale) -> float:
        return cfg.model.hidden_size if cfg.model.kind == "new" else cfg.model.parameters

    every = sorted([ours, *arms.values()], key=size)
    ends = {size_label(every[0]): "smallest model", size_label(every[-1]): "largest model"}
    return lambda bar, label: (f"{bar} {ends[label]}",) if label in ends else ()


def size_label(cfg: schema.Scale) -> str:
    """1.4B, or the width of a model that is trained from scratch."""
    found = cfg.model
    return f"width {found.hidden_size}" if found.kind == "new" else f"{found.parameters / 1e9:.2g}B"


def more_prompts(ours: schema.Scale, theirs: schema.Scale) -> str:
    """What an arm of Fig 5 is called: its prompts, and whether it takes as many steps."""
    steps = [cfg.data.online * cfg.dpo.epochs for cfg in (ours, theirs)]
    return f"{theirs.data.online / ours.data.online:g}x prompts" + ", same steps" * (steps[0] == steps[1])


def contrasts(name: str, bars: list[Bar]) -> dict[str, dict[str, float]]:
    names = [bar.name for bar in bars]
    if name in ("recipe", "recipe_data"):
        labels = [bar.removeprefix("DPO ") for bar in names if bar.startswith("DPO ")]
        return {f"{label}: Online(DPO) - DPO": {f"Online(DPO) {label}": 1, f"DPO {label}": -1} for label in labels}
    if name == "rouge_warm":
        return {f"{bar} - DPO": {bar: 1, "DPO": -1} for bar in names if bar.startswith("Online(DPO)")}
    if name == "sizes":
        labels = [bar.removeprefix("SFT ") for bar in names if bar.startswith("SFT ")]
        pairs = {label: (NAMES[a], NAMES[b]) for label, (a, b) in GAPS.items()}
        pairs["more prompts - 1x"] = "Online(SFT) more prompts", "Online(SFT)"
        return {f"{size}: {label}": {f"{a} {size}": 1, f"{b} {size}": -1} for size in labels
                for label, (a, b) in pairs.items() if {f"{a} {size}", f"{b} {size}"} <= set(names)}
    if name == "fig6":
        suffixes = sorted({bar.name.removeprefix(bar.series) for bar in bars})
        return {label + suffix: {NAMES[a] + suffix: 1, NAMES[b] + suffix: -1} for suffix in suffixes
                for label, (a, b) in GAPS.items() if {NAMES[a] + suffix, NAMES[b] + suffix} <= set(names)}
    if name == "fig5":
        return {f"{bar.removeprefix(names[0] + ' ')} - 1x": {bar: 1, names[0]: -1} for bar in names[1:]}
    also = {"Optimum, RM - DPO's reward": {"Optimum, RM": 1, "Optimum, DPO's reward": -1},
            "Optimum, RM - Online(DPO)": {"Optimum, RM": 1, "Online(DPO)": -1},
            "RM's pick, warm - DPO": {"RM's pick, warm": 1, "DPO": -1}} if name == "rouge_limits" else {}
    return also | {label: {NAMES[a]: 1, NAMES[b]: -1} for label, (a, b) in GAPS.items()
                   if {NAMES[a], NAMES[b]} <= set(names)}


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    caption, measure, floor = FIGURES[a.figure]
    bars = bars_of(a.scale, a.figure)
    parts = {"log-likelihood": "log_likelihood", "KL": "kl", "log pi(chosen)": "chosen_logps", "held-out": "held_out"}
    figure.save(a.out, a.figure, a.runs, bars, contrasts(a.figure, bars), a.scale, caption, measure,
                partial(figure.bar_chart, floor=floor), also_keys=parts if a.figure == "fig4" else {})


if __name__ == "__main__":
    stage.main(_command)

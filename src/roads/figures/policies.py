"""Figures 3 and 11: SFT, offline DPO, DPO for twice the epochs and Online DPO on one task.

    python -m roads.figures.policies runs/mini/human reports/mini --scale mini --figure fig3     # winrate, task human
    python -m roads.figures.policies runs/mini/rouge reports/mini --scale mini --figure fig11    # ROUGE-L, task rouge
"""

from roads import config, stage
from roads.figures import figure

BARS = {"SFT": "scores/sft", "DPO": "scores/dpo/s{seed}", "DPO 2x": "scores/dpo_2x/s{seed}",
        "Online(DPO)": "scores/online/s{seed}"}
COLOURS = [figure.GREY, figure.BLUE, figure.LIGHT, figure.ORANGE]
GAPS = {"Online(DPO) - DPO": ("Online(DPO)", "DPO"), "Online(DPO) - DPO 2x": ("Online(DPO)", "DPO 2x"),
        "DPO - SFT": ("DPO", "SFT")}
FIGURES = {
    "fig3": ("Fig. 3: online against offline preference fine-tuning", "winrate against the reference summary"),
    "fig11": ("Fig. 11: the same where the reward is ROUGE-L", "ROUGE-L F1 against the preferred completion"),
}


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=list(FIGURES))
    a = parser.parse_args()
    title, measure = FIGURES[a.figure]
    figure.save(a.out, a.figure, a.runs, BARS, GAPS, config.load().seeds, figure.note(a.scale), title, measure, COLOURS)


if __name__ == "__main__":
    stage.main(_command)

"""Figure 7: how likely global, local and DPO reward models find held-out preferences, on the same pairs.

The mean probability, which the paper draws, grows with the scale of a reward; accuracy and log loss go with it.

    python -m roads.figures.likelihood runs reports/mini --scale mini --figure fig7
"""

from functools import partial

import numpy as np

from roads import stage
from roads.figures import figure
from roads.figures.figure import Bar

KINDS = {"Global RM": "reward", "Local RM": "local", "DPO RM": "dpo"}
GAPS = {"Global - Local": {"Global RM": 1, "Local RM": -1}, "Local - DPO": {"Local RM": 1, "DPO RM": -1},
        "Global - DPO": {"Global RM": 1, "DPO RM": -1}}
ALSO = {"accuracy": lambda p: (p > 0.5).astype(float), "log loss": lambda p: -np.log(p)}
CAPTION = ("Bradley-Terry probability of the chosen completion of held-out pairs, from reward models trained from the "
           "same checkpoint on the same pairs. Accuracy and log loss stand beside it because the mean probability also "
           "grows with the mere scale of a reward.")


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", required=True, choices=["fig7"])
    a = parser.parse_args()
    bars = [Bar(name, f"{a.scale}/human/likelihood/{kind}/s{{seed}}") for name, kind in KINDS.items()]
    figure.save(a.out, a.figure, a.runs, bars, GAPS, a.scale, CAPTION,
                "mean probability of the chosen completion", partial(figure.bar_chart, floor=0.5), also=ALSO)


if __name__ == "__main__":
    stage.main(_command)

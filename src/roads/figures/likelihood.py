"""Figure 7: how likely global, local and DPO reward models find held-out preferences, on the same pairs.

The mean probability, which the paper draws, grows with the scale of a reward; accuracy and log loss go with it.

    python -m roads.figures.likelihood runs/mini/human reports/mini --scale mini
"""

import numpy as np

from roads import config, stage
from roads.figures import figure

BARS = {"Global RM": "likelihood/reward/s{seed}", "Local RM": "likelihood/local/s{seed}",
        "DPO RM": "likelihood/dpo/s{seed}"}
COLOURS = [figure.ORANGE, figure.GREEN, figure.BLUE]
GAPS = {"Global - Local": ("Global RM", "Local RM"), "Local - DPO": ("Local RM", "DPO RM"),
        "Global - DPO": ("Global RM", "DPO RM")}
ALSO = {"accuracy": lambda p: (p > 0.5).astype(float), "log loss": lambda p: -np.log(p)}


def _command() -> None:
    parser = stage.arguments(__doc__, "runs", "out")
    a = parser.parse_args()
    figure.save(a.out, "fig7", a.runs, BARS, GAPS, config.load().seeds, figure.note(a.scale),
                "Fig. 7: validation likelihood of three reward models", "mean probability of the chosen completion",
                COLOURS, floor=0.5, also=ALSO)


if __name__ == "__main__":
    stage.main(_command)

"""Stage likelihood: how likely a reward model finds the choices of held-out pairs (Fig 7).

    python -m roads.stages.likelihood MODEL PAIRS OUT --scale mini --kind reward|local|dpo --reference SFT
"""

from pathlib import Path

import numpy as np
import torch

from roads import candidates, config, model, preferences, schema, stage


def margins(path: Path, pairs: Path, reference: Path, cfg: schema.Scale, kind: str) -> torch.Tensor:
    """r(chosen) - r(rejected) of every pair, [N].

    reward: the global RM's scalar (Eq. 6). local: beta * log pi (Eq. 1). dpo: beta * log(pi / pi_ref).
    """
    query, *sides = preferences.load(pairs, reference)
    both = torch.stack(sides, 1)
    if kind == "reward":
        rm = model.RewardModel.load(path, cfg.compute).eval()
        scores = candidates.in_batches(candidates.rewards, rm, query, both, label=kind)
    else:
        of = reference if kind == "dpo" else None
        scores = getattr(cfg, kind).beta * candidates.implicit_rewards(path, of, query, both, cfg.compute)
    return scores[:, 0] - scores[:, 1]


def likelihood(path: Path, pairs: Path, reference: Path, out: Path, cfg: schema.Scale, kind: str) -> None:
    """Write scores.npz: score [N], the Bradley-Terry probability of the chosen completion of each pair.

    Their mean is what the paper calls validation likelihood; log loss and accuracy go with it.
    """
    torch.set_num_threads(cfg.machine.threads)
    with stage.output(out, {"kind": kind, **schema.used(cfg, kind)}, [path, pairs, reference]) as folder:
        margin = margins(path, pairs, reference, cfg, kind).double()
        score = torch.sigmoid(margin).numpy()
        np.savez(folder / "scores.npz", score=score)
        stage.write_json(folder / "metrics.json", {
            "training": stage.training(path), "pairs": len(score),
            "mean_score": float(score.mean()), "accuracy": float((margin > 0).double().mean()),
            "log_loss": float(-torch.nn.functional.logsigmoid(margin).mean())})


def _command() -> None:
    parser = stage.arguments(__doc__, "model", "pairs", "out")
    parser.add_argument("--kind", required=True, choices=["reward", "local", "dpo"])
    parser.add_argument("--reference", type=Path, required=True, help="the SFT policy")
    a = parser.parse_args()
    likelihood(a.model, a.pairs, a.reference, a.out, config.load_scale(a.scale), a.kind)


if __name__ == "__main__":
    stage.main(_command)

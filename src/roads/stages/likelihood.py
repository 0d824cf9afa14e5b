"""Stage likelihood: how likely a reward model finds the choices of held-out pairs (Fig 7).

    python -m roads.stages.likelihood MODEL PAIRS OUT --scale mini --kind reward|local|dpo|base --reference SFT
"""

from pathlib import Path

import numpy as np
import torch

from roads import arrays, candidates, config, model, preferences, schema, stage, zero_shot
from roads.world import World


def margins(path: Path, pairs: Path, reference: Path, cfg: schema.Scale, kind: str) -> torch.Tensor:
    """r(chosen) - r(rejected) of every pair, [N].

    reward: the global RM's scalar (Eq. 6). local: beta * log pi (Eq. 1). dpo: beta * log(pi / pi_ref). base: what the
    model expects of a document's tag, in buckets (a world's, zero_shot.py).
    """
    query, *sides = preferences.load(pairs, reference)
    both = torch.stack(sides, 1)
    if kind in ("reward", "base"):
        rm = model.RewardModel.load(path, cfg.compute).eval() if kind == "reward" else zero_shot.load(path, cfg)
        scores = candidates.in_batches(candidates.rewards, rm, query, both, label=kind)
    else:
        of = reference if kind == "dpo" else None
        scores = getattr(cfg, kind).beta * candidates.implicit_rewards(path, of, query, both, cfg.compute)
    return scores[:, 0] - scores[:, 1]


def quality_gap(pairs: Path, reference: Path, cfg: schema.Scale) -> np.ndarray:
    """True quality of the chosen less that of the rejected completion of every pair, [N], in a world."""
    query, chosen, rejected = (side.numpy() for side in preferences.load(pairs, reference))
    world = World(cfg.source)
    return world.quality(query, chosen) - world.quality(query, rejected)


def likelihood(path: Path, pairs: Path, reference: Path, out: Path, cfg: schema.Scale, kind: str) -> None:
    """Write scores.npz: score [N], the Bradley-Terry probability of the chosen completion of each pair; in a world also
    by_quality [N], as `preferences.right` has it. post [N] where pairs share posts.

    The mean of score is what the paper calls validation likelihood; log loss and accuracy go with it.
    """
    torch.set_num_threads(cfg.machine.threads)
    blocks = ["compute", *[kind] * (kind != "base"), *["source"] * cfg.synthetic]
    used = schema.used(cfg, *blocks) | {"kind": kind}
    with stage.output(out, used, [path, pairs, reference]) as folder:
        margin = margins(path, pairs, reference, cfg, kind).double()
        scores = {"score": torch.sigmoid(margin).numpy()}
        if cfg.synthetic:
            scores["by_quality"] = preferences.right(margin.numpy(), quality_gap(pairs, reference, cfg))
        query = preferences.load(pairs, reference)[0].numpy()
        np.savez(folder / "scores.npz", **scores, **arrays.posts(query))
        stage.write_json(folder / "metrics.json", {
            "training": stage.training(path), "pairs": len(margin),
            **({"by_quality": float(scores["by_quality"].mean())} if cfg.synthetic else {}),
            "mean_score": float(scores["score"].mean()), "accuracy": float((margin > 0).double().mean()),
            "log_loss": float(-torch.nn.functional.logsigmoid(margin).mean())})


def _command() -> None:
    parser = stage.arguments(__doc__, "model", "pairs", "out")
    parser.add_argument("--kind", required=True, choices=["reward", "local", "dpo", "base"])
    parser.add_argument("--reference", type=Path, required=True, help="the SFT policy")
    a = parser.parse_args()
    likelihood(a.model, a.pairs, a.reference, a.out, config.load_scale(a.scale), a.kind)


if __name__ == "__main__":
    stage.main(_command)

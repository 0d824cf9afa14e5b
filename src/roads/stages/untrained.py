"""Stage untrained: how well held-out pairs are judged without a reward model: by what pretraining taught the SFT
policy, and by a linear probe of its hidden states, fitted to the pairs.

    python -m roads.stages.untrained SFT PAIRS HELD_OUT OUT --scale mini.learnt.two

Writes scores.npz, each [N], 1 where the side of the higher true quality is preferred (preferences.right):

tag         by the expected sum of the tag's buckets (zero_shot.py); tag0, tag1, ...: by one attribute's buckets alone
likelihood  by the policy's log-probability of a completion; per_token: by that over its length
probe       by a linear function of the last hidden state at EOS: Bradley-Terry on the pairs' labels, the trunk as it is
"""

from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from torch import Tensor, nn

from roads import candidates, config, model, preferences, schema, stage, zero_shot
from roads.tldr import PAD
from roads.world import World

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the probe's squared weights
ROWS = 256


class _Last(nn.Module):
    """The last hidden state itself, in the place of a reward."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, nn.Identity()


def features(sft: Path, query: Tensor, completions: Tensor, compute: schema.Compute) -> np.ndarray:
    """Last hidden states [N, n, d] of an SFT policy at the EOS of completions [N, n, R]."""
    trunk = _Last(model.load_policy(sft, compute).base_model).eval()
    parts = [candidates.rewards(trunk, *(part.to(trunk.trunk.device) for part in rows)).cpu()
             for rows in zip(query.split(ROWS), completions.split(ROWS), strict=True)]
    return torch.cat(parts).double().numpy()


def fit_probe(differences: np.ndarray) -> np.ndarray:
    """Weights [d] under which differences [N, d] of chosen less rejected features are likeliest (Eq. 6), with a penalty
    on squared weights, in units of each feature's spread, that is best on the second half of the pairs."""
    unit = differences.std(axis=0) + 1e-9
    scaled = differences / unit

    def fitted(rows: np.ndarray, penalty: float) -> np.ndarray:
        def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            margins = rows @ w
            slope = -(expit(-margins) @ rows) / len(rows)
            return float(-log_expit(margins).mean() + penalty * w @ w), slope + 2 * penalty * w

        return minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B").x

    half = len(scaled) // 2
    losses = {penalty: -log_expit(scaled[half:] @ fitted(scaled[:half], penalty)).mean() for penalty in PENALTIES}
    return fitted(scaled, min(losses, key=losses.__getitem__)) / unit


def untrained(sft: Path, pairs: Path, held_out: Path, out: Path, cfg: schema.Scale) -> None:
    """Write which held-out pairs each judge gets right, by true quality."""
    torch.set_num_threads(cfg.machine.threads)
    with stage.output(out, schema.used(cfg, "compute", "source"), [sft, pairs, held_out]) as folder:
        query, *sides = preferences.load(held_out, sft)
        both, world = torch.stack(sides, 1), World(cfg.source)
        better = world.quality(query.numpy(), sides[0].numpy()) - world.quality(query.numpy(), sides[1].numpy())
        reader = zero_shot.load(sft, cfg)
        found = {"tag": candidates.in_batches(candidates.rewards, reader, query, both, label="tag")}
        for a, values in enumerate(np.indices(world.tag_shape).reshape(len(world.tag_shape), -1)):
            reader.values = torch.tensor(values, dtype=torch.float32, device=reader.values.device)
            found[f"tag{a}"] = candidates.in_batches(candidates.rewards, reader, query, both, label="tag")
        found["likelihood"] = candidates.implicit_rewards(sft, None, query, both, cfg.compute)
        found["per_token"] = found["likelihood"] / (both != PAD).sum(2)
        taught, *labelled = preferences.load(pairs, sft)
        learnt = features(sft, taught, torch.stack(labelled, 1), cfg.compute)
        weights = fit_probe(learnt[:, 0] - learnt[:, 1])
        found["probe"] = torch.from_numpy(features(sft, query, both, cfg.compute) @ weights)
        right = {name: preferences.right((scores[:, 0] - scores[:, 1]).double().numpy(), better)
                 for name, scores in found.items()}
        np.savez(folder / "scores.npz", **right)
        stage.write_json(folder / "metrics.json", {name: float(values.mean()) for name, values in right.items()})


def _command() -> None:
    parser = stage.arguments(__doc__, "sft", "pairs", "held_out", "out")
    a = parser.parse_args()
    untrained(a.sft, a.pairs, a.held_out, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command)

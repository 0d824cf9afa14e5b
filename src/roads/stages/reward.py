"""Stage reward: the global reward model, a Bradley-Terry classifier of whole completions (Eq. 6).

    python -m roads.stages.reward PAIRS SFT OUT --scale mini --seed 0
"""

from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from roads import config, model, preferences, schema, stage, train


def reward_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """-log sigma(r(chosen) - r(rejected)) per pair [B] (Eq. 6)."""
    return -logsigmoid(chosen_rewards - rejected_rewards)


def reward(pairs: Path, sft: Path, out: Path, cfg: schema.Scale, seed: int) -> None:
    """Train a reward model from the SFT checkpoint on the pairs.npz in `pairs`."""

    def job() -> train.Job:
        query, chosen, rejected = preferences.load(pairs, sft)
        rm = model.RewardModel.from_policy(sft, seed, cfg.compute, cfg.reward.layers)

        def loss(i: torch.Tensor) -> tuple[torch.Tensor, dict]:
            ours, theirs = model.pair_rewards(rm, query[i], chosen[i], rejected[i])
            return reward_loss(ours, theirs).mean(), preferences.told_apart(ours, theirs)

        return train.Job(rm, loss, train.tokens(query, chosen, rejected),
                         also=stage.metrics_of(pairs, "dropped_as_ties"))

    used = schema.used(cfg, "reward") | {"seed": seed}
    train.run(out, job, cfg.reward, cfg, used=used, reads=[pairs, sft], seed=seed, name="reward")


def _command() -> None:
    parser = stage.arguments(__doc__, "pairs", "sft", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    reward(a.pairs, a.sft, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command, launch=True)

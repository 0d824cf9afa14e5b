"""Stage reward: the global reward model, a Bradley-Terry classifier of whole completions (Eq. 6).

    python -m roads.stages.reward PAIRS SFT OUT --scale mini --seed 0
"""

from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from roads import config, model, stage, train


def reward_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> torch.Tensor:
    """-log sigma(r(chosen) - r(rejected)) per pair [B] (Eq. 6)."""
    return -logsigmoid(chosen_rewards - rejected_rewards)


def reward(pairs: Path, sft: Path, out: Path, cfg: config.Scale, seed: int) -> None:
    """Train a reward model from the SFT checkpoint on pairs.npz."""
    torch.set_num_threads(cfg.machine.threads)
    used = config.used(cfg, "reward") | {"seed": seed}
    with stage.output(out, used, [pairs, sft]) as folder:
        query, chosen, rejected = train.load_pairs(pairs)
        rm = model.RewardModel.from_policy(sft, seed, cfg.compute)
        model.for_training(rm, cfg)

        def loss(i):
            chosen_rewards, rejected_rewards = model.pair_rewards(rm, query[i], chosen[i], rejected[i])
            accuracy = (chosen_rewards > rejected_rewards).float().mean()
            return reward_loss(chosen_rewards, rejected_rewards).mean(), {"accuracy": accuracy}

        key = train.key_of(used, [pairs, sft], "reward")
        log = train.fit(rm, loss, len(query), cfg.reward, seed, key, label=f"reward s{seed}",
                        lengths=train.tokens(query, chosen, rejected), micro_batch=cfg.machine.micro_batch,
                        packed=model.is_packed(rm))
        train.save(rm, folder)
        stage.write_json(folder / "metrics.json", train.summary(log))
    train.forget(key)


def _command() -> None:
    parser = stage.arguments(__doc__, "pairs", "sft", "out")
    parser.add_argument("--seed", type=stage.seed, required=True)
    a = parser.parse_args()
    reward(a.pairs, a.sft, a.out, config.load_scale(a.scale), a.seed)


if __name__ == "__main__":
    stage.main(_command, launch=True)

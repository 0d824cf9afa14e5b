"""Preference pairs: rows of a prompt, the completion that was preferred, and the other one."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from roads import arrays, candidates, kept
from roads.distributed import rank_and_world_size, sum_over


def load(folder: Path, policy: Path) -> tuple[Tensor, Tensor, Tensor]:
    """query [N, Q], chosen [N, R] and rejected [N, R] of a folder of pairs, which the policy in a folder can read."""
    rows = arrays.tokens(folder / "pairs.npz", "query", "chosen", "rejected", model=policy)
    return tuple(torch.from_numpy(rows[name]) for name in ("query", "chosen", "rejected"))


def beside(folder: Path, *, rewards: bool) -> dict[str, Tensor]:
    """What else the pairs of a folder have: probability [N], that the chosen side is better, where labels are soft; and
    rewards [N, 2] of both sides, where a loss asks for them.

    Raises:
        UserError: the rewards are asked for, and not there.
    """
    with np.load(folder / "pairs.npz") as file:
        names = ["probability"] * ("probability" in file) + ["rewards"] * rewards
    if not names:
        return {}
    found = arrays.load(folder / "pairs.npz", *names)
    return {name: torch.from_numpy(values).float() for name, values in found.items()}


def told_apart(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """What a training's curves say of rewards [B] of both sides: means, and how often the chosen one's is higher."""
    margins = chosen_rewards - rejected_rewards
    return {"accuracy": (margins > 0).float().mean(), "margin": margins.mean(),
            "chosen_reward": chosen_rewards.mean(), "rejected_reward": rejected_rewards.mean()}


def right(margins: np.ndarray, better: np.ndarray) -> np.ndarray:
    """Whether a judge's margin of every pair, [N], has the sign of the difference in true quality: 1 where it has, 0
    where it has the other, one half where either is 0."""
    return (1 + np.sign(margins) * np.sign(better)) / 2


def reference_logps(policy: nn.Module, query: Tensor, completions: Tensor, temperature: float, key: str) -> Tensor:
    """`candidates.logps` [N, n] of a stage's reference, computed once: each process takes a part of the rows.

    They are kept (kept.py) for other seeds, more epochs and a run that was killed: the key must follow
    from the policy's weights, the rows, the temperature, `compute` and the code.
    """
    rank, world = rank_and_world_size()
    known = kept.load(f"reference-{key}")
    if not sum_over(torch.tensor(float(known is None), device=policy.device)):  # all of them have it, or none uses it
        return torch.from_numpy(known)
    found = torch.zeros(completions.shape[:2], device=policy.device)
    mine = torch.arange(len(query)).tensor_split(world)[rank]
    if len(mine):
        found[mine] = candidates.in_batches(candidates.logps, policy, query[mine], completions[mine], temperature,
                                            label="reference").to(policy.device)
    found = sum_over(found).cpu()
    if rank == 0:
        kept.save(f"reference-{key}", found.numpy())
    return found

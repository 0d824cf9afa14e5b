"""The policy that is best under a reward, exactly: where all completions of a prompt can be listed, as in a world."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

from roads import candidates, model, schema
from roads.tldr import PAD


def exact_policy(logps: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """Probabilities [N, S] of all S summaries of a prompt under pi_ref exp(r / beta), from log pi_ref and r, [N, S].

    It is the policy that is best for E[r] - beta KL (Rafailov et al. 2023, Eq. 4), among those on valid summaries.
    """
    return softmax(logps + rewards / beta, axis=1)


def draw(probabilities: np.ndarray, candidates: int, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One of the S = candidates^K summaries of each prompt, as its place [N], word by word, every word's distribution
    sharpened by the temperature, as a policy is sampled.

    >>> draw(np.array([[0.3, 0.3, 0.4, 0.0]]), 2, 1e-3, np.random.default_rng(0))  # .6 for the first word, then a tie
    array([1])
    """
    every, found = np.arange(len(probabilities)), np.zeros(len(probabilities), int)
    left = probabilities
    while left.shape[1] > 1:
        left = left.reshape(len(left), candidates, -1)
        with np.errstate(divide="ignore"):
            logits = np.log(left.sum(2)) / temperature
        choice = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
        found, left = found * candidates + choice, left[every, choice]
    return found


def optima(query: np.ndarray, every: np.ndarray, nets: dict[str, Path], rm: model.RewardModel, cfg: schema.Scale,
           seed: int, more: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """A summary [N, R] of every query [N, Q], drawn from the best policy under each reward: `exact.rm` the reward
    model's, `exact.dpo` DPO's own, `exact.local` the local reward model's; with its KL from SFT, in nats, and the mass
    of SFT that is outside the list.

    Args:
        every: all S valid summaries of every query, [N, S, R - 1].
        nets: the checkpoints of `sft` and `dpo`, and of `local` where its reward is asked for.
        more: further rewards of those summaries by name, [N, S], in logits.
    """
    prompts = torch.from_numpy(query)
    listed = torch.from_numpy(np.pad(every, ((0, 0), (0, 0), (0, 1)), constant_values=PAD))
    logps = {name: candidates.in_batches(candidates.logps, model.load_policy(path, cfg.compute).eval(), prompts, listed,
                                         label=name).double().numpy() for name, path in nets.items()}
    reference = logps["sft"]
    rewards = {"rm": candidates.in_batches(candidates.rewards, rm, prompts, listed, label="rm").double().numpy(),
               "dpo": cfg.dpo.beta * (logps["dpo"] - reference)}
    rewards |= ({"local": cfg.local.beta * logps["local"]} if "local" in nets else {}) | more
    outside = float(1 - np.exp(reference).sum(1).mean())
    for name, reward_of in rewards.items():
        best = exact_policy(reference, reward_of, cfg.dpo.beta)
        chosen = draw(best, cfg.source.candidates, cfg.samples.evaluate.temperature, np.random.default_rng(seed))
        distance = float((best * (np.log(np.maximum(best, 1e-300)) - reference)).sum(1).mean())
        yield f"exact.{name}", listed.numpy()[np.arange(len(chosen)), chosen], {"kl": distance, "outside": outside}

"""Token trees with every trajectory enumerated: policies, soft RL and Bradley-Terry losses as float64 tensors.

A trajectory xi is a prompt and `horizon` tokens. Shapes: n trajectories, S prefixes (prompt and 0 .. H-1 tokens),
A tokens, H horizon, X prompts. Logarithms are natural, so every divergence is in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor


class Tree(NamedTuple):
    """Trajectories in lexicographic order, prefixes by depth; token h of xi is chosen at the prefix `state[xi, h]`."""

    prompts: int
    vocab: int
    horizon: int
    state: Tensor  # [n, H], row of the prefix in a table of logits [S, A]
    action: Tensor  # [n, H], the token chosen there
    prompt: Tensor  # [n]


class Pairs(NamedTuple):
    """Weighted preferences between trajectories of one prompt; a weight is a count, or a probability."""

    chosen: Tensor  # [m]
    rejected: Tensor  # [m]
    weight: Tensor  # [m]


def make(prompts: int, vocab: int, horizon: int) -> Tree:
    """The full tree. With 1 prompt, 2 tokens and horizon 2: prefixes (), 0, 1; trajectories 00, 01, 10, 11."""
    row = np.arange(prompts * vocab**horizon)[:, None]
    below = vocab ** (horizon - np.arange(horizon))  # trajectories that share the prefix of depth h
    depth_start = prompts * (vocab ** np.arange(horizon) - 1) // (vocab - 1)
    state = depth_start + row // below
    action = row // (below // vocab) % vocab
    return Tree(prompts, vocab, horizon, torch.tensor(state), torch.tensor(action), torch.tensor(row[:, 0] // below[0]))


def n_states(tree: Tree) -> int:
    return int(tree.state.max()) + 1


def trajectory_log_prob(tree: Tree, logits: Tensor) -> Tensor:
    """log P_pi(xi | s0) [n] of the policy with logits [S, A]; as a reward it is the local RM of Eq. 1."""
    return logits.log_softmax(-1)[tree.state, tree.action].sum(1)


def normalise(tree: Tree, reward: Tensor) -> Tensor:
    """log P*_r(xi | s0) [n], Eq. 11: Boltzmann in the reward [n], prompt by prompt."""
    table = reward.view(tree.prompts, -1)
    return (table - table.logsumexp(1, keepdim=True)).view(-1)


def soft_q(tree: Tree, reward: Tensor) -> Tensor:
    """Soft Q-function [S, A] of a reward [n], by backward induction: Q(s, a) = V(s a), V(s) = log sum_a exp Q(s, a)."""
    levels, value = [], reward
    for _ in range(tree.horizon):
        levels.append(value.view(-1, tree.vocab))
        value = levels[-1].logsumexp(1)
    return torch.cat(levels[::-1])


def soft_return(tree: Tree, rho: Tensor, reward: Tensor, logits: Tensor, ref: Tensor | None = None) -> Tensor:
    """E_pi[r] + H(pi), Eq. 10, or with logits `ref` E_pi[r] - KL(pi || pi_ref), Eq. 22, by policy evaluation.

    Backward over the tree, V(s) = sum_a pi(a|s) (V(s a) - log pi(a|s) + log pi_ref(a|s)): no distribution over
    trajectories is formed, so it is another route than the projections of `reverse_kl`.
    """
    log_pi = logits.log_softmax(-1)
    bonus = -log_pi if ref is None else ref.log_softmax(-1) - log_pi
    value, end = reward, len(logits)
    for _ in range(tree.horizon):
        gain = value.view(-1, tree.vocab)
        level = slice(end - len(gain), end)
        value = (log_pi[level].exp() * (gain + bonus[level])).sum(1)
        end = level.start
    return rho @ value


def reverse_kl(tree: Tree, rho: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(rho p || q) over the joint of prompt and completion: log_p [n] given the prompt, log_q [n] joint."""
    log_joint = rho.log()[tree.prompt] + log_p
    return (log_joint.exp() * (log_joint - log_q)).sum()


def bradley_terry(pairs: Pairs, reward: Tensor) -> Tensor:
    """Mean negative log-likelihood of the preferences under sigma(r(chosen) - r(rejected)), Eqs. 4-6."""
    losses = -torch.nn.functional.logsigmoid(reward[pairs.chosen] - reward[pairs.rejected])
    return (pairs.weight * losses).sum() / pairs.weight.sum()


def all_pairs(tree: Tree) -> tuple[Tensor, Tensor]:
    """Both orders of every pair of different trajectories with a prompt in common."""
    same = tree.prompt[:, None] == tree.prompt
    return tuple((same & ~torch.eye(len(same), dtype=bool)).nonzero().T)


def population_pairs(tree: Tree, reward: Tensor) -> Pairs:
    """Infinite Bradley-Terry data of a reward: every pair, weighted by the probability of its order."""
    first, second = all_pairs(tree)
    return Pairs(first, second, (reward[first] - reward[second]).sigmoid())


def prefix_blind(tree: Tree) -> Tensor:
    """Design [S A, X H A] of policies that know the prompt and the position but not the tokens before.

    Their local RMs are the rewards that add up over positions (`additive`), up to a shift for every prompt.
    """
    psi = torch.zeros(n_states(tree), tree.vocab, tree.prompts, tree.horizon, tree.vocab, dtype=torch.float64)
    for h in range(tree.horizon):
        for token in range(tree.vocab):
            psi[tree.state[:, h], token, tree.prompt, h, token] = 1
    return psi.view(n_states(tree) * tree.vocab, -1)


def additive(tree: Tree) -> Tensor:
    """Design [n, X H A] of rewards r(xi) = sum_h w[s0, h, a_h]."""
    phi = torch.zeros(len(tree.state), tree.prompts, tree.horizon, tree.vocab, dtype=torch.float64)
    for h in range(tree.horizon):
        phi[torch.arange(len(phi)), tree.prompt, h, tree.action[:, h]] = 1
    return phi.view(len(phi), -1)


def minimise(loss: Callable[[Tensor], Tensor], *starts: Tensor, tolerance: float = 1e-9) -> Tensor:
    """A stationary point of a smooth loss: the best of L-BFGS from every start, then Newton steps with exact Hessians.

    Newton's step is of least norm, because logits and rewards have directions that no probability depends on.

    Raises:
        RuntimeError: the largest entry of the gradient is not below `tolerance`, as where no minimiser exists.
    """
    gradient = torch.func.grad(loss)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, requires_grad=True)
        value = loss(point)
        return value.item(), torch.autograd.grad(value, point)[0].numpy()

    options = {"maxiter": 2000, "maxcor": 30, "gtol": 1e-7, "ftol": 0}
    found = [minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
             for start in starts]
    x = torch.tensor(min(found, key=lambda result: result.fun).x)
    for _ in range(8):
        slope = gradient(x)
        if slope.abs().max() < tolerance / 1000:
            break
        x = x - torch.linalg.pinv(torch.func.hessian(loss)(x), rcond=1e-12, hermitian=True) @ slope
    if not gradient(x).abs().max() < tolerance:
        raise RuntimeError(f"no minimiser found: the gradient is still {gradient(x).abs().max():.1e}")
    return x

"""Every statement of sections 2 and 3.4 and Theorem 3.1 as a function that returns how far its two sides are apart.

A side is built by its own route: soft RL by policy evaluation over the tree (`soft_return`), projections over
enumerated trajectories (`reverse_kl`), maximum likelihood over logits or over rewards, each from its own start.
Distances are the largest absolute difference of P(xi | s0) unless the docstring says otherwise. A function does
not look whether the assumptions hold: `problem` makes instances in which they do, `roads.theory.broken` others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from roads.theory import tree as t

SHAPES = [(3, 3, 2), (3, 4, 2), (2, 2, 3), (1, 3, 3)]  # prompts, vocabulary, horizon


class Problem(NamedTuple):
    """One instance: a tree, its prompts' distribution, a reward, a reference policy, preferences and two classes."""

    tree: t.Tree
    rho: Tensor  # [X], the distribution of prompts
    reward: Tensor  # [n]
    ref: Tensor  # [S, A], logits of the reference policy
    pairs: t.Pairs
    policies: Tensor  # [S A, d], the class Pi: logits of the form policies @ theta
    rewards: Tensor  # [n, k], the class R: rewards of the form rewards @ w
    seed: int


def problem(seed: int, blind: bool = False, realizable: bool = False) -> Problem:
    """A random instance with R = R(Pi) up to a shift for every prompt, which no side of a statement can see.

    Args:
        blind: Pi is the policies that do not see the prefix and R the additive rewards; otherwise Pi is all
            policies and R all rewards.
        realizable: the reward is in R, the reference policy in Pi and the preferences are the reward's infinite data.
            Otherwise the preferences are counts that no Bradley-Terry model generates, with both orders of every pair
            seen, so that a maximum-likelihood estimate exists and is unique up to those shifts.
    """
    draw = torch.Generator().manual_seed(seed)
    tree = t.make(*SHAPES[seed % len(SHAPES)])
    size = (t.n_states(tree), tree.vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    policies = t.prefix_blind(tree) if blind else torch.eye(size[0] * size[1], dtype=torch.float64)
    rewards = t.additive(tree) if blind else torch.eye(len(tree.state), dtype=torch.float64)
    reward, ref = normal(len(tree.state)), normal(*size)
    first, second = t.all_pairs(tree)
    pairs = t.Pairs(first, second, torch.randint(1, 20, first.shape, generator=draw).double())
    if realizable:
        reward = rewards @ normal(rewards.shape[1])
        ref = (policies @ normal(policies.shape[1])).view(size)
        pairs = t.population_pairs(tree, reward)
    return Problem(tree, normal(tree.prompts).softmax(0), reward, ref, pairs, policies, rewards, seed)


def unrestricted(p: Problem) -> bool:
    """Whether Pi is all policies."""
    return p.policies.shape[0] == p.policies.shape[1]


def starts(p: Problem, size: int, side: str) -> list[Tensor]:
    """Points to start from: another draw for every side, so that equal results are not equal starts.

    A restricted class makes a policy's problem non-convex (soft RL over it is a mean-field approximation), so it
    is started from ten points: from three, one instance of Lemma A.1 in 100 ended in a local optimum.
    """
    draw = torch.Generator().manual_seed(10_000 + 2 * p.seed + (side == "right"))
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(1 if unrestricted(p) else 10)]


def logits(p: Problem, theta: Tensor) -> Tensor:
    return (p.policies @ theta).view(-1, p.tree.vocab)


def soft_optimal(p: Problem, reward: Tensor, side: str, ref: Tensor | None = None) -> Tensor:
    """log P_pi [n] of the policy in Pi that maximises Eq. 10 (Eq. 22 with a reference) for `reward` [n]."""
    def loss(theta: Tensor) -> Tensor:
        return -t.soft_return(p.tree, p.rho, reward, logits(p, theta), ref)

    theta = t.minimise(loss, *starts(p, p.policies.shape[1], side))
    return t.trajectory_log_prob(p.tree, logits(p, theta))


def project(p: Problem, log_q: Tensor, side: str) -> Tensor:
    """log p [n] of the reverse-KL projection of a joint distribution q [n] onto P_Pi.

    Over all policies P_Pi is every distribution over completions, so a table over trajectories is optimised and no
    policy at all; over a restricted class, the policy's parameters.
    """
    if unrestricted(p):
        def log_p(x: Tensor) -> Tensor:
            return t.normalise(p.tree, x)
        size = len(log_q)
    else:
        def log_p(x: Tensor) -> Tensor:
            return t.trajectory_log_prob(p.tree, logits(p, x))
        size = p.policies.shape[1]
    return log_p(t.minimise(lambda x: t.reverse_kl(p.tree, p.rho, log_p(x), log_q), *starts(p, size, side)))


def fit_reward(p: Problem, side: str) -> Tensor:
    """r_mle [n]: the Bradley-Terry maximum-likelihood estimate over R, Eq. 6."""
    start = starts(p, p.rewards.shape[1], side)[0]  # the loss is convex: one is enough
    return p.rewards @ t.minimise(lambda w: t.bradley_terry(p.pairs, p.rewards @ w), start)


def fit_policy(p: Problem, side: str, ref: Tensor | None = None) -> Tensor:
    """log P_pi [n] of the maximum-likelihood policy over Pi, Eq. 9; with a reference, of DPO at beta = 1."""
    offset = 0 if ref is None else t.trajectory_log_prob(p.tree, ref)

    def loss(theta: Tensor) -> Tensor:
        return t.bradley_terry(p.pairs, t.trajectory_log_prob(p.tree, logits(p, theta)) - offset)

    theta = t.minimise(loss, *starts(p, p.policies.shape[1], side))
    return t.trajectory_log_prob(p.tree, logits(p, theta))


def optimum(p: Problem) -> Tensor:
    """log P*_r [n] of the problem's reward (Eq. 11), joint with the prompts."""
    return p.rho.log()[p.tree.prompt] + t.normalise(p.tree, p.reward)


def apart(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() - log_q.exp()).abs().max())


def lemma_2_1(p: Problem) -> float:
    """Lemma 2.1: the soft-optimal policy over Pi (Eq. 10) is the reverse-KL projection of P*_r onto P_Pi.

    Assumes: trajectories carry the prompts' distribution rho, unique optima. Nothing of Pi or r. Where a class has
    several equally good policies the statement is about the sets of them.
    """
    return apart(soft_optimal(p, p.reward, "left"), project(p, optimum(p), "right"))


def lemma_a_1(p: Problem) -> float:
    """Lemma A.1: with a reference policy, the projection is that of the mixture of P*_r and P_ref (Eq. 21).

    Assumes: as Lemma 2.1. As printed, Eq. 21 normalises over all trajectories, not prompt by prompt, which changes the
    mixture's distribution of prompts; the projection cannot change that marginal, so the statement holds as printed.
    """
    log_rho = p.rho.log()[p.tree.prompt]
    product = 2 * log_rho + t.normalise(p.tree, p.reward) + t.trajectory_log_prob(p.tree, p.ref)
    mixture = product - product.logsumexp(0)
    return apart(soft_optimal(p, p.reward, "left", p.ref), project(p, mixture, "right"))


def theorem_2_2(p: Problem) -> float:
    """Theorem 2.2: maximum likelihood over Pi is maximum likelihood over R, then soft RL over Pi.

    Assumes: R = R(Pi), no reference, exact optimisation, a unique estimate. The last needs data in which no group of
    completions always wins (Ford's condition); "regardless of the number of samples" is true of the sets of optima
    only. R may be R(Pi) up to a shift for every prompt. Realizability is not assumed: the counts here fit no reward.
    """
    return apart(fit_policy(p, "left"), soft_optimal(p, fit_reward(p, "right"), "right"))


def theorem_2_3(p: Problem) -> float:
    """Theorem 2.3: DPO over all policies is maximum likelihood over R, then soft RL with the reference over Pi.

    Assumes: R = R(Pi); the unrestricted optima pi*_mle and pi*_dpo are in Pi; unique optima; beta = 1.
    """
    everything = torch.eye(p.policies.shape[0], dtype=torch.float64)
    left = fit_policy(p._replace(policies=everything), "left", p.ref)
    return apart(left, soft_optimal(p, fit_reward(p, "right"), "right", p.ref))


def network(p: Problem, theta: Tensor) -> Tensor:
    """Logits [S, A] of a one-layer network on fixed random codes of the prefixes: parameters shared by all prefixes."""
    draw = torch.Generator().manual_seed(p.seed)
    codes = torch.randn(t.n_states(p.tree), 5, generator=draw, dtype=torch.float64)
    inner, outer = theta[:20].view(5, 4), theta[20:].view(4, -1)
    return (codes @ inner).tanh() @ outer


def spin_gradients(p: Problem, link: str = "linear", sampler: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """g_sft and g_spin [d] for a network policy and demonstrations drawn with random frequencies, by autograd.

    Args:
        link: "linear" is the paper's variant of SPIN; "logistic" is Chen et al.'s, -log sigma(log-ratio's difference).
        sampler: logits [S, A] of the policy that the rejected trajectories come from; None is pi_theta itself.
    """
    theta = starts(p, 20 + 4 * p.tree.vocab, "left")[0].requires_grad_(True)
    log_p = t.trajectory_log_prob(p.tree, network(p, theta))
    ratio = log_p - t.trajectory_log_prob(p.tree, p.ref)
    demos = p.rho[p.tree.prompt] * t.normalise(p.tree, 2 * p.reward).exp()
    drawn = log_p.detach() if sampler is None else t.trajectory_log_prob(p.tree, sampler)
    samples = p.rho[p.tree.prompt] * drawn.exp()  # no gradient flows through where the samples come from
    if link == "linear":
        spin = -(demos @ ratio) + samples @ ratio
    else:
        same = p.tree.prompt[:, None] == p.tree.prompt
        joint = demos[:, None] * drawn.exp() * same  # a demonstration and a sample for its prompt
        spin = -(joint * torch.nn.functional.logsigmoid(ratio[:, None] - ratio)).sum()
    g_spin = torch.autograd.grad(spin, theta, retain_graph=True)[0]
    return torch.autograd.grad(-(demos @ log_p), theta)[0], g_spin


def theorem_2_4(p: Problem) -> float:
    """Theorem 2.4: the expected gradients of linear SPIN and of SFT are the same; largest entry of the difference.

    Assumes: rejected samples come from the current pi_theta, the link is linear, the expectation is exact. Nothing of
    Pi: a network here. (The last display of the paper's proof has a sign too many, which zero does not mind.)
    """
    g_sft, g_spin = spin_gradients(p)
    return float((g_sft - g_spin).abs().max())


def theorem_3_1(p: Problem) -> float:
    """Theorem 3.1: maximum likelihood over R_sim, then soft RL over Pi, is maximum likelihood over Pi(R_sim).

    Here R_sim is the rewards with three random features in R. The right side optimises the weights through soft
    value iteration and the token probabilities: it fits policies, and no reward is ever compared.
    Assumes: P*_r in P_Pi for the fitted reward; r_pi of the best policy in R_sim, which as printed asks R_sim to
    contain log-normalised rewards: enough is "up to a shift for every prompt". True data need not be in R_sim.
    """
    draw = torch.Generator().manual_seed(20_000 + p.seed)
    simple = p.rewards @ torch.randn(p.rewards.shape[1], 3, generator=draw, dtype=torch.float64)
    left = soft_optimal(p, fit_reward(p._replace(rewards=simple), "left"), "left")

    def log_p(w: Tensor) -> Tensor:
        return t.trajectory_log_prob(p.tree, t.soft_q(p.tree, simple @ w))

    w = t.minimise(lambda w: t.bradley_terry(p.pairs, log_p(w)), starts(p, 3, "right")[0])
    return apart(left, log_p(w))


def equation_11(p: Problem) -> float:
    """Eq. 11: over all policies soft RL gives P*_r = exp(r) / Z; and its Bradley-Terry form: log-ratios are r1 - r2.

    Left: Eq. 10 maximised over logits. Largest of both differences. Assumes: Pi is all policies.
    """
    left = soft_optimal(p, p.reward, "left")
    first, second = t.all_pairs(p.tree)
    form = (left[first] - left[second]).sigmoid() - (p.reward[first] - p.reward[second]).sigmoid()
    return max(apart(left, t.normalise(p.tree, p.reward)), float(form.abs().max()))


def enumerated_q(tree: t.Tree, reward: Tensor) -> Tensor:
    """Eq. 12 as printed, Q(s, a) = log of the sum of exp r over the trajectories through (s, a): [S, A]."""
    q = torch.empty(t.n_states(tree), tree.vocab, dtype=torch.float64)
    for s in range(len(q)):
        for a in range(tree.vocab):
            through = ((tree.state == s) & (tree.action == a)).any(1)
            q[s, a] = reward[through].logsumexp(0)
    return q


def equation_12(p: Problem) -> float:
    """Eq. 12: the sum over trajectories is the soft Q-function of backward induction, and pi*_r its softmax.

    The second against the policy that maximises Eq. 10. Largest of both differences. Assumes: Pi is all policies.
    """
    q = enumerated_q(p.tree, p.reward)
    bellman = float((q - t.soft_q(p.tree, p.reward)).abs().max())
    return max(bellman, apart(soft_optimal(p, p.reward, "left"), t.trajectory_log_prob(p.tree, q)))


def equation_13(p: Problem) -> float:
    """Eq. 13: r -> pi*_r -> r_pi comes back to r, and r_pi -> Q -> pi to pi; largest difference of rewards.

    As printed it is no bijection: r and r + c(s0) have one soft-optimal policy. It is one of classes of rewards up to
    a shift for every prompt (and of Q-functions up to a shift for every prefix), which is how it is checked here.
    """
    r_pi = soft_optimal(p, p.reward, "left")
    shift = (r_pi - p.reward).view(p.tree.prompts, -1)
    back = t.trajectory_log_prob(p.tree, t.soft_q(p.tree, r_pi + 3.0))  # a shift of its own changes nothing
    return max(float((shift - shift.mean(1, keepdim=True)).abs().max()), float((back - r_pi).abs().max()))


def equation_14(p: Problem) -> float:
    """Eq. 14: the triangle of R, Pi and Q commutes: log of soft RL's policy is Eq. 12's Q, up to a shift per prefix.

    Largest difference of logits with mean 0 at every prefix. What makes it "no two-way street" is counted in `reach`.
    """
    def loss(theta: Tensor) -> Tensor:
        return -t.soft_return(p.tree, p.rho, p.reward, theta.view(-1, p.tree.vocab))

    # Divided by how often a prefix is reached, a gradient of 1e-9 could leave its logits less exact than 1e-6.
    theta = t.minimise(loss, *starts(p, p.policies.shape[0], "left"), tolerance=1e-10)
    log_pi, q = theta.view(-1, p.tree.vocab).log_softmax(-1), enumerated_q(p.tree, p.reward)
    return float(((log_pi - log_pi.mean(1, keepdim=True)) - (q - q.mean(1, keepdim=True))).abs().max())


def reach(p: Problem) -> tuple[int, int]:
    """At how many prefixes the policy moves with one entry of a reward table (RL), and of a table of Q (log / exp)."""
    def moved(before: Tensor, after: Tensor) -> int:
        return int(((before.softmax(1) - after.softmax(1)).abs().max(1).values > 1e-12).sum())

    bump = torch.zeros_like(p.reward)
    bump[0] = 1.0
    q = t.soft_q(p.tree, p.reward)
    other = q.clone()
    other[0, 0] += 1.0
    return moved(q, t.soft_q(p.tree, p.reward + bump)), moved(q, other)


# Statement -> function and the kinds of instance (arguments of `problem`) on which its assumptions hold.
ALL, BLIND, BLIND_REALIZABLE = {}, {"blind": True}, {"blind": True, "realizable": True}
STATEMENTS = {
    "Lemma 2.1": (lemma_2_1, [ALL, BLIND]),
    "Lemma A.1": (lemma_a_1, [ALL, BLIND]),
    "Theorem 2.2": (theorem_2_2, [ALL, BLIND]),
    "Theorem 2.3": (theorem_2_3, [ALL, BLIND_REALIZABLE]),
    "Theorem 2.4": (theorem_2_4, [ALL]),
    "Theorem 3.1": (theorem_3_1, [ALL, BLIND]),
    "Eq. 11": (equation_11, [ALL]),
    "Eq. 12": (equation_12, [ALL]),
    "Eq. 13": (equation_13, [ALL]),
    "Eq. 14": (equation_14, [ALL]),
}

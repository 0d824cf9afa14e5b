"""What each assumption buys: the same statements where one assumption is dropped, and how far the sides then part.

Distances are as in `roads.theory.statements`: the largest absolute difference of P(xi | s0), unless said otherwise.
Each function takes a seed and returns one number.
"""

from functools import partial

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components

from roads.theory import further
from roads.theory import statements as s
from roads.theory import tree as t

SEEN, UNSEEN = 0.6, 0.8  # deviations of the errors in `unrealizable_policy`


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(30_000 + seed)


def normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def blind_policies(p: s.Problem) -> s.Problem:
    """The problem with policies that do not see the prefix, its rewards left as they are."""
    return p._replace(policies=t.prefix_blind(p.tree))


def kl_to_truth(p: s.Problem, log_p: torch.Tensor) -> float:
    """KL(pi || P*_r) for the problem's reward: the regret of the policy in Eq. 10."""
    return float(t.reverse_kl(p.tree, p.rho, log_p, s.optimum(p)))


# Lemma 2.1

def forward_projection(seed: int) -> float:
    """Soft RL against the *forward* KL projection, over prefix-blind policies. Over all policies they agree."""
    p = s.problem(seed, blind=True)
    target = s.optimum(p).exp()
    theta = t.minimise(lambda x: -(target @ t.trajectory_log_prob(p.tree, s.logits(p, x))),
                       s.starts(p, p.policies.shape[1], "right")[0])
    return s.apart(s.soft_optimal(p, p.reward, "left"), t.trajectory_log_prob(p.tree, s.logits(p, theta)))


def two_optima(seed: int) -> float:
    """Uniqueness fails: r = 4 if both tokens agree. A prefix-blind policy must pick one token for both, and either will
    do: soft RL from a start on one side of the tie, the projection from a start on the other."""
    tree = t.make(1, 2, 2)
    rho, psi = torch.ones(1, dtype=torch.float64), t.prefix_blind(tree)
    reward = 4.0 * (tree.action[:, 0] == tree.action[:, 1]).double()
    lean = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64) + 0.1 * normal(generator(seed), 4)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return (psi @ x).view(-1, 2)

    left = t.minimise(lambda x: -t.soft_return(tree, rho, reward, logits(x)), lean)
    right = t.minimise(lambda x: t.reverse_kl(tree, rho, t.trajectory_log_prob(tree, logits(x)),
                                              t.normalise(tree, reward)), -lean)
    return s.apart(t.trajectory_log_prob(tree, logits(left)), t.trajectory_log_prob(tree, logits(right)))


# Theorem 2.2

def restricted_policies(seed: int) -> float:
    """R(Pi) smaller than R: prefix-blind policies, all rewards."""
    return s.theorem_2_2(blind_policies(s.problem(seed)))


def restricted_policies_regret(seed: int) -> float:
    """The same on infinite Bradley-Terry data: regret in Eq. 10 of the offline policy minus that of the online one.

    With unlimited data the online policy is the best in Pi, whatever the reward's complexity: a benefit of the detour
    that is not H6's.
    """
    p = s.problem(seed)
    p = blind_policies(p._replace(pairs=t.population_pairs(p.tree, p.reward)))
    online = s.soft_optimal(p, s.fit_reward(p, "right"), "right")
    return kl_to_truth(p, s.fit_policy(p, "left")) - kl_to_truth(p, online)


def restricted_rewards(seed: int) -> float:
    """R smaller than R(Pi): all policies, additive rewards, preferences that no additive reward fits."""
    p = s.problem(seed)
    return s.theorem_2_2(p._replace(rewards=t.additive(p.tree)))


def restricted_rewards_realizable(seed: int) -> float:
    """The same on infinite data of a reward in R: the sides agree again, though R is not R(Pi)."""
    p = s.problem(seed, blind=True, realizable=True)
    return s.theorem_2_2(p._replace(policies=torch.eye(p.policies.shape[0], dtype=torch.float64)))


def finite_pairs(seed: int, per_trajectory: int) -> tuple[s.Problem, bool]:
    """A problem whose preferences are that many comparisons per trajectory, and whether the estimate exists.

    It exists, and is unique, where for every prompt "beaten by" is a strongly connected graph (Ford, 1957).
    """
    p, draw = s.problem(seed), generator(seed)
    first, second = t.all_pairs(p.tree)
    drawn = torch.randint(len(first), (per_trajectory * len(p.reward),), generator=draw)
    first, second = first[drawn], second[drawn]
    wins = torch.rand(len(drawn), generator=draw, dtype=torch.float64) < (p.reward[first] - p.reward[second]).sigmoid()
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    p = p._replace(pairs=t.Pairs(chosen, rejected, torch.ones(len(drawn), dtype=torch.float64)))
    beaten = np.zeros((len(p.reward), len(p.reward)))
    beaten[rejected, chosen] = 1
    groups, _ = connected_components(beaten, directed=True, connection="strong")
    return p, groups == p.tree.prompts


def few_pairs(seed: int, per_trajectory: int) -> float:
    """Theorem 2.2 on finite data.

    A penalty of 5e-5 |x|^2 on each side's own parameters, logits or rewards, picks a solution where the data leave many
    or none; where the estimate exists there is no penalty and no choice.
    """
    p, exists = finite_pairs(seed, per_trajectory)
    if exists:
        return s.theorem_2_2(p)
    penalty = 5e-5

    def policy_loss(x: torch.Tensor) -> torch.Tensor:
        return t.bradley_terry(p.pairs, t.trajectory_log_prob(p.tree, s.logits(p, x))) + penalty * (x @ x)

    theta = t.minimise(policy_loss, *s.starts(p, p.policies.shape[1], "left"))
    start = s.starts(p, len(p.reward), "right")[0]
    reward = t.minimise(lambda r: t.bradley_terry(p.pairs, r) + penalty * (r @ r), start)
    return s.apart(t.trajectory_log_prob(p.tree, s.logits(p, theta)), t.normalise(p.tree, reward))


# Theorem 2.3

def dpo_unrealizable(seed: int) -> float:
    """pi*_mle and pi*_dpo are not in Pi: prefix-blind policies and reference, preferences no additive reward fits."""
    realizable = s.problem(seed, blind=True, realizable=True)
    return s.theorem_2_3(realizable._replace(pairs=s.problem(seed).pairs))


def dpo_reference_outside(seed: int) -> float:
    """pi*_dpo alone is not in Pi: realizable additive preferences, but a reference that sees the prefix."""
    return s.theorem_2_3(s.problem(seed, blind=True, realizable=True)._replace(ref=s.problem(seed).ref))


# Theorem 2.4

def spin_apart(p: s.Problem, **changes: object) -> float:
    g_sft, g_spin = s.spin_gradients(p, **changes)
    return float((g_sft - g_spin).norm() / g_sft.norm())


def spin_logistic(seed: int) -> float:
    """SPIN's own logistic link. |g_sft - g_spin| / |g_sft|."""
    return spin_apart(s.problem(seed), link="logistic")


def spin_off_policy(seed: int) -> float:
    """Rejected trajectories from the reference instead of the current policy. |g_sft - g_spin| / |g_sft|."""
    p = s.problem(seed)
    return spin_apart(p, sampler=p.ref)


def spin_samples(seed: int, count: int) -> float:
    """A finite sample of rejected trajectories instead of the expectation. |g_sft - g_spin| / |g_sft|."""
    p = s.problem(seed)
    theta = s.starts(p, 20 + 4 * p.tree.vocab, "left")[0].requires_grad_(True)
    log_p = t.trajectory_log_prob(p.tree, s.network(p, theta))
    g_sft, _ = s.spin_gradients(p)
    joint = (p.rho.log()[p.tree.prompt] + log_p.detach()).exp()
    drawn = torch.multinomial(joint, count, replacement=True, generator=generator(seed))
    return float(torch.autograd.grad(log_p[drawn].mean(), theta)[0].norm() / g_sft.norm())


# Theorem 3.1

def best_of_projections(p: s.Problem, simple: list[torch.Tensor]) -> float:
    """Both sides' distance for a finite R_sim: the fitted reward's projection, the projection that fits best."""
    likelihood = [float(t.bradley_terry(p.pairs, reward)) for reward in simple]
    projections = [s.soft_optimal(p, reward, "left") for reward in simple]
    after = [float(t.bradley_terry(p.pairs, log_p)) for log_p in projections]
    return s.apart(projections[np.argmin(likelihood)], projections[np.argmin(after)])


def unrepresentable(seed: int) -> float:
    """P*_r of the fitted reward is not in P_Pi: prefix-blind policies, R_sim four rewards around the true one."""
    p, draw = blind_policies(s.problem(seed)), generator(seed)
    p = p._replace(pairs=t.population_pairs(p.tree, p.reward))
    return best_of_projections(p, [p.reward + normal(draw, len(p.reward)) for _ in range(4)])


def unrealizable_policy(seed: int) -> float:
    """Only r_pi in R_sim fails. The truth is additive and R_sim has two rewards: the truth with additive errors of
    deviation SEEN, which Pi can follow, and the truth with errors of deviation UNSEEN that Pi mostly projects away."""
    p, draw = s.problem(seed, blind=True, realizable=True), generator(seed)
    seen, unseen = p.rewards @ normal(draw, p.rewards.shape[1]), normal(draw, len(p.reward))
    unseen = unseen - p.rewards @ (torch.linalg.pinv(p.rewards) @ unseen)

    def standard(error: torch.Tensor) -> torch.Tensor:
        table = error.view(p.tree.prompts, -1)
        table = table - table.mean(1, keepdim=True)
        return (table / table.std()).view(-1)

    return best_of_projections(p, [p.reward + SEEN * standard(seen), p.reward + UNSEEN * standard(unseen)])


def simple_but_wrong(seed: int) -> float:
    """Infinite data of a table of rewards, which is not in R_sim, all policies: the theorem holds all the same."""
    p = s.problem(seed)
    return s.theorem_3_1(p._replace(pairs=t.population_pairs(p.tree, p.reward)))


def simple_but_wrong_regret(seed: int) -> float:
    """... and both sides share the regret KL(pi || P*_r), here on infinite data of a table, R_sim additive."""
    p = s.problem(seed)
    p = p._replace(pairs=t.population_pairs(p.tree, p.reward), rewards=t.additive(p.tree))
    return kl_to_truth(p, t.normalise(p.tree, s.fit_reward(p, "left")))


# Bradley-Terry itself

def two_samplings(seed: int, transitive: bool) -> float:
    """Maximum likelihood on infinite data, pairs drawn uniformly against pairs drawn with random frequencies.

    Transitive preferences are Bradley-Terry's; the others are Condorcet cycles: a beats b, b beats c, c beats a.
    """
    p, draw = s.problem(seed), generator(seed)
    first, second = t.all_pairs(p.tree)
    if transitive:
        chosen = (p.reward[first] - p.reward[second]).sigmoid()
    else:
        chosen = further.cycles(p).weight
    often = torch.rand(len(p.reward), len(p.reward), generator=draw, dtype=torch.float64) ** 3 + 0.01
    often = (often + often.T)[first, second]
    fits = [s.fit_reward(p._replace(pairs=t.Pairs(first, second, weight)), "left")
            for weight in (chosen, chosen * often)]
    return s.apart(*(t.normalise(p.tree, reward) for reward in fits))


def two_sides_on_cycles(seed: int) -> float:
    """Theorem 2.2 on Condorcet cycles with uneven counts, which its proof never needed to be absent."""
    p = s.problem(seed)
    pairs = further.cycles(p)
    uneven = torch.rand(len(pairs.weight), generator=generator(seed), dtype=torch.float64) + 0.1
    return s.theorem_2_2(p._replace(pairs=pairs._replace(weight=pairs.weight * uneven)))


def verifier_without_intercept(seed: int) -> float:
    """The remark on 0/1 verifiers where neither side has a free constant for each prompt."""
    return further.remark_verifier(s.problem(seed), intercept=False)


# Statement, what is dropped, function of a seed.
PARTING = [
    ("Lemma 2.1", "reverse KL: forward instead, prefix-blind policies", forward_projection),
    ("Lemma 2.1", "uniqueness: two equally good prefix-blind policies", two_optima),
    ("Theorem 2.2", "R = R(Π): policies prefix-blind, all rewards", restricted_policies),
    ("Theorem 2.2", "the same on infinite data: regret of offline minus online, nats", restricted_policies_regret),
    ("Theorem 2.2", "R = R(Π): rewards additive, all policies", restricted_rewards),
    ("Theorem 2.3", "π*_mle and π*_dpo in Π", dpo_unrealizable),
    ("Theorem 2.3", "π_ref, and so π*_dpo, in Π", dpo_reference_outside),
    ("Theorem 2.4", "linear link: logistic instead, relative to the gradient", spin_logistic),
    ("Theorem 2.4", "on-policy samples: from π_ref instead, relative", spin_off_policy),
    *[("Theorem 2.4", f"exact expectation: {n} samples instead, relative", partial(spin_samples, count=n))
      for n in (10, 100, 1000)],
    ("Theorem 3.1", "P*_r in P_Π (and r_π in R_sim): prefix-blind policies, four rewards", unrepresentable),
    ("Theorem 3.1", "r_π in R_sim alone: two rewards", unrealizable_policy),
    ("Theorem 3.1", "nothing; true reward outside R_sim: regret of both sides, nats", simple_but_wrong_regret),
    ("Eqs. 4-6", "transitive preferences: cycles, pairs sampled in two ways", partial(two_samplings, transitive=False)),
    ("Eqs. 4-6", "the same: KL to the nearest Bradley-Terry model, nats a pair", further.nearest_bradley_terry),
    ("Eq. 2", "nothing; minimised as printed, against DPO", partial(further.literal_objective, ref=True)),
    ("Eq. 3", "nothing; minimised as printed, against π_mle", further.literal_objective),
    ("Remark, verifier", "a free constant for each prompt", verifier_without_intercept),
    ("Data processing", "nothing; bits that the data have and a simple reward model has not", further.lost),
]
# The same where the statement holds all the same: statement, what it does not need, function of a seed.
UNNEEDED = [
    ("Theorem 2.2", "R = R(Π), on infinite data of a reward in the smaller R", restricted_rewards_realizable),
    ("Theorem 2.2", "transitive preferences: Condorcet cycles", two_sides_on_cycles),
    ("Theorem 3.1", "true reward in R_sim, on its infinite data", simple_but_wrong),
    ("Eqs. 4-6", "one sampling of pairs, on Bradley-Terry data", partial(two_samplings, transitive=True)),
]
PER_TRAJECTORY = [1, 2, 4, 8, 16, 32, 64]  # comparisons per trajectory, for `few_pairs`

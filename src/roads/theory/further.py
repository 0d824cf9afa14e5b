"""What the paper says in passing, checked like its statements: the remark of Sec. 2.3, H1's data-processing argument,
Theorem 2.2 as sets of optima, Theorem 3.1 for finite sets of rewards, Eq. 36; and Eqs. 2 and 3 read literally.

Distances are as in `roads.theory.statements`.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from roads.theory import statements as s
from roads.theory import tree as t


def _draw(p: s.Problem, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(40_000 + p.seed), dtype=torch.float64)


def _groups(p: s.Problem) -> Tensor:
    """[n]: each prompt's completions in two groups, by turns."""
    return torch.arange(len(p.reward)) % 2 + 2 * p.tree.prompt


def theorem_2_2_sets(p: s.Problem) -> float:
    """Theorem 2.2 where the data cover little: the two *sets* of optima are the same.

    Pairs lie within two groups of completions, so that neither side knows how the groups compare, and each has many
    optima. A policy from a start of its own must be as likely as r_mle says within every group (left in right), and
    the soft-optimal policy of r_mle with any shift of a group must maximise the likelihood over policies (right in
    left): largest difference of log-ratios within a group, and of the two likelihoods.
    """
    group = _groups(p)
    inside = group[p.pairs.chosen] == group[p.pairs.rejected]
    p = p._replace(pairs=t.Pairs(*(each[inside] for each in p.pairs)))
    left, r_mle = s.fit_policy(p, "left"), s.fit_reward(p, "right")
    first, second = p.pairs.chosen, p.pairs.rejected
    within = (left[first] - left[second] - r_mle[first] + r_mle[second]).abs().max()
    shifted = r_mle + _draw(p, int(group.max()) + 1)[group]
    right = s.soft_optimal(p, shifted, "right")
    worse = t.bradley_terry(p.pairs, right) - t.bradley_terry(p.pairs, left)
    return float(max(within, worse.abs()))


def theorem_3_1_finite(p: s.Problem) -> float:
    """Theorem 3.1 for a set of five rewards: the soft-optimal policy of the likeliest reward is the likeliest of the
    five soft-optimal policies. Assumes as Theorem 3.1 does; Pi is all policies."""
    simple = list(_draw(p, 5, len(p.reward)))
    policies = [s.soft_optimal(p, reward, "left") for reward in simple]
    best = min(range(5), key=lambda i: float(t.bradley_terry(p.pairs, simple[i])))
    likeliest = min(policies, key=lambda log_p: float(t.bradley_terry(p.pairs, log_p)))
    return s.apart(t.normalise(p.tree, simple[best]), likeliest)


def remark_sft(p: s.Problem) -> float:
    """Sec. 2.3's remark, SFT: maximum likelihood of demonstrations over Pi is the same over rewards, by P*_r, then
    soft RL over Pi. Assumes as Theorem 2.2 does."""
    demos = p.rho[p.tree.prompt] * t.normalise(p.tree, _draw(p, len(p.reward))).exp()
    theta = t.minimise(lambda x: -(demos @ t.trajectory_log_prob(p.tree, s.logits(p, x))),
                       *s.starts(p, p.policies.shape[1], "left"))
    w = t.minimise(lambda w: -(demos @ t.normalise(p.tree, p.rewards @ w)),
                   s.starts(p, p.rewards.shape[1], "right")[0])
    return s.apart(t.trajectory_log_prob(p.tree, s.logits(p, theta)), s.soft_optimal(p, p.rewards @ w, "right"))


def remark_verifier(p: s.Problem, intercept: bool = True) -> float:
    """Sec. 2.3's remark, labels of a 0/1 verifier: the same with P(1 | xi) = sigma(r(xi) + c(s0)) fitted to how often
    each trajectory is right.

    Args:
        intercept: both sides have a free c(s0). Without it the statement is false: a reward may be positive, and a
            policy's own reward, a log-probability, cannot.
    """
    right = (2 * _draw(p, len(p.reward))).sigmoid()

    def loss(score: Tensor) -> Tensor:
        return -(right * logsigmoid(score) + (1 - right) * logsigmoid(-score)).mean()

    def score(values: Tensor, c: Tensor) -> Tensor:
        return values + c[p.tree.prompt] if intercept else values

    n_prompts, d, k = p.tree.prompts, p.policies.shape[1], p.rewards.shape[1]
    theta = t.minimise(lambda x: loss(score(t.trajectory_log_prob(p.tree, s.logits(p, x[:d])), x[d:])),
                       *s.starts(p, d + n_prompts, "left"))
    w = t.minimise(lambda x: loss(score(p.rewards @ x[:k], x[k:])), s.starts(p, k + n_prompts, "right")[0])
    left = t.trajectory_log_prob(p.tree, s.logits(p, theta[:d]))
    return s.apart(left, s.soft_optimal(p, p.rewards @ w[:k], "right"))


def equation_36(p: s.Problem) -> float:
    """Eq. 36 with its normaliser: log pi*_dpo = log pi*_mle + log pi_ref - log Z(s0), over all policies.

    As printed it lacks log Z(s0), and its right side is no log-probability; nothing in the proof depends on it.
    """
    product = s.fit_policy(p, "right") + t.trajectory_log_prob(p.tree, p.ref)
    return s.apart(s.fit_policy(p, "left", p.ref), t.normalise(p.tree, product))


def information(seed: int) -> dict[str, float]:
    """H1's data-processing argument with every probability computed: bits about which of three rewards is the true one.

    One prompt, three completions, four labels of each of their pairs by the true reward (`data`); the reward model
    of a class with one parameter fitted to them (`reward_model`); two samples of its soft-optimal policy with the
    reward model's label (`online`). Each follows from the one before alone.
    """
    draw = torch.Generator().manual_seed(50_000 + seed)
    rewards = 1.5 * torch.randn(3, 3, generator=draw, dtype=torch.float64)
    feature = torch.randn(3, generator=draw, dtype=torch.float64)
    feature = (feature - feature.mean()) / feature.std()
    pairs, labels = [(0, 1), (0, 2), (1, 2)], 4
    counts = torch.tensor(list(itertools.product(range(labels + 1), repeat=3)))  # wins of the first, [125, 3]
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    choose = torch.lgamma(torch.tensor(labels + 1.0)) - torch.lgamma(counts + 1.0) - torch.lgamma(labels - counts + 1.0)

    def likelihood(margin: Tensor) -> Tensor:  # of all counts, [125], given r(first) - r(second) of each pair
        return (choose.double() + counts * logsigmoid(margin) + (labels - counts) * logsigmoid(-margin)).sum(1).exp()

    data = torch.stack([likelihood(r[first] - r[second]) for r in rewards])  # P(D | theta), [3, 125]
    grid = torch.linspace(-3, 3, 25, dtype=torch.float64)
    margins = (feature[first] - feature[second])[:, None] * grid
    fits = counts.double() @ logsigmoid(margins) + (labels - counts.double()) @ logsigmoid(-margins)
    fitted = fits.argmax(1)  # which of 25 reward models, a function of the data
    model = torch.zeros(3, 25, dtype=torch.float64).index_add_(1, fitted, data)
    policy = (grid[:, None] * feature).softmax(1)
    wins = (grid[:, None, None] * (feature[:, None] - feature)).sigmoid()
    online = (policy[:, :, None] * policy[:, None, :] * wins).reshape(25, -1)  # P(chosen, rejected | reward model)

    def bits(given: Tensor) -> float:
        marginal = given.mean(0)
        terms = torch.where(given > 0, given * (given / marginal).log2(), 0.0)
        return float(terms.sum(1).mean())

    return {"data": bits(data), "reward_model": bits(model), "online": bits(model @ online)}


def data_processing(p: s.Problem) -> float:
    """H1: bits that a reward model has beyond its data, or samples beyond the reward model; there are none."""
    found = information(p.seed)
    return max(found["reward_model"] - found["data"], found["online"] - found["reward_model"], 0.0)


def lost(seed: int) -> float:
    """Bits about the true reward that the data have and a reward model of one parameter has not."""
    found = information(seed)
    return found["data"] - found["reward_model"]


def literal_objective(seed: int, ref: bool = False) -> float:
    """Eq. 3 (with `ref` Eq. 2 at beta = 1) minimised as printed, against pi_mle (pi_dpo), over all policies.

    Both methods end at pi_mle (Theorem 2.2), where the first term of Eq. 3 is least and its entropy still has a slope:
    they optimise its terms one after the other, and not their sum.
    """
    p = s.problem(seed)
    offset = t.trajectory_log_prob(p.tree, p.ref) if ref else 0

    def loss(theta: Tensor) -> Tensor:
        logits = s.logits(p, theta)
        zero = torch.zeros_like(p.reward)
        likelihood = t.bradley_terry(p.pairs, t.trajectory_log_prob(p.tree, logits) - offset)
        return likelihood - t.soft_return(p.tree, p.rho, zero, logits, p.ref if ref else None)

    theta = t.minimise(loss, *s.starts(p, p.policies.shape[1], "right"))
    return s.apart(t.trajectory_log_prob(p.tree, s.logits(p, theta)), s.fit_policy(p, "left", p.ref if ref else None))


def nearest_bradley_terry(seed: int) -> float:
    """KL in nats a pair from infinite data of Condorcet cycles to the nearest Bradley-Terry model: none fits."""
    p = s.problem(seed)
    pairs = cycles(p)
    p = p._replace(pairs=pairs)
    entropy = -(pairs.weight * pairs.weight.log()).sum() / pairs.weight.sum()
    return float(t.bradley_terry(pairs, s.fit_reward(p, "left")) - entropy)


def cycles(p: s.Problem) -> t.Pairs:
    """Infinite data in which each completion beats the half that follows it around a circle, four times in five."""
    first, second = t.all_pairs(p.tree)
    size = len(p.reward) // p.tree.prompts
    ahead = (second - first) % size
    return t.Pairs(first, second, torch.where(2 * ahead == size, 0.5, torch.where(2 * ahead < size, 0.8, 0.2)).double())


# As statements.STATEMENTS.
STATEMENTS = {
    "Theorem 2.2, sets": (theorem_2_2_sets, [s.ALL]),
    "Theorem 3.1, finite": (theorem_3_1_finite, [s.ALL]),
    "Remark, SFT": (remark_sft, [s.ALL, s.BLIND]),
    "Remark, verifier": (remark_verifier, [s.ALL]),
    "Eq. 36": (equation_36, [s.ALL]),
    "Data processing": (data_processing, [s.ALL]),
}

"""H6 in closed form: how many preferences it takes to learn a policy, directly or by way of a simple reward.

One prompt (others would be problems of their own), 3 tokens, horizon H, n = 3^H completions. The simple reward is
r(xi) = sum_a w[a] 1[a occurs in xi]: three weights at every horizon, "the summary mentions the point". Its soft-optimal
policy has to remember what was said and plan for what is left, so its Q-function is no such sum. At H = 1 the three
indicators are all there is: R_sim is R, and the generation-verification gap is closed. The complex reward is a table
of n independent numbers, with nothing to verify but a look-up. Rewards have mean 0 and deviation 1.5 over
completions, so that a pair is about as informative at every horizon and of either kind.

Data: N pairs of different completions drawn uniformly, labelled by Bradley-Terry. Every estimator is a maximum a
posteriori fit of log-likelihood minus penalty |theta|^2 / 2 (without a penalty the estimate rarely exists at small N),
its penalty chosen on development seeds for each setting. The error of a policy is KL(pi || pi*), over completions,
in nats: the reverse KL to the soft-optimal policy, which is also its regret in Eq. 10 under the true reward.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import expit, log_expit, log_softmax, logsumexp

from roads.theory import tree as t

VOCAB, SPREAD = 3, 1.5
DEVELOPMENT, SEEDS = range(100, 120), range(40)
PENALTIES = np.geomspace(0.1, 10_000, 11)
HORIZONS = [1, 2, 3, 4]
PAIRS = [32, 128, 512, 2048, 8192, 32768, 131072]
HORIZON, N = 4, 512  # of the curves in which one is fixed
MIX_PAIRS = [N, 8192]
MIXTURES = [0.0, 0.03, 0.1, 0.3, 0.6, 1.0]  # share of a reward's variance that is the table's

# theta [B, d] -> rewards or log-probabilities [B, n], and their derivatives [B or 1, n, d]
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def occurs(horizon: int) -> np.ndarray:
    """Features of the simple reward [n, A]: whether a token occurs in a completion."""
    action = t.make(1, VOCAB, horizon).action.numpy()
    return (action[:, :, None] == np.arange(VOCAB)).any(1).astype(float)


def draw_reward(horizon: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """A reward [n] with that share of its variance from a table, the rest from the simple features."""
    def standard(reward: np.ndarray) -> np.ndarray:
        return (reward - reward.mean()) / reward.std()

    simple = standard(occurs(horizon) @ rng.normal(size=VOCAB))
    table = standard(rng.normal(size=VOCAB**horizon))
    return SPREAD * standard(np.sqrt(1 - share) * simple + np.sqrt(share) * table)


def draw_wins(reward: np.ndarray, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Counts [n, n]: how often the row was preferred to the column, in that many uniformly drawn pairs."""
    n = len(reward)
    first, second = np.triu_indices(n, 1)
    drawn = rng.multinomial(pairs, np.full(len(first), 1 / len(first)))
    won = rng.binomial(drawn, expit(reward[first] - reward[second]))
    wins = np.zeros((n, n))
    wins[first, second], wins[second, first] = won, drawn - won
    return wins


def rewards(design: np.ndarray) -> Model:
    """Rewards design [n, d] @ theta."""
    return lambda theta: (theta @ design.T, design[None])


def policies(horizon: int, design: np.ndarray | None = None) -> Model:
    """Local RMs log pi(xi) of policies with logits design [S A, d] @ theta; every logit is free without a design."""
    tree = t.make(1, VOCAB, horizon)
    state, action, n_states = tree.state.numpy(), tree.action.numpy(), t.n_states(tree)
    row = np.arange(len(state))[:, None]
    visits = np.zeros((len(state), n_states, 1))
    taken = np.zeros((len(state), n_states, VOCAB))
    visits[row, state] = 1
    taken[row, state, action] = 1
    design = np.eye(n_states * VOCAB) if design is None else design

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_pi = log_softmax((theta @ design.T).reshape(-1, n_states, VOCAB), -1)
        # d log pi(a|s) / d logit(s, b) = 1[a = b] - pi(b|s)
        slope = (taken - visits * np.exp(log_pi)[:, None]).reshape(len(theta), len(state), -1)
        return log_pi[:, state, action].sum(-1), slope @ design
    return model


def prefix_features(horizon: int) -> np.ndarray:
    """Design [S A, A] of policies with the simple reward's features of the prefix: theta[a] if a is new, else 0."""
    tree = t.make(1, VOCAB, horizon)
    design = np.zeros((t.n_states(tree), VOCAB, VOCAB))
    for tokens, states in zip(tree.action.numpy(), tree.state.numpy()):
        for h, s in enumerate(states):
            design[s] = np.diag(~np.isin(np.arange(VOCAB), tokens[:h]))
    return design.reshape(-1, VOCAB)


def soft_optimal_policies(design: np.ndarray) -> Model:
    """Local RMs of Pi(R): the log-probabilities (Eq. 11) of the soft-optimal policies of rewards design @ theta."""
    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_p = log_softmax(theta @ design.T, -1)
        return log_p, design - (np.exp(log_p) @ design)[:, None]
    return model


def pair_loss(wins: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Negative Bradley-Terry log-likelihood [B] of wins [B, n, n] under rewards [B, n]."""
    return -(wins * log_expit(reward[:, :, None] - reward[:, None])).sum((1, 2))


def pair_curvature(compared: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Hessian [B, n, n] of `pair_loss` in the rewards; compared [B, n, n] counts each pair in both of its places."""
    weight = compared * expit(reward[:, :, None] - reward[:, None]) * expit(reward[:, None] - reward[:, :, None])
    return weight.sum(2)[:, :, None] * np.eye(reward.shape[1]) - weight


def fit(model: Model, wins: np.ndarray, penalty: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The maximum a posteriori theta [B, d] of B data sets wins [B, n, n], given each parameter's penalty [d].

    Gauss-Newton steps, damped where they fail.

    Raises:
        RuntimeError: some data set's gradient is not small after 200 steps.
    """
    theta, damping = start, np.full(len(start), 1e-3)
    compared = wins + wins.swapaxes(1, 2)
    reward, slope = model(theta)
    loss = pair_loss(wins, reward) + (penalty * theta**2).sum(1) / 2
    for _ in range(200):
        expected = compared * expit(reward[:, :, None] - reward[:, None])
        gradient = ((expected - wins).sum(2)[:, None] @ slope)[:, 0] + penalty * theta
        if np.abs(gradient).max() < 1e-4 * np.sqrt(wins[0].sum()):  # a thousandth of its sampling noise, or less
            return theta
        curvature = slope.swapaxes(1, 2) @ pair_curvature(compared, reward) @ slope
        curvature += (penalty + damping[:, None])[:, None] * np.eye(theta.shape[1])
        tried = theta - np.linalg.solve(curvature, gradient[..., None])[..., 0]
        tried_loss = pair_loss(wins, model(tried)[0]) + (penalty * tried**2).sum(1) / 2
        better = tried_loss <= loss + 1e-12 * np.abs(loss)
        theta = np.where(better[:, None], tried, theta)
        loss = np.where(better, tried_loss, loss)
        damping = np.where(better, damping / 10, np.maximum(damping * 10, 1e-3))
        reward, slope = model(theta)
    raise RuntimeError(f"Gauss-Newton has not converged: largest gradient {np.abs(gradient).max():.1e}")


def reverse_kl(reward: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """KL(pi_r || pi*) [B] of the soft-optimal policies (Eq. 11) of rewards [B, n] and true rewards [B, n]."""
    log_p = log_softmax(reward, -1)
    return (np.exp(log_p) * (log_p - log_softmax(truth, -1))).sum(-1)


def estimators(horizon: int) -> dict[str, tuple[Model, np.ndarray]]:
    """Name -> model, and the penalty of each of its parameters relative to the others [d].

    A model of rewards is the first of two stages; the second is soft RL in closed form (Eq. 11).
    """
    simple, n = occurs(horizon), VOCAB**horizon
    few, many, logits = np.ones(VOCAB), np.ones(n), np.ones((n - 1) // (VOCAB - 1) * VOCAB)
    return {
        "MLE over Π": (policies(horizon), logits),
        "MLE over Π(R_sim)": (soft_optimal_policies(simple), few),
        "two-stage, R_sim": (rewards(simple), few),
        "two-stage, all rewards": (rewards(np.eye(n)), many),
        "two-stage, all rewards, simple first": (rewards(np.hstack([simple, np.eye(n)])),
                                                 np.append(few / 10_000, many)),
        "MLE over policies of prefix features": (policies(horizon, prefix_features(horizon)), few),
    }


def true_rewards(horizon: int, share: float, seeds: range) -> np.ndarray:
    """The true reward [B, n] of every seed, the same for every N."""
    return np.array([draw_reward(horizon, share, np.random.default_rng([seed, horizon, int(100 * share)]))
                     for seed in seeds])


def data(horizon: int, pairs: int, share: float, seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """True rewards [B, n] and wins [B, n, n]."""
    truths = true_rewards(horizon, share, seeds)
    wins = [draw_wins(truth, pairs, np.random.default_rng([seed, horizon, int(100 * share), pairs]))
            for seed, truth in zip(seeds, truths)]
    return truths, np.array(wins)


def errors(horizon: int, pairs: int, share: float) -> dict[str, tuple[np.ndarray, float]]:
    """Estimator -> errors [B] on the report's seeds and its penalty, the best of `PENALTIES` on development seeds."""
    results = {}
    developing, reporting = (data(horizon, pairs, share, seeds) for seeds in (DEVELOPMENT, SEEDS))
    for name, (model, relative) in estimators(horizon).items():
        theta, mean = np.zeros((len(DEVELOPMENT), len(relative))), {}
        for penalty in PENALTIES[::-1]:
            theta = fit(model, developing[1], penalty * relative, theta)
            mean[penalty] = reverse_kl(model(theta)[0], developing[0]).mean()
            if mean[penalty] > 1.5 * min(mean.values()):  # past the best one
                break
        best = min(mean, key=mean.get)
        theta = fit(model, reporting[1], best * relative, np.zeros((len(SEEDS), len(relative))))
        results[name] = reverse_kl(model(theta)[0], reporting[0]), float(best)
    return results


def asymptote(horizon: int, share: float, design: np.ndarray, seeds: range) -> np.ndarray:
    """lim N E[KL(pi || pi*)] [B] of maximum likelihood over rewards design @ w that contain the truth.

    The delta method: tr(F^-1 G) / 2, with F the Fisher information of one pair and G the Hessian of the KL, which is
    the covariance of the features under pi*. By Theorem 2.2 it is the same for the policies isomorphic to the rewards.
    """
    truth = true_rewards(horizon, share, seeds)
    n = truth.shape[1]
    compared = (1 - np.eye(n))[None] * 2 / (n * (n - 1))
    p = np.exp(truth - logsumexp(truth, axis=1, keepdims=True))
    covariance = p[:, :, None] * np.eye(n) - p[:, :, None] * p[:, None]
    fisher, hessian = (design.T @ matrix @ design for matrix in (pair_curvature(compared, truth), covariance))
    return np.trace(np.linalg.pinv(fisher, rcond=1e-10, hermitian=True) @ hessian, axis1=1, axis2=2) / 2

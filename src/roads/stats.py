"""Statistics of the claims: intervals that resample prompts and seeds, tests, and what a verdict takes.

A claim is a contrast of bars (weights that sum to 0), computed per prompt and seed, and one of four tests. `margin` is
the smallest effect of interest, in the figure's unit, fixed before results. Where rows share posts (a post has several
human comparisons) posts are resampled, and vote in the sign test, and not rows.

`greater`, the contrast is above 0: p is the larger of a sign test over prompts and of the bootstrap's.
    not supported   the interval's upper end is below the margin: the effect, if any, is smaller than what matters
    supported       the interval is above 0 and the adjusted p below alpha
    undecided       otherwise
`equivalent`, the contrast is within +-margin: p is the larger of two one-sided tests' (TOST).
    supported       the adjusted p is below alpha
    not supported   the interval lies outside [-margin, margin]
    undecided       otherwise
`different`, the contrast is not 0: p is twice the smaller of the bootstrap's two one-sided ones.
    supported       the adjusted p is below alpha; the estimate's sign says which way
    undecided       otherwise
`correlated`, Pearson's r of some models' means in two figures is above 0: as `greater`, by the bootstrap alone.
A claim over worlds takes each world, or each arm and number of pairs of figure `learnt`, as one observation: a t
interval of their means and a t test in place of the bootstrap, and Pearson's r with Fisher's interval.
So a large p is never evidence of no difference, and one contrast is never both greater than 0 and equivalent to 0 at
one margin. Intervals are 95%, two-sided, not adjusted; p-values are one-sided but for `different`, adjusted by
Holm over the claims of a family that were run: the paper's, or ours. A bootstrap p is at least 1 / (RESAMPLES + 1).

The sign test asks whether most of the prompts that move go up, not whether their mean does: where few prompts move far
and many a little the other way, a claim stays undecided. It needs paired prompts: a contrast between bars of different
worlds (`paired: false`) has the bootstrap alone.

Three seeds are few. Resampling 3 understates their spread (it sees 2/3 of the variance, and 1 draw in 9 repeats one
seed), so where seeds differ much an interval is too short and a verdict too sure: with a spread of seeds four times
the standard error that prompts give, `greater` is supported in about 8% of cases without an effect, against 1% where
seeds agree. Every estimate therefore has `by_seed` and `over_seeds`, a t interval of the seeds' means; a claim whose
seeds differ in sign says so, and so does one that is supported though that interval has 0 in it.
"""

from functools import lru_cache

import numpy as np
from scipy.stats import binomtest, linregress, pearsonr, t

RESAMPLES = 4000
TIE = 1e-12  # sums of winrates that cancel leave rounding errors; they are ties


@lru_cache(maxsize=1)
def _resamples(n_seeds: int, n_prompts: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the prompts [RESAMPLES, prompts] and draws of seeds [RESAMPLES, seeds]; the same for every bar."""
    rng = np.random.default_rng(stream)
    weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=RESAMPLES) / n_prompts
    return weights, rng.integers(n_seeds, size=(RESAMPLES, n_seeds))


def _shared_seeds(n_seeds: int) -> np.ndarray:
    """Draws of seeds [RESAMPLES, seeds] for bars whose prompts are not the same and whose seeds are."""
    return np.random.default_rng([0, n_seeds]).integers(n_seeds, size=(RESAMPLES, n_seeds))


def by_post(scores: np.ndarray, post: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of scores [seeds, rows] over each post's rows, [seeds, posts], and how many rows each has, [posts].

    Args:
        post: [rows], the number of each row's post, from 0; None: each row is of a post of its own.
    """
    if post is None:
        return scores, np.ones(scores.shape[1])
    rows = np.bincount(post)
    return np.stack([np.bincount(post, weights=row, minlength=len(rows)) for row in scores]), rows


def bootstrap(scores: np.ndarray, stream: int = 0, post: np.ndarray | None = None,
              seeds: np.ndarray | None = None) -> np.ndarray:
    """Means [RESAMPLES] of scores [seeds, rows], seeds and posts resampled independently (two-way, clustered); seeds as
    drawn elsewhere, where `seeds` [RESAMPLES, seeds] has them.

    Three seeds give few distinct draws: the interval is honest about prompts and only indicative about seeds,
    which is why every figure shows each seed's point as well.
    """
    sums, rows = by_post(scores, post)
    weights, draws = _resamples(*sums.shape, stream)
    means = weights @ sums.T if post is None else (weights @ sums.T) / (weights @ rows)[:, None]
    return np.take_along_axis(means, draws if seeds is None else seeds, axis=1).mean(axis=1)


def total(parts: list[np.ndarray], post: np.ndarray | None = None) -> tuple[dict, np.ndarray]:
    """Estimate of a sum of means, and its resampled values [RESAMPLES].

    Args:
        parts: arrays [seeds, prompts], each of a world of its own: their prompts and seeds are resampled apart.
        post: [prompts], for one part whose prompts share posts (`by_post`).
    """
    resampled = sum(bootstrap(part, stream, post) for stream, part in enumerate(parts))  # equal scores: up to rounding
    mean = float(sum(part.mean() for part in parts))
    low, high = (mean if abs(end - mean) < TIE else float(end) for end in np.quantile(resampled, [0.025, 0.975]))
    found = {"mean": mean, "low": low, "high": high,
             "by_seed": np.asarray(sum(part.mean(axis=1) for part in parts)).tolist()}
    return found, resampled


def correlation(x: list[np.ndarray], y: list[np.ndarray]) -> tuple[dict, np.ndarray]:
    """Pearson's r of some models' means, and its resampled values [RESAMPLES].

    Args:
        x, y: for each model scores [seeds, prompts]; the prompts of x and of y are not the same, the seeds are.
    """
    def r(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        left, right = left - left.mean(0), right - right.mean(0)
        return (left * right).sum(0) / np.sqrt((left**2).sum(0) * (right**2).sum(0))

    seeds = _shared_seeds(len(x[0]))
    resampled = r(*(np.stack([bootstrap(scores, stream, seeds=seeds) for scores in side])
                    for stream, side in enumerate((x, y))))
    low, high = np.quantile(resampled, [0.025, 0.975])
    by_seed = r(*(np.stack([scores.mean(axis=1) for scores in side]) for side in (x, y)))
    mean = r(*(np.array([[scores.mean()] for scores in side]) for side in (x, y)))[0]
    return {"mean": float(mean), "low": float(low), "high": float(high), "by_seed": by_seed.tolist()}, resampled


def estimate(scores: np.ndarray, post: np.ndarray | None = None) -> dict:
    """Mean of scores [seeds, prompts], its 95% interval and every seed's own mean."""
    return total([scores], post)[0]


def over_seeds(by_seed: list[float]) -> tuple[float, float] | None:
    """95% t interval of the mean over seeds, each one value; None for one seed.

    >>> [round(end, 3) for end in over_seeds([0.009, 0.046, 0.021])]
    [-0.022, 0.072]
    """
    n = len(by_seed)
    if n < 2:
        return None
    half = float(t.ppf(0.975, n - 1) * np.std(by_seed, ddof=1) / n**0.5)
    mean = float(np.mean(by_seed))
    return mean - half, mean + half


def over_units(values: list[float], margin: float | None = None) -> dict[str, float]:
    """Mean of independent observations, one a world, its 95% t interval, and p: one-sided, of a mean above 0, or with a
    margin of one within +-margin (two one-sided tests)."""
    n, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1) / n**0.5)
    half = float(t.ppf(0.975, n - 1) * error)
    bounds = [0.0] if margin is None else [-margin, margin]
    if error == 0:  # the same everywhere: there is nothing to test
        inside = mean > bounds[0] and (margin is None or mean < bounds[-1])
        return {"mean": mean, "low": mean, "high": mean, "p": float(not inside)}
    p = max(float(t.sf((mean - bounds[0]) / error, n - 1)),
            float(t.cdf((mean - bounds[-1]) / error, n - 1)) if margin is not None else 0.0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def regression(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Least squares of y [n] on x [n]: slope with its 95% t interval, intercept, Pearson's r with Fisher's interval,
    and the one-sided p of a slope above 0."""
    found, r = linregress(x, y, alternative="greater"), pearsonr(x, y)
    half = float(t.ppf(0.975, len(x) - 2) * found.stderr)
    low, high = r.confidence_interval()
    return {"slope": float(found.slope), "low": float(found.slope) - half, "high": float(found.slope) + half,
            "intercept": float(found.intercept), "r": float(found.rvalue), "r_low": float(low), "r_high": float(high),
            "p": float(found.pvalue)}


def difference(treated: np.ndarray, control: np.ndarray, post: np.ndarray | None = None) -> dict:
    """Paired difference of two [seeds, prompts] arrays, with its interval and its standardised size.

    The standardised effect is the mean paired difference over the standard deviation of the control's score
    across prompts: it compares a gap in winrate with a gap in ROUGE-L.
    """
    paired = treated - control
    spread = float(control.std(axis=1, ddof=1).mean())
    found = estimate(paired, post)
    scale = 1 / spread if spread > 0 else float("nan")
    return found | {"standardised": {key: found[key] * scale for key in ("mean", "low", "high")}}


def sign_test(paired: np.ndarray, post: np.ndarray | None = None) -> float:
    """Exact one-sided sign test of paired differences [seeds, prompts]: one vote per post, its mean over seeds; no tie
    counts.

    For 0/1 scores of one seed it is McNemar's exact test: prompts that only one of two policies wins are the
    discordant ones.
    """
    votes = by_post(paired, post)[0].mean(axis=0)
    up, down = int((votes > TIE).sum()), int((votes < -TIE).sum())
    return float(binomtest(up, up + down, alternative="greater").pvalue) if up + down else 1.0


def p_above(resampled: np.ndarray, bound: float = 0.0) -> float:
    """One-sided bootstrap p of 'the mean is above `bound`': the share of resampled means that are not."""
    return float((1 + (resampled <= bound + TIE).sum()) / (len(resampled) + 1))


def p_equivalent(resampled: np.ndarray, margin: float) -> float:
    """Two one-sided tests, above -margin and below margin; the p of both is the larger one."""
    return max(p_above(resampled, -margin), p_above(-resampled, -margin))


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: they keep the chance of any false claim below alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(test: str, found: dict, p_adjusted: float, margin: float, alpha: float) -> tuple[str, str]:
    """What the rules above say about an estimate, and why, in a few words."""
    low, high = found["low"], found["high"]
    sure = p_adjusted < alpha
    p = f"adjusted p {p_adjusted:.2g}"
    if test == "different":
        if sure:
            return "supported", f"{'above' if low > 0 else 'below'} 0, {p}"
        return "undecided", f"not shown to differ from 0, {p}"
    if test in ("greater", "correlated"):
        if high < 0:
            return "not supported", "the interval is below 0"
        if high < margin:
            small = "above 0, but " if low > 0 else ""
            return "not supported", f"{small}the upper end {high:+.4f} is below the margin {margin:g}"
        if low > 0 and sure:
            return "supported", f"the interval is above 0, {p}"
        return "undecided", f"{'the interval is above 0' if low > 0 else 'the interval has 0 in it'}, {p}"
    if sure:
        return "supported", f"within +-{margin:g}, {p}"
    if low > margin or high < -margin:
        return "not supported", f"the interval is {f'above {margin:g}' if low > 0 else f'below {-margin:g}'}"
    return "undecided", f"not shown to be within +-{margin:g}, nor outside, {p}"

"""Statistics of the claims: means over prompts and seeds, with bootstrap intervals that resample both."""

from functools import lru_cache

import numpy as np

RESAMPLES = 4000


@lru_cache(maxsize=1)
def _resamples(n_seeds: int, n_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the prompts [RESAMPLES, prompts] and draws of seeds [RESAMPLES, seeds]; the same for every bar."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=RESAMPLES) / n_prompts
    return weights, rng.integers(n_seeds, size=(RESAMPLES, n_seeds))


def bootstrap(scores: np.ndarray) -> np.ndarray:
    """Means [RESAMPLES] of scores [seeds, prompts], seeds and prompts resampled independently (two-way).

    Three seeds give few distinct draws: the interval is honest about prompts and only indicative about seeds,
    which is why every figure shows each seed's point as well.
    """
    weights, rows = _resamples(*scores.shape)
    return np.take_along_axis(weights @ scores.T, rows, axis=1).mean(axis=1)


def estimate(scores: np.ndarray) -> dict:
    """Mean of scores [seeds, prompts], its 95% interval and every seed's own mean."""
    low, high = np.quantile(bootstrap(scores), [0.025, 0.975])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high),
            "by_seed": [float(x) for x in scores.mean(axis=1)]}


def difference(treated: np.ndarray, control: np.ndarray) -> dict:
    """Paired difference of two [seeds, prompts] arrays, with its interval and its standardised size.

    The standardised effect is the mean paired difference over the standard deviation of the control's score
    across prompts: it compares a gap in winrate with a gap in ROUGE-L.
    """
    paired = treated - control
    spread = float(control.std(axis=1, ddof=1).mean())
    found = estimate(paired)
    scale = 1 / spread if spread > 0 else float("nan")
    return found | {"standardised": {key: found[key] * scale for key in ("mean", "low", "high")}}

"""The intervals of the figures: they cover what they should, and pair what is paired."""

import numpy as np
import pytest

from roads import stats


def test_an_interval_covers_the_mean_in_about_95_percent_of_draws():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        scores = np.repeat(rng.normal(1.0, 2.0, size=(1, 100)), 3, axis=0) + rng.normal(0, 0.5, size=(3, 100))
        found = stats.estimate(scores)
        hits += found["low"] <= 1.0 <= found["high"]
    assert 0.90 <= hits / 200 <= 0.985


def test_seeds_that_differ_widen_the_interval():
    prompts = np.random.default_rng(0).normal(size=400)
    same, apart = (stats.estimate(prompts + np.array(shift)[:, None]) for shift in ([0, 0, 0], [-0.5, 0, 0.5]))
    assert apart["high"] - apart["low"] > 2 * (same["high"] - same["low"])
    assert apart["by_seed"] == pytest.approx(prompts.mean() + np.array([-0.5, 0, 0.5]))


def test_a_paired_difference_cancels_the_prompts():
    rng = np.random.default_rng(0)
    control = rng.normal(0, 5, size=(3, 300))
    found = stats.difference(control + 0.1, control)
    assert found["mean"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1) == found["high"]
    assert found["standardised"]["mean"] == pytest.approx(0.1 / control.std(axis=1, ddof=1).mean())


def test_the_same_scores_give_the_same_interval():
    scores = np.random.default_rng(3).normal(size=(3, 50))
    assert stats.estimate(scores) == stats.estimate(scores.copy())

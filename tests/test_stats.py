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


def test_a_correlation_draws_the_seeds_of_both_sides_together():
    """Three models whose means go with a seed's luck on both sides: r is about 1 in every resample, and not in some."""
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 5, size=(3, 3))  # [models, seeds]
    x, y = ([row[:, None] + rng.normal(0, 0.1, size=(3, 50)) for row in luck] for _ in range(2))
    found, resampled = stats.correlation(x, y)
    assert found["low"] > 0.95 and (resampled > 0.9).mean() > 0.99


@pytest.mark.parametrize("value", [0.5, 0.1, 1 / 3, 0.7])
def test_the_interval_of_equal_scores_is_their_value(value):
    """Sums of 4,999 equal numbers are off in the last digits; a plot wants no interval beside its mean."""
    found = stats.estimate(np.full((2, 4999), value))
    assert found["low"] == found["mean"] == found["high"] == pytest.approx(value)


def test_equal_values_of_all_units_leave_nothing_to_test():
    assert stats.over_units([0.5] * 4) == {"mean": 0.5, "low": 0.5, "high": 0.5, "p": 0.0}
    assert stats.over_units([0.0] * 4)["p"] == 1.0 and stats.over_units([-0.5] * 4)["p"] == 1.0
    assert [stats.over_units([value] * 4, margin=0.02)["p"] for value in (0.01, 0.03)] == [0.0, 1.0]


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
    first = stats.estimate(scores)
    stats._resamples.cache_clear()
    assert stats.estimate(scores.copy()) == first


def test_the_intervals_of_the_figures_stay_what_they_were():
    """Numbers of the version whose intervals the README quotes."""
    scores = np.random.default_rng(7).integers(0, 3, size=(3, 40)) / 2
    found = stats.estimate(scores)
    assert found == {"mean": pytest.approx(0.525), "low": pytest.approx(0.4208333333333334),
                     "high": pytest.approx(0.6375), "by_seed": pytest.approx([0.5875, 0.475, 0.5125])}


def test_one_seed_of_wins_and_losses_is_mcnemars_exact_test():
    first = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0.0]])
    second = np.array([[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0.0]])
    # Discordant prompts: 7 for the first, 1 for the second. P(at least 7 of 8 heads) = (8 + 1) / 2^8.
    assert stats.sign_test(first - second) == pytest.approx(9 / 256)
    assert stats.sign_test(second - first) == pytest.approx(1 - 1 / 256)


def test_seeds_vote_once_per_prompt_and_ties_drop_out():
    paired = np.array([[1, 1, 1, -1, 0.1], [1, 0, 0, 1, 0.2], [0, 0, 0, 0, -0.3]])  # 0.1 + 0.2 - 0.3 is not quite 0
    assert stats.sign_test(paired) == pytest.approx(1 / 8)
    assert stats.sign_test(np.zeros((3, 5))) == 1.0


def test_bootstrap_p_counts_the_resampled_means_that_are_not_above():
    resampled = np.array([-0.2, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert stats.p_above(resampled) == pytest.approx(3 / 10)
    assert stats.p_above(resampled, 0.25) == pytest.approx(5 / 10)
    assert stats.p_above(np.ones(4000)) == pytest.approx(1 / 4001)  # never 0


def test_two_one_sided_tests_take_the_larger_p():
    resampled = np.array([-0.3, -0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.2, 0.25])
    assert stats.p_equivalent(resampled, 0.22) == pytest.approx(2 / 10)  # one at or below -0.22, one at or above 0.22
    assert stats.p_equivalent(resampled, 0.15) == pytest.approx(3 / 10)  # one, and two
    assert stats.p_equivalent(resampled, 0.5) == pytest.approx(1 / 10)


def test_holm_by_hand():
    # Sorted: .005 * 4, .01 * 3, .03 * 2, .04 * 1; none below the one before it.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.6]) == [1.0, 1.0] and stats.holm([0.02]) == [0.02] and stats.holm([]) == []


@pytest.mark.parametrize("test, low, high, p, verdict, why", [
    ("greater", 0.01, 0.05, 0.01, "supported", "the interval is above 0, adjusted p 0.01"),
    ("greater", 0.01, 0.05, 0.06, "undecided", "the interval is above 0, adjusted p 0.06"),
    ("greater", -0.01, 0.05, 0.01, "undecided", "the interval has 0 in it, adjusted p 0.01"),
    ("greater", -0.01, 0.015, 0.4, "not supported", "the upper end +0.0150 is below the margin 0.02"),
    ("greater", 0.005, 0.015, 0.001, "not supported", "above 0, but the upper end +0.0150 is below the margin 0.02"),
    ("greater", -0.05, -0.01, 1.0, "not supported", "the interval is below 0"),
    ("equivalent", -0.01, 0.01, 0.001, "supported", "within +-0.02, adjusted p 0.001"),
    ("equivalent", 0.005, 0.015, 0.001, "supported", "within +-0.02, adjusted p 0.001"),
    ("equivalent", -0.01, 0.03, 0.3, "undecided", "not shown to be within +-0.02, nor outside, adjusted p 0.3"),
    ("equivalent", 0.021, 0.03, 1.0, "not supported", "the interval is above 0.02"),
    ("equivalent", -0.03, -0.021, 1.0, "not supported", "the interval is below -0.02"),
])  # fmt: skip
def test_verdicts(test, low, high, p, verdict, why):
    assert stats.verdict(test, {"low": low, "high": high}, p, margin=0.02, alpha=0.05) == (verdict, why)


def _verdict(test: str, scores: np.ndarray, margin: float) -> str:
    found, resampled = stats.total([scores])
    p = {"greater": max(stats.p_above(resampled), stats.sign_test(scores)),
         "equivalent": stats.p_equivalent(resampled, margin)}[test]
    return stats.verdict(test, found, p, margin, 0.05)[0]


@pytest.mark.parametrize("test, effect, wrong", [
    ("greater", 0.0, "supported"), ("greater", 0.4, "not supported"),
    ("equivalent", 0.4, "supported"), ("equivalent", 0.4, "not supported"),
])  # fmt: skip
def test_a_verdict_is_wrong_in_at_most_5_percent_of_studies(test, effect, wrong):
    """500 studies of 100 prompts and 3 seeds, at the edge of what the verdict says: 0, or the margin."""
    rng = np.random.default_rng(0)
    draws = [effect + rng.normal(0, 1, size=(1, 100)) + rng.normal(0, 1, size=(3, 100)) for _ in range(500)]
    rate = [_verdict(test, scores, margin=0.4) for scores in draws].count(wrong) / 500
    assert rate <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 500)


def test_noise_is_no_evidence_of_no_difference():
    rng = np.random.default_rng(0)
    verdicts = [_verdict("equivalent", rng.normal(0, 3, size=(3, 100)), margin=0.2) for _ in range(50)]
    assert set(verdicts) == {"undecided"}


def test_three_seeds_that_differ_much_make_a_verdict_too_sure():
    """The number in the module's docstring: seeds with four times the spread that prompts alone give the mean."""
    rng = np.random.default_rng(0)
    draws = [rng.normal(0, 1, size=(1, 100)) + rng.normal(0, 1, size=(3, 100)) + rng.normal(0, 0.46, size=(3, 1))
             for _ in range(300)]  # prompts alone: sqrt((1 + 1/3) / 100) = 0.115
    assert 0.05 < [_verdict("greater", scores, margin=1e-9) for scores in draws].count("supported") / 300 < 0.15


@pytest.mark.parametrize("test, effect", [("greater", 1.0), ("equivalent", 0.0)])
def test_a_clear_case_is_seen(test, effect):
    rng = np.random.default_rng(0)
    scores = effect + rng.normal(0, 1, size=(1, 100)) + rng.normal(0, 0.5, size=(3, 100))
    assert _verdict(test, scores, margin=0.4) == "supported"


def test_parts_of_different_worlds_are_resampled_apart():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(1, 300)).repeat(3, axis=0)
    other = rng.normal(size=(1, 200)).repeat(3, axis=0)
    found, resampled = stats.total([prompts, -prompts])
    assert found["mean"] == 0 and found["high"] - found["low"] > 0.1  # not a paired difference, which would be 0
    found, resampled = stats.total([1 + prompts, other])
    assert found["mean"] == pytest.approx(1 + prompts.mean() + other.mean())
    assert resampled.std() == pytest.approx(np.sqrt(prompts.var() / 300 + other.var() / 200), rel=0.05)

"""The slot world: its quality by hand, and that its labels and karma mean what they say."""

import numpy as np
import pytest
from conftest import ROOT

from roads import config
from roads.stages.rank import best_and_worst
from roads.world import EOS, PAD, World


@pytest.fixture
def world(tiny):
    return World(tiny.source.model_copy(update={"slots": 2, "words": 3, "candidates": 2, "clusters": 2}))


def test_quality_by_hand(world):
    """K = 2: worth + interaction * (sum of squared cluster counts / 2 - 1) - 4 * share of bad positions."""
    w, first = world, world.first_word
    world.cluster[:] = [0, 1, 0, 1, 0, 0]
    query = np.array([[w.first_subreddit + 1, first + 0, first + 2, first + 3, first + 4, 2]])
    worth, bonus = w.worth[1], w.cfg.interaction

    def quality(*words):
        return w.quality(query, np.array([[first + words[0], first + words[1], EOS, PAD]]))[0]

    assert quality(2, 4) == pytest.approx(worth[2] + worth[4] + bonus * (4 / 2 - 1))  # both of cluster 0
    assert quality(0, 3) == pytest.approx(worth[0] + worth[3] + bonus * (2 / 2 - 1))  # one of each
    assert quality(1, 3) == pytest.approx(worth[3] + bonus * (1 / 2 - 1) - 2)  # 1 is not offered
    no_end = w.quality(query, np.array([[first + 2, first + 4, first + 4, EOS]]))[0]
    assert no_end == pytest.approx(quality(2, 4) - 2)


def test_prompts_and_summaries(world):
    rng = np.random.default_rng(0)
    query = world.prompts(500, rng)
    response = world.summaries(query, rng)
    assert query.shape == (500, 6) and (query[:, -1] == 2).all() and response.shape == (500, 3)
    assert (world.validity(query, response) == 1).all()
    likely = world.quality(query, world.summaries(query, rng, liked=True))
    assert likely.mean() > world.quality(query, response).mean() + 0.3


def test_karma_buckets_are_equally_full_and_follow_quality():
    world = World(config.load(ROOT / "params.yaml").scales["mini"].source)
    rng = np.random.default_rng(1)
    query = world.prompts(4000, rng)
    quality = world.quality(query, world.summaries(query, rng))
    karma = world.karma(quality, rng) - world.first_karma
    counts = np.bincount(karma, minlength=world.cfg.karma_buckets)
    assert len(counts) == world.cfg.karma_buckets and np.corrcoef(karma, quality)[0, 1] > 0.8
    quiet = World(world.cfg.model_copy(update={"karma_noise": 0.0}))
    counts = np.bincount(quiet.karma(quality, rng) - quiet.first_karma)
    assert counts == pytest.approx(np.full(world.cfg.karma_buckets, 400), rel=0.2)  # sd of a count: 19, of an edge: 19


def test_best_and_worst():
    best, worst, told = best_and_worst(np.array([[0.2, 0.9, 0.1], [1.0, 1.0, 1.0], [3.0, -1.0, 3.0]]))
    assert best.tolist() == [1, 0, 0] and worst.tolist() == [2, 0, 1] and told.tolist() == [True, False, True]


def test_a_world_is_its_seed(tiny):
    one, two = World(tiny.source), World(tiny.source)
    other = World(tiny.source.model_copy(update={"seed": 5}))
    assert np.array_equal(one.tables, two.tables) and not np.array_equal(one.tables, other.tables)

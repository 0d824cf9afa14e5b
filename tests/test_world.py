"""The slot world: its quality by hand, and that its tags mean what they say."""

import numpy as np
import pytest
from conftest import ROOT

from roads import config
from roads.sources import Terms
from roads.stages.rank import best_and_worst
from roads.tldr import PAD
from roads.world import EOS, World


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


def test_a_split_may_be_empty(world):
    rng = np.random.default_rng(0)
    query = world.prompts(0, rng)
    assert query.shape == (0, 6) and world.summaries(query, rng).shape == (0, 3)


def test_quality_weighs_attributes_by_taste(tiny):
    """Taste (3, -4) scaled to length 1 is (.6, -.8); what the prompt does not offer counts for no attribute."""
    world = World(tiny.source.model_copy(update={"taste": [3.0, -4.0], "interaction": 0.0}))
    rng = np.random.default_rng(0)
    query = world.prompts(50, rng)
    response = world.summaries(query, rng)
    first, second = world.attributes(query, response)
    assert world.quality(query, response) == pytest.approx(0.6 * first - 0.8 * second)
    word = response[0, 0] - world.first_word
    response[0, 0] = world.first_word + (word + 1) % world.cfg.words  # of the slot, offered or not
    offered = response[0, 0] in query[0]
    gain = (world.tables[:, query[0, 0] - world.first_subreddit, response[0, 0] - world.first_word] if offered else 0)
    lost = world.tables[:, query[0, 0] - world.first_subreddit, word]
    assert world.attributes(query, response)[:, 0] == pytest.approx([first[0], second[0]] - lost + gain)


def test_counts_and_order_by_hand(tiny):
    """Three slots of clusters 0, 1, 1: v_0 + 2 v_1, and B_01 + B_11; an invalid word has no neighbours."""
    terms = Terms(attributes=0.0, counts=2.0, order=3.0)
    world = World(tiny.source.model_copy(update={"interaction": terms}))
    plain = World(tiny.source.model_copy(update={"interaction": Terms(attributes=0.0, counts=1.0)}))
    world.cluster[:], first = 0, world.first_word
    world.cluster[[4, 8]] = 1  # of slots 1 and 2, words 0
    value = np.random.default_rng([tiny.source.seed, 60]).standard_normal(2)
    world.worth = 2.0 * np.tile(value[world.cluster], (2, 1))
    query = np.array([[world.first_subreddit, *(first + np.array([0, 1, 4, 5, 8, 9])), 2]])
    response = np.array([[first, first + 4, first + 8, EOS, PAD]])
    table, counts = world.order, 2 * (value[0] + 2 * value[1])
    assert world.quality(query, response) == pytest.approx(counts + 3 * (table[0, 1] + table[1, 1]))
    response[0, 2] = first + 10  # not offered: no word, no neighbour, and a third of 2K
    assert world.quality(query, response) == pytest.approx(counts - 2 * value[1] + 3 * table[0, 1] - 2)
    assert np.array_equal(plain.worth, np.tile(value[plain.cluster], (2, 1)))  # of the cluster, in every subreddit


def test_a_number_is_the_weight_of_coherence_and_of_nothing_else(tiny):
    block = World(tiny.source.model_copy(update={"interaction": Terms(attributes=1.0, coherence=0.5)}))
    number = World(tiny.source.model_copy(update={"interaction": 0.5}))
    query = number.prompts(40, np.random.default_rng(0))
    response = number.summaries(query, np.random.default_rng(1))
    assert np.array_equal(block.quality(query, response), number.quality(query, response))


def test_documents_may_keep_to_a_topic(tiny):
    """In a slot that offers both clusters, the topic's word comes e^2 times as often; the tag says which one it is."""
    shown = {"slots": 8, "tags": "topic", "clusters": 2}
    world = World(tiny.source.model_copy(update=shown))
    query = world.prompts(4000, np.random.default_rng(0))
    response = world.documents(query, np.random.default_rng(1))
    topic = np.random.default_rng(1).integers(2, size=4000)
    of_offered = world.cluster[world._parse(query)[1]]
    of_word = world.cluster[response[:, :-1] - world.first_word]
    both = of_offered.min(2) != of_offered.max(2)
    assert (world.validity(query, response) == 1).all() and both.sum() > 10000
    assert (of_word == topic[:, None])[both].mean() == pytest.approx(np.exp(2) / (1 + np.exp(2)), abs=0.01)
    tags = world.tags(query, response, np.random.default_rng(2)) - world.first_tag
    assert np.array_equal(tags, of_word.mean(1) > 0.5) and world.tag_shape == (2,)
    assert np.array_equal(world.tag_values(), [0, 0])  # no topic is better
    plain = World(tiny.source)
    query = plain.prompts(40, np.random.default_rng(0))
    drawn = [draw(query, np.random.default_rng(3)) for draw in (plain.documents, plain.summaries)]
    assert np.array_equal(*drawn)


def test_every_summary_is_listed_once(world):
    query = world.prompts(5, np.random.default_rng(0))
    listed = world.every_summary(query)
    assert listed.shape == (5, 4, 3) and all(len(np.unique(each, axis=0)) == 4 for each in listed)
    assert all((world.validity(query, listed[:, i]) == 1).all() for i in range(4))
    assert (listed[:, 0, 0] == listed[:, 1, 0]).all() and (listed[:, 0, 1] != listed[:, 1, 1]).all()


def test_the_drawn_worlds_are_those_of_params_yaml(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import draw_worlds

    mini = config.load()
    arms = mini.arms_of("mini", "worlds")
    drawn = draw_worlds.draws()
    assert list(drawn) == list(arms) and len(drawn) == 12
    for name, source in drawn.items():
        assert arms[name].source == mini.scales["mini"].source.model_copy(update=source), name


@pytest.mark.parametrize("tags, buckets", [("attributes", 5), ("quality", 10)])
def test_tags_are_equally_full_and_follow_what_they_tell(tags, buckets):
    source = config.load(ROOT / "params.yaml").scales["mini"].source
    world = World(source.model_copy(update={"tags": tags, "tag_buckets": buckets}))
    rng = np.random.default_rng(1)
    query = world.prompts(4000, rng)
    response = world.summaries(query, rng)
    told = world.attributes(query, response) if tags == "attributes" else world.quality(query, response)[None]
    parts = np.unravel_index(world.tags(query, response, rng) - world.first_tag, world.tag_shape)
    for part, value in zip(parts, told, strict=True):
        assert np.corrcoef(part, value)[0, 1] > 0.8
    quiet = World(world.cfg.model_copy(update={"tag_noise": 0.0}))
    for part in np.unravel_index(quiet.tags(query, response, rng) - quiet.first_tag, quiet.tag_shape):
        assert np.bincount(part) == pytest.approx(np.full(buckets, 4000 / buckets), rel=0.2)
    # What pretraining says of a summary is the sum of the buckets: as good as chance where the taste is (1, -1).
    says = world.tag_values()[world.tags(query, response, rng) - world.first_tag]
    found = np.corrcoef(says, world.quality(query, response))[0, 1]
    assert abs(found) < 0.1 if tags == "attributes" else found > 0.8


def test_best_and_worst():
    best, worst, told = best_and_worst(np.array([[0.2, 0.9, 0.1], [1.0, 1.0, 1.0], [3.0, -1.0, 3.0]]))
    assert best.tolist() == [1, 0, 0] and worst.tolist() == [2, 0, 1] and told.tolist() == [True, False, True]


def test_a_world_is_its_seed(tiny):
    one, two = World(tiny.source), World(tiny.source)
    other = World(tiny.source.model_copy(update={"seed": 5}))
    assert np.array_equal(one.tables, two.tables) and not np.array_equal(one.tables, other.tables)

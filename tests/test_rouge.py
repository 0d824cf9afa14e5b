"""`rouge_l` gives the very floats of rouge-score."""

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from roads.rouge import rouge_l, rouge_l_plain
from roads.tldr import read_rows

ROWS = read_rows(Path(__file__).parents[1] / "data/tldr_sample/train.jsonl")
EDGES = [
    "", " ", "?!...", "the", "The THE the", "a-b_c d'e",
    "naïve café, İstanbul 東京 🎉", "\u212aelvin \u017fings",
    "running runs ran runner 1234 12ab ies sses generously", "x\ny\tz\u00a0w", "eed ing ed ss " * 30,
]  # fmt: skip


def test_a_pair_scored_by_hand():
    # cat(s) and sat are common, in order: 2 of 3 candidate tokens, 2 of 4 reference tokens.
    precision, recall, f1 = rouge_l("the cats sat down", ["a cat sat"])[0]
    assert (precision, recall) == (2 / 3, 2 / 4)
    assert f1 == pytest.approx(4 / 7)


def test_equals_rouge_score_on_real_text():
    rng = random.Random(0)
    summaries = [row.summary for row in ROWS]
    for row in ROWS[::2]:
        sentences = [s for s in row.post.replace("\n", ". ").split(". ") if len(s) < 300]
        candidates = rng.sample(summaries, 15) + sentences[:9] + [row.summary]
        assert_array_equal(rouge_l(row.summary, candidates), rouge_l_plain(row.summary, candidates))


def test_equals_rouge_score_on_long_texts():  # beyond the 64 tokens of one machine word
    for one, other in zip(ROWS[:10], ROWS[10:20]):
        pair = one.post, [other.post, one.post, one.post[::-1]]
        assert_array_equal(rouge_l(*pair), rouge_l_plain(*pair))


@pytest.mark.parametrize("reference", EDGES)
def test_equals_rouge_score_on_edge_cases(reference):
    assert_array_equal(rouge_l(reference, EDGES), rouge_l_plain(reference, EDGES))


def test_shape_order_and_repeats():
    scores = rouge_l("one two three", ["three", "one two", "three"])
    assert scores.shape == (3, 3) and scores.dtype == np.float64
    assert scores[0].tolist() == scores[2].tolist() == [1.0, 1 / 3, 0.5]
    assert rouge_l("one", []).shape == rouge_l_plain("one", []).shape == (0, 3)

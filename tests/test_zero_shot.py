"""The base as a judge: its own prediction of the tag after EOS, by a plain forward pass, and how often it is right."""

import numpy as np
import pytest
import torch

from roads import candidates, model, schema, zero_shot
from roads.stages import likelihood
from roads.tldr import PAD
from roads.world import World


@pytest.fixture
def world(tiny):
    return World(tiny.source)


@pytest.fixture
def base(world, tmp_path):
    shape = schema.FromScratch(kind="new", hidden_size=32, layers=1, heads=2, max_positions=32)
    model.new_policy(shape, world.vocab_size, seed=3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_it_is_the_expected_sum_of_the_buckets_at_eos(base, world, tiny):
    query = world.prompts(6, np.random.default_rng(0))
    response = np.pad(world.summaries(query, np.random.default_rng(1)), ((0, 0), (0, 1)), constant_values=PAD)
    reader, policy = zero_shot.load(base, tiny), model.load_policy(base)
    rows = [torch.from_numpy(rows) for rows in (query, response)]
    found = candidates.rewards(reader, rows[0], rows[1][:, None])[:, 0]
    with torch.no_grad():
        logits = policy(torch.cat([rows[0], rows[1][:, :-1]], 1)).logits[:, -1]  # after EOS, before the padding
    tags = logits[:, world.first_tag : world.first_tag + 4].softmax(1)
    assert found == pytest.approx((tags @ torch.tensor([0.0, 1, 1, 2])).numpy(), abs=1e-5)  # 2 x 2 buckets


def test_right_by_quality_is_not_right_by_label(base, world, tiny, tmp_path, monkeypatch):
    """Of four pairs two labels are wrong about the true quality: a judge that follows the labels is right twice."""
    rng = np.random.default_rng(2)
    query = world.prompts(40, rng)
    sides = [np.pad(world.summaries(query, rng), ((0, 0), (0, 1)), constant_values=PAD) for _ in range(2)]
    gap = world.quality(query, sides[0]) - world.quality(query, sides[1])
    kept = np.concatenate([np.flatnonzero(gap > 0)[:2], np.flatnonzero(gap < 0)[:2]])
    (tmp_path / "pairs").mkdir()
    np.savez(tmp_path / "pairs/pairs.npz", query=query[kept], chosen=sides[0][kept], rejected=sides[1][kept])
    monkeypatch.setattr(likelihood, "margins", lambda *_: torch.tensor([2.0, 1.0, 0.5, 0.5]))
    likelihood.likelihood(base, tmp_path / "pairs", base, tmp_path / "out", tiny, "base")
    with np.load(tmp_path / "out/scores.npz") as found:
        assert found["by_quality"].tolist() == [1, 1, 0, 0] and (found["score"] > 0.5).all() and "post" not in found

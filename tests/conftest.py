"""What several tests share: a tiny world, a tiny policy, rows with padding on both sides."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads: its threads get in the way of tiny matrices

import pytest
import torch

from roads import config, model
from roads.tldr import EOS, PAD

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> config.Scale:
    """The block `tiny` of params.yaml: mini with small numbers."""
    return config.load(ROOT / "params.yaml").scales["tiny"]


@pytest.fixture
def policy():
    return model.new_policy(config.Model(hidden_size=32, layers=2, heads=2, max_positions=64), 20, seed=3).eval()


@pytest.fixture
def rows():
    """Queries [4, 6] padded left and responses [4, 5] padded right, of unequal lengths."""
    query = torch.tensor([[PAD, PAD, 5, 6, 7, 2], [3, 4, 5, 6, 7, 2], [PAD, PAD, PAD, PAD, 9, 2], [PAD, 8, 8, 3, 4, 2]])
    response = torch.tensor(
        [[10, 11, EOS, PAD, PAD], [12, 13, 14, EOS, PAD], [15, EOS, PAD, PAD, PAD], [5, 5, 5, 5, EOS]])
    return query, response

"""What pretraining alone knows about judging, in the synthetic world: a reward model that has seen no preference."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from roads import model, schema
from roads.world import World


class TagReader(nn.Module):
    """Reads a policy's own prediction of the tag that ends a document of its corpus (world.py), after EOS.

    The reward is the expected sum of the tag's buckets, in buckets. Where tags tell the quality that is its expected
    bucket. Where they tell attributes each counts alike, for nothing in pretraining says which of them readers like.
    Called as a `model.RewardModel` is by `candidates.rewards`.
    """

    def __init__(self, policy: PreTrainedModel, world: World):
        super().__init__()
        self.trunk, self.output = policy.base_model, policy.get_output_embeddings()
        values = torch.tensor(world.tag_values(), dtype=torch.float32, device=policy.device)
        self.register_buffer("values", values)
        self.tags = slice(world.first_tag, world.first_tag + len(values))

    def head(self, states: Tensor) -> Tensor:
        """Rewards [..., 1] of the hidden states [..., d] at EOS."""
        return (self.output(states)[..., self.tags].float().softmax(-1) @ self.values)[..., None]


def load(path: Path, cfg: schema.Scale) -> TagReader:
    """The policy in a folder as a judge of the scale's world."""
    return TagReader(model.load_policy(path, cfg.compute), World(cfg.source)).eval()

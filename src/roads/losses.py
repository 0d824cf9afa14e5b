"""The loss of language modelling, which pretraining has, and SFT where the query counts too."""

import torch
from transformers import PreTrainedModel

from roads.tldr import PAD


def language_model_loss(policy: PreTrainedModel, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy of tokens [B, L]; weights [B, L] >= 0, 0 at padding."""
    length = int((tokens != PAD).sum(1).max())
    tokens, weights = (part.to(policy.device) for part in (tokens[:, :length].long(), weights[:, 1:length]))
    logits = policy(tokens, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()

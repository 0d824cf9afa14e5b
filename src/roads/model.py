"""Policy and reward model, both on the GPT-NeoX trunk of Pythia: make, load, save; response log-probs and rewards."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from transformers.utils.logging import disable_progress_bar

from roads import config
from roads.tldr import EOS, PAD

disable_progress_bar()  # of loading and saving; the long work has bars of its own


def new_policy(cfg: config.Model, vocab_size: int, seed: int) -> GPTNeoXForCausalLM:
    """A policy of Pythia's architecture with random weights, fp32."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=cfg.hidden_size, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, intermediate_size=4 * cfg.hidden_size, rotary_pct=1.0,
        max_position_embeddings=cfg.max_positions, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    ))


def load_policy(path: Path) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM.from_pretrained(path, dtype=torch.float32)


class RewardModel(nn.Module):
    """Trunk + one linear layer, read at the EOS of the response (Eq. 6); head ~ N(0, 1/sqrt(d + 1))."""

    def __init__(self, trunk: GPTNeoXModel):
        super().__init__()
        self.trunk = trunk
        width = trunk.config.hidden_size
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_policy(cls, path: Path, seed: int) -> "RewardModel":
        policy = load_policy(path)
        torch.manual_seed(seed)
        return cls(policy.base_model)

    @classmethod
    def load(cls, path: Path) -> "RewardModel":
        model = cls(GPTNeoXModel.from_pretrained(path, dtype=torch.float32))
        model.head.load_state_dict(load_file(Path(path) / "head.safetensors"))
        return model

    def save_pretrained(self, path: Path) -> None:
        self.trunk.save_pretrained(path)
        save_file({k: v.contiguous() for k, v in self.head.state_dict().items()}, Path(path) / "head.safetensors")

    def forward(self, query: Tensor, response: Tensor) -> Tensor:
        """Rewards [B] of responses [B, R] (padded right) to queries [B, Q] (padded left)."""
        query, response = trim(query, response)
        hidden = self.trunk(**_inputs(query, response)).last_hidden_state
        last = query.shape[1] + (response != PAD).sum(1) - 1
        return self.head(hidden[torch.arange(len(last)), last]).squeeze(1)


def trim(query: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns that are padding in every row."""
    longest_query = int((query != PAD).sum(1).max())
    longest_response = int((response != PAD).sum(1).max())
    return query[:, query.shape[1] - longest_query :], response[:, :longest_response]


def _inputs(query: Tensor, response: Tensor) -> dict[str, Tensor]:
    """The trunk's inputs for query + response; positions count from the first real token."""
    tokens = torch.cat([query, response], dim=1).long()
    real = tokens != PAD
    # Padding on the right is never attended to by what comes before it: only the left needs a mask.
    if bool(real[:, 0].all()):
        return {"input_ids": tokens, "use_cache": False}
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": real.long(), "position_ids": positions, "use_cache": False}


def prefill(trunk, query: Tensor) -> tuple[Tensor, DynamicCache]:
    """Run the prompts [B, Q], padded left, once: the last hidden states [B, d], and a cache to go on from."""
    real = (query != PAD).long()
    cache = DynamicCache(config=trunk.config)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    out = trunk(query.long(), attention_mask=real, position_ids=positions, past_key_values=cache)
    return out.last_hidden_state[:, -1], cache


@torch.inference_mode()
def candidate_rewards(rm: RewardModel, query: Tensor, completions: Tensor) -> Tensor:
    """Rewards [B, n] of completions [B, n, R]: a prompt is run once, and so are equal completions of it."""
    n_prompts, n, width = completions.shape
    owner = torch.arange(n_prompts).repeat_interleave(n)[:, None]
    rows, where = torch.unique(torch.cat([owner, completions.view(-1, width)], 1), dim=0, return_inverse=True)
    owner, (query, response) = rows[:, 0], trim(query, rows[:, 1:])
    _, cache = prefill(rm.trunk, query)
    cache.batch_select_indices(owner)
    real = (query != PAD)[owner]
    hidden = rm.trunk(
        response, attention_mask=torch.cat([real, response != PAD], 1).long(), past_key_values=cache,
        position_ids=real.sum(1, keepdim=True) + torch.arange(response.shape[1])).last_hidden_state
    last = (response != PAD).sum(1) - 1
    return rm.head(hidden[torch.arange(len(last)), last]).squeeze(1)[where].view(n_prompts, n)


def response_logps(policy, query: Tensor, response: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over the response of log softmax(logits / temperature): r_pi of Eq. 1.

    Args:
        query: [B, Q], padded left. response: [B, R], padded right, EOS included.
        temperature: online DPO divides the logits by the sampling temperature.
    Returns:
        Log-probabilities [B] in nats, fp32. Logits are computed at response positions only.
    """
    query, response = trim(query, response)
    hidden = policy.base_model(**_inputs(query, response)).last_hidden_state
    logits = policy.get_output_embeddings()(hidden[:, query.shape[1] - 1 : -1]).float() / temperature
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, response.long().unsqueeze(2)).squeeze(2)
    return (token_logps * (response != PAD)).sum(1)


@torch.no_grad()
def all_logps(policy, query, response, temperature: float = 1.0, batch_size: int = 256, label: str = "logps"):
    """Log-probs [N] of every response, computed once, without gradients."""
    parts = tqdm(torch.arange(len(query)).split(batch_size), desc=label, unit="batch")
    return torch.cat([response_logps(policy, query[i], response[i], temperature) for i in parts])

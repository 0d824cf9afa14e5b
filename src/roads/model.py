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

LOGITS = 2**26  # at a time: 256 MiB

disable_progress_bar()  # of loading and saving; the long work has bars of its own


def new_policy(cfg: config.New, vocab_size: int, seed: int) -> GPTNeoXForCausalLM:
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


def _positions(real: Tensor) -> Tensor:
    """Positions [B, L] that count from the first real token."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _inputs(query: Tensor, response: Tensor) -> dict[str, Tensor]:
    """The trunk's inputs for query + response."""
    tokens = torch.cat([query, response], dim=1).long()
    real = tokens != PAD
    # Padding on the right is never attended to by what comes before it: only the left needs a mask.
    if bool(real[:, 0].all()):
        return {"input_ids": tokens, "use_cache": False}
    return {"input_ids": tokens, "attention_mask": real.long(), "position_ids": _positions(real), "use_cache": False}


def prefill(trunk, query: Tensor) -> tuple[Tensor, DynamicCache]:
    """Run the prompts [B, Q], padded left, once: the last hidden states [B, d], and a cache to go on from."""
    real = query != PAD
    cache = DynamicCache(config=trunk.config)
    out = trunk(query.long(), attention_mask=real.long(), position_ids=_positions(real), past_key_values=cache)
    return out.last_hidden_state[:, -1], cache


def _prefix_tree(completions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The distinct prefixes of every prompt's completions [B, n, R]: one tree a prompt, a prefix a node.

    [5, 6, EOS], [5, 7, EOS] make five nodes: 5 and below it 6, EOS, 7, EOS. That is their order, depth first, and one
    prompt's nodes come after the other's: what descends from node j is j + 1 ... end[j] - 1.

    Returns:
        Of the T nodes: the prompt, the token, the depth (from 0) and the end, each [T]; and the node that each
        completion is at with each of its tokens, [B, n, R] (at padding: some node).
    """
    n_prompts, n, width = completions.shape
    prompt = torch.arange(n_prompts, device=completions.device).repeat_interleave(n)[:, None]
    rows, where = torch.unique(torch.cat([prompt, completions.reshape(-1, width)], 1), dim=0, return_inverse=True)
    differs = torch.ones_like(rows, dtype=torch.bool)
    differs[1:] = rows[1:] != rows[:-1]
    real = rows[:, 1:] != PAD
    new = (differs.cumsum(1)[:, 1:] > 0) & real  # rows are sorted: a prefix is new where it is not the row's before
    node = ((new.flatten().cumsum(0) - 1).view(new.shape) * new).cummax(0).values
    row, depth = new.nonzero(as_tuple=True)
    leaf = (node * real).amax(1, keepdim=True).expand(-1, width)
    end = 1 + torch.zeros_like(row).scatter_reduce(0, node[real], leaf[real], "amax")
    return rows[row, 0], rows[row, 1 + depth], depth, end, node[where].view(completions.shape)


def _run_candidates(trunk, query: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """Run completions [B, n, R] on their prompts [B, Q]: a prompt is run once, and so is each prefix that they share.

    A prompt's tree is one sequence behind the prompt's cache, in which a node sees the prompt and its own ancestors.

    Returns:
        Hidden states [S, d]; and which of the S follows the prompt and each token of a completion, [B, n, 1 + R].
    """
    query, completions = trim(query, query)[0], completions.long()
    n_prompts, device = len(query), query.device
    states, cache = prefill(trunk, query)
    prompt, token, depth, end, node = _prefix_tree(completions)
    if len(token):
        count = torch.bincount(prompt, minlength=n_prompts)
        first = count.cumsum(0) - count
        slot = torch.arange(len(token), device=device) - first[prompt]
        width = int(count.max())
        slots = torch.arange(width, device=device)
        tokens = torch.full((n_prompts, width), PAD, device=device)
        positions, ends = torch.zeros_like(tokens), (slots + 1).repeat(n_prompts, 1)  # padding sees itself
        tokens[prompt, slot], ends[prompt, slot] = token, end - first[prompt]
        real = query != PAD
        positions[prompt, slot] = real.sum(1)[prompt] + depth
        descends = (slots[:, None] >= slots) & (slots[:, None] < ends[:, None])
        mask = torch.cat([real[:, None].expand(-1, width, -1), descends], 2)[:, None]
        hidden = trunk(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).last_hidden_state
        states = torch.cat([states, hidden[prompt, slot]])
    start = torch.arange(n_prompts, device=device)[:, None, None].expand(-1, completions.shape[1], 1)
    return states, torch.cat([start, n_prompts + node], 2)


@torch.inference_mode()
def candidate_rewards(rm: RewardModel, query: Tensor, completions: Tensor) -> Tensor:
    """Rewards [B, n] of completions [B, n, R] to queries [B, Q]."""
    states, at = _run_candidates(rm.trunk, query, completions)
    last = at.gather(2, (completions != PAD).sum(2, keepdim=True))
    return rm.head(states[last.squeeze(2)]).squeeze(2)


@torch.inference_mode()
def candidate_logps(policy, query: Tensor, completions: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, n] of completions [B, n, R]: `response_logps` without gradients, each prompt run once."""
    real = completions != PAD
    followed = torch.nn.functional.pad(real[..., 1:], (0, 1))  # what comes after the last token is never asked for
    states, at = _run_candidates(policy.base_model, query, completions.where(followed, PAD))
    at, token = at[..., :-1][real], completions[real].long()
    logps = torch.empty(len(token), device=states.device)
    for part in torch.arange(len(states), device=states.device).split(max(1, LOGITS // policy.config.vocab_size)):
        logits = policy.get_output_embeddings()(states[part]).float() / temperature
        here = (at >= part[0]) & (at <= part[-1])
        state = at[here] - part[0]
        logps[here] = logits[state, token[here]] - logits.logsumexp(1)[state]
    return torch.zeros(real.shape, device=states.device).masked_scatter(real, logps).sum(2)


def in_batches(function, model, query: Tensor, completions: Tensor, *args, label: str, budget: int = 2**13) -> Tensor:
    """`candidate_rewards` or `candidate_logps` [N, n] of any number of prompts, `budget` tokens at a time.

    Prompts whose trees are about as large run together.
    """
    device = next(model.parameters()).device
    nodes = [torch.bincount(_prefix_tree(part)[0], minlength=len(part)) for part in completions.long().split(256)]
    size = (query != PAD).sum(1) + torch.cat(nodes)
    order, batches = size.argsort(descending=True, stable=True), []
    while len(order):
        fit = max(1, budget // int(size[order[0]]))
        batches.append(order[:fit])
        order = order[fit:]
    found = torch.empty(completions.shape[:2])
    for i in tqdm(batches, desc=label, unit="batch"):
        found[i] = function(model, query[i].to(device), completions[i].to(device), *args).float().cpu()
    return found


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
    return _sum_logps(policy, hidden[:, query.shape[1] - 1 : -1], response, temperature)


def _sum_logps(policy, hidden: Tensor, response: Tensor, temperature: float) -> Tensor:
    """Log-probs [B] of responses [B, R] from the hidden states [B, R, d] that predict each of their tokens."""
    logits = policy.get_output_embeddings()(hidden).float() / temperature
    token_logps = torch.log_softmax(logits, dim=-1).gather(2, response.long().unsqueeze(2)).squeeze(2)
    return (token_logps * (response != PAD)).sum(1)


def _run_pair(trunk, query: Tensor, chosen: Tensor, rejected: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run prompt + chosen + rejected as one sequence in which neither completion sees the other.

    Returns, for each of the two: its tokens [B, R], and the hidden states [B, 1 + R, d] of the prompt's last token and
    of its own. Gradients reach the prompt from both sides.
    """
    query, chosen = trim(query, chosen)
    rejected = trim(query, rejected)[1]
    tokens = torch.cat([query, chosen, rejected], dim=1).long()
    real = tokens != PAD
    part = torch.tensor([0] * query.shape[1] + [1] * chosen.shape[1] + [2] * rejected.shape[1])
    sees = torch.ones(len(part), len(part), dtype=torch.bool).tril() & ((part == 0) | (part[:, None] == part))
    mask = sees & real[:, None] | torch.eye(len(part), dtype=torch.bool)  # a softmax over nothing would be nan
    positions = _positions(real) - (part == 2) * (chosen != PAD).sum(1, keepdim=True)
    hidden = trunk(input_ids=tokens, attention_mask=mask[:, None], position_ids=positions.clamp(min=0),
                   use_cache=False).last_hidden_state
    before, *states = hidden.split([query.shape[1], chosen.shape[1], rejected.shape[1]], dim=1)
    return [(side, torch.cat([before[:, -1:], own], 1)) for side, own in zip((chosen, rejected), states, strict=True)]


def pair_logps(policy, query: Tensor, chosen: Tensor, rejected: Tensor, temperature: float = 1.0):
    """`response_logps` [B] of chosen and of rejected; their prompt [B, Q] is run once for both."""
    sides = _run_pair(policy.base_model, query, chosen, rejected)
    return [_sum_logps(policy, hidden[:, :-1], side, temperature) for side, hidden in sides]


def pair_rewards(rm: RewardModel, query: Tensor, chosen: Tensor, rejected: Tensor):
    """Rewards [B] of chosen and of rejected; their prompt [B, Q] is run once for both."""
    sides = _run_pair(rm.trunk, query, chosen, rejected)
    rows = torch.arange(len(query))
    return [rm.head(hidden[rows, (side != PAD).sum(1)]).squeeze(1) for side, hidden in sides]

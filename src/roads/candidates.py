"""Scores of many completions of a prompt: the prompt is run once, and so is each prefix that some of them share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from roads import model, schema
from roads.tldr import PAD

TOKENS = 2**13  # that are scored at once; on a GPU four times as many, or a small model waits for Python


class PrefixTrees(NamedTuple):
    """The distinct prefixes of every prompt's completions: one tree a prompt, a prefix a node, T nodes together.

    Nodes stand depth first, and one prompt's after the other's: what descends from node j is j + 1 ... end[j] - 1.

    >>> tree = prefix_trees(torch.tensor([[[5, 6, 0], [5, 7, 0]]]))  # 5, and below it 6, EOS, 7, EOS
    >>> tree.token.tolist(), tree.depth.tolist(), tree.end.tolist()
    ([5, 6, 0, 7, 0], [0, 1, 2, 1, 2], [5, 3, 3, 5, 5])
    >>> tree.node.tolist()
    [[[0, 1, 2], [0, 3, 4]]]
    """

    prompt: Tensor  # [T]
    token: Tensor  # [T]
    depth: Tensor  # [T], from 0
    end: Tensor  # [T]
    node: Tensor  # [B, n, R]: where each completion is with each of its tokens; at padding, some node


def prefix_trees(completions: Tensor) -> PrefixTrees:
    """Of completions [B, n, R], padded right."""
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
    return PrefixTrees(rows[row, 0], rows[row, 1 + depth], depth, end, node[where].view(completions.shape))


def _run_candidates(trunk: PreTrainedModel, query: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """Run completions [B, n, R] on their prompts [B, Q]: a prompt is run once, and so is each prefix that they share.

    A prompt's tree is one sequence behind the prompt's cache, in which a node sees the prompt and its own ancestors.

    Returns:
        Hidden states [S, d]; and which of the S follows the prompt and each token of a completion, [B, n, 1 + R].
    """
    query, completions = model.trim(query, query)[0], completions.long()
    n_prompts, device = len(query), query.device
    states, cache = model.prefill(trunk, query)
    prompt, token, depth, end, node = prefix_trees(completions)
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
def rewards(rm: model.RewardModel, query: Tensor, completions: Tensor) -> Tensor:
    """Rewards [B, n] of completions [B, n, R] to queries [B, Q]."""
    states, at = _run_candidates(rm.trunk, query, completions)
    last = at.gather(2, (completions != PAD).sum(2, keepdim=True))
    return rm.head(states[last.squeeze(2)].float()).squeeze(2)


@torch.inference_mode()
def logps(policy: PreTrainedModel, query: Tensor, completions: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, n] of completions [B, n, R]: `model.response_logps` without gradients."""
    real = completions != PAD
    followed = torch.nn.functional.pad(real[..., 1:], (0, 1))  # what comes after the last token is never asked for
    states, at = _run_candidates(policy.base_model, query, completions.where(followed, PAD))
    at, token = at[..., :-1][real], completions[real].long()
    found = torch.empty(len(token), device=states.device)
    for part in torch.arange(len(states), device=states.device).split(max(1, model.LOGITS // policy.config.vocab_size)):
        logits = policy.get_output_embeddings()(states[part]).float() / temperature
        here = (at >= part[0]) & (at <= part[-1])
        state = at[here] - part[0]
        found[here] = logits[state, token[here]] - logits.logsumexp(1)[state]
    return torch.zeros(real.shape, device=states.device).masked_scatter(real, found).sum(2)


def in_batches(function: Callable, net: nn.Module, query: Tensor, completions: Tensor, *args: object, label: str,
               budget: int | None = None) -> Tensor:
    """`rewards` or `logps` [N, n] of any number of prompts, `budget` tokens at a time: TOKENS, or more on a GPU.

    Prompts whose trees are about as large run together.
    """
    device = next(net.parameters()).device
    budget = budget or (TOKENS if device.type == "cpu" else 4 * TOKENS)
    nodes = [torch.bincount(prefix_trees(part).prompt, minlength=len(part)) for part in completions.long().split(256)]
    size = (query != PAD).sum(1) + torch.cat(nodes)
    order, batches = size.argsort(descending=True, stable=True), []
    while len(order):
        fit = max(1, budget // int(size[order[0]]))
        batches.append(order[:fit])
        order = order[fit:]
    found = torch.empty(completions.shape[:2])
    for i in tqdm(batches, desc=label, unit="batch"):
        found[i] = function(net, query[i].to(device), completions[i].to(device), *args).float().cpu()
    return found


def implicit_rewards(path: Path, reference: Path | None, query: Tensor, completions: Tensor,
                     compute: schema.Compute) -> Tensor:
    """log pi, or log(pi / pi_ref) where there is a reference, of completions [N, n, R]: [N, n]."""
    policies = [model.load_policy(policy, compute).eval() for policy in (path, reference) if policy]
    found = [in_batches(logps, policy, query, completions, label="logps") for policy in policies]
    return found[0] - found[1] if reference else found[0]

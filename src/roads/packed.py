"""Rows packed into one sequence without padding: a prompt, its completions, the next prompt, and so on.

Every row is a tree: its prompt is a chain, and the completions are branches at its end. Tokens stand depth first,
so token k is seen by the tokens k ... end[k] - 1 and by no others. FlexAttention skips the blocks of 128 x 128 in
which nothing is seen.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from roads.tldr import PAD

ATTENTION = "roads_packed"
BLOCK = 128  # FlexAttention's


class Packed(NamedTuple):
    """B prompts with n completions each, as one sequence of L tokens; S of them are tokens of completions.

    >>> found = pack(*(torch.tensor([row]) for row in ([1, 5, 6], [7, 0], [8, 9, 0])))
    >>> found.token.tolist()[:7], found.position.tolist()[:7], found.end.tolist()[:7]
    ([5, 6, 7, 0, 8, 9, 0], [0, 1, 2, 3, 2, 3, 4], [7, 7, 4, 4, 7, 7, 7])
    >>> found.before.tolist(), found.completion.tolist(), found.last.tolist()
    ([1, 2, 1, 4, 5], [0, 0, 1, 1, 1], [[3], [6]])
    """

    token: Tensor  # [L]
    position: Tensor  # [L], in its own prompt and completion
    end: Tensor  # [L]
    before: Tensor  # [S], which of the L predicts each token of a completion
    target: Tensor  # [S], those tokens
    completion: Tensor  # [S], whose they are: the first of row i is i, the second B + i
    last: Tensor  # [n, B], the last token of every completion


def filled_up(count: int) -> int:
    """How many tokens `count` of them are filled up to.

    A multiple of 128, and of more where there are many: lengths that are compiled for are few, and less than a
    sixteenth is padding.

    >>> [filled_up(count) for count in (1, 300, 5_000, 11_000, 43_645)]
    [128, 384, 5120, 11264, 45056]
    """
    grain = BLOCK * 2 ** max(0, (count // (16 * BLOCK)).bit_length() - 1)
    return -(-count // grain) * grain


def pack(query: Tensor, *sides: Tensor) -> Packed:
    """Of query [B, Q], padded left, and completions [B, R] of each, padded right."""
    parts = query, *sides
    tokens = torch.cat(parts, 1).long()
    counts = torch.stack([(part != PAD).sum(1) for part in parts], 1)  # [B, 1 + n]
    ends = counts.flatten().cumsum(0).view_as(counts)
    starts, prompt = ends - counts, ends[:, 0] - 1  # the prompt's last token
    row, column = (tokens != PAD).nonzero(as_tuple=True)
    token, index = tokens[row, column], torch.arange(len(row))
    part = torch.arange(len(parts)).repeat_interleave(torch.tensor([part.shape[1] for part in parts]))[column]
    position = index - starts[row, part] + (part > 0) * counts[row, 0]
    end = torch.where(part > 0, ends[row, part], ends[row, -1])
    before = torch.where(index == starts[row, part], prompt[row], index - 1)
    last = torch.where(counts > 0, ends - 1, prompt[:, None])[:, 1:].T
    own, completion = part > 0, (part - 1) * len(query) + row
    more = filled_up(len(token)) - len(token)
    return Packed(
        pad(token, (0, more), value=PAD), pad(position, (0, more)),
        torch.cat([end, torch.arange(len(token), len(token) + more) + 1]),  # padding sees itself
        before[own], token[own], completion[own], last)


def dense_mask(end: Tensor) -> Tensor:
    """Who sees whom, [1, 1, L, L]: row q, column k."""
    index = torch.arange(len(end), device=end.device)
    return ((index <= index[:, None]) & (index[:, None] < end))[None, None]


def block_mask(end: Tensor) -> BlockMask:
    """`dense_mask` for FlexAttention; L is a multiple of 128.

    Which blocks are full, mixed or empty follows from the least and greatest end of their keys: L x L is never made.
    """
    count = len(end) // BLOCK
    start = torch.arange(count, device=end.device) * BLOCK
    least, most = end.view(count, BLOCK).aminmax(dim=1)
    full = (start < start[:, None]) & (least >= start[:, None] + BLOCK)
    mixed = (start <= start[:, None]) & (most > start[:, None]) & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return BlockMask.from_kv_blocks(*listed(mixed), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees,
                                    seq_lengths=(len(end), len(end)))


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
            **_: object) -> tuple[Tensor, None]:
    """Attention of transformers' models under `block_mask`; under `dense_mask` where FlexAttention has no gradient.

    Raises:
        ValueError: neither mask; without one every token would see those after it.
    """
    if not isinstance(mask, BlockMask) and (mask is None or mask.dim() != 4):
        raise ValueError("a model that is prepared for packed rows ran without their mask; use packed.run")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary position may have left them in fp32
    shared = query.shape[1] // key.shape[1]
    if shared & (shared - 1):  # FlexAttention shares keys among 2, 4, 8 ... heads
        key, value, shared = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1), 1
    if isinstance(mask, BlockMask):
        found = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=shared > 1)
    else:
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared > 1)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)


def run(trunk: PreTrainedModel, packed: Packed) -> Tensor:
    """Hidden states [L, d] of the trunk, whose attention is `ATTENTION`."""
    end = packed.end.to(trunk.device)
    mask = block_mask(end) if end.is_cuda else dense_mask(end)
    return trunk(input_ids=packed.token[None].to(trunk.device), position_ids=packed.position[None].to(trunk.device),
                 attention_mask=mask, use_cache=False).last_hidden_state[0]


def logps(policy: PreTrainedModel, packed: Packed, temperature: float, at_once: int) -> Tensor:
    """Log-probs [n, B] of the completions; logits of `at_once` tokens are in memory at a time."""
    hidden = run(policy.base_model, packed)

    def part(states: Tensor, target: Tensor) -> Tensor:
        logits = policy.get_output_embeddings()(states).float() / temperature
        return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)

    states, target = hidden[packed.before.to(hidden.device)], packed.target.to(hidden.device)
    found = torch.cat([checkpoint(part, *both, use_reentrant=False)
                       for both in zip(states.split(at_once), target.split(at_once), strict=True)])
    sums = found.new_zeros(packed.last.numel()).index_add(0, packed.completion.to(found.device), found)
    return sums.view(packed.last.shape)


def supports(trunk: PreTrainedModel) -> bool:
    """Whether a trunk's attention can be exchanged for ours, which knows neither dropout nor windows nor caps."""
    names = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout",
             "sliding_window", "attn_logit_softcapping")
    return trunk._supports_attention_backend and not any(getattr(trunk.config, name, None) for name in names)


def prepare(trunk: PreTrainedModel) -> None:
    """Let a trunk run packed rows, with compiled layers: their many small operations are fused, one program for all."""
    trunk.set_attn_implementation(ATTENTION)
    limits = torch._dynamo.config  # of how often a layer is compiled, in a process that trains model after model
    limits.recompile_limit, limits.accumulated_recompile_limit = max(64, limits.recompile_limit), 4096
    for module in trunk.modules():
        if type(module).__name__ in (trunk._no_split_modules or ()):
            module.compile()

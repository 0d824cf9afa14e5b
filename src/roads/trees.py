"""Prompts and the prefixes that grow from them, as the sampler keeps them: keys and values, and attention to them.

Keys and values are only ever added: nothing is gathered, repeated or dropped. A node, which is a prefix that some
completions share, sees its prompt, the nodes above it and itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from roads.stage import UserError

TREE = "roads_tree"  # transformers' name for `_attend`
BLOCK = 128  # slots that are looked at together


class Trees(Cache):
    """Keys and values of `places` prompts and what grows from them, `slots` tokens each, `width` nodes at the tip.

    Where shapes are fixed, as a CUDA graph needs them, one more place takes what a step's padding writes.
    """

    def __init__(self, places: int, slots: int, width: int, device: torch.device, fixed: bool):
        super().__init__(layers=[])
        self.places, self.slots, self.width, self.fixed = places, slots, width, fixed
        self.keys: list[Tensor] = []  # a layer's: [places + 1, slots, heads, d]
        self.values: list[Tensor] = []
        self.sees = torch.zeros(places + 1, width, slots, dtype=torch.bool, device=device)
        self.start = torch.zeros(places, dtype=torch.long)  # tokens of the prompt
        self.used = torch.zeros(places, dtype=torch.long)
        self.at = self.slot = torch.empty(0)  # of the nodes of a step: place * width + number; place * slots + slot
        self.blocks = torch.ones(places + 1, 1, 1, dtype=torch.int32, device=device)  # of BLOCK slots, that are used
        self.mask = None  # what flex attention makes of them

    def plant(self, place: Tensor, prompts: DynamicCache, length: Tensor) -> None:
        """Take in prompts [G] that were run, padded on the right."""
        if not self.keys:
            for layer in prompts.layers:
                for room, part in ((self.keys, layer.keys), (self.values, layer.values)):
                    # Zeros: what is not seen counts nothing, but nothing times infinity would.
                    room.append(layer.values.new_zeros(self.places + 1, self.slots, part.shape[1], part.shape[3]))
        to, width = place.to(self.sees.device), prompts.layers[0].keys.shape[2]
        for layer, keys, values in zip(prompts.layers, self.keys, self.values, strict=True):
            keys[to, :width] = layer.keys.transpose(1, 2).to(keys.dtype)  # rotary position may have left them in fp32
            values[to, :width] = layer.values.transpose(1, 2)
        slots = torch.arange(self.slots, device=to.device)
        self.sees[to, 0] = slots < length.to(to.device)[:, None]
        self.start[place] = self.used[place] = length

    def branch(self, parent: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for nodes [R] below others, those of a place together: where they are, and the slots they get."""
        count = torch.bincount(place, minlength=self.places)
        number = torch.arange(len(place)) - (count.cumsum(0) - count)[place]
        at, own = place * self.width + number, self.used[place] + number
        self.used += count
        device = self.sees.device
        rows, above, own_slot = at.to(device), parent.to(device), own.to(device)
        sees = self.sees.flatten(0, 1)
        sees[rows] = sees[above].scatter(1, own_slot[:, None], True)
        return at, place * self.slots + own

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values [1, heads, R, d] to their slots; all of the layer's."""
        for room, part in ((self.keys[layer], key), (self.values[layer], value)):
            room.flatten(0, 1)[self.slot] = part[0].transpose(0, 1).to(room.dtype)
        return self.keys[layer], self.values[layer]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None,
            trees: Trees | None = None, **options: object) -> tuple[Tensor, None]:
    """Attention of a step's nodes [1, heads, R, d] to all that is planted; of prompts, with no trees yet, as ever.

    Heads that share keys are more queries of those keys: no key is repeated for them.
    """
    if trees is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: {unknown[0]} is not in this sampler; set compute.sampler: vllm")
    window = options.get("sliding_window")
    if isinstance(window, int) and 0 < window < trees.slots:
        raise UserError(f"{type(module).__name__}: a window of {window} tokens is less than a "
                        "prompt and its completions, and this sampler knows none; set compute.sampler: vllm")
    _, heads, _, d = query.shape
    shared = heads // key.shape[2]
    rows = query[0].transpose(0, 1).to(key.dtype)
    if trees.fixed:
        tips, at = trees.sees.shape[:2], trees.at
    else:  # no more than there is
        place, number = trees.at // trees.width, trees.at % trees.width
        tips = int(place.max()) + 1, int(number.max()) + 1
        at = place * tips[1] + number
    padded = rows.new_zeros(tips[0] * tips[1], heads, d)
    padded[at] = rows
    padded = padded.view(*tips, -1, shared, d).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [places, key heads, queries, d]
    if trees.fixed:
        out = _flex(padded, key.transpose(1, 2), value.transpose(1, 2), trees, shared, scaling)
    else:
        longest = int(trees.used[: tips[0]].max())
        sees = trees.sees[: tips[0], : tips[1], :longest].repeat_interleave(shared, 1)
        key, value = (part[: tips[0], :longest].transpose(1, 2) for part in (key, value))
        out = scaled_dot_product_attention(padded, key, value, sees[:, None], scale=scaling)
    out = out.unflatten(2, (tips[1], shared)).permute(0, 2, 1, 3, 4).reshape(tips[0] * tips[1], heads, d)
    return out[at][None], None


ALL_ATTENTION_FUNCTIONS.register(TREE, _attend)
_compiled = None


def _flex(query: Tensor, key: Tensor, value: Tensor, trees: Trees, shared: int, scaling: float | None) -> Tensor:
    """Attention in fixed shapes: of a place's keys, only the blocks that are used are read."""
    global _compiled
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if query.is_cuda and not _compiled:
        # Once for every number of places, slots and nodes, of all the stages that a process draws for (stay.py); beyond
        # the limits it would run as written, many times slower.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        _compiled = torch.compile(flex_attention, dynamic=False)
    if trees.mask is None:
        sees, columns = trees.sees, torch.arange(trees.slots // BLOCK, dtype=torch.int32, device=query.device)
        trees.mask = BlockMask.from_kv_blocks(
            trees.blocks, columns.expand(len(sees), 1, 1, -1).contiguous(),
            BLOCK_SIZE=(-(-query.shape[2] // BLOCK) * BLOCK, BLOCK),
            mask_mod=lambda place, head, row, slot: sees[place, row // shared, slot],
            seq_lengths=(query.shape[2], trees.slots))
    return (_compiled or flex_attention)(query, key, value, block_mask=trees.mask, scale=scaling)


@contextmanager
def attended(policy: PreTrainedModel) -> Iterator[None]:
    """The policy's attention knows trees meanwhile."""
    if not policy._supports_attention_backend:
        raise UserError(f"{policy.config.model_type}: transformers lets nobody change its attention, as this sampler "
                        "does; set compute.sampler: vllm")
    before = policy.config._attn_implementation
    policy.set_attn_implementation(TREE)
    try:
        yield
    finally:
        policy.set_attn_implementation(before)

"""The sampler: a prompt's completions grow as one tree, to which keys and values are only ever added.

The prompt is run once and so is every prefix that some of its completions share; a node sees the prompt, the nodes
above it and itself. Nothing is gathered, repeated or dropped. The nodes whose next token is drawn, those of all prompts
that are under way, go through the model as one sequence; a prompt that is done makes room for one that waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from roads.stage import UserError
from roads.tldr import EOS, PAD

TREE = "roads_tree"  # transformers' name for `_attend`
BLOCK = 128  # tokens of the vocabulary, or of a prompt's keys, that are looked at together
TOKENS = 2**14  # of prompts that are run together


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

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values [1, heads, R, d] to their slots; all of the layer's."""
        for room, part in ((self.keys[layer], key), (self.values[layer], value)):
            room.flatten(0, 1)[self.slot] = part[0].transpose(0, 1).to(room.dtype)
        return self.keys[layer], self.values[layer]


def _attend(module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float | None = None,
            trees: Trees | None = None, **options):
    """Attention of a step's nodes [1, heads, R, d] to all that is planted; of prompts, with no trees yet, as ever.

    Heads that share keys are more queries of those keys: no key is repeated for them.
    """
    if trees is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise UserError(f"{type(module).__name__}: {unknown[0]} is not in this sampler; set compute.sampler: vllm")
    if (options.get("sliding_window") or trees.slots) < trees.slots:
        raise UserError(f"{type(module).__name__}: a window of {options['sliding_window']} tokens is less than a "
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
FIXED = False  # whether shapes are fixed on a CPU too, for tests
_compiled = None


def _flex(query: Tensor, key: Tensor, value: Tensor, trees: Trees, shared: int, scaling: float | None) -> Tensor:
    """Attention in fixed shapes: of a place's keys, only the blocks that are used are read."""
    global _compiled
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if query.is_cuda and not _compiled:
        # Once for every number of places, slots and nodes; beyond the limit it would run as written, many times slower.
        torch._dynamo.config.recompile_limit = 64
        _compiled = torch.compile(flex_attention, dynamic=False)
    if trees.mask is None:
        sees, columns = trees.sees, torch.arange(trees.slots // BLOCK, dtype=torch.int32, device=query.device)
        trees.mask = BlockMask.from_kv_blocks(
            trees.blocks, columns.expand(len(sees), 1, 1, -1).contiguous(),
            BLOCK_SIZE=(-(-query.shape[2] // BLOCK) * BLOCK, BLOCK),
            mask_mod=lambda place, head, row, slot: sees[place, row // shared, slot],
            seq_lengths=(query.shape[2], trees.slots))
    return (_compiled or flex_attention)(query, key, value, block_mask=trees.mask, scale=scaling)


def draw(logits: Tensor, row: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens [C] from rows [C] of logits [R, V] at a temperature, by inversion at numbers [C] from 0 to 1.

    The distribution function is summed in blocks: which block, then which token of it. The logits are used up.
    """
    weight = logits.float().div_(temperature)  # in place: on a GPU there are hundreds of MB of them
    weight[:, PAD] = -torch.inf
    weight = weight.sub_(weight.amax(1, keepdim=True)).exp_()
    if ragged := -weight.shape[1] % BLOCK:
        weight = pad(weight, (0, ragged))
    weight = weight.unflatten(1, (-1, BLOCK))
    below = weight.sum(2, dtype=torch.double).cumsum(1)
    target = uniform[:, None] * below[row, -1:]
    block = torch.searchsorted(below[row], target, right=True)
    inside = weight[row, block.squeeze(1)].double().cumsum(1)
    before = pad(below, (1, 0))[row].gather(1, block)
    # Two ways to sum differ in the last bit: what is drawn must not be past the last token that can be.
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 2**-50))
    return (block * BLOCK + torch.searchsorted(inside, target, right=True)).squeeze(1)


@contextmanager
def _as_trees(policy):
    """The policy, with attention that knows trees."""
    if not policy._supports_attention_backend:
        raise UserError(f"{policy.config.model_type}: transformers lets nobody change its attention, as this sampler "
                        "does; set compute.sampler: vllm")
    before = policy.config._attn_implementation
    policy.set_attn_implementation(TREE)
    try:
        yield
    finally:
        policy.set_attn_implementation(before)


def _run_prompts(policy, queries: list[Tensor]) -> Iterator[tuple[Tensor, DynamicCache]]:
    """Run prompts, TOKENS at a time: the logits [G, V] after each, and their keys and values, padded right."""
    device = policy.device
    while queries:
        count = max(1, TOKENS // max(map(len, queries)))
        some, queries = queries[:count], queries[count:]
        tokens = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=EOS).to(device).long()
        cache = DynamicCache()
        hidden = policy.base_model(tokens, past_key_values=cache, use_cache=True).last_hidden_state
        last = torch.tensor([len(query) - 1 for query in some], device=device)
        yield policy.get_output_embeddings()(hidden[torch.arange(len(some), device=device), last]), cache


class _Pass:
    """The model's pass over a step's nodes: their logits [R, V].

    On a GPU a CUDA graph: R is rounded up to one of a few sizes, and what is beyond R goes to the last place.
    """

    def __init__(self, policy, trees: Trees):
        self.policy, self.trees, self.graphs, self.pool = policy, trees, {}, None
        self.logits = None  # of whatever graph ran last

    def __call__(self, token: Tensor, position: Tensor, at: Tensor, slot: Tensor) -> Tensor:
        trees, nodes = self.trees, torch.stack([token, position, at, slot])
        if not trees.fixed:
            return self._run(nodes.to(self.policy.device))
        count = nodes.shape[1]
        most = trees.places * trees.width
        grain = max(64, 2 ** (count.bit_length() - 3))
        size = min(-(-count // grain) * grain, most)
        padding = torch.tensor([EOS, 0, most, trees.places * trees.slots])[:, None]
        nodes = torch.cat([nodes, padding.expand(-1, size - count)], 1)
        blocks = ((trees.used + BLOCK - 1) // BLOCK).clamp(min=1).int()
        if self.policy.device.type == "cpu":
            trees.blocks[:-1, 0, 0] = blocks
            return self._run(nodes.to(self.policy.device))
        nodes = nodes.pin_memory()
        trees.blocks[:-1, 0, 0].copy_(blocks.pin_memory(), non_blocking=True)
        if size not in self.graphs:
            self.graphs[size] = self._capture(nodes.to(self.policy.device))
        graph, static = self.graphs[size]
        static.copy_(nodes, non_blocking=True)
        graph.replay()
        return self.logits[:count]

    def _run(self, nodes: Tensor) -> Tensor:
        token, position, self.trees.at, self.trees.slot = nodes
        hidden = self.policy.base_model(token[None], position_ids=position[None], past_key_values=self.trees,
                                        use_cache=True, trees=self.trees).last_hidden_state
        return self.policy.get_output_embeddings()(hidden[0])

    def _capture(self, static: Tensor):
        if not self.graphs:  # a warm-up: kernels are made
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                logits = self._run(static)
            torch.cuda.current_stream().wait_stream(side)
            self.logits = logits.new_empty(self.trees.places * self.trees.width, logits.shape[1])
            del logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.logits[: static.shape[1]].copy_(self._run(static))
        self.pool = self.pool or graph.pool()
        return graph, static


@torch.inference_mode()
def grow(policy, prompts: Iterator[tuple[int, Tensor, Tensor]], longest: int, n: int, length: int, temperature: float,
         places: int) -> Iterator[tuple[int, Tensor]]:
    """Completions [n, length] int32 of prompts, padded right, each under its number and as soon as it is done.

    Args:
        prompts: numbers, token ids without padding, and draws [length, n] from 0 to 1, which decide every token: what
            a prompt gets does not depend on what runs beside it.
        longest: of the prompts, tokens.
        places: prompts that are under way at once.
    """
    slots = -(-(longest + n * max(1, length - 1)) // BLOCK) * BLOCK
    trees = Trees(places, slots, n, policy.device, FIXED or policy.device.type == "cuda")
    run, vocab = _Pass(policy, trees), policy.get_output_embeddings().weight.shape[0]
    prompts, more = iter(prompts), True
    found = torch.full((places, n, length), PAD, dtype=torch.int32)
    draws = torch.empty(places, length, n, dtype=torch.double)
    depth = torch.zeros(places, dtype=torch.long)  # tokens that a place's completions have
    number = [-1] * places
    free = list(range(places))
    # Of completions that go on: place * n + which; the node it is at; the token that was drawn there.
    which = node = token = torch.empty(0, dtype=torch.long)

    def drawn(logits: Tensor, row: Tensor, which: Tensor) -> Tensor:
        place = which // n
        uniform = draws[place, depth[place], which % n].to(logits.device)
        return draw(logits, row.to(logits.device), uniform, temperature).cpu()

    with _as_trees(policy):
        while True:
            if more and free and (len(free) >= -(-places // 4) or not len(which)):
                some = [prompt for _, prompt in zip(range(len(free)), prompts)]
                more = len(some) == len(free)
                if some:
                    free.sort()
                    place = torch.tensor([free.pop(0) for _ in some])
                    for it, (name, _, uniform) in zip(place.tolist(), some, strict=True):
                        number[it], draws[it], found[it] = name, uniform, PAD
                    depth[place] = 0
                    lengths, begin = torch.tensor([len(query) for _, query, _ in some]), 0
                    for logits, cache in _run_prompts(policy, [query for _, query, _ in some]):
                        part = slice(begin, begin := begin + len(logits))
                        trees.plant(place[part], cache, lengths[part])
                        fresh = (place[part, None] * n + torch.arange(n)).flatten()
                        row = torch.arange(len(logits)).repeat_interleave(n)
                        which, node = torch.cat([which, fresh]), torch.cat([node, fresh // n * n])
                        token = torch.cat([token, drawn(logits, row, fresh)])
            if not len(which):
                return
            place = which // n
            alive = torch.unique(place)
            token = token.where(depth[place] < length - 1, EOS)
            found[place, which % n, depth[place]] = token.int()
            depth[alive] += 1
            going = token != EOS
            # After the last but one token comes the end, whatever the model says.
            closed = going & (depth[place] == length - 1)
            found[place[closed], which[closed] % n, -1] = EOS
            going &= ~closed
            which, node, token = which[going], node[going], token[going]
            place = which // n
            left = torch.bincount(place, minlength=places)
            for it in alive[left[alive] == 0].tolist():
                free.append(it)
                yield number[it], found[it].clone()
            if not len(which):
                continue
            grown, row = torch.unique(node * vocab + token, return_inverse=True)
            parent, place = grown // vocab, grown // vocab // n
            at, slot = trees.branch(parent, place)
            logits = run(grown % vocab, trees.start[place] + depth[place] - 1, at, slot)
            node = at[row]
            token = drawn(logits, row, which)


def places_for(policy, longest: int, n: int, length: int, memory: int) -> int:
    """How many prompts of at most `longest` tokens, with n completions each, are under way at once in so many bytes."""
    shape, weight = policy.config, next(policy.parameters())
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    slots = longest + n * length + BLOCK
    token = 2 * shape.num_hidden_layers * heads * size * weight.element_size()
    # Of every slot keys, values and who sees it; of every node at the tip logits, weights and their sums.
    return max(1, memory // (slots * (token + n) + n * 16 * shape.vocab_size))

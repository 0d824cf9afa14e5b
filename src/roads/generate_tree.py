"""The sampler: a prompt's completions grow as one tree, to which keys and values are only ever added.

The prompt is run once and so is every prefix that some of its completions share. The nodes whose next token is drawn,
those of all prompts that are under way, go through the model as one sequence; a prompt that is done makes room for one
that waits.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from roads.tldr import EOS, PAD
from roads.trees import BLOCK, Trees, attended

TOKENS = 2**14  # of prompts that are run together
FIXED = False  # whether shapes are fixed on a CPU too, for tests


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


def _run_prompts(policy: PreTrainedModel, queries: list[Tensor]) -> Iterator[tuple[Tensor, DynamicCache]]:
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

    def __init__(self, policy: PreTrainedModel, trees: Trees):
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

    def _capture(self, static: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
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


class _Growth:
    """The prompts that are under way, and those of their completions that go on."""

    def __init__(self, policy: PreTrainedModel, trees: Trees, n: int, length: int, temperature: float):
        self.policy, self.trees, self.n, self.length, self.temperature = policy, trees, n, length, temperature
        self.run, self.vocab = _Pass(policy, trees), policy.get_output_embeddings().weight.shape[0]
        places = trees.places
        self.found = torch.full((places, n, length), PAD, dtype=torch.int32)
        self.draws = torch.empty(places, length, n, dtype=torch.double)
        self.depth = torch.zeros(places, dtype=torch.long)  # tokens that a place's completions have
        self.number, self.free = [-1] * places, list(range(places))
        # Of completions that go on: place * n + which of n; the node it is at; the token that was drawn there.
        self.which = self.node = self.token = torch.empty(0, dtype=torch.long)

    def admit(self, prompts: list[tuple[int, Tensor, Tensor]]) -> None:
        """Run prompts and draw the first token of each of their completions."""
        self.free.sort()
        place = torch.tensor([self.free.pop(0) for _ in prompts])
        for it, (number, _, draws) in zip(place.tolist(), prompts, strict=True):
            self.number[it], self.draws[it], self.found[it] = number, draws, PAD
        self.depth[place] = 0
        queries = [query for _, query, _ in prompts]
        lengths, begin = torch.tensor([len(query) for query in queries]), 0
        for logits, cache in _run_prompts(self.policy, queries):
            part = slice(begin, begin := begin + len(logits))
            self.trees.plant(place[part], cache, lengths[part])
            which = (place[part, None] * self.n + torch.arange(self.n)).flatten()
            token = self._draw(logits, torch.arange(len(logits)).repeat_interleave(self.n), which)
            self.which, self.token = torch.cat([self.which, which]), torch.cat([self.token, token])
            self.node = torch.cat([self.node, which // self.n * self.n])

    def write(self) -> list[tuple[int, Tensor]]:
        """Write down the tokens that were drawn; numbers and completions of prompts that are done, whose places are
        free now."""
        place, last = self.which // self.n, self.length - 1
        places = torch.unique(place)
        token = self.token.where(self.depth[place] < last, EOS)
        self.found[place, self.which % self.n, self.depth[place]] = token.int()
        self.depth[places] += 1
        going = token != EOS
        closed = going & (self.depth[place] == last)  # the last token is the end, whatever the model says
        self.found[place[closed], self.which[closed] % self.n, -1] = EOS
        going &= ~closed
        self.which, self.node, self.token = self.which[going], self.node[going], token[going]
        left = torch.bincount(self.which // self.n, minlength=self.trees.places)
        done = places[left[places] == 0].tolist()
        self.free += done
        return [(self.number[it], self.found[it].clone()) for it in done]

    def step(self) -> None:
        """Run the nodes that completions reach, each once, and draw what follows."""
        node, row = torch.unique(self.node * self.vocab + self.token, return_inverse=True)
        parent, place = node // self.vocab, node // self.vocab // self.n
        at, slot = self.trees.branch(parent, place)
        logits = self.run(node % self.vocab, self.trees.start[place] + self.depth[place] - 1, at, slot)
        self.node, self.token = at[row], self._draw(logits, row, self.which)

    def _draw(self, logits: Tensor, row: Tensor, which: Tensor) -> Tensor:
        place = which // self.n
        uniform = self.draws[place, self.depth[place], which % self.n].to(logits.device)
        return draw(logits, row.to(logits.device), uniform, self.temperature).cpu()


@torch.inference_mode()
def grow(policy: PreTrainedModel, prompts: Iterator[tuple[int, Tensor, Tensor]], longest: int, n: int, length: int,
         temperature: float, places: int) -> Iterator[tuple[int, Tensor]]:
    """Completions [n, length] int32 of prompts, padded right, each under its number and as soon as it is done.

    Args:
        prompts: numbers, token ids without padding, and draws [length, n] from 0 to 1, which decide every token: what
            a prompt gets does not depend on what runs beside it.
        longest: of the prompts, tokens.
        places: prompts that are under way at once.
    """
    slots = -(-(longest + n * max(1, length - 1)) // BLOCK) * BLOCK
    trees = Trees(places, slots, n, policy.device, FIXED or policy.device.type == "cuda")
    growth, prompts, more = _Growth(policy, trees, n, length, temperature), iter(prompts), True
    with attended(policy):
        while True:
            # Several at a time: a prompt alone fills no machine.
            if more and (len(growth.free) >= max(1, places // 4) or not len(growth.which)):
                some = list(islice(prompts, len(growth.free)))
                more = len(some) == len(growth.free)
                if some:
                    growth.admit(some)
            if not len(growth.which):
                return
            yield from growth.write()
            if len(growth.which):
                growth.step()


def places_for(policy: PreTrainedModel, longest: int, n: int, length: int, memory: int) -> int:
    """How many prompts of at most `longest` tokens, with n completions each, are under way at once in so many bytes."""
    shape, weight = policy.config, next(policy.parameters())
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    slots = longest + n * length + BLOCK
    token = 2 * shape.num_hidden_layers * heads * size * weight.element_size()
    # Of every slot keys, values and who sees it; of every node at the tip logits, weights and their sums.
    return max(1, memory // (slots * (token + n) + n * 16 * shape.vocab_size))

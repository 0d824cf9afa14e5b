"""The words of the cost model (cost.py): what a stage does, as numbers that add up, and what its command line says."""

import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

from roads import schema, sources
from roads.runner.devices import Device

COLD, SHARED = 0.1, 0.25  # n samples at this temperature share so many prefixes that only this part of them is run
# The judge: 600 tokens read and 33 written an answer make, at $2.50 and $10 per million, the $1.1 that 600 pairs in one
# order have cost others (and $175 for 92,900). Prices are the block's own: spending.
READ, WRITTEN = 600, 33
ORDERS = 2  # every comparison is asked in both
PYTHIA_VOCAB = 50304  # of posts that bring their own tokenizer


@dataclass(frozen=True)
class Work:
    """What a stage does. Works add up: a stage that trains and then samples is the sum of both."""

    flops: float = 0  # of training and forward passes
    decoded: float = 0  # sampled tokens x parameters (what attention reads counts as some)
    steps: int = 0  # of the optimiser
    layers: int = 0  # that batches go through while sampling and scoring
    judged: int = 0  # answers of an outside judge
    dollars: float = 0  # for them
    size: float = 0  # bytes written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def seconds(self, device: Device) -> float:
        startup = device.startup if self.flops or self.decoded else device.startup_light
        return (startup + self.flops / device.flops + self.decoded / (1e9 * device.decode) + self.steps * device.step
                + self.layers * device.layer)


@dataclass(frozen=True)
class Command:
    """`python -m roads.MODULE PLACE... --option value...`, and the block of params.yaml that its --scale names."""

    module: str
    places: list[str]
    options: dict[str, str]
    block: dict
    drawn: set = field(default_factory=set)  # completions that an earlier stage has drawn: they are kept (generate.py)

    @classmethod
    def parse(cls, command: str, blocks: dict[str, dict], drawn: set) -> "Command":
        words = shlex.split(command)
        start = words.index("-m") + 1
        places, options = [], {}
        for before, word in zip(words[start:], words[start + 1:]):
            if word.startswith("--"):
                options[word[2:]] = ""
            elif before.startswith("--"):
                options[before[2:]] = word
            else:
                places.append(word)
        module = words[start].removeprefix("roads.").removeprefix("stages.")
        return cls(module, places, options, blocks[options["scale"]], drawn)

    @property
    def parameters(self) -> float:
        return parameters(self.block)

    @property
    def prompt(self) -> int:
        """Tokens, at most."""
        source = self.block["source"]
        is_world = source["kind"] == "world"
        return 2 + source["slots"] * source["candidates"] if is_world else source["max_query_tokens"]

    @property
    def response(self) -> int:
        """Tokens, at most, EOS included, of what is sampled and of the sides of a pair."""
        source = self.block["source"]
        if source["kind"] == "world":
            return source["slots"] + 2
        return source["max_preference_tokens" if source["kind"] == "two_word" else "max_response_tokens"]

    def forward(self, tokens: int, context: int, words: int = 0) -> float:
        """FLOPs of running tokens that attend to `context` others each; at `words` of them the next is predicted."""
        model = self.block["model"]
        if model["kind"] != "new":  # of unknown shape: every parameter is used for every token, and that is all
            return 2 * tokens * model["parameters"]
        layers, width = model["layers"], model["hidden_size"]
        return tokens * layers * width * (24 * width + 4 * context) + 2 * words * vocabulary(self.block) * width

    @property
    def depth(self) -> int:
        """Layers, where they are known."""
        return self.block["model"].get("layers", 0)

    def distinct(self, samples: dict) -> float:
        """How many of n completions are as much work as all, given that equal prefixes are run once."""
        return samples["n"] * SHARED if samples["n"] > 1 and samples["temperature"] <= COLD else samples["n"]

    def rows(self, place: str) -> int:
        """Rows of the split that a place is about; ties may leave fewer pairs than that."""
        data, path = self.block["data"], Path(place)
        split = {"test_human": "test", "test_rouge": "valid", "test_best_of_n": "best_of_n"}.get(path.stem, path.stem)
        if split not in data:
            split = "online" if any(part.startswith("online") for part in path.parts) else "preferences"
        return data.get(split, data["preferences"])

    def answers(self, n: int) -> Work:
        """n answers of the block's judge; one of known quality costs nothing."""
        judge = self.block.get("judge") or {"kind": "gold"}
        if judge["kind"] not in schema.OUTSIDE:
            return Work()
        prices = self.block["spending"]
        dollars = n * (READ * prices["input"] + WRITTEN * prices["output"]) / 1e6
        return Work(judged=n, dollars=dollars * (prices["batch_discount"] if judge["kind"] == "batch" else 1))

    def compared(self, pairs: int, orders: int = ORDERS) -> Work:
        """Pairs that the judge is shown, in both orders unless one is said."""
        return self.answers(orders * pairs)

    def labelled(self, rows: int) -> Work:
        """Pairs of task human: labelled by the judge, or for nothing."""
        orders = (self.block.get("judge") or {}).get("label_orders", ORDERS)
        return self.compared(rows, orders) if self.block["samples"]["human"]["labels"] == "judge" else Work()


def vocabulary(block: dict) -> int:
    source = block["source"]
    if source["kind"] == "world":
        tags = math.prod(sources.World(**source).tag_shape)
        return 3 + tags + source["subreddits"] + source["slots"] * source["words"]
    return source.get("vocab_size") or PYTHIA_VOCAB


def parameters(block: dict) -> float:
    """Parameters of a block's model: as it says where that is pretrained, or else those of GPT-NeoX, head untied."""
    model = block["model"]
    if model["kind"] != "new":
        return model["parameters"]
    return 12 * model["layers"] * model["hidden_size"] ** 2 + 2 * vocabulary(block) * model["hidden_size"]

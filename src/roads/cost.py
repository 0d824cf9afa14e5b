"""The cost model: what a stage's command does at a scale, and how long a device takes for it.

Seconds = start-up + FLOPs / (FLOP/s) + sampled tokens / (tokens/s) + optimiser steps x their overhead. It takes 6 N
FLOPs a token to train N parameters and 2 N to run them; no row is dropped, and every sequence is as long as the scale
allows, so that a plan errs on the long side.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

# Devices and prices: everything here that is not derived.


@dataclass(frozen=True)
class Device:
    flops: float  # FLOP/s of training and forward passes: peak x utilisation
    decode: float  # sampled tokens/s with 1e9 parameters, all completions together; in inverse proportion to them
    step: float  # seconds on top of that for every optimiser step
    startup: float  # seconds: Python, DVC, torch, the model
    startup_light: float = 3.0  # the same without torch


# GPUs: NVIDIA's dense bf16 peak x an assumed utilisation of 40%, usual for full fine-tuning of 1 to 7 billion
# parameters. Decoding on an H100: a third of what vLLM is reported to reach there with 8B parameters (12,500 tokens/s),
# as the paper's completions are short; an A100 at half of that, an H200 by its memory bandwidth. None of the GPU
# numbers was measured with this code.
# CPU: one core, fitted to the stages of docs/stages.md, scale mini. Real posts take up to three times as long.
DEVICES = {
    "cpu": Device(flops=57e9, decode=130, step=0.001, startup=5, startup_light=4),
    "A100": Device(flops=312e12 * 0.4, decode=16_000, step=0, startup=60),
    "H100": Device(flops=989e12 * 0.4, decode=33_000, step=0, startup=60),
    "H200": Device(flops=989e12 * 0.4, decode=46_000, step=0, startup=60),
}
GPU_FROM = 1e8  # parameters: a scale with more is planned on GPUs unless --device says otherwise

# The judge, at its list price of $2.50 and $10 per million tokens read and written: 600 and 33 tokens an answer make
# the $1.1 that 600 pairs in one order have cost others (and $175 for 92,900).
JUDGE = "gpt-4o"
DOLLARS_AN_ANSWER = 600 * 2.50e-6 + 33 * 10.00e-6
ORDERS = 2  # every comparison is asked in both

FLOAT = INT = 4  # bytes: weights are saved in fp32, token ids as int32


@dataclass(frozen=True)
class Work:
    """What a stage does. Works add up: a stage that trains and then samples is the sum of both."""

    flops: float = 0  # of training and forward passes
    decoded: float = 0  # sampled tokens x parameters
    steps: int = 0  # of the optimiser
    judged: int = 0  # comparisons by an outside judge
    size: float = 0  # bytes written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def seconds(self, device: Device) -> float:
        startup = device.startup if self.flops or self.decoded else device.startup_light
        return startup + self.flops / device.flops + self.decoded / (1e9 * device.decode) + self.steps * device.step


@dataclass(frozen=True)
class Command:
    """`python -m roads.MODULE PLACE... --option value...`, and the block of params.yaml that its --scale names."""

    module: str
    places: list[str]
    options: dict[str, str]
    block: dict

    @classmethod
    def parse(cls, command: str, blocks: dict[str, dict]) -> "Command":
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
        return cls(words[start].removeprefix("roads."), places, options, blocks[options["scale"]])

    @property
    def parameters(self) -> float:
        return parameters(self.block)

    @property
    def prompt(self) -> int:
        """Tokens, at most."""
        source = self.block["source"]
        return 2 + source["slots"] * source["candidates"] if _is_world(self.block) else source["max_query_tokens"]

    @property
    def response(self) -> int:
        """Tokens, at most, EOS included."""
        source = self.block["source"]
        return source["slots"] + 2 if _is_world(self.block) else source["max_response_tokens"]

    def rows(self, place: str) -> int:
        """Rows of the split that a place is about; ties may leave fewer pairs than that."""
        data, path = self.block["data"], Path(place)
        split = {"test_human": "test", "test_rouge": "valid", "test_best_of_n": "best_of_n"}.get(path.stem, path.stem)
        if split not in data:
            split = "online" if any(part.startswith("online") for part in path.parts) else "preferences"
        return data.get(split, data["preferences"])

    def outside(self, comparisons: int) -> int:
        """How many of the comparisons an outside judge is asked for: in a world none, which knows the answers."""
        return 0 if _is_world(self.block) else comparisons


def _is_world(block: dict) -> bool:
    return block["source"]["kind"] == "world"


def parameters(block: dict) -> float:
    """Parameters of a block's model: `parameters` where it says so, or else those of GPT-NeoX, head untied."""
    source, model = block["source"], block["model"]
    if "parameters" in model:
        return model["parameters"]
    vocab = (3 + source["karma_buckets"] + source["subreddits"] + source["slots"] * source["words"]
             if _is_world(block) else source["vocab_size"])
    return 12 * model["layers"] * model["hidden_size"] ** 2 + 2 * vocab * model["hidden_size"]


def train(c: Command, rows: int, recipe: dict, sides: int = 1, reference: bool = False) -> Work:
    """Epochs over rows of `sides` sequences each; `reference`: their log-probs under another model first, once."""
    tokens = rows * sides * (c.prompt + c.response)
    return Work(flops=c.parameters * tokens * (6 * recipe["epochs"] + 2 * reference),
                steps=-(-rows // recipe["batch_size"]) * recipe["epochs"], size=FLOAT * c.parameters)


def sample(c: Command, prompts: int, n: int) -> Work:
    """The prompt is run once, its n completions are decoded from its cache."""
    return Work(flops=2 * c.parameters * prompts * c.prompt, decoded=c.parameters * prompts * n * c.response,
                size=INT * prompts * (c.prompt + n * c.response))


def score(c: Command, prompts: int, n: int, models: int = 1) -> Work:
    """Forward passes of n completions of every prompt, which is run once."""
    return Work(flops=2 * c.parameters * models * prompts * (c.prompt + n * c.response))


def pairs(c: Command, rows: int) -> Work:
    return Work(size=INT * rows * (c.prompt + 2 * c.response))


def _data(c: Command) -> Work:
    return Work(size=INT * (c.prompt + c.response) * (sum(c.block["data"].values()) + c.block["data"]["base"]))


def _dpo(c: Command, rows: int, name: str = "dpo", times: int = 1) -> Work:
    recipe = c.block[name]
    return train(c, rows, recipe | {"epochs": recipe["epochs"] * times}, sides=2, reference=name == "dpo")


def _rank(c: Command) -> Work:
    rows, by = c.rows(c.places[0]), c.options["by"]
    if by == "reward":
        return score(c, rows, c.block["samples"]["online"]["n"]) + pairs(c, rows)
    return pairs(c, rows) + Work(judged=0 if by == "rouge" else c.outside(rows))


def _evaluate(c: Command) -> Work:
    rows = c.rows(f"test_{c.options['task']}")
    return Work(size=8 * rows, judged=0 if c.options["task"] == "rouge" else c.outside(rows))


def _likelihood(c: Command) -> Work:
    rows = c.rows(c.places[1])
    return score(c, rows, 2, models=2 if c.options["kind"] == "dpo" else 1) + Work(size=8 * rows)


def _kl(c: Command, prompts: int, more: int = 0) -> Work:
    """Samples of a policy, scored by it and its reference; `more` completions of each prompt scored with them."""
    n = c.block["samples"]["value"]["n"]
    return sample(c, prompts, n) + score(c, prompts, n + more, models=2)


def _value(c: Command) -> Work:
    rows = c.rows(c.places[1])
    return replace(_kl(c, rows, more=2), size=4 * 8 * rows)


def _best_of_n(c: Command) -> Work:
    rows, counts = c.rows("test_best_of_n"), 5  # N is 1, 2, 5, 10 and 25
    scored = score(c, rows, c.block["samples"]["best_of_n"]["n"], models=2 if c.options["kind"] == "dpo" else 1)
    return scored + Work(size=8 * counts * rows, judged=counts * c.outside(rows))


def _cell(c: Command) -> Work:
    """One seed of the whole comparison: the stages of the graph, one after the other."""
    data, samples, policies = c.block["data"], c.block["samples"], c.block["policies"]
    total = Work()
    for rows in (data["preferences"], data["valid"]):
        labelled = c.outside(rows) if samples["human"]["labels"] == "judge" else 0
        total += sample(c, rows, samples["human"]["n"]) + Work(judged=labelled)
    if {"online", "online_sft"} & set(policies):
        total += train(c, data["preferences"], c.block["reward"], sides=2) + score(c, data["valid"], 2)
    for policy in policies:
        if policy in ("dpo", "dpo_2x"):
            total += _dpo(c, data["preferences"], times=2 if policy == "dpo_2x" else 1)
        else:
            n = samples["online"]["n"]
            total += sample(c, data["online"], n) + score(c, data["online"], n) + _dpo(c, data["online"])
        total += _kl(c, data["best_of_n"])
    total += score(c, data["valid"], 2, models=2) if "dpo" in policies else Work()
    for _ in ("sft", *policies):
        total += sample(c, data["test"], samples["evaluate"]["n"]) + Work(judged=c.outside(data["test"]))
    return replace(total, size=8 * data["test"] * (1 + len(policies)))  # the models are thrown away


# A new kind of work goes here, under the name of its module; what is not here is 'unknown' until it has run once.
KINDS: dict[str, Callable[[Command], Work]] = {
    "data": _data,
    "base": lambda c: train(c, c.rows("base"), c.block["base"]),
    "sft": lambda c: train(c, c.rows("sft"), c.block["sft"]),
    "reward": lambda c: train(c, c.rows(c.places[0]), c.block["reward"], sides=2),
    "dpo": lambda c: _dpo(c, c.rows(c.places[0]), "local" if "local" in c.options else "dpo",
                          int(c.options.get("times", 1))),
    "sample": lambda c: sample(c, c.rows(c.places[1]), c.block["samples"][c.options["samples"]]["n"]),
    "rank": _rank,
    "evaluate": _evaluate,
    "likelihood": _likelihood,
    "value": _value,
    "best_of_n": _best_of_n,
    "cell": _cell,
    "figures": lambda c: Work(size=2e5),
}


def work(commands: str | list[str], blocks: dict[str, dict]) -> Work | None:
    """What a stage does, given its command or commands and every block of params.yaml; None: the model cannot say."""
    total = Work()
    for command in [commands] if isinstance(commands, str) else commands:
        try:
            c = Command.parse(command, blocks)
            total += KINDS.get(c.module, KINDS.get(c.module.split(".")[0]))(c)
        except (KeyError, IndexError, TypeError, ValueError):  # a module, option or block that is not known here
            return None
    return total

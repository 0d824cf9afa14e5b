"""The cost model: what a stage's command does at a scale, and how long a device takes for it.

Seconds = start-up + FLOPs / (FLOP/s) + sampled tokens / (tokens/s) + the overheads of optimiser steps and of layers. It
takes 2 N FLOPs a token to run N parameters (and for a new model, of known shape: those of attention, and of its head
only where words are predicted), three times that to train; no row is dropped, only cold samples share prefixes, and
every sequence is as long as the scale allows, so that a plan errs on the long side.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace

from roads import schema
from roads.runner.work import ORDERS, Command, Work, vocabulary

ROWS, MEMORY, BATCH = 1600, 2**29, 2**13  # generate.py's, and the tokens that are scored at once
INT = 4  # bytes: token ids are int32
WEIGHT = {"fp32": 4, "bf16": 2}  # bytes, as a model is saved (distributed.save)


def train(c: Command, rows: int, recipe: dict, sides: int = 1, words: int = 0, reference: bool = False,
          start: bool = False) -> Work:
    """Epochs over rows of a prompt and `sides` completions, at `words` tokens of which the next one is predicted;
    `reference`: their log-probs under another model first, once. `start`: another training begins there."""
    length = c.prompt + sides * c.response
    once = c.forward(rows * length, length, rows * words)
    return Work(flops=once * (3 * recipe["epochs"] + reference),
                steps=-(-rows // recipe["batch_size"]) * recipe["epochs"],
                size=WEIGHT["fp32" if start else c.block.get("compute", {}).get("precision", "fp32")] * c.parameters)


def sample(c: Command, prompts: int, samples: dict, policy: str = "", split: str = "") -> Work:
    """The prompt is run once; a token attends to it and to the tree of its completions. vLLM decodes equal prefixes
    too, and attends to one completion. What a policy has drawn for a split is not drawn again."""
    n, size = samples["n"], INT * prompts * (c.prompt + samples["n"] * c.response)
    key = policy, split, prompts, json.dumps(samples, sort_keys=True)
    if policy and key in c.drawn:
        return Work(size=size)
    c.drawn.add(key)
    vllm = c.block.get("compute", {}).get("sampler") == "vllm"
    grown = n if vllm else c.distinct(samples)
    words = prompts * grown * c.response
    slots = c.prompt + n * c.response + 128  # as generate_tree.places_for has it
    place = slots * (8 * c.depth * c.block["model"].get("hidden_size", 0) + n) + 16 * n * vocabulary(c.block)
    batches = math.ceil(prompts / max(1, min(ROWS // n, MEMORY // place)))
    return Work(flops=c.forward(prompts * c.prompt, c.prompt),
                decoded=c.forward(words, c.prompt + int((1 if vllm else grown) * c.response) // 2, words) / 2,
                layers=batches * c.response * c.depth, size=size)


def score(c: Command, prompts: int, n: float, policies: int = 0) -> Work:
    """Forward passes of n completions of every prompt, which is run once: rewards, or log-probs of some policies."""
    words = n * c.response
    once = c.forward(c.prompt, c.prompt) + c.forward(words, c.prompt + words, words if policies else 0)
    batches = math.ceil(prompts * (c.prompt + words) / BATCH)
    return Work(flops=(policies or 1) * prompts * once, layers=(policies or 1) * 2 * batches * c.depth)


def pairs(c: Command, rows: int) -> Work:
    return Work(size=INT * rows * (c.prompt + 2 * c.response))


def _data(c: Command) -> Work:
    data = c.block["data"]
    asked = Work()
    if c.block["source"]["kind"] == "two_word":  # two summaries of each post are written and compared; of test, one
        orders = c.block["judge"].get("label_orders", ORDERS)
        asked = c.answers((2 + orders) * (data["preferences"] + data["valid"]) + data["test"])
    return asked + Work(size=INT * (c.prompt + c.response) * (sum(data.values()) + data["base"]))


def _base(c: Command) -> Work:
    if c.block["model"]["kind"] != "new":  # fetched, or read from a folder
        return Work(size=WEIGHT["fp32"] * c.parameters)
    return train(c, c.rows("base"), c.block["base"], words=c.prompt + c.response, start=True)


def _sample(c: Command) -> Work:
    settings = c.block["samples"][c.options["samples"]]
    if settings.get("labels") == "rows":  # the pairs come with the data
        return pairs(c, c.rows(c.places[1]))
    return sample(c, c.rows(c.places[1]), settings, *c.places[:2])


def _dpo(c: Command, rows: int, name: str = "dpo", times: int = 1, start: bool = False) -> Work:
    recipe = c.block[name]
    return train(c, rows, recipe | {"epochs": recipe["epochs"] * times}, sides=2, words=2 * c.response,
                 reference=name == "dpo", start=start)


def _rank(c: Command) -> Work:
    rows, by = c.rows(c.places[0]), c.options["by"]
    if by == "reward":
        return score(c, rows, c.distinct(c.block["samples"]["online"])) + pairs(c, rows)
    return pairs(c, rows) + (c.labelled(rows) if by == "human" else Work())


def _evaluate(c: Command) -> Work:
    rows = c.rows(f"test_{c.options['task']}")
    return Work(size=8 * rows) + (c.compared(rows) if c.options["task"] == "human" else Work())


def _likelihood(c: Command) -> Work:
    rows = c.rows(c.places[1])
    return score(c, rows, 2, policies=2 if c.options["kind"] == "dpo" else 0) + Work(size=8 * rows)


def _kl(c: Command, prompts: int, more: int = 0) -> Work:
    """Samples of a policy, scored by it and its reference; `more` completions of each prompt scored with them."""
    samples = c.block["samples"]["value"]
    return sample(c, prompts, samples) + score(c, prompts, samples["n"] + more, policies=2)


def _value(c: Command) -> Work:
    rows = c.rows(c.places[1]) + min(c.rows(c.places[2]), schema.HELD_OUT)
    return replace(_kl(c, rows, more=2), size=4 * 8 * rows)


def _best_of_n(c: Command) -> Work:
    rows, counts = c.rows("test_best_of_n"), len(schema.BEST_OF)
    scored = score(c, rows, c.distinct(c.block["samples"]["best_of_n"]),
                   policies=2 if c.options["kind"] == "dpo" else 0)
    return scored + Work(size=8 * counts * rows) + c.compared(counts * rows)


def _arm(c: Command) -> Work:
    """One seed of the whole comparison: the stages of the graph, one after the other; or of all sizes of an arm."""
    if c.block.get("sizes"):
        total = Work()
        for n, epochs in c.block["sizes"].items():
            changes = {"sizes": {}, "data": c.block["data"] | {"preferences": n, "online": n}}
            changes |= {name: c.block[name] | {"epochs": epochs[name]} for name in ("dpo", "reward")}
            total += _arm(replace(c, block=c.block | changes))
        return total
    data, samples, policies = c.block["data"], c.block["samples"], c.block["policies"]
    (where, sft, *_), total = c.places, Work()
    task, folders = c.options.get("task", "human"), "folders" in c.options
    labels, test = samples[task].get("labels"), data["test" if task == "human" else "valid"]
    paid = labels == "judge" and c.block["judge"]["kind"] in schema.OUTSIDE and not folders
    for split in ("preferences", "valid")[: 2 - paid]:
        if labels != "rows":
            total += sample(c, data[split], samples[task], sft, f"{where}/{split}.npz")
            total += c.labelled(data[split]) if task == "human" else Work()
    if folders:
        total += _dpo(c, data["preferences"], "local") + score(c, data["valid"], 2, policies=1)
    if {"online", "online_sft"} & set(policies):
        total += train(c, data["preferences"], c.block["reward"], sides=2) + score(c, data["valid"], 2)
    for policy in policies:
        if policy in ("dpo", "dpo_2x"):
            total += _dpo(c, data["preferences"], times=2 if policy == "dpo_2x" else 1)
        else:
            start = sft if policy == "online_sft" else ""
            for _ in range(c.block.get("rounds", 1)):
                total += sample(c, data["online"], samples["online"], start, f"{where}/online.npz")
                total += _dpo(c, data["online"]) + score(c, data["online"], c.distinct(samples["online"]))
                start = ""
        total += _kl(c, data["best_of_n"])
    total += score(c, data["valid"], 2, policies=2) if "dpo" in policies else Work()
    for policy in (sft, *("" for _ in policies)):
        total += sample(c, test, samples["evaluate"], policy, f"{where}/test_{task}.npz")
        total += c.compared(test) if task == "human" else Work()
    return replace(total, size=8 * test * (1 + len(policies)))  # the models are thrown away


def _anatomy(c: Command) -> Work:
    """18 policies on pairs of the SFT policy, each sampled and measured; and all summaries of the test prompts scored
    under three policies and the reward model."""
    data, samples, source = c.block["data"], c.block["samples"], c.block["source"]
    (where, sft, *_), n = c.places, data["preferences"]
    total = sample(c, n, samples["human"], sft, f"{where}/preferences.npz") + _dpo(c, n) + _dpo(c, n, "local")
    total += sample(c, data["online"], samples["online"], sft, f"{where}/online.npz")
    total += train(c, n, c.block["reward"], sides=2) + score(c, n, c.distinct(samples["online"]))
    for _ in range(18):
        total += _dpo(c, n) + _kl(c, data["best_of_n"]) + sample(c, data["test"], samples["evaluate"])
    total += sample(c, data["test"], samples["best_of_n"], sft, f"{where}/test_human.npz")
    words = 2 * source["candidates"] ** source["slots"] / c.response  # each prefix once
    return replace(total + score(c, data["test"], words, policies=3) + score(c, data["test"], words),
                   size=8 * 8 * 27 * data["test"])


def _limits(c: Command) -> Work:
    """Two sets of samples scored, and all summaries of the prompts under two policies and the reward model."""
    rows, samples, source = c.rows("test_rouge"), c.block["samples"], c.block["source"]
    (where, sft, *_), total = c.places, Work(size=8 * 6 * c.rows("test_rouge"))
    for settings in (samples["best_of_n"], samples["rouge"]):
        total += sample(c, rows, settings, sft, f"{where}/test_rouge.npz") + score(c, rows, c.distinct(settings))
    words = 2 * source["candidates"] ** source["slots"] / c.response  # each prefix once
    return total + score(c, rows, words, policies=2) + score(c, rows, words)


# A new kind of work goes here, under the name of its module; what is not here is 'unknown' until it has run once.
KINDS: dict[str, Callable[[Command], Work]] = {
    "data": _data,
    "base": _base,
    "sft": lambda c: train(c, c.rows("sft"), c.block["sft"], words=c.response, start=True),
    "reward": lambda c: train(c, c.rows(c.places[0]), c.block["reward"], sides=2),
    "dpo": lambda c: _dpo(c, c.rows(c.places[0]), "local" if "local" in c.options else "dpo",
                          int(c.options.get("times", 1)), not {"local", "times", "online"} & set(c.options)),
    "sample": _sample,
    "rank": _rank,
    "evaluate": _evaluate,
    "likelihood": _likelihood,
    "value": _value,
    "kl": lambda c: _kl(c, c.rows("test_best_of_n")),
    "judge_report": lambda c: Work(size=16 * c.block["samples"]["best_of_n"]["n"] * c.rows("test_best_of_n")),
    "best_of_n": _best_of_n,
    "arm": _arm,
    "anatomy": _anatomy,
    "limits": _limits,
    "untrained": lambda c: score(c, 2 * c.rows(c.places[1]), 2, policies=2),
    "figures": lambda c: Work(size=2e5),
    "report": lambda c: Work(size=2e5),
}


def work(commands: str | list[str], blocks: dict[str, dict], drawn: set | None = None) -> Work | None:
    """What a stage does, given its command or commands and every block of params.yaml; None: the model cannot say.
    `drawn` goes from stage to stage: completions that one has drawn are there for the next."""
    total, drawn = Work(), set() if drawn is None else drawn
    for command in [commands] if isinstance(commands, str) else commands:
        try:
            c = Command.parse(command, blocks, drawn)
            total += KINDS.get(c.module, KINDS.get(c.module.split(".")[0]))(c)
        except (KeyError, IndexError, TypeError, ValueError):  # a module, option or block that is not known here
            return None
    return total

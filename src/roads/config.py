"""Strict parameters: params.yaml -> frozen models. Unknown keys, wrong types and impossible values are errors.

    python -m roads.config check                                  # validate params.yaml
    python -m roads.config set --scale real-cpu --data PATH       # switch the active scale, visibly
"""

import argparse
import difflib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from roads.stage import UserError, main

PARAMS = Path("params.yaml")
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class World(Strict):
    """The synthetic slot world (world.py)."""

    seed: Seed
    subreddits: Count
    slots: Count  # K; the horizon is K + 1 tokens, EOS included
    words: Count  # per slot
    candidates: Count  # words of a slot that a prompt offers
    clusters: Count
    interaction: NonNegative  # weight of coherence in the gold quality
    tau: Positive  # temperature of the Bradley-Terry labels of task human, in units of quality
    karma_buckets: Count
    karma_noise: NonNegative  # sd of the noise on the quality that the karma token tells
    karma_weight: NonNegative  # weight of the karma token in the base's loss; a word weighs 1

    @model_validator(mode="after")
    def _choice(self):
        if not 2 <= self.candidates <= self.words:
            raise ValueError(f"candidates: expected 2 to words={self.words}, got {self.candidates}")
        return self


class Text(Strict):
    """Rows of real text: `path` holds train.jsonl, valid.jsonl and test.jsonl (tldr.py)."""

    path: str
    vocab_size: Annotated[int, Field(ge=258)]
    max_query_tokens: Annotated[int, Field(ge=16)]
    max_response_tokens: Annotated[int, Field(ge=2)]  # EOS included


class Data(Strict):
    """How many rows each split has."""

    base: Count
    sft: Count
    preferences: Count  # prompts of the preference set
    valid: Count  # prompts of its validation set
    test: Count  # prompts of the SFT test set, for winrates


class Model(Strict):
    hidden_size: Count
    layers: Count
    heads: Count
    max_positions: Count

    @model_validator(mode="after")
    def _heads(self):
        if self.hidden_size % self.heads:
            raise ValueError(f"heads: expected a divisor of hidden_size={self.hidden_size}, got {self.heads}")
        return self


class Train(Strict):
    """AdamW, as in Tables 2 to 4: eps 1e-5, weight decay .01, no warm-up."""

    lr: Positive
    schedule: Literal["linear", "cosine"]
    batch_size: Count  # rows, or pairs
    epochs: Count


class Preference(Train):
    beta: Positive


class Sampling(Strict):
    n: Count  # completions per prompt
    temperature: Positive


class RankedSampling(Sampling):
    n: Annotated[int, Field(ge=2)]  # best and worst need two


class Samples(Strict):
    human: RankedSampling  # what the (simulated) annotator compares
    rouge: RankedSampling  # what ROUGE-L ranks, Fig 11
    online: RankedSampling  # what the global RM ranks
    evaluate: Sampling


class Scale(Strict):
    """One block of params.yaml. Scales differ by numbers, never by code."""

    threads: Count
    world: World | None = None
    text: Text | None = None
    data: Data
    model: Model
    base: Train
    sft: Train
    reward: Train
    local: Preference
    dpo: Preference
    samples: Samples

    @model_validator(mode="after")
    def _source(self):
        if (self.world is None) == (self.text is None):
            raise ValueError("world: expected exactly one of the blocks `world` and `text`")
        return self


class Params(Strict):
    scale: str
    tasks: Annotated[list[Literal["human", "rouge"]], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    scales: dict[str, Scale]

    @model_validator(mode="after")
    def _consistent(self):
        for name, values in (("seeds", self.seeds), ("tasks", self.tasks)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected distinct values, got {values}")
        if self.scale not in self.scales:
            raise ValueError(f"scale: no block named {self.scale!r}{_nearest(self.scale, self.scales)}")
        if "human" in self.tasks and self.scales[self.scale].world is None:
            raise ValueError(f"tasks: scale {self.scale} has no preference labels for task human; use [rouge]")
        return self


def _nearest(key: str, known) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(known)}"


def _explain(error: dict) -> str:
    """One pydantic error as 'key: what was expected'."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location[1:] if location[:1] == ["scales"] else location)
    if error["type"] == "extra_forbidden":
        model = Params
        for part in location[:-1]:
            if model is Params and part == "scales":
                continue
            field = model.model_fields.get(part) if model is not Params or part in Params.model_fields else None
            model = Scale if field is None else _model_of(field.annotation)
        known = [k for k in model.model_fields if k != "scales"]
        return f"{key}: unknown key{_nearest(location[-1], known)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "value_error":
        inner = str(error["ctx"]["error"])
        return f"{key}.{inner}" if key else inner
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _model_of(annotation):
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(a for a in options if isinstance(a, type) and issubclass(a, BaseModel))


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: one line with the file, the key, what was expected and the nearest valid key.
    """
    try:
        raw = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the root of the project") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping with the keys scale, tasks, seeds and one block per scale")
    # A mapping that is no top-level key is the block of a scale; anything else unknown is a mistake.
    scales = {key: raw[key] for key in raw if key not in Params.model_fields and isinstance(raw[key], dict)}
    flat = {key: value for key, value in raw.items() if key not in scales}
    try:
        return Params.model_validate({**flat, "scales": scales})
    except ValidationError as error:
        details = error.errors()
        # An unknown key explains the missing one beside it: name it first.
        details.sort(key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(f"{path}: {_explain(details[0])}") from None


def load_scale(name: str) -> Scale:
    """The checked block of one scale."""
    params = load()
    if name not in params.scales:
        raise UserError(f"{PARAMS}: no block named {name!r}{_nearest(name, params.scales)}")
    return params.scales[name]


def used(scale: Scale, *blocks: str) -> dict:
    """The named blocks as plain values: what a stage writes to its params.json, and what DVC tracks for it."""
    return {block: scale.model_dump()[block] for block in blocks}


def switch(scale: str, data: str | None = None, path: Path = PARAMS) -> None:
    """Set `scale`, the tasks that its data allow, and its data folder in params.yaml; comments stay."""
    known = load(path).scales
    if scale not in known:
        raise UserError(f"{path}: no block named {scale!r}{_nearest(scale, known)}")
    if data is not None and known[scale].text is None:
        raise UserError(f"DATA={data}: scale {scale} makes its own data; use a scale with a `text` block")
    if data is not None and not Path(data).is_dir():
        raise UserError(f"DATA={data}: no such folder; expected one with train.jsonl, valid.jsonl and test.jsonl")
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 200
    document = yaml.load(path.read_text(encoding="utf-8"))
    document["scale"] = scale
    tasks = ["human", "rouge"] if known[scale].world else ["rouge"]
    document["tasks"].clear()
    document["tasks"].extend(tasks)
    if data is not None:
        document[scale]["text"]["path"] = data
    scratch = path.with_suffix(".writing")
    with scratch.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)
    load(scratch)
    scratch.replace(path)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate params.yaml")
    setter = commands.add_parser("set", help="switch the active scale")
    setter.add_argument("--scale", help="a block of params.yaml (default: the active one)")
    setter.add_argument("--data", help="folder with train.jsonl, valid.jsonl, test.jsonl")
    args = parser.parse_args()
    params = load()
    if args.command == "set":
        switch(args.scale or params.scale, args.data)


if __name__ == "__main__":
    main(_command)

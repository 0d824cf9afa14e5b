"""Strict parameters: params.yaml -> frozen models. Unknown keys, wrong types and impossible values are errors.

    python -m roads.config check                                  # validate params.yaml
    python -m roads.config set --scale real-cpu --data PATH       # switch the active scale, visibly
"""

import argparse
import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from roads.stage import UserError, main

PARAMS = Path("params.yaml")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # of a block: it becomes part of commands, of folders and of DVC's keys
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# What the data of a scale are made from, by the kind of its source, unless DATA= says otherwise: the world's module,
# the posts in this repository, what to download. The arms of a scale read the same.
DATA_FROM = {"world": "src/roads/world.py", "posts": "data/tldr", "jsonl": "data/tldr_sample",
             "openai": "data/openai.json",
             "two_word": "data/openai.json"}


class World(Strict):
    """The synthetic slot world (world.py)."""

    kind: Literal["world"]
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


class OpenAI(Strict):
    """OpenAI's TL;DR posts and comparisons, downloaded as data/openai.json says."""

    kind: Literal["openai"]
    max_query_tokens: Annotated[int, Field(ge=16)]
    max_response_tokens: Annotated[int, Field(ge=2)]  # EOS included
    max_preference_tokens: Annotated[int, Field(ge=2)]  # of the sides of a comparison: people wrote up to 169


class TwoWord(OpenAI):
    """Fig 10: pairs of two-word summaries, at most max_preference_tokens long, that the judge writes and labels."""

    kind: Literal["two_word"]


class Jsonl(OpenAI):
    """Rows of your own: a folder with train.jsonl, valid.jsonl and test.jsonl, and maybe comparisons (tldr.py)."""

    kind: Literal["jsonl"]
    vocab_size: Annotated[int, Field(ge=258)] | None  # of a BPE, trained where there is no tokenizer.json


class Posts(OpenAI):
    """The real posts of data/tldr, or rows of your own in its layout. Numbers are chosen on posts of their own."""

    kind: Literal["posts"]
    held_out: Literal["report", "development"]  # what valid and test are: the posts of reports, or those for choosing


class Data(Strict):
    """How many rows each split has."""

    base: Annotated[int, Field(ge=0)]  # none where the base is pretrained
    sft: Count
    preferences: Count  # prompts of the preference set
    more: Annotated[int, Field(ge=0)]  # prompts beyond it (Fig 5), which the world's annotators can label too
    online: Count  # prompts, of the two together, that online DPO samples
    valid: Count  # prompts of the validation preference set
    test: Count  # prompts of the SFT test set, for winrates
    best_of_n: Count  # how many of those are used for best-of-N


class New(Strict):
    """A GPT-NeoX of random weights, which stage base trains."""

    kind: Literal["new"]
    hidden_size: Count
    layers: Count
    heads: Count
    max_positions: Count

    @model_validator(mode="after")
    def _heads(self):
        if self.hidden_size % self.heads:
            raise ValueError(f"heads: expected a divisor of hidden_size={self.hidden_size}, got {self.heads}")
        return self


class Pretrained(Strict):
    """Any causal language model of the hub, or of a folder; stage base fetches it."""

    kind: Literal["pretrained"]
    name: str
    revision: str | None  # of the hub; none for a folder
    parameters: Positive  # for `make plan`


class Packaged(Strict):
    """A language model that an installed package holds (hub.PACKAGES), or any GGUF file that transformers reads; stage
    base dequantises it."""

    kind: Literal["packaged"]
    name: str  # of hub.PACKAGES, or the path of a .gguf file
    eos: str | None  # the token that ends a text; null: as the file has it
    pad: str | None
    parameters: Positive  # for `make plan`


class Compute(Strict):
    """How numbers are computed: it may move them, by rounding (precision, attention) or other draws (sampler)."""

    device: Literal["cpu", "gpu"]
    precision: Literal["fp32", "bf16"]  # bf16: autocast; weights and optimiser stay fp32
    attention: Literal["sdpa", "flash"]
    sampler: Literal["tree", "vllm"]


class Machine(Strict):
    """What fits the machine and moves no number beyond rounding: DVC does not look at it."""

    threads: Count  # per stage, without a GPU
    micro_batch: Count | None  # rows, or pairs, that a GPU takes at once; null: halved until it fits
    gradient_checkpointing: bool
    tensor_parallel: Count  # GPUs that vLLM spreads a model over
    stages_per_gpu: Count = 1  # at the same time: a small model leaves most of a large GPU idle


class Gold(Strict):
    kind: Literal["gold"]  # the world's own judge, which knows the quality


class Outside(Strict):
    """A judge behind an OpenAI-compatible endpoint (client.py): OPENAI_BASE_URL and OPENAI_API_KEY say where."""

    kind: Literal["openai", "batch"]  # one request an answer, or OpenAI's Batch API
    model: str  # dated, as gpt-4o-2024-08-06
    prompt: Literal["summary", "two_word"]  # a file of prompts/
    temperature: NonNegative
    max_tokens: Count


class Spending(Strict):
    """What asking may cost, and how it is done: no answer depends on it, and DVC does not look at it."""

    budget: Positive  # dollars, over all that was ever asked of the model; asking stops before it is passed
    input: NonNegative  # dollars per million tokens read
    output: NonNegative  # and written
    batch_discount: Annotated[float, Field(gt=0, le=1)]  # the Batch API's price, as a share
    concurrency: Count  # requests at once
    timeout: Positive  # seconds
    retries: Annotated[int, Field(ge=0)]


class Train(Strict):
    """AdamW, as in Tables 2 to 4: eps 1e-5, weight decay .01, no warm-up."""

    lr: Positive
    schedule: Literal["linear", "cosine"]
    batch_size: Count  # rows, or pairs
    epochs: Count


class Preference(Train):
    beta: Positive
    shards: Count  # 1: every pair once an epoch. 8: what the authors' loader gives on 8 GPUs (train.batches)


class Sampling(Strict):
    n: Count  # completions per prompt
    temperature: Positive


class RankedSampling(Sampling):
    n: Annotated[int, Field(ge=2)]  # best and worst need two


class Labelled(Strict):
    n: Literal[2]
    temperature: Positive | None  # none for rows
    labels: Literal["annotators", "judge", "rows"]  # noisy Bradley-Terry ones; of winrates' judge (Fig 6); the data's

    @model_validator(mode="after")
    def _sampled(self):
        if (self.temperature is None) != (self.labels == "rows"):
            raise ValueError("temperature: expected a number, or null where labels are the rows' own")
        return self


class Online(RankedSampling):
    logits_divided_by: Positive  # in training; the paper divides by the sampling temperature


class Samples(Strict):
    human: Labelled | None = None  # what preferences are about, where there is someone to have them
    rouge: RankedSampling  # what ROUGE-L ranks, Fig 11
    online: Online  # what the global RM ranks
    evaluate: Sampling
    value: Sampling | None = None  # for the reverse KL of Eq. 2
    best_of_n: Sampling | None = None  # Figs 8 and 9


class Scale(Strict):
    """One block of params.yaml. Scales differ by numbers, never by code."""

    compute: Compute
    machine: Machine
    policies: list[Literal["dpo", "dpo_2x", "online_sft", "online"]]  # that arm.py trains, where the block is an arm
    source: Annotated[World | Posts | Jsonl | OpenAI | TwoWord, Field(discriminator="kind")]
    data: Data
    model: Annotated[New | Pretrained | Packaged, Field(discriminator="kind")]
    base: Train | None  # none for a model that is trained already
    sft: Train
    reward: Train
    local: Preference
    dpo: Preference
    samples: Samples
    judge: Annotated[Gold | Outside, Field(discriminator="kind")] | None  # none without preferences
    spending: Spending | None  # none where nothing is asked over a network

    @property
    def synthetic(self) -> bool:
        return isinstance(self.source, World)

    @model_validator(mode="after")
    def _complete(self):
        for name in ("human", "value", "best_of_n") if self.synthetic or self.samples.human else ():
            if getattr(self.samples, name) is None:
                raise ValueError(f"samples.{name}: missing; preferences need it")
        if (self.samples.human is None) != (self.judge is None):
            raise ValueError("judge: expected a block where there is samples.human, and null elsewhere")
        if self.judge and self.synthetic != (self.judge.kind == "gold"):
            raise ValueError("judge.kind: expected gold for a world, and openai or batch for posts")
        own = "annotators" if self.synthetic else "rows"
        if self.samples.human and self.samples.human.labels not in (own, "judge"):
            raise ValueError(f"samples.human.labels: expected {own} or judge, got {self.samples.human.labels}")
        if isinstance(self.judge, Outside) != (self.spending is not None):
            raise ValueError("spending: expected a block where the judge is asked over a network, and null elsewhere")
        if not (self.model.kind == "new") == (self.base is not None) == (self.data.base > 0):
            raise ValueError("base: expected a block and data.base > 0 for a new model, null and 0 for one pretrained")
        if self.compute.attention == "flash" and (self.compute.precision, self.compute.device) != ("bf16", "gpu"):
            raise ValueError("compute.attention: flash needs precision bf16 and device gpu")
        if self.source.kind == "two_word" and self.data.more:
            raise ValueError(f"data.more: expected 0 for two_word, as tied pairs leave the set; got {self.data.more}")
        if self.data.online > self.data.preferences + self.data.more:
            raise ValueError(f"data.online: expected at most preferences + more, got {self.data.online}")
        if self.data.best_of_n > self.data.test:
            raise ValueError(f"data.best_of_n: expected at most test={self.data.test}, got {self.data.best_of_n}")
        return self

    def made_from(self) -> dict:
        """What the SFT checkpoint and the test prompts follow from: arms that agree in it share them."""
        data = self.data.model_dump(exclude={"preferences", "more", "online"})
        return used(self, "source", "model", "base", "sft") | {"data": data}


# A figure -> the task it needs. Figures of one scale alone; figures that compare it with arms on the same SFT
# checkpoint; figures with arms that are worlds, or model sizes, of their own.
FIGURES = {"fig3": "human", "fig4": "human", "fig7": "human", "fig8": "human", "fig11": "rouge"}
SHARED = ("fig5", "fig6", "fig12", "more_data", "recipe", "budget")
APART = ("fig9", "fig10", "horizon", "complexity", "verifier", "worlds")
BORROWS = {"more_data": "fig12", "horizon": "fig10"}  # points that another figure has already
ArmFigure = Literal[SHARED + APART]
Figure = Literal[tuple(FIGURES) + SHARED + APART]


class Params(Strict):
    """params.yaml. What follows from the scale is written out in it, as DVC needs it: `switch` sets all of that."""

    scale: str
    data_from: str
    tasks: list[Literal["human", "rouge"]]
    sizes: list[str]  # blocks whose policies and reward models Fig 9 crosses
    worlds: list[str]  # blocks with an SFT checkpoint of their own
    arms: dict[ArmFigure, list[str]]  # blocks that a figure compares with the scale's
    figures: dict[Figure, list[str]]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    studies: dict[str, dict[ArmFigure, list[str]]]  # scale -> arms
    scales: dict[str, Scale]

    @model_validator(mode="after")
    def _consistent(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected distinct values, got {self.seeds}")
        if self.scale not in self.scales:
            raise ValueError(f"scale: no block named {self.scale!r}{nearest(self.scale, self.scales)}")
        self._check_studies()
        cfg = self.scales[self.scale]
        for key, value in active(self.scale, cfg.samples.human is not None, self.studies).items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}: expected {value} for scale {self.scale}, got {getattr(self, key)};"
                                 f" `make fig11 SCALE={self.scale}` sets it")
        if cfg.synthetic != (self.data_from == DATA_FROM["world"]):
            wanted = DATA_FROM["world"] if cfg.synthetic else "a folder of posts, or data/openai.json"
            raise ValueError(f"data_from: expected {wanted} for scale {self.scale}, got {self.data_from!r}")
        return self

    def _check_studies(self):
        for scale, figures in self.studies.items():
            if scale not in self.scales:
                raise ValueError(f"studies: no block named {scale!r}{nearest(scale, self.scales)}")
            for figure, arms in figures.items():
                for name in arms:
                    if name not in self.scales:
                        raise ValueError(f"studies.{scale}.{figure}: no block named {name!r}"
                                         f"{nearest(name, self.scales)}")
                    same = self.scales[name].made_from() == self.scales[scale].made_from()
                    if figure in SHARED and not same:
                        raise ValueError(f"studies.{scale}.{figure}: {name} differs from {scale} in what SFT is made "
                                         "from; expected the same source, model, base, sft and data")


def active(scale: str, has_preferences: bool, studies: dict) -> dict:
    """What of the graph a scale has: posts may come without preferences, and not every scale has a study."""
    tasks = ["human", "rouge"] if has_preferences else ["rouge"]
    study = studies.get(scale, {})
    arms = {name: list(study.get(name, [])) for name in SHARED + APART}
    apart = [arm for name in APART for arm in arms[name]]
    figures = {name: [scale] * (task in tasks) for name, task in FIGURES.items()}
    figures |= {name: [scale] * bool(arms[name]) for name in SHARED + APART}
    return {"tasks": tasks, "sizes": [scale, *arms["fig9"]] if has_preferences else [],
            "worlds": list(dict.fromkeys([scale, *apart])), "arms": arms, "figures": figures}


def nearest(key: str, known) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(known)}"


def _explain(error: dict) -> str:
    """One pydantic error as 'key: what was expected'."""
    # pydantic's path has two steps that the file has not: `scales`, and the kind of a block that has several.
    location = [str(part) for part in error["loc"]]
    location = location[1:] if location[:1] == ["scales"] else location
    is_kind = [before in KINDS and part in KINDS[before] for before, part in zip(["", *location], location)]
    key = ".".join(part for part, kind in zip(location, is_kind) if not kind)
    if error["type"] == "extra_forbidden":
        model = Params if len(location) == 1 else Scale
        for before, part in zip(location, location[1:-1]):
            if before in KINDS:
                model = KINDS[before][part]
            elif part not in KINDS:
                model = _model_of(model.model_fields[part].annotation)
        known = [name for name in model.model_fields if name != "scales"]
        return f"{key}: unknown key{nearest(location[-1], known)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    if error["type"] == "value_error":
        inner = str(error["ctx"]["error"])
        return f"{key}.{inner}" if key else inner
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


KINDS = {"source": {"world": World, "posts": Posts, "jsonl": Jsonl, "openai": OpenAI, "two_word": TwoWord},
         "model": {"new": New, "pretrained": Pretrained, "packaged": Packaged},
         "judge": {"gold": Gold, "openai": Outside, "batch": Outside}}


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
        raise UserError(f"{path}: expected a mapping with the keys scale, seeds and one block per scale")
    # A mapping that is no top-level key is the block of a scale; anything else unknown is a mistake.
    scales = {key: raw[key] for key in raw if key not in Params.model_fields and isinstance(raw[key], dict)}
    for name in scales:
        if not NAME.fullmatch(str(name)):
            raise UserError(f"{path}: {name!r}: expected a block name of letters, digits, _ and -, a letter first")
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
        raise UserError(f"{PARAMS}: no block named {name!r}{nearest(name, params.scales)}")
    return params.scales[name]


def used(scale: Scale, *blocks: str) -> dict:
    """The named blocks as plain values: what a stage writes to its params.json, and what DVC tracks for it."""
    return {block: scale.model_dump()[block] for block in blocks}


def switch(scale: str, data: str | None = None, path: Path = PARAMS) -> None:
    """Set the active scale and all that follows from it in params.yaml; comments stay.

    Raises:
        UserError: no such scale, a folder of posts for a scale that makes its own data, or no such folder.
    """
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 118
    yaml.representer.add_representer(type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null"))
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    document = yaml.load(before) or {}
    block = document.get(scale)
    if not isinstance(block, dict) or scale in Params.model_fields:
        known = [key for key in document if isinstance(document[key], dict) and key not in Params.model_fields]
        raise UserError(f"{path}: no block named {scale!r}{nearest(scale, known)}")
    kind = block.get("source", {}).get("kind")
    if data is not None and kind == "world":
        raise UserError(f"DATA={data}: scale {scale} makes its own data; use a scale of real posts")
    if data is not None and not (Path(data).is_file() if kind == "openai" else Path(data).is_dir()):
        expected = ("a file that says what to download, as data/openai.json does" if kind == "openai" else
                    "a folder with train.jsonl, valid.jsonl and test.jsonl")
        raise UserError(f"DATA={data}: not found; expected {expected}")
    if data is None:
        data = document["data_from"] if document.get("scale") == scale else DATA_FROM.get(kind, "")
    document["scale"], document["data_from"] = scale, data
    for key, value in active(scale, bool(block.get("samples", {}).get("human")), document["studies"]).items():
        for where, name, blocks in ([(document, key, value)] if isinstance(value, list)
                                    else [(document[key], name, blocks) for name, blocks in value.items()]):
            where[name][:] = blocks
            where[name].fa.set_flow_style()
    scratch = path.with_suffix(".writing")
    with scratch.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)
    try:
        load(scratch)
    except UserError as error:
        scratch.unlink()
        raise UserError(str(error).replace(str(scratch), str(path))) from None
    if scratch.read_text(encoding="utf-8") == before:
        scratch.unlink()
    else:
        scratch.replace(path)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate params.yaml")
    setter = commands.add_parser("set", help="switch the active scale")
    setter.add_argument("--scale", help="a block of params.yaml (default: the active one)")
    setter.add_argument("--data", help="folder with train.jsonl, valid.jsonl, test.jsonl")
    args = parser.parse_args()
    if args.command == "set":
        switch(args.scale or load().scale, args.data)
    else:
        load()


if __name__ == "__main__":
    main(_command)

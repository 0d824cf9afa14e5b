"""Preferences of your own: rows with prompt, chosen and rejected, as TRL and the hub have them, as token arrays.

A row is an object with these fields; others are ignored.
    prompt               a text, or a chat: a list of messages with role and content
    chosen, rejected     how it continues: a text, or messages of which the last is the assistant's
    reference            the text or message to learn in SFT, and to beat; chosen, where there is none
Texts are taken as they are: a completion begins where its prompt ends. What comes before the last message of a chat is
its prompt (a `prompt` that the messages repeat is not read twice), put into one text by the model's own chat template.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer
from tqdm import tqdm

from roads import hub, schema, stage, strict, tldr
from roads.sources import SUFFIXES
from roads.stage import UserError

SPLITS = ("train", "valid", "test")
FIELDS = ["prompt", "chosen", "rejected"]
HELD_OUT = 10  # where there is no file of a split, it has the last rows of train, at most one in so many
Rows = list[tuple[dict, str]]  # each with where it stands
Template = Callable[[list[dict]], str]


class Dataset(strict.Strict):
    """What a file of DATA says: a dataset of the hub, at a commit, and its files of each split."""

    dataset: str
    revision: str | None
    splits: dict[Literal["train", "valid", "test"], Annotated[str, Field(pattern="^[^/]")]]  # split -> pattern


@dataclass(frozen=True)
class Preference:
    prompt: str  # as the policy reads it
    is_chat: bool  # the prompt is a template's, whose special tokens are tokens
    chosen: str
    rejected: str
    reference: str


def read(source: Path) -> dict[str, Rows]:
    """The rows of train, and of valid and test where there are such files, of a folder or of a dataset of the hub.

    Raises:
        UserError: no file of train, or one that cannot be read.
    """
    if source.is_dir():
        files = {split: found for split in SPLITS
                 if (found := [path for suffix in SUFFIXES if (path := source / f"{split}{suffix}").exists()])}
        for found in files.values():
            if len(found) > 1:
                raise UserError(f"{source}: {' and '.join(path.name for path in found)}; expected one of them")
    else:
        try:
            content = stage.read_json(source)
        except ValueError as error:  # of JSON, or of its encoding
            raise UserError(f"{source}: {error}; expected JSON, as data/ultrafeedback.json is") from None
        wanted = strict.check(Dataset, content, str(source))
        folder, _ = hub.fetch(wanted.dataset, wanted.revision, list(wanted.splits.values()), "dataset")
        try:
            files = {split: sorted(folder.glob(pattern)) for split, pattern in wanted.splits.items()}
        except ValueError as error:
            raise UserError(f"{source}: splits: {error}; expected patterns of files, as data/train-*.parquet") from None
        if "train" not in files:
            raise UserError(f"{source}: splits.train: missing; expected a pattern of the files to train on")
        for split, found in files.items():
            if not found:
                raise UserError(f"{source}: splits.{split}: no file {wanted.splits[split]} in {wanted.dataset}")
    if "train" not in files:
        raise UserError(f"{source}: no rows to train on; expected train.jsonl or train.parquet")
    return {split: [row for path in paths for row in _rows(path)] for split, paths in files.items()}


def _rows(path: Path) -> Rows:
    if path.suffix != ".parquet":
        return list(tldr.objects(path, FIELDS))
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(path)
        kept = [name for name in (*FIELDS, "reference") if name in table.column_names]
        rows = table.select(kept).to_pylist()
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; expected a parquet file of rows") from None
    return [(row, f"{path}: row {i}") for i, row in enumerate(rows)]


def preference_of(value: dict, where: str, template: Template) -> Preference:
    """One row; `where` begins the error of one that is none."""
    for name in ("chosen", "rejected"):
        if value.get(name) is None:
            raise UserError(f"{where}: no field {name!r}; expected {', '.join(FIELDS)}")
    (begun, chosen), (other, rejected) = (_last(value[name], f"{where}: {name}") for name in ("chosen", "rejected"))
    if begun != other:
        raise UserError(f"{where}: chosen and rejected differ before their last message; expected one prompt")
    prompt = value.get("prompt")
    if prompt is None and not begun:
        raise UserError(f"{where}: no field 'prompt', and no message before the last; expected {', '.join(FIELDS)}")
    reference = value.get("reference")
    reference = chosen if reference is None else _last(reference, f"{where}: reference")[1]
    sides = chosen, rejected, reference
    if isinstance(prompt, str) and isinstance(value["chosen"], str):
        return Preference(_text(prompt, f"{where}: prompt"), False, *sides)
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": _text(prompt, f"{where}: prompt")}]
        before = begun if any(one["role"] == "user" for one in begun) else begun + asked
    else:
        before = _joined(_messages(prompt, f"{where}: prompt") if prompt is not None else [], begun)
    try:
        return Preference(template(before), True, *sides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _joined(asked: list[dict], begun: list[dict]) -> list[dict]:
    """The messages of a prompt and those before a side's last one; what both have is there once."""
    one, other = ([(it["role"], it["content"].strip()) for it in messages] for messages in (asked, begun))
    if any(other[i : i + len(one)] == one for i in range(len(other) - len(one) + 1)):
        return begun
    shared = next(k for k in range(min(len(one), len(other)), -1, -1) if one[len(one) - k :] == other[:k])
    return asked + begun[shared:]


def _last(side: Any, where: str) -> tuple[list[dict], str]:
    """The messages before a side's last one, and the text of that."""
    if isinstance(side, str):
        return [], _text(side, where)
    messages = _messages(side, where)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is of role {messages[-1]['role']!r}; expected the assistant's")
    return messages[:-1], messages[-1]["content"].strip()


def _messages(found: Any, where: str) -> list[dict]:
    if not (isinstance(found, list) and found and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in found)):
        raise UserError(f"{where}: expected a text, or a list of messages with role and content, each a text")
    return [{"role": _text(one["role"], where), "content": _text(one["content"], where)} for one in found]


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half a surrogate pair; expected Unicode text") from None
    return text


def template_of(model: schema.Pretrained | schema.Packaged) -> Template:
    """A function that renders messages with the model's own chat template, up to where its answer begins."""
    found = []  # read when the first chat comes

    def text_of(messages: list[dict]) -> str:
        if not found:
            found.append(_tokenizer(model))
        if not found[0].chat_template:
            raise UserError(f"model {model.name} has no chat template, which messages need; expected an instruct "
                            "model, or rows of plain texts")
        try:
            return found[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # what a template raises is its own
            raise UserError(f"the chat template of {model.name} does not take it: {error}") from None

    return text_of


def _tokenizer(model: schema.Pretrained | schema.Packaged) -> Any:
    from transformers import AutoTokenizer

    if model.kind == "packaged":
        file = hub.gguf(model.name)
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder, _ = hub.fetch(model.name, model.revision, ["*.json", "*.jinja", "tokenizer*"])
    return AutoTokenizer.from_pretrained(folder)


def splits_of(source: Path, cfg: schema.Scale, tokenizer: Tokenizer) -> tuple[dict[str, dict[str, np.ndarray]], dict]:
    """The splits of stage data, as many rows as params.yaml asks for or as there are, and what did not fit.

    Rows are taken in an order that is drawn once. SFT and the preference set are the first rows of train, `more` comes
    after the preference set; a prompt that valid or test has is in none of them. A prompt that is too long is left
    out, and so is a row whose sides are the same or empty; a completion that is too long is cut.

    Raises:
        UserError: rows that are none, a split without rows, or more than `source.cut_at_most` of the rows too long.
    """
    rows, lengths, template = read(source), cfg.source, template_of(cfg.model)
    drawn = {split: [found[i] for i in np.random.default_rng(0).permutation(len(found))]
             for split, found in rows.items()}
    for split in ("valid", "test"):
        if split not in drawn:
            start = len(drawn["train"]) - min(getattr(cfg.data, split), len(drawn["train"]) // HELD_OUT)
            drawn["train"], drawn[split] = drawn["train"][:start], drawn["train"][start:]
    special = Tokenizer.from_str(tokenizer.to_str())
    special.encode_special_tokens = False
    counts: dict[str, dict[str, int]] = {}
    found, prompts = {}, set()
    wanted = {"valid": cfg.data.valid, "test": cfg.data.test,
              "train": max(cfg.data.sft, cfg.data.preferences + cfg.data.more)}
    for split, n in wanted.items():
        counts[split] = dict.fromkeys(("rows", "prompt too long", "completion cut", "sides alike", "held out"), 0)
        each = (preference_of(value, where, template) for value, where in drawn[split])
        found[split] = _fit(tqdm(each, desc=f"tokens of {split}", unit="row", total=min(n, len(drawn[split]))), n,
                            counts[split], lengths, tokenizer, special, prompts if split == "train" else set())
        prompts |= {query.tobytes() for query in found[split]["query"]} if split != "train" else set()
    print(table(counts), flush=True)
    for split, count in counts.items():
        lost = count["prompt too long"] + count["completion cut"]
        if lost > lengths.cut_at_most * count["rows"]:
            raise UserError(f"{source}: {split}: {lost} of {count['rows']} rows are too long, which is more than "
                            f"source.cut_at_most, {lengths.cut_at_most:g}; raise source.max_query_tokens, "
                            "max_response_tokens and max_preference_tokens, or that share")
        if not len(found[split]["query"]):
            raise UserError(f"{source}: {split}: none of {count['rows']} rows is left; expected at least one"
                            + f" (a split without a file has one in {HELD_OUT} rows of train)" * (split != "train"))
    train, start = found.pop("train"), cfg.data.preferences
    found["sft"] = {name: train[name][: cfg.data.sft] for name in ("query", "response")}
    found["preferences"] = {name: values[:start] for name, values in train.items()}
    known = {query.tobytes() for query in found["preferences"]["query"]}
    beyond = [i for i in range(start, min(len(train["query"]), start + cfg.data.more))
              if train["query"][i].tobytes() not in known]
    found["more"] = {name: train[name][beyond] for name in ("query", "response")}
    found["test"] = {name: found["test"][name] for name in ("query", "response")}
    return found, counts


def _fit(rows: Iterable[Preference], n: int, count: dict[str, int], lengths: schema.OwnPreferences, plain: Tokenizer,
         special: Tokenizer, held_out: set[bytes]) -> dict[str, np.ndarray]:
    """The first n rows that fit, as query, response, chosen and rejected; `count` says what became of the others."""
    task = tldr.Task(max_response_tokens=lengths.max_response_tokens)
    side = tldr.Task(max_response_tokens=lengths.max_preference_tokens)
    kept: dict[str, list[list[int]]] = {name: [] for name in ("query", "response", "chosen", "rejected")}
    for row in rows:
        if len(kept["query"]) == n:
            break
        count["rows"] += 1
        ids = (special if row.is_chat else plain).encode(row.prompt, add_special_tokens=False).ids
        ids = [i for i in ids if i != tldr.PAD and (row.is_chat or i != tldr.EOS)]
        texts = {"response": (row.reference, task), "chosen": (row.chosen, side), "rejected": (row.rejected, side)}
        if not ids or not all(text.strip() for text, _ in texts.values()) or row.chosen == row.rejected:
            count["sides alike"] += 1
            continue
        if len(ids) > lengths.max_query_tokens:
            count["prompt too long"] += 1
            continue
        if held_out and tldr.pad([ids], lengths.max_query_tokens, "left").tobytes() in held_out:
            count["held out"] += 1
            continue
        found = {name: plain.encode(text, add_special_tokens=False).ids for name, (text, _) in texts.items()}
        count["completion cut"] += any(len(found[name]) >= of.max_response_tokens for name, (_, of) in texts.items())
        kept["query"].append(ids)
        for name, (_, of) in texts.items():
            kept[name].append(of.closed(found[name]))
    sizes = {"query": lengths.max_query_tokens, "response": lengths.max_response_tokens,
             "chosen": lengths.max_preference_tokens, "rejected": lengths.max_preference_tokens}
    return {name: tldr.pad(kept[name], size, "left" if name == "query" else "right") for name, size in sizes.items()}


def table(counts: dict[str, dict[str, int]]) -> str:
    """What was read of each split, and what was left out or cut.

    >>> print(table({"train": {"rows": 10, "completion cut": 2}}))
                    rows  completion cut
    train             10               2
    """
    names = list(next(iter(counts.values())))
    lines = [" " * 12 + "".join(f"{name:>{max(8, len(name) + 2)}}" for name in names)]
    lines += [f"{split:<12}" + "".join(f"{count[name]:>{max(8, len(name) + 2)}}" for name in names)
              for split, count in counts.items()]
    return "\n".join(lines)

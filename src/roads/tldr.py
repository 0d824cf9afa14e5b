"""TL;DR rows as text and as token arrays: the task of every stage at every scale.

`Task` is the one place that knows the query format, the two lengths and how a text that is too
long is cut, as in `tasks.py` of openai/summarize-from-feedback.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from roads.stage import UserError

EOS, PAD = 0, 1
SPECIAL = ["<|endoftext|>", "<|padding|>"]  # the tokens of EOS and PAD
END = "\n\nTL;DR:"
_WORD_END = re.compile(r"\S[ \n]")


@dataclass(frozen=True)
class Row:
    id: str
    subreddit: str
    title: str
    post: str
    summary: str


FIELDS = [field.name for field in fields(Row)]


def read_rows(path: Path) -> list[Row]:
    """Read a jsonl file: one object with the text fields of `Row` per line; other fields are ignored.

    Raises:
        UserError: the file cannot be read or holds no rows, or a line is no such row (`FILE:LINE: ...`).
    """
    try:
        lines = Path(path).read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a jsonl file of TL;DR rows") from None
    if lines == [b""]:
        raise UserError(f"{path}: empty; expected one TL;DR row per line")
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected one object per line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with the fields {', '.join(FIELDS)}")
    for name in FIELDS:
        if name not in value:
            raise UserError(f"{where}: no field {name!r}; expected {', '.join(FIELDS)}")
        if not isinstance(value[name], str):
            raise UserError(f"{where}: field {name!r} is {json.dumps(value[name])[:40]}; expected a string")
        if re.search("[\ud800-\udfff]", value[name]):
            raise UserError(f"{where}: field {name!r} has half a surrogate pair; expected Unicode text")
    if not value["summary"].strip():
        raise UserError(f"{where}: field 'summary' is empty; expected the text to learn")
    return Row(*(value[name] for name in FIELDS))


@dataclass(frozen=True)
class Task:
    """Continue the query `SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:` by a response that ends in EOS."""

    max_query_tokens: int = 512
    max_response_tokens: int = 53

    def query_ids(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """At most `max_query_tokens` ids of the query; `tokenizer` is a byte-level BPE.

        Too long: cut the post at its last newline, or else drop its last character, and repeat.

        Raises:
            UserError: the query is too long even without its post.
        """
        head = f"SUBREDDIT: r/{row.subreddit}\n\nTITLE: {row.title}\n\nPOST: "
        text, post = head + row.post + END, row.post
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if len(encoding) <= self.max_query_tokens:
            return encoding.ids
        # No token spans the end of a word and the white space after it, so whatever follows a word,
        # the tokens up to its end stay. A post that keeps the word of token `max_query_tokens` is
        # thus too long, because END comes on top: pass over such posts without tokenising them.
        word_end = _WORD_END.search(text, encoding.offsets[self.max_query_tokens - 1][1] - 1)
        too_long = word_end.start() + 1 - len(head) if word_end else len(post)
        while len(encoding) > self.max_query_tokens:
            if not post:
                raise UserError(f"row {row.id!r}: over {self.max_query_tokens} query tokens without the post")
            post = post[: post.rfind("\n")]  # -1 where there is none: drops the last character
            if len(post) < too_long or not post:
                encoding = tokenizer.encode(head + post + END, add_special_tokens=False)
        return encoding.ids

    def response_ids(self, summary: str, tokenizer: Tokenizer) -> list[int]:
        """At most `max_response_tokens` ids of " " + summary, the last one EOS even if it is cut."""
        ids = tokenizer.encode(" " + summary.strip(), add_special_tokens=False).ids
        return ids[: self.max_response_tokens - 1] + [EOS]


def pad(sequences: list[list[int]], length: int, side: str) -> np.ndarray:
    """Stack sequences as int32 [n, length], PAD added on `side`, "left" or "right".

    >>> pad([[5, 6], [7]], 3, "left").tolist()
    [[1, 5, 6], [1, 1, 7]]
    """
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r}: expected 'left' or 'right'")
    out = np.full((len(sequences), length), PAD, dtype=np.int32)
    for row, ids in zip(out, sequences):
        if len(ids) > length:
            raise ValueError(f"a sequence of {len(ids)} tokens does not fit {length}")
        start = length - len(ids) if side == "left" else 0
        row[start : start + len(ids)] = ids
    return out


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer.

    Every text is the decoding of its encoding, because all 256 bytes are tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(SPECIAL) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size}: expected at least {smallest} (256 bytes, EOS, padding)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        UserError: it cannot be read, or `<|endoftext|>` and `<|padding|>` are not its tokens 0 and 1.
    """
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}; expected a tokenizer.json") from None
    for expected, token in enumerate(SPECIAL):
        found = tokenizer.token_to_id(token)
        if found != expected:
            raise UserError(f"{path}: {token} has id {found}; expected {expected}, as in Pythia's tokenizer")
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Read a special token in a text as text, so that no post can end a sequence; never cut or pad."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

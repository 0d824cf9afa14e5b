"""TL;DR rows as text and as token arrays: the task of every stage at every scale.

`Task` is the one place that knows the query format, the two lengths and how a text that is too long is cut, as in
`tasks.py` of openai/summarize-from-feedback.

Files of rows are jsonl, an object a line. A post with its summary has the text fields of `Row`. A comparison of two
summaries has the fields id, subreddit, title, post, chosen and rejected, or is as OpenAI published it:
    {"info": {"id", "subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1, "batch"}
Those of the `CNN_DM` batches are about news articles and are left out.
"""

import json
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from roads.stage import UserError, expect_file, write_json

EOS, PAD = 0, 1
BEYOND = 8  # tokens that a cut within a word changes, at most
SPECIAL = ["<|endoftext|>", "<|padding|>"]  # the tokens of EOS and PAD
END = "\n\nTL;DR:"
TWO_WORD_END = "\n\nTwo-Word TL;DR:"  # Fig 10
CNN_DM = ("batch0_cnndm", "cnndm0", "cnndm2")
_WORD_END = re.compile(r"\S[ \n]")


@dataclass(frozen=True)
class Row:
    id: str
    subreddit: str
    title: str
    post: str
    summary: str


@dataclass(frozen=True)
class Comparison(Row):
    """Two summaries of a post, of which a person preferred `summary`."""

    rejected: str


FIELDS = [field.name for field in fields(Row)]
SIDES = [*FIELDS[:-1], "chosen", "rejected"]  # of a comparison


def read_rows(path: Path) -> list[Row]:
    """Read a jsonl file of posts with their summaries; fields beyond those of `Row` are ignored.

    Raises:
        UserError: the file cannot be read or holds no rows, or a line is no such row (`FILE:LINE: ...`).
    """
    return [row_of(value, where) for value, where in objects(path)]


def read_comparisons(path: Path) -> list[Comparison]:
    """Read a jsonl file of comparisons, of either shape. Raises UserError as `read_rows` does."""
    return [comparison_of(*found) for found in objects(path, SIDES) if found[0].get("batch") not in CNN_DM]


def row_of(value: dict, where: str) -> Row:
    """One row; `where` begins the error of one that is none."""
    texts = _texts(value, where, FIELDS)
    if not value["summary"].strip():
        raise UserError(f"{where}: field 'summary' is empty; expected the text to learn")
    return Row(*texts)


def comparison_of(value: dict, where: str) -> Comparison:
    """One comparison; `where` begins the error of one that is none."""
    if "summaries" in value:
        info, sides, choice = (value.get(name) for name in ("info", "summaries", "choice"))
        two = isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, dict) for side in sides)
        if not (two and isinstance(info, dict) and choice in (0, 1) and not isinstance(choice, bool)):
            raise UserError(f"{where}: expected an object info, two summaries and a choice of 0 or 1")
        first = int(choice)  # 1.0, as some tools write it
        value = info | {"chosen": sides[first].get("text"), "rejected": sides[1 - first].get("text")}
    return Comparison(*_texts(value, where, SIDES))


def objects(path: Path, names: list[str] = FIELDS) -> Iterator[tuple[dict, str]]:
    """The object of each line of a jsonl file, which may be compressed (.xz), and where it stands: FILE:LINE."""
    if not Path(path).is_dir():
        expect_file(path)
    try:
        text = Path(path).read_bytes()
        lines = (lzma.decompress(text) if Path(path).suffix == ".xz" else text).rstrip().split(b"\n")
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}; expected a jsonl file of rows") from None
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: empty; expected one row per line")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); expected one object per line") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with the fields {', '.join(names)}")
        yield value, where


def _texts(value: dict, where: str, names: list[str]) -> list[str]:
    for name in names:
        if name not in value:
            raise UserError(f"{where}: no field {name!r}; expected {', '.join(names)}")
        if not isinstance(value[name], str):
            raise UserError(f"{where}: field {name!r} is {json.dumps(value[name])[:40]}; expected a string")
        if re.search("[\ud800-\udfff]", value[name]):
            raise UserError(f"{where}: field {name!r} has half a surrogate pair; expected Unicode text")
    return [value[name] for name in names]


@dataclass(frozen=True)
class Task:
    """Continue the query `SUBREDDIT: r/... TITLE: ... POST: ... TL;DR:` by a response that ends in EOS."""

    max_query_tokens: int = 512
    max_response_tokens: int = 53
    end: str = END

    def query_ids(self, row: Row, tokenizer: Tokenizer) -> list[int]:
        """At most `max_query_tokens` ids of the query.

        Too long: cut the post at its last newline, or else drop its last character, and repeat.

        Raises:
            UserError: the query is too long even without its post.
        """
        head = f"SUBREDDIT: r/{row.subreddit}\n\nTITLE: {row.title}\n\nPOST: "
        text, post = head + row.post + self.end, row.post
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if len(encoding) <= self.max_query_tokens:
            return _of_text(encoding.ids)
        # Where no token spans the end of a word and the white space after it, whatever follows a word,
        # the tokens up to its end stay. A post that keeps the word of token `max_query_tokens` is
        # thus too long, because `end` comes on top: pass over such posts without tokenising them.
        full = encoding.offsets[self.max_query_tokens - 1][1]  # where the tokens that there is room for end
        # Some tokens more than there is room for are too many, whatever a cut does to those before it.
        beyond = encoding.offsets[min(len(encoding), self.max_query_tokens + BEYOND) - 1][1]
        too_long = min(len(post), beyond - len(head))
        if _splits_after_words(tokenizer) and (word_end := _WORD_END.search(text, full - 1)):
            too_long = min(too_long, word_end.start() + 1 - len(head))
        while len(encoding) > self.max_query_tokens:
            if not post:
                raise UserError(f"row {row.id!r}: its title is over source.max_query_tokens={self.max_query_tokens}")
            newline = post.rfind("\n")
            post = post[:newline] if newline >= 0 else post[: min(len(post), max(too_long, 1)) - 1]
            if len(post) < too_long or not post:
                encoding = tokenizer.encode(head + post + self.end, add_special_tokens=False)
        return _of_text(encoding.ids)

    def response_ids(self, summary: str, tokenizer: Tokenizer) -> list[int]:
        """At most `max_response_tokens` ids of " " + summary, the last one EOS even if it is cut."""
        return self.closed(tokenizer.encode(" " + summary.strip(), add_special_tokens=False).ids)

    def closed(self, ids: list[int]) -> list[int]:
        """At most `max_response_tokens` ids of a response, the last one EOS."""
        return _of_text(ids)[: self.max_response_tokens - 1] + [EOS]


def _of_text(ids: list[int]) -> list[int]:
    """Without EOS and padding, which a tokenizer of whole words (Unigram, WordLevel) finds where a text spells them."""
    return [i for i in ids if i not in (EOS, PAD)]


def _splits_after_words(tokenizer: Tokenizer) -> bool:
    """GPT-2's pattern never puts a word, or punctuation, and the white space after it into one token. Llama 3's and
    Qwen's put line breaks to the punctuation before them, and SentencePiece may do anything."""
    splitter = tokenizer.pre_tokenizer
    return isinstance(splitter, pre_tokenizers.ByteLevel) and splitter.use_regex


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
        row[slice(length - len(ids), None) if side == "left" else slice(len(ids))] = ids
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
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        UserError: it cannot be read, or its tokens 0 and 1 are no special tokens: they end a text, and pad it.
    """
    special = (tokenizer := _read_tokenizer(path)[1]).get_added_tokens_decoder()
    for expected, token in enumerate(SPECIAL):
        if expected not in special or not special[expected].special:
            raise UserError(f"{path}: {token} has id {tokenizer.token_to_id(token)}; expected {expected}, as in "
                            "Pythia's tokenizer")
    return _plain(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what AutoTokenizer opens: tokenizer.json, and tokenizer_config.json, which names EOS and padding."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
                "clean_up_tokenization_spaces": False, "eos_token": tokenizer.id_to_token(EOS),
                "pad_token": tokenizer.id_to_token(PAD)}
    write_json(folder / "tokenizer_config.json", settings)


def renumber_tokenizer(path: Path, eos: str | int, pad: str | None) -> tuple[Tokenizer, int, int]:
    """The tokenizer of any model, with EOS and padding as tokens 0 and 1: they change places with what is there.

    Args:
        path: its tokenizer.json. eos: the token that ends a text, or its id.
        pad: the padding token. Where it is none, or ends texts too, `<|padding|>` is taken; a tokenizer without one
            gets it as a token beyond the others.
    Returns:
        The tokenizer, and the ids that the two tokens had.
    Raises:
        UserError: the file cannot be read, or it has no such token.
    """
    text, tokenizer = _read_tokenizer(path)
    known = tokenizer.get_vocab()
    end = tokenizer.id_to_token(eos) if isinstance(eos, int) else eos
    if end not in known:
        raise UserError(f"{path}: no token {end!r}, which the model's settings say ends a text")
    if pad == end or pad not in known:
        pad = SPECIAL[PAD]
    ids = known | {pad: known.get(pad, max(known.values()) + 1)}
    eos_id, pad_id = ids[end], ids[pad]
    if (eos_id, pad_id) != (EOS, PAD):
        tokenizer = Tokenizer.from_str(_renumbered(json.loads(text), ids, end, pad))
    return _plain(tokenizer), eos_id, pad_id


def swaps(eos_id: int, pad_id: int) -> list[tuple[int, int]]:
    """The pairs of tokens that change places, one after the other, to bring EOS and padding to 0 and 1.

    >>> swaps(2, 0)
    [(0, 2), (1, 2)]
    """
    return [(EOS, eos_id), (PAD, eos_id if pad_id == EOS else pad_id)]


def _renumbered(spec: dict, ids: dict[str, int], eos: str, pad: str) -> str:
    """tokenizer.json with EOS and padding at 0 and 1. Merges go by the tokens' text, and stay."""
    place = {i: i for i in ids.values()}
    for a, b in swaps(ids[eos], ids[pad]):
        at = {i: old for old, i in place.items()}
        place[at[a]], place[at[b]] = b, a
    ids = {token: place[i] for token, i in ids.items()}
    model, added = spec["model"], {token["content"]: token for token in spec["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for token in (eos, pad):
        added[token] = plain | added.get(token, {}) | {"content": token, "special": True}
    # tokenizers numbers added tokens anew unless the model's own vocabulary has them.
    if isinstance(model["vocab"], dict):
        model["vocab"] = ids
    else:  # Unigram: tokens in order, each with its log-probability
        score = dict(map(tuple, model["vocab"]))
        least = min(score.values())
        if model.get("unk_id") is not None:
            model["unk_id"] = ids[model["vocab"][model["unk_id"]][0]]
        model["vocab"] = [[token, score.get(token, least)] for token in sorted(ids, key=ids.get)]
    added = [token | {"id": ids[name]} for name, token in added.items()]
    spec["added_tokens"] = sorted(added, key=lambda token: token["id"])
    # Post-processors that add tokens, such as BOS, are dropped. ByteLevel's stays: it makes offsets exact.
    after = spec["post_processor"] or {}
    levels = [one for one in (after, *after.get("processors", ())) if one.get("type") == "ByteLevel"]
    spec |= {"post_processor": levels[0] if levels else None, "truncation": None, "padding": None}
    return json.dumps(spec, ensure_ascii=False)


def _read_tokenizer(path: Path) -> tuple[str, Tokenizer]:
    expect_file(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        return text, Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: {getattr(error, 'strerror', 0) or error}; expected a tokenizer.json") from None


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Read a special token in a text as text, so that no post can end a sequence; never cut or pad."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

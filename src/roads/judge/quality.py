"""How good a summary is, where that is known: the world's own quality, or one computed from the text of real posts.

    relevance    cosine of the sentence embeddings of post and summary (all-MiniLM-L6-v2): a property of the whole
                 summary, and no sum over its words
    calibrated   2.87 cos(post) + 1.29 cos(title) + 1.87 ln(1 + words), the logit of a logistic fit to 1,000 verdicts of
                 GPT-4 on TL;DR: it likes length, as that judge does
    sentiment    VADER's compound score: monotone in a sum over words, but for negations and such
    rouge        ROUGE-L F1 against the author's own summary, which no policy sees (Fig 11's reward)

A judge of known quality is noiseless. Annotators make Bradley-Terry labels of it, at a temperature in units of its
spread, with length bias, position bias and noise as params.yaml has them.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from roads import arrays, hub, kept, model, schema
from roads.judge.text import texts_of, titles_and_posts
from roads.rouge import rouge_l
from roads.tldr import PAD, load_tokenizer
from roads.world import World

Quality = Callable[[np.ndarray], np.ndarray]  # responses [N, R] -> quality [N]
PIECES = 256  # of a text at most: what the encoder was trained on
BATCH = 8192  # word pieces that it takes at once


def of(cfg: schema.Scale, query: np.ndarray, data: Path) -> Quality:
    """The quality of responses to queries [N, Q] of a data folder, by the judge of a scale that knows it."""
    if cfg.judge.kind == "gold":
        world = World(cfg.source)
        return lambda responses: world.quality(query, responses)
    tokenizer, kind = load_tokenizer(data / "tokenizer.json"), cfg.judge.kind
    if kind == "rouge":
        references = _references(query, data, tokenizer)
        return lambda responses: np.array([rouge_l(reference, [text])[0, 2] for reference, text in
                                           zip(references, texts_of(responses, tokenizer), strict=True)])
    if kind == "sentiment":
        return lambda responses: sentiment(texts_of(responses, tokenizer))
    titles, posts = map(list, zip(*titles_and_posts(query, tokenizer), strict=True))

    def near(texts: list[str], summaries: list[str]) -> np.ndarray:
        return (embed(texts, cfg.compute) * embed(summaries, cfg.compute)).sum(1, dtype=float)

    def calibrated(responses: np.ndarray) -> np.ndarray:
        texts = texts_of(responses, tokenizer)
        words = np.array([len(text.split()) for text in texts])
        return 2.87 * near(posts, texts) + 1.29 * near(titles, texts) + 1.87 * np.log1p(words)

    return calibrated if kind == "calibrated" else lambda responses: near(posts, texts_of(responses, tokenizer))


def annotate(quality: np.ndarray, lengths: np.ndarray, tau: float, labels: schema.PairSampling,
             rng: np.random.Generator) -> np.ndarray:
    """Scores [N, 2], 1 for the winner, of noisy Bradley-Terry labels (Eq. 4).

    Args:
        quality: [N, 2] of two summaries, the one that is shown first in front. lengths: [N, 2], tokens of each.
        tau: temperature, in units of quality. labels: the biases, in logits: of length per unit of ln tokens, and for
            what is shown first; and the share of labels that are flipped.
    """
    logits = (quality[:, 0] - quality[:, 1]) / tau
    if labels.length_bias:
        logits += labels.length_bias * np.log(lengths[:, 0] / lengths[:, 1])
    logits = np.clip(logits + labels.position_bias, -500, 500)  # exp would overflow
    first = rng.random(len(quality)) < 1 / (1 + np.exp(-logits))
    if labels.flipped:
        first ^= rng.random(len(quality)) < labels.flipped
    return np.stack([first, ~first], axis=1).astype(float)


def spread(quality: np.ndarray) -> float:
    """Standard deviation of the quality [N, n] of a prompt's samples, pooled over prompts: the unit of `tau`.

    >>> spread(np.array([[0.0, 2.0], [5.0, 5.0]]))
    1.0
    """
    return float(np.sqrt(quality.var(axis=1, ddof=1).mean()))


def sentiment(texts: list[str]) -> np.ndarray:
    """VADER's compound score [N] of texts, from -1 to 1."""
    return np.array([_lexicon().polarity_scores(text)["compound"] for text in texts], dtype=float)


@cache
def _lexicon():  # noqa: ANN202
    hub.installed(hub.LEXICON, "judge sentiment")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def embed(texts: list[str], compute: schema.Compute) -> np.ndarray:
    """Sentence embeddings [N, d] of texts, of length 1: the mean of the last hidden states. Kept for whoever asks for
    the same texts (a post has 25 summaries, and references are compared with every policy)."""
    unique = sorted(set(texts))
    digest = hashlib.sha256("\0".join([_version(), torch.__version__, compute.device, *unique]).encode()).hexdigest()
    key = f"embeddings-{digest[:20]}"
    if (found := kept.load(key)) is None:
        found = _embed(unique, compute)
        kept.save(key, found)
    place = {text: i for i, text in enumerate(unique)}
    return found[[place[text] for text in texts]]


@torch.no_grad()
def _embed(texts: list[str], compute: schema.Compute) -> np.ndarray:
    net, tokenizer = _encoder()
    net = net.to(model.device(compute))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = np.argsort([len(row) for row in ids], kind="stable")
    out, start = np.empty((len(ids), net.config.hidden_size), np.float32), 0
    while start < len(order):
        width, end = len(ids[order[start]]), start
        while end < len(order) and (end - start + 1) * len(ids[order[end]]) <= BATCH:
            width, end = len(ids[order[end]]), end + 1
        rows = order[start:end]
        tokens, real = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(ids[row])], real[i, : len(ids[row])] = ids[row], 1
        mask = torch.from_numpy(real).to(net.device)
        hidden = net(input_ids=torch.from_numpy(tokens).to(net.device), attention_mask=mask).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        out[rows] = torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy()
        start = end
    return out


@cache
def _encoder() -> tuple[torch.nn.Module, Tokenizer]:
    from transformers import AutoModel

    folder = hub.encoder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(PIECES)
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@cache
def _version() -> str:
    return f"{hub.encoder().parent.name} {metadata.version(hub.ENCODER)}"


def _references(query: np.ndarray, data: Path, tokenizer: Tokenizer) -> list[str]:
    """The author's own summary of each query's post."""
    known: dict[bytes, np.ndarray] = {}
    for split in ("test_human", "preferences", "valid", "more"):
        rows = arrays.tokens(data / f"{split}.npz", empty=True)
        known |= {row[row != PAD].tobytes(): answer for row, answer in zip(rows["query"], rows["response"])}
    return texts_of(np.stack([known[row[row != PAD].tobytes()] for row in query]), tokenizer)

"""Stage judge_report: what a judge of known quality likes, on samples of the SFT policy.

    python -m roads.stages.judge_report COMPLETIONS DATA OUT --scale real

Writes scores.npz: quality [N, n] and words [N, n] of every sample; examples.json: of ten posts, the samples that it
likes best and least and the author's own summary; metrics.json: how strongly its quality correlates
with length, and how much of it no sum over words explains (`beyond_words`).
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from roads import arrays, config, schema, stage
from roads.judge import quality, text
from roads.tldr import load_tokenizer

VOCABULARY = 4000  # words, the most frequent ones
PENALTIES = (1.0, 10.0, 100.0)  # of the ridge
FOLDS = 5
EXAMPLES = 10


def within(values: np.ndarray) -> np.ndarray:
    """Values [N, n, ...] less the mean of their prompt, flat [N * n, ...]."""
    return (values - values.mean(1, keepdims=True)).reshape(-1, *values.shape[2:])


def explained_by_words(texts: list[list[str]], target: np.ndarray) -> float:
    """R² of the best sum over words: a weight for each word, fitted by ridge regression to the differences between
    samples of a prompt, on prompts that it was not fitted to. 1 where there are no differences.

    Args:
        texts: n samples of each of N prompts. target: [N, n].
    """
    counted = [[Counter(sample.lower().split()) for sample in samples] for samples in texts]
    total = Counter()
    for samples in counted:
        for words in samples:
            total.update(words)
    place = {word: i for i, (word, _) in enumerate(sorted(total.items(), key=lambda it: (-it[1], it[0]))[:VOCABULARY])}
    counts = np.zeros((*target.shape, len(place)), np.float32)
    for i, samples in enumerate(counted):
        for j, words in enumerate(samples):
            for word, n in words.items():
                if word in place:
                    counts[i, j, place[word]] = n
    x, y = torch.from_numpy(within(counts)), torch.from_numpy(within(target)).float()
    fold = torch.arange(len(target)).repeat_interleave(target.shape[1]) % FOLDS
    grams = [(x[fold == k].T @ x[fold == k], x[fold == k].T @ y[fold == k]) for k in range(FOLDS)]
    gram, moment = (sum(parts) for parts in zip(*grams))
    best, total_error = 0.0, float((y.double() ** 2).sum())
    if not total_error:
        return 1.0
    for penalty in PENALTIES:
        error = 0.0
        for k, (own_gram, own_moment) in enumerate(grams):
            weights = torch.linalg.solve(gram - own_gram + penalty * torch.eye(len(place)), moment - own_moment)
            error += float(((y - x @ weights)[fold == k].double() ** 2).sum())
        best = max(best, 1 - error / total_error)
    return best


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, of values [N, n] within their prompts; 0 where one of them never varies."""
    a, b = within(a), within(b)
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def judge_report(completions: Path, data: Path, out: Path, cfg: schema.Scale) -> None:
    """Write what the scale's judge says of n samples per prompt."""
    torch.set_num_threads(cfg.machine.threads)
    with stage.output(out, schema.used(cfg, "judge"), [completions, data]) as folder:
        rows, tokenizer = arrays.tokens(completions / "completions.npz"), load_tokenizer(data / "tokenizer.json")
        query, sampled = rows["query"], rows["completions"]
        quality_of = quality.of(cfg, query, data)
        found = np.stack([quality_of(sampled[:, i]) for i in range(sampled.shape[1])], 1)
        texts = [text.texts_of(samples, tokenizer) for samples in sampled]
        words = np.array([[len(sample.split()) for sample in samples] for samples in texts])
        references = arrays.tokens(data / "test_human.npz")["response"][: len(query)]
        own, own_quality = text.texts_of(references, tokenizer), quality_of(references)
        pages = text.titles_and_posts(query[:EXAMPLES], tokenizer)
        stage.write_json(folder / "examples.json", [
            {"title": title, "post": post, "author": [own[i], float(own_quality[i])],
             **{name: [texts[i][j], float(found[i, j])] for name, j in
                (("best", int(found[i].argmax())), ("worst", int(found[i].argmin())))}}
            for i, (title, post) in enumerate(pages)])
        np.savez(folder / "scores.npz", quality=found, words=words)
        stage.write_json(folder / "metrics.json", {
            "prompts": len(query), "samples": sampled.shape[1], "mean_quality": float(found.mean()),
            "mean_quality_reference": float(own_quality.mean()), "spread": quality.spread(found),
            "correlation_with_words": correlation(found, words),
            "correlation_with_log_words": correlation(found, np.log1p(words)),
            "beyond_words": 1 - explained_by_words(texts, found)})


def _command() -> None:
    a = stage.arguments(__doc__, "completions", "data", "out").parse_args()
    judge_report(a.completions, a.data, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command)

"""The slot world: a synthetic summarisation task whose true quality is known (scale mini).

A prompt offers `candidates` words for each of K slots, shuffled; a summary names one candidate per
slot, in slot order, then EOS. Gold quality of a summary y for subreddit g:

    q(y) = sum_k salience[g, y_k] + interaction * (sum_c count_c(y)^2 / K - 1) - 2K * invalid(y) / K

Salience is a fixed standard-normal table; every word belongs to one cluster and count_c counts the
words of cluster c (coherence: a property of the whole summary, easy to verify, harder to generate).
A position without a candidate of its slot is invalid.
"""

import numpy as np

from roads.schema import World as WorldConfig

EOS, PAD, TLDR = 0, 1, 2
_SLOTS = "ba da fa ga ka la ma na pa ra sa ta va za".split()
_WORDS = "bo do fo go ko lo mo no po ro so to vo zo".split()


class World:
    def __init__(self, cfg: WorldConfig):
        self.cfg = cfg
        rng = np.random.default_rng([cfg.seed, 0])
        n_words = cfg.slots * cfg.words
        self.salience = rng.standard_normal((cfg.subreddits, n_words))
        self.cluster = rng.integers(cfg.clusters, size=n_words)
        self.first_karma = TLDR + 1
        self.first_subreddit = self.first_karma + cfg.karma_buckets
        self.first_word = self.first_subreddit + cfg.subreddits
        self.vocab_size = self.first_word + n_words
        # Karma buckets are equally likely under random summaries.
        queries = self.prompts(4096, np.random.default_rng([cfg.seed, 1]))
        quality = self.quality(queries, self.summaries(queries, np.random.default_rng([cfg.seed, 2])))
        self.karma_edges = np.quantile(quality, np.linspace(0, 1, cfg.karma_buckets + 1)[1:-1])

    def vocabulary(self) -> list[str]:
        """Token strings by id."""
        c = self.cfg
        words = [_SLOTS[k % 14] * (1 + k // 14) + _WORDS[w % 14] * (1 + w // 14)
                 for k in range(c.slots) for w in range(c.words)]
        return (["<|endoftext|>", "<|padding|>", "TL;DR:"] + [f"karma{i}" for i in range(c.karma_buckets)]
                + [f"r/{i}" for i in range(c.subreddits)] + words)

    def prompts(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Queries [n, 2 + K * candidates]: subreddit, shuffled candidates, TL;DR marker."""
        c = self.cfg
        offered = rng.permuted(np.tile(np.arange(c.words), (n, c.slots, 1)), axis=2)[:, :, : c.candidates]
        words = (self.first_word + np.arange(c.slots)[:, None] * c.words + offered).reshape(n, -1)
        subreddit = self.first_subreddit + rng.integers(c.subreddits, size=(n, 1))
        return np.hstack([subreddit, rng.permuted(words, axis=1), np.full((n, 1), TLDR)]).astype(np.int32)

    def _parse(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Subreddits [n], and candidates as word indices [n, K, candidates]."""
        c = self.cfg
        words = np.sort(queries[:, 1:-1].astype(np.int64) - self.first_word, axis=1)
        return queries[:, 0] - self.first_subreddit, words.reshape(len(queries), c.slots, c.candidates)

    def summaries(self, queries: np.ndarray, rng: np.random.Generator, follow_salience: bool = False) -> np.ndarray:
        """Responses [n, K + 1]: per slot a random candidate, or one drawn from softmax(salience)."""
        subreddit, offered = self._parse(queries)
        logits = self.salience[subreddit[:, None, None], offered] * float(follow_salience)
        choice = np.argmax(logits + rng.gumbel(size=logits.shape), axis=2)
        words = np.take_along_axis(offered, choice[:, :, None], axis=2)[:, :, 0] + self.first_word
        return np.hstack([words, np.full((len(queries), 1), EOS)]).astype(np.int32)

    def quality(self, queries: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Gold quality [n] of responses [n, R]."""
        c = self.cfg
        subreddit, offered = self._parse(queries)
        word = self._slot_words(responses)
        valid = (word[:, :, None] == offered).any(axis=2)
        word = np.where(valid, word, 0)
        salience = np.where(valid, self.salience[subreddit[:, None], word], 0.0).sum(axis=1)
        counts = np.zeros((len(queries), c.clusters))
        np.add.at(counts, (np.arange(len(queries))[:, None], self.cluster[word]), valid)
        coherence = (counts**2).sum(axis=1) / c.slots - 1
        return salience + c.interaction * coherence - 2 * c.slots * (1 - self.validity(queries, responses))

    def validity(self, queries: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Share of positions [n] that hold a candidate of their slot; a missing EOS counts as a bad one."""
        c = self.cfg
        _, offered = self._parse(queries)
        valid = (self._slot_words(responses)[:, :, None] == offered).any(axis=2).sum(axis=1)
        ends = responses[:, c.slots] == EOS if responses.shape[1] > c.slots else np.zeros(len(responses), bool)
        return np.clip(valid - ~ends, 0, None) / c.slots

    def _slot_words(self, responses: np.ndarray) -> np.ndarray:
        """Word indices [n, K] of the first K positions; -1 where there is none."""
        words = np.full((len(responses), self.cfg.slots), -1, dtype=np.int64)
        width = min(self.cfg.slots, responses.shape[1])
        words[:, :width] = responses[:, :width].astype(np.int64) - self.first_word
        return words

    def karma(self, quality: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Karma tokens [n]: the bucket of a noisy look at the quality."""
        noisy = quality + self.cfg.karma_noise * rng.standard_normal(len(quality))
        return (self.first_karma + np.searchsorted(self.karma_edges, noisy)).astype(np.int32)

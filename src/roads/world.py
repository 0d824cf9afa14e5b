"""The slot world: a synthetic summarisation task whose true quality is known (scale mini).

A prompt offers `candidates` words for each of K slots, shuffled; a summary names one candidate per
slot, in slot order, then EOS. An attribute of a summary y for subreddit g is a sum over its words,

    A_a(y) = sum_k table_a[g, y_k]

of a fixed standard-normal table. Gold quality weighs the attributes by `taste`, scaled to length 1:

    q(y) = sum_a taste_a A_a(y) + interaction * (sum_c count_c(y)^2 / K - 1) - 2K * invalid(y) / K

Every word belongs to one cluster and count_c counts the words of cluster c (coherence: a property of the whole
summary, easy to verify, harder to generate). A position without a candidate of its slot is invalid. Where `interaction`
is a block, it weighs the first sum too, and two more terms: counts, sum_c v_c count_c(y), and order, the sum over
neighbours k, k + 1 of B[cluster of y_k, cluster of y_k+1], of standard-normal v and B.

A document of the base's corpus ends, after EOS, in a tag. By `tags: attributes` it tells a noisy look at every
attribute, and nothing about which of them readers like: only preferences show that. By `tags: quality` it tells a
noisy look at the quality itself. By `tags: topic` documents keep to a topic, as natural text does: a word of one
cluster, another for every document, is e^2 times as likely, and the tag says which cluster most of its words are of.
"""

import math

import numpy as np

from roads.schema import World as WorldConfig

EOS, TLDR = 0, 2  # 1 is padding, as for every tokenizer (tldr.py)
TOPICAL = 2.0  # nats by which a word of a document's topic is likelier
_SLOTS = "ba da fa ga ka la ma na pa ra sa ta va za".split()
_WORDS = "bo do fo go ko lo mo no po ro so to vo zo".split()


class World:
    def __init__(self, cfg: WorldConfig):
        self.cfg = cfg
        rng = np.random.default_rng([cfg.seed, 0])
        n_words = cfg.slots * cfg.words
        tables = [rng.standard_normal((cfg.subreddits, n_words))]
        self.cluster = rng.integers(cfg.clusters, size=n_words)
        tables += [np.random.default_rng([cfg.seed, 76 + a]).standard_normal((cfg.subreddits, n_words))
                   for a in range(1, len(cfg.taste))]
        self.tables = np.stack(tables)  # [attributes, subreddits, words]
        taste = np.array(cfg.taste)
        of_cluster = np.random.default_rng([cfg.seed, 60]).standard_normal(cfg.clusters)[self.cluster]
        # What readers think a word is worth: [subreddits, words].
        self.worth = (cfg.terms.attributes * np.tensordot(taste / np.linalg.norm(taste), self.tables, 1)
                      + cfg.terms.counts * of_cluster)
        self.order = np.random.default_rng([cfg.seed, 61]).standard_normal((cfg.clusters, cfg.clusters))
        self.tag_shape = cfg.tag_shape
        self.first_tag = TLDR + 1
        self.first_subreddit = self.first_tag + math.prod(self.tag_shape)
        self.first_word = self.first_subreddit + cfg.subreddits
        self.vocab_size = self.first_word + n_words
        # The buckets of what a tag tells are equally likely under random summaries.
        queries = self.prompts(4096, np.random.default_rng([cfg.seed, 1]))
        told = self._tagged(queries, self.summaries(queries, np.random.default_rng([cfg.seed, 2])))
        self.tag_edges = np.quantile(told, np.linspace(0, 1, cfg.tag_buckets + 1)[1:-1], axis=1).T

    def vocabulary(self) -> list[str]:
        """Token strings by id."""
        c = self.cfg
        words = [_SLOTS[k % 14] * (1 + k // 14) + _WORDS[w % 14] * (1 + w // 14)
                 for k in range(c.slots) for w in range(c.words)]
        return (["<|endoftext|>", "<|padding|>", "TL;DR:"] + [f"tag{i}" for i in range(math.prod(self.tag_shape))]
                + [f"r/{i}" for i in range(c.subreddits)] + words)

    def prompts(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Queries [n, 2 + K * candidates]: subreddit, shuffled candidates, TL;DR marker."""
        c = self.cfg
        offered = rng.permuted(np.tile(np.arange(c.words), (n, c.slots, 1)), axis=2)[:, :, : c.candidates]
        words = (self.first_word + np.arange(c.slots)[:, None] * c.words + offered).reshape(n, c.slots * c.candidates)
        subreddit = self.first_subreddit + rng.integers(c.subreddits, size=(n, 1))
        return np.hstack([subreddit, rng.permuted(words, axis=1), np.full((n, 1), TLDR)]).astype(np.int32)

    def _parse(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Subreddits [n], and candidates as word indices [n, K, candidates]."""
        c = self.cfg
        words = np.sort(queries[:, 1:-1].astype(np.int64) - self.first_word, axis=1)
        return queries[:, 0] - self.first_subreddit, words.reshape(len(queries), c.slots, c.candidates)

    def documents(self, queries: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Responses [n, K + 1] of the base's corpus: random ones, or such as keep to a topic (`tags: topic`)."""
        if self.cfg.tags != "topic":
            return self.summaries(queries, rng)
        topic = rng.integers(self.cfg.clusters, size=len(queries))
        on_topic = self.cluster[self._parse(queries)[1]] == topic[:, None, None]
        return self._drawn(queries, TOPICAL * on_topic, rng)

    def summaries(self, queries: np.ndarray, rng: np.random.Generator, liked: bool = False) -> np.ndarray:
        """Responses [n, K + 1]: per slot a random candidate, or one drawn from softmax(worth)."""
        subreddit, offered = self._parse(queries)
        return self._drawn(queries, self.worth[subreddit[:, None, None], offered] * float(liked), rng)

    def _drawn(self, queries: np.ndarray, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Responses [n, K + 1], the candidate of each slot by its logits [n, K, candidates]."""
        _, offered = self._parse(queries)
        choice = np.argmax(logits + rng.gumbel(size=logits.shape), axis=2)
        words = np.take_along_axis(offered, choice[:, :, None], axis=2)[:, :, 0] + self.first_word
        return np.hstack([words, np.full((len(queries), 1), EOS)]).astype(np.int32)

    def every_summary(self, queries: np.ndarray) -> np.ndarray:
        """All valid summaries [n, candidates^K, K + 1] of queries; the last slot's candidate changes fastest."""
        c = self.cfg
        _, offered = self._parse(queries)
        choice = np.indices((c.candidates,) * c.slots).reshape(c.slots, -1)
        words = np.stack([offered[:, k, choice[k]] for k in range(c.slots)], axis=2) + self.first_word
        return np.pad(words, ((0, 0), (0, 0), (0, 1)), constant_values=EOS).astype(np.int32)

    def attributes(self, queries: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Attributes [a, n] of responses [n, R]; a word that the prompt does not offer counts for nothing."""
        subreddit, offered = self._parse(queries)
        word = self._slot_words(responses)
        valid = (word[:, :, None] == offered).any(axis=2)
        return np.where(valid, self.tables[:, subreddit[:, None], np.where(valid, word, 0)], 0.0).sum(axis=2)

    def quality(self, queries: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Gold quality [n] of responses [n, R]."""
        c = self.cfg
        subreddit, offered = self._parse(queries)
        word = self._slot_words(responses)
        valid = (word[:, :, None] == offered).any(axis=2)
        word = np.where(valid, word, 0)
        worth = np.where(valid, self.worth[subreddit[:, None], word], 0.0).sum(axis=1)
        counts = np.zeros((len(queries), c.clusters))
        np.add.at(counts, (np.arange(len(queries))[:, None], self.cluster[word]), valid)
        coherence = (counts**2).sum(axis=1) / c.slots - 1
        of_word = self.cluster[word]
        order = np.where(valid[:, 1:] & valid[:, :-1], self.order[of_word[:, :-1], of_word[:, 1:]], 0.0).sum(axis=1)
        return (worth + c.terms.coherence * coherence + c.terms.order * order
                - 2 * c.slots * (1 - self.validity(queries, responses)))

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

    def _tagged(self, queries: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """What a tag tells of responses [n, R], before its noise: [attributes, n], or topic or quality [1, n]."""
        if self.cfg.tags == "topic":
            of_word = self.cluster[self._slot_words(responses)]
            return (of_word[:, :, None] == np.arange(self.cfg.clusters)).sum(1).argmax(1)[None]
        if self.cfg.tags == "attributes":
            return self.attributes(queries, responses)
        return self.quality(queries, responses)[None]

    def tags(self, queries: np.ndarray, responses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tag tokens [n]: the buckets of a noisy look at what tags tell, the last one's running fastest."""
        told = self._tagged(queries, responses)
        if self.cfg.tags == "topic":
            return (self.first_tag + told[0]).astype(np.int32)
        noisy = told + self.cfg.tag_noise * rng.standard_normal(told.shape)
        buckets = [np.searchsorted(edges, look) for edges, look in zip(self.tag_edges, noisy, strict=True)]
        return (self.first_tag + np.ravel_multi_index(buckets, self.tag_shape)).astype(np.int32)

    def tag_values(self) -> np.ndarray:
        """What each tag says, [tags]: the sum of its buckets, each attribute counting alike; no topic is better."""
        if self.cfg.tags == "topic":
            return np.zeros(self.tag_shape)
        return np.indices(self.tag_shape).sum(0).ravel()

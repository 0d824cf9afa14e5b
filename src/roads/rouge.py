"""ROUGE-L of many candidates against one reference: the floats of `rouge-score`, many times faster.

`RougeScorer(["rougeL"], use_stemmer=True)` is the definition and `rouge_l_plain` calls it. `rouge_l`
keeps its tokeniser and its arithmetic, but stems each word once per process, finds the longest
common subsequence (LCS) with rapidfuzz, and scores equal candidates once.
"""

from collections import defaultdict
from functools import cache
from itertools import count

import numpy as np
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score import scoring, tokenize
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer
from tqdm import tqdm

_stemmer = PorterStemmer()
_ids: dict[str, int] = defaultdict(count().__next__)
_scorer = RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, candidates: list[str]) -> np.ndarray:
    """ROUGE-L of each candidate: float64 [n, 3], columns precision, recall, F1.

    >>> rouge_l("the cats sat down", ["a cat sat", ""]).round(3).tolist()
    [[0.667, 0.5, 0.571], [0.0, 0.0, 0.0]]
    """
    target = _tokens(reference)
    scores = {text: _score(target, _tokens(text)) for text in set(candidates)}
    return np.array([scores[text] for text in candidates], dtype=np.float64).reshape(-1, 3)


def unseen(texts: list[str]) -> int:
    """How many texts lose most of their letters to rouge-score, which keeps a to z and 0 to 9.

    >>> unseen(["the cat", "кот", "кот on TV in Riga", "?"])
    2
    """
    def is_seen(text: str) -> bool:
        letters = [letter for letter in text.lower() if letter.isalnum()]
        return 2 * sum(letter.isascii() for letter in letters) > len(letters)

    return sum(not is_seen(text) for text in texts)


def rouge_scores(completions: np.ndarray, references: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """ROUGE-L F1 [N, n] of completions [N, n, R] against references [N, R], all token ids."""
    targets = tokenizer.decode_batch(references.tolist(), skip_special_tokens=True)
    rows = tqdm(zip(targets, completions, strict=True), total=len(targets), desc="rouge", unit="prompt")
    return np.stack([rouge_l(target, tokenizer.decode_batch(row.tolist(), skip_special_tokens=True))[:, 2]
                     for target, row in rows])


def rouge_l_plain(reference: str, candidates: list[str]) -> np.ndarray:
    """The same as `rouge_l` by `rouge-score` alone: slow, and right by definition."""
    scores = [_scorer.score(reference, text)["rougeL"] for text in candidates]
    return np.array(scores, dtype=np.float64).reshape(-1, 3)


def _score(target: list[int], prediction: list[int]) -> tuple[float, float, float]:
    if not target or not prediction:
        return 0.0, 0.0, 0.0
    lcs = LCSseq.similarity(target, prediction)
    precision, recall = lcs / len(prediction), lcs / len(target)
    return precision, recall, scoring.fmeasure(precision, recall)


def _tokens(text: str) -> list[int]:
    words = tokenize.NON_ALPHANUM_RE.sub(" ", text.lower()).split()
    return [token for word in words for token in _stem(word)]


@cache
def _stem(word: str) -> tuple[int, ...]:
    """The ids of the tokens of one word: none where the stemmer leaves nothing, else one."""
    return tuple(_ids[token] for token in tokenize.tokenize(word, _stemmer))

"""What a judge reads of tokens: the title and the post of a query, and a summary."""

import re

import numpy as np
from tokenizers import Tokenizer

from roads.stage import UserError
from roads.tldr import EOS, PAD

QUERY = re.compile(r"SUBREDDIT: r/.*?\n\nTITLE: (.*?)\n\nPOST: (.*?)(?:\n\n(?:Two-Word )?TL;DR:)?", re.DOTALL)


def titles_and_posts(query: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Title and post of queries [N, Q], as far as the policy saw them.

    Raises:
        UserError: a query is none of TL;DR.
    """
    return [title_and_post(text) for text in tokenizer.decode_batch([row[row != PAD].tolist() for row in query])]


def title_and_post(query: str) -> tuple[str, str]:
    """
    >>> title_and_post("SUBREDDIT: r/cats\\n\\nTITLE: Tom\\n\\nPOST: He eats.\\n\\nTL;DR:")
    ('Tom', 'He eats.')
    """
    found = QUERY.fullmatch(query)
    if not found:
        raise UserError(f"query {query[:60]!r}: expected SUBREDDIT: r/..., TITLE: ..., POST: ..., TL;DR: (tldr.py)")
    title, post = (part.strip() for part in found.groups())
    return title, post


def posts_of(query: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What a language model is shown of queries [N, Q]: the title, and the post below it."""
    return ["\n\n".join(parts).strip() for parts in titles_and_posts(query, tokenizer)]


def prompts_of(query: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Queries [N, Q] as texts, as the policy reads them, with the special tokens of a chat."""
    return [text.strip() for text in tokenizer.decode_batch([row[row != PAD].tolist() for row in query],
                                                            skip_special_tokens=False)]


def texts_of(responses: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Responses [N, R] as texts, up to the first EOS or PAD."""
    ends = [np.flatnonzero((row == EOS) | (row == PAD)) for row in responses]
    cut = [row[:end[0]] if len(end) else row for row, end in zip(responses, ends)]
    return [text.strip() for text in tokenizer.decode_batch([row.tolist() for row in cut])]

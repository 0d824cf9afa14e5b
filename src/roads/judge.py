"""The judge's protocol: every pair is shown in both orders; a disagreement of the two is a tie.

A judge is a function `ask(first, second) -> answers`: for each row the text that it says of summary A (first) and
summary B (second), of which the line `Preferred: A` or `Preferred: B` counts (Appendix B.4). `gold` is the judge of
the synthetic world, which knows the true quality.
"""

import re
from collections.abc import Callable

import numpy as np

from roads.world import World

PREFERRED = re.compile(r"^\s*Preferred:\s*[\"'<]*([AB])\b", re.MULTILINE)
Ask = Callable[[np.ndarray, np.ndarray], list[str]]


def parse(answer: str) -> str:
    """A or B, or '' for an answer that says neither, or both."""
    found = set(PREFERRED.findall(answer))
    return found.pop() if len(found) == 1 else ""


def compare(ask: Ask, ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    """Judge ours [N, R] against theirs [N, R], in both orders.

    Returns:
        score [N]: 1 if ours won in both orders, 0 if theirs did, .5 for a tie; consistent [N]: both orders agreed;
        failed [N]: an answer could not be read, which counts as a tie and is reported.
    """
    shown_first = np.array([parse(answer) for answer in ask(ours, theirs)])
    shown_second = np.array([parse(answer) for answer in ask(theirs, ours)])
    failed = (shown_first == "") | (shown_second == "")
    consistent = (shown_first != shown_second) & ~failed  # A, then B, is the same summary
    return {"score": np.where(consistent, shown_first == "A", 0.5), "consistent": consistent, "failed": failed}


def gold(world: World, query: np.ndarray) -> Ask:
    """The world's judge of summaries of queries [N, Q]: the better one, or the first shown of two equally good ones."""

    def ask(first: np.ndarray, second: np.ndarray) -> list[str]:
        better = world.quality(query, first) >= world.quality(query, second)
        return [f"Preferred: {'A' if a else 'B'}" for a in better]

    return ask


def summary(verdicts: dict[str, np.ndarray]) -> dict[str, float]:
    """Winrate, ties, position consistency and parse failures, as shares of the prompts."""
    score = verdicts["score"]
    return {"winrate": float(score.mean()), "ties": float((score == 0.5).mean()),
            "position_consistency": float(verdicts["consistent"].mean()),
            "parse_failures": float(verdicts["failed"].mean())}

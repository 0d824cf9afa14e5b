"""The judge's protocol: every pair is shown in both orders; a disagreement of the two is a tie.

A judge is a function `ask(first, second) -> answers`: for each row the text that it says of summary A (first) and
summary B (second), of which the line `Preferred: A` or `Preferred: B` counts (Appendix B.4). `known` is a judge whose
quality can be computed (quality.py); `outside` asks a language model, gpt-4o in the paper (client.py).

For Fig 10 that model writes as well: two-word summaries, and pairs of them with the one it prefers (Appendix B.1).
"""

import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from roads.judge import quality
from roads.judge.text import posts_of, prompts_of, texts_of
from roads.schema import OUTSIDE, LLMJudge, Scale, Spending
from roads.stage import UserError
from roads.tldr import load_tokenizer

# A line that says which summary is preferred, or nothing but its letter, with what models put around it: Markdown,
# quotes, brackets, a dash, "Summary". Where more than a stop follows the letter ("A tie", "A/B") there is no verdict.
DECORATION = r"[\s*_`#>\"'“”‘’«»<\[\](){}.-]*"
VERDICT = rf"{DECORATION}(?:(?i:summary|option|response)\b{DECORATION})?([AB]){DECORATION}"
PREFERRED = re.compile(rf"^{DECORATION}preferred(?: summary)?{DECORATION}[:：=](.*)$", re.MULTILINE | re.IGNORECASE)
SAID = re.compile(rf"{VERDICT}(?:$|[,;:!?–—](?!\W*(?:(?:and|or)\W+)?[AB]\b).*$)", re.IGNORECASE)
BARE = re.compile(rf"^{VERDICT}$", re.MULTILINE)
SUMMARY = re.compile(rf"^{DECORATION}summary{DECORATION}[:：](.*)$", re.MULTILINE | re.IGNORECASE)
PREFERENCE = "a line `Preferred: A` or `Preferred: B`"
UNREAD = 0.2  # of the answers at most: beyond it a number would be the parser's, not the judge's
DRAWS = 6  # two summaries of a post that are the same after so many draws make no pair
Ask = Callable[[np.ndarray, np.ndarray], list[str]]


def parse(answer: str) -> str:
    """A or B, or '' for an answer that says neither, or both.

    >>> [parse(answer) for answer in ("**Preferred**: [Summary B]", "Preferred: A tie", "so\\n(A)", "Preferred: A/B")]
    ['B', '', 'A', '']
    """
    lines = PREFERRED.findall(answer)
    read = [SAID.fullmatch(line.strip()) for line in lines] if lines else list(BARE.finditer(answer))
    found = {verdict[1].upper() if verdict else "" for verdict in read}
    return found.pop() if len(found) == 1 else ""


def readable(answers: list[str], read: Callable[[str], str], expected: str) -> list[str]:
    """What is read of answers.

    Raises:
        UserError: of ten answers or more, over a fifth cannot be read.
    """
    found = [read(answer) for answer in answers]
    unread = [answer for answer, text in zip(answers, found, strict=True) if not text]
    if len(answers) >= 10 and len(unread) > UNREAD * len(answers):
        shown = ", ".join(repr(answer[-80:]) for answer in unread[:3])
        raise UserError(f"the judge: {len(unread)} of {len(answers)} answers cannot be read; expected {expected}, got "
                        f"for example {shown}; take another model, or another prompt of judge/prompts")
    return found


def compare(ask: Ask, ours: np.ndarray, theirs: np.ndarray, orders: int = 2) -> dict[str, np.ndarray]:
    """Judge ours [N, R] against theirs [N, R], in both orders or, of one, with ours shown first.

    Returns:
        score [N]: 1 if ours won in both orders, 0 if theirs did, .5 for a tie; consistent [N]: both orders agreed;
        failed [N]: an answer could not be read, which counts as a tie and is reported.
    """
    if orders == 1:
        said = np.array(readable(ask(ours, theirs), parse, PREFERENCE))
        failed = said == ""
        return {"score": np.where(failed, 0.5, said == "A"), "consistent": ~failed, "failed": failed}
    answers = [*ask(ours, theirs), *ask(theirs, ours)]
    shown_first, shown_second = np.array(readable(answers, parse, PREFERENCE)).reshape(2, -1)
    failed = (shown_first == "") | (shown_second == "")
    consistent = (shown_first != shown_second) & ~failed  # A, then B, is the same summary
    return {"score": np.where(consistent, shown_first == "A", 0.5), "consistent": consistent, "failed": failed}


def known(quality_of: quality.Quality) -> Ask:
    """The judge that prefers the better summary, or the first shown of two equally good ones."""

    def ask(first: np.ndarray, second: np.ndarray) -> list[str]:
        same = (first == second).all(1)  # an encoder's last digits may depend on what else it reads
        better = same | (quality_of(first) >= quality_of(second))
        return [f"Preferred: {'A' if a else 'B'}" for a in better]

    return ask


def of(cfg: Scale, query: np.ndarray, data: Path, orders: int = 2) -> Ask:
    """The judge of a scale for queries [N, Q] of a data folder, which is going to be asked in so many orders."""
    if cfg.judge.kind not in OUTSIDE:
        return known(quality.of(cfg, query, data))
    return outside(cfg.judge, cfg.spending, load_tokenizer(data / "tokenizer.json"), query, orders)


def outside(cfg: LLMJudge, spending: Spending, tokenizer: Tokenizer, query: np.ndarray, orders: int = 2) -> Ask:
    """The language model of cfg as judge of summaries of queries [N, Q]; spending says what it may cost.

    Raises:
        UserError: as client.answers, when it is asked.
    """

    def ask(first: np.ndarray, second: np.ndarray) -> list[str]:
        from roads.judge import client

        # The other order is asked for at once: `compare` wants it next, and a batch takes up to a day.
        messages = both_orders(cfg, tokenizer, query, first, second)[: orders * len(first)]
        return client.answers(messages, cfg, spending, readable=parse)[:len(first)]

    return ask


def both_orders(cfg: LLMJudge, tokenizer: Tokenizer, query: np.ndarray, first: np.ndarray,
                second: np.ndarray) -> list[str]:
    """What the judge reads: 2 N messages, first [N, R] shown as A, and then all of them the other way round."""
    about = cfg.about  # read from a file
    asked, answer = (posts_of, "summary") if about == "post" else (prompts_of, "response")
    prompts, a, b = asked(query, tokenizer), texts_of(first, tokenizer), texts_of(second, tokenizer)
    return [fill(cfg.prompt, **{about: prompt, f"{answer}a": x, f"{answer}b": y})
            for one, other in ((a, b), (b, a)) for prompt, x, y in zip(prompts, one, other, strict=True)]


def fill(name: str, **slots: str) -> str:
    """The prompt of prompts/<name>.txt with its slots `{{slot}}` filled; what is filled in is not looked into."""
    return re.sub(r"{{(\w+)}}", lambda slot: slots[slot[1]], _template(name))


@cache
def _template(name: str) -> str:
    return (resources.files("roads.judge") / "prompts" / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def two_words(answer: str) -> str:
    """The summary of one or two words in an answer to prompts/write_two_word.txt, or '' if there is none."""
    found = SUMMARY.findall(answer)
    words = [word.strip("*_`\"'“”‘’<>[](){}.,") for word in found[0].split()] if len(found) == 1 else []
    words = [word for word in words if word]
    return " ".join(words) if 1 <= len(words) <= 2 else ""


def write_two_word(posts: list[str], cfg: LLMJudge, spending: Spending, draw: int = 0, **where: object) -> list[str]:
    """A summary of two words of each post (text.posts_of), or '' where the model did not write one.

    Another draw is another summary. The temperature is 1, the endpoint's default, as the paper names none: at that of
    the judge, 0, the two summaries of a pair would be the same.
    """
    from roads.judge import client

    writer = LLMJudge(kind=cfg.kind, model=cfg.model, prompt=cfg.prompt, temperature=1.0, max_tokens=20)
    messages = [fill("write_two_word", post=post) for post in posts]
    answers = client.answers(messages, writer, spending, readable=two_words, draw=draw, **where)
    return readable(answers, two_words, "a line `Summary: ` and one or two words")


def two_word_rows(posts: list[str], cfg: LLMJudge, spending: Spending, **where: object) -> list[dict]:
    """Fig 10's data: for each post a reference, and two summaries with the one that the judge prefers, in both orders
    or (cfg.label_orders) in one.

    Returns:
        A dict per post: reference, the first summary that was written, '' if none was; chosen and rejected, None for
        a tie, and where DRAWS draws gave no two different summaries.
    """
    from roads.judge import client

    pairs = [[text] if text else [] for text in write_two_word(posts, cfg, spending, **where)]
    for draw in range(1, DRAWS):
        short = [i for i, pair in enumerate(pairs) if len(pair) < 2]
        for i, text in zip(short, write_two_word([posts[i] for i in short], cfg, spending, draw, **where)):
            if text and text.lower() not in (other.lower() for other in pairs[i]):
                pairs[i].append(text)
    shown = [i for i, pair in enumerate(pairs) if len(pair) == 2]
    orders = (slice(None), slice(None, None, -1))[: cfg.label_orders]
    messages = [fill(cfg.prompt, post=posts[i], summarya=a, summaryb=b)
                for order in orders for i in shown for a, b in [pairs[i][order]]]
    said = readable(client.answers(messages, cfg, spending, readable=parse, **where), parse, PREFERENCE)
    rows = [{"reference": pair[0] if pair else "", "chosen": None, "rejected": None} for pair in pairs]
    first, second = said[: len(shown)], said[len(shown) :] or ["B" if answer == "A" else "A" for answer in said]
    for i, *both in zip(shown, first, second):
        if set(both) == {"A", "B"}:  # the same summary, in both orders
            a, b = pairs[i]
            rows[i]["chosen"], rows[i]["rejected"] = (a, b) if both[0] == "A" else (b, a)
    return rows


def summary(verdicts: dict[str, np.ndarray]) -> dict[str, float]:
    """Winrate, ties, position consistency and parse failures, as shares of the prompts."""
    score = verdicts["score"]
    return {"winrate": float(score.mean()), "ties": float((score == 0.5).mean()),
            "position_consistency": float(verdicts["consistent"].mean()),
            "parse_failures": float(verdicts["failed"].mean())}

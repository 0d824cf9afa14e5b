"""What scale rehearsal is made from, of the shape that scale paper downloads, made anew from data/tldr_sample.

    PYTHONPATH=src python scripts/rehearsal_rows.py data/rehearsal

Posts with summaries, comparisons in OpenAI's schema, and openai.json, which names them as data/openai.json does the
real ones.
"""

import json
import re
import sys
from dataclasses import asdict, astuple
from hashlib import sha256
from pathlib import Path

from roads import tldr

SAMPLE = Path(__file__).parents[1] / "data/tldr_sample"
POSTS = {"train": 130, "valid": 40, "test": 40}
COMPARISONS = {"train": 60, "valid": 40}
NEWS = 6  # of the held-out comparisons, to be left out


def first_sentence(post: str) -> str:
    """What a lazy annotator writes: the beginning of the post, up to 120 characters."""
    return re.split(r"(?<=[.!?])\s|\n", post.strip())[0][:120]


def comparison(row: tldr.Row, number: int) -> dict:
    """The author's summary against the first sentence; mostly the author's is preferred, on either side."""
    sides = [{"text": " " + row.summary.strip(), "policy": "ref", "note": "ok"},
             {"text": " " + first_sentence(row.post), "policy": "sup1", "note": None}]
    flipped, upset = number % 2, number % 5 == 4
    info = {"id": row.id, "post": row.post, "title": row.title, "subreddit": row.subreddit, "site": None,
            "article": None}
    return {"info": info, "summaries": sides[::-1] if flipped else sides, "choice": flipped ^ upset,
            "worker": f"worker{number % 7}", "batch": f"batch{3 + number % 2}", "split": "train",
            "extra": {"confidence": None if number % 3 else 1 + number % 9}}


def news(row: tldr.Row, number: int) -> dict:
    """A comparison about a news article, which the paper leaves out."""
    batch = tldr.CNN_DM[number % len(tldr.CNN_DM)]
    info = {"id": f"news{number}", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": row.post}
    return comparison(row, number) | {"info": info, "batch": batch}


def rows(folder: Path) -> None:
    """Write posts, comparisons and openai.json under `folder`."""
    wanted = {"sft": {"repository": "sft", "revision": None, "splits": {}},
              "comparisons": {"repository": "comparisons", "revision": None, "splits": {}}}

    def write(part: str, split: str, values: list[dict], kept: list[tldr.Row]) -> None:
        path = folder / part / f"{'validation' if (part, split) == ('comparisons', 'valid') else split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
        text = "".join(sorted(json.dumps(astuple(row), ensure_ascii=False) + "\n" for row in kept))
        found = {"files": path.name, "rows": len(kept), "sha256": sha256(text.encode()).hexdigest()}
        wanted[part]["splits"][split] = found

    for split, n in POSTS.items():
        posts = tldr.read_rows(SAMPLE / f"{split}.jsonl")
        write("sft", split, [asdict(row) for row in posts[:n]], posts[:n])
        if split in COMPARISONS:
            half = posts[-COMPARISONS[split] // 2 :]  # each of them compared twice
            values = [comparison(row, i) for i, row in enumerate(half + half)]
            kept = [tldr.comparison_of(value, "") for value in values]
            about_news = [news(row, i) for i, row in enumerate(half[:NEWS])] if split == "valid" else []
            write("comparisons", split, [*about_news, *values], kept)
    (folder / "openai.json").write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    rows(Path(sys.argv[1]))

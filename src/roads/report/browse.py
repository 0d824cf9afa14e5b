"""Read what every policy wrote: reports/<scale>/browse.html, a page with post, reference and completions side by side.

    python -m roads.report.browse runs/mini reports/mini      # or: make browse

It shows the completions of Figs 3 and 11 that are in runs/, of seed 0, for prompts drawn by a fixed seed: each with the
judge's verdict, its length and its true quality where that is known. A verdict is of both orders of the two summaries:
won in both, lost in both, or one of each, which is a tie.
"""

import argparse
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from tokenizers import Tokenizer

from roads import arrays, stage, tldr
from roads.figures.policies import NAMES
from roads.tldr import EOS, PAD

TEMPLATE = Path(__file__).with_suffix(".html")
TASKS = {"human": "Fig. 3", "rouge": "Fig. 11"}
PROMPTS = 30


def texts(rows: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Rows of tokens [n, T] as texts, without padding and what ends them."""
    return [text.strip() for text in tokenizer.decode_batch(
        [row[(row != PAD) & (row != EOS)].tolist() for row in rows], skip_special_tokens=False)]


def verdict(score: float, task: str) -> tuple[str, str]:
    """A score as (win, loss or tie, in words); of ROUGE-L there is none of the three."""
    if task == "rouge":
        return "", f"ROUGE-L {score:.3f}"
    kind = "win" if score > 0.5 else "loss" if score < 0.5 else "tie"
    return kind, {"win": "won in both orders", "loss": "lost in both orders", "tie": "a tie"}[kind]


def written(home: Path, task: str, prompts: int) -> list[dict]:
    """What a page shows of a task: each prompt with its reference, and every policy's completion; none where no policy
    has written.

    Raises:
        UserError: completions and scores that are not of the same prompts.
    """
    found = {}
    for name, label in NAMES.items():
        drawn = sorted(home.glob(f"{task}/completions/{name}/s*"), key=lambda folder: (len(folder.name), folder.name))
        place = f"{task}/completions/{name}" + (f"/{drawn[0].name}" if drawn else "")
        scored = home / place.replace("completions", "scores") / "scores.npz"
        if (home / place / "completions.npz").exists() and scored.exists():
            found[label] = home / place / "completions.npz", scored
    if not found:
        return []
    tokenizer = tldr.load_tokenizer(home / "data/tokenizer.json")
    test = arrays.tokens(home / f"data/test_{task}.npz", "query", "response")
    shown = np.sort(np.random.default_rng(0).permutation(len(test["query"]))[:prompts])
    rows = [{"prompt": post, "reference": reference, "number": int(i), "policies": []} for i, post, reference in zip(
        shown, texts(test["query"][shown], tokenizer), texts(test["response"][shown], tokenizer), strict=True)]
    for label, (completions, scored) in found.items():
        drawn = arrays.tokens(completions, "completions")["completions"][:, 0]
        with np.load(scored) as file:
            scores = {name: file[name] for name in ("score", "quality", "tokens") if name in file}
        if not len(drawn) == len(scores["score"]) == len(test["query"]):
            raise stage.UserError(f"{completions}: {len(drawn)} completions, {len(scores['score'])} scores and "
                                  f"{len(test['query'])} prompts; `dvc repro` brings them together")
        for row, i, text in zip(rows, shown, texts(drawn[shown], tokenizer), strict=True):
            kind, told = verdict(float(scores["score"][i]), task)
            row["policies"].append({
                "name": label, "text": text, "kind": kind, "verdict": told, "tokens": int(scores["tokens"][i, 0]),
                "quality": f"{scores['quality'][i]:+.2f}" if "quality" in scores else ""})
    return rows


def browse(home: Path, out: Path, prompts: int = PROMPTS) -> Path:
    """Write browse.html in `out`.

    Raises:
        UserError: no policy's completions are in the scale's folder of runs.
    """
    figures = {TASKS[task]: rows for task in TASKS if (rows := written(home, task, prompts))}
    if not figures:
        raise stage.UserError(f"{home}: no completions; `make fig3` or `make fig11` draws them")
    names = list(dict.fromkeys(each["name"] for rows in figures.values() for row in rows for each in row["policies"]))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")).render(scale=home.name, figures=figures, policies=names)
    out.mkdir(parents=True, exist_ok=True)
    with stage.writing(out / "browse.html") as scratch:
        scratch.write_text(page, encoding="utf-8")
    return out / "browse.html"


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a scale's folder of runs, as runs/mini")
    parser.add_argument("out", type=Path, help="its folder of reports, as reports/mini")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="how many are shown")
    a = parser.parse_args()
    print(browse(a.runs, a.out, a.prompts))


if __name__ == "__main__":
    stage.main(_command)

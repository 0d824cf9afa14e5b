"""A page about the judges of known quality: best and worst samples of ten posts by each, and what goes with its score.

    python -m roads.report.judges runs/real/human/judges reports/real/judges.md --scale real
"""

from pathlib import Path

from roads import config, stage

HEAD = """# What the judges like

Samples of the SFT policy, {samples} for each of {prompts} posts, scored by each judge (src/roads/judge/quality.py). The
columns: spread, the standard deviation of quality among a post's samples; r with length, Pearson's correlation with the
number of words and its logarithm, within posts; beyond words, the share of the variance within posts that no sum over
words explains (1 - R² of a ridge regression on posts that it was not fitted to); author, mean quality of the authors'
own summaries, and sample, of the samples.

| judge | spread | r with words | r with ln(1 + words) | beyond words | author | sample |
|---|---|---|---|---|---|---|
"""


def page(folder: Path, kinds: dict[str, str]) -> str:
    """The page of a folder with a judge_report for each name in `kinds`, name -> what the judge is called."""
    found = {name: stage.read_json(folder / name / "metrics.json") for name in kinds}
    first = next(iter(found.values()))
    text = HEAD.format(samples=first["samples"], prompts=first["prompts"])
    for name, it in found.items():
        text += (f"| {kinds[name]} | {it['spread']:.3f} | {it['correlation_with_words']:+.2f} | "
                 f"{it['correlation_with_log_words']:+.2f} | {it['beyond_words']:.2f} | "
                 f"{it['mean_quality_reference']:.3f} | {it['mean_quality']:.3f} |\n")
    for name, kind in kinds.items():
        text += f"\n## {kind}\n"
        for number, it in enumerate(stage.read_json(folder / name / "examples.json"), 1):
            text += f"\n**{number}. {_line(it['title'])}** {_line(it['post'], 300)}\n\n"
            for label in ("best", "worst", "author"):
                said, score = it[label]
                text += f"- {label} ({score:.3f}): {_line(said) or '(nothing)'}\n"
    return text


def _line(text: str, longest: int = 10**6) -> str:
    """A text in one line of Markdown, cut to a length."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[:longest].rsplit(" ", 1)[0] + " …"
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|" else letter for letter in line)


def _command() -> None:
    a = stage.arguments(__doc__, "reports", "out").parse_args()
    cfg = config.load()
    judges = {"own": cfg.scales[a.scale]} | cfg.arms_of(a.scale, "rewards")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with stage.writing(a.out) as scratch:
        scratch.write_text(page(a.reports, {name: block.judge.kind for name, block in judges.items()}),
                           encoding="utf-8")
    print(f"{a.reports} -> {a.out}")


if __name__ == "__main__":
    stage.main(_command)

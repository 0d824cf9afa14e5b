"""Fills the slots of a text with what reports/<scale> says: numbers, verdicts, and words that follow from a verdict.

    python -m roads.report.results reports/mini docs/results.md README.md     # rewrites the two in place

A slot is a pair of comments, which a Markdown page does not show, with its value between them. Its words are parted by
semicolons, as a bar would end a cell of a table:

    <!-- $ gap ; fig3 ; Online(DPO) - DPO -->+0.025 [+0.006, +0.046]<!-- $ -->
    <!-- $ gap ; fig7 ; accuracy ; Global - Local -->...     a measure that stands beside the one drawn
    <!-- $ standardised ; fig3 ; Online(DPO) - DPO -->...    over the spread of DPO's score over prompts
    <!-- $ bar ; fig3 ; DPO -->0.723<!-- $ -->
    <!-- $ effect ; online-beats-offline -->+0.025 [+0.006, +0.046]<!-- $ -->
    <!-- $ verdict ; online-beats-offline -->supported<!-- $ -->
    <!-- $ seeds ; online-beats-offline -->+0.012 to +0.038, 10 of 10 above 0<!-- $ -->
    <!-- $ say ; online-beats-offline ; wins ; does not win ; may win -->wins<!-- $ -->   if supported | not | undecided
    <!-- $ count ; supported -->18<!-- $ -->
    <!-- $ table ; the paper's -->...<!-- $ -->     every claim of a family, a row each
    <!-- $ again ; mini_epyc -->31 of 36<!-- $ -->    verdicts as in reports/mini_epyc/claims.json, of other scores
    <!-- $ moved ; mini_epyc -->...<!-- $ -->         the claims whose verdict is another there, a row each
    <!-- $ bar@real-short ; fig3 ; DPO -->0.670<!-- $ -->    any of them, of reports/real-short
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from roads import stage
from roads.report.schema import Claim, Claims, Estimate, Figure, read
from roads.stage import UserError
from roads.strict import nearest

SLOT = re.compile(r"(<!-- ?\$ ?([^>]+?) ?-->)(.*?)(<!-- ?\$ ?-->)", re.S)


class Reports:
    """The figures and claims of a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = read(folder / "claims.json", Claims, "make claims").claims
        self.figures: dict[str, Figure] = {}
        self.others: dict[str, Reports] = {}

    def of(self, scale: str) -> "Reports":
        """Those of another scale, in a folder beside; their own where it is none."""
        if scale and scale not in self.others:
            if not (self.folder.parent / scale).is_dir():
                known = [path.name for path in self.folder.parent.iterdir() if path.is_dir()]
                raise UserError(f"no folder {scale!r} in {self.folder.parent}{nearest(scale, known)}")
            self.others[scale] = Reports(self.folder.parent / scale)
        return self.others[scale] if scale else self

    def figure(self, name: str) -> Figure:
        if name not in self.figures:
            path = self.folder / f"{name}.json"
            if not path.exists():
                raise UserError(f"no figure {name!r} in {self.folder}; `make {name}` makes it")
            self.figures[name] = read(path, Figure, f"make {name}")
        return self.figures[name]

    def claim(self, name: str) -> Claim:
        found = {claim.id: claim for claim in self.claims}
        if name not in found:
            raise UserError(f"no claim {name!r}{nearest(name, found)}")
        if found[name].estimate is None:
            raise UserError(f"claim {name} was not run; `make {found[name].figure} claims` decides it")
        return found[name]


def _pick(found: dict, name: str) -> Estimate:
    if name not in found:
        raise UserError(f"no {name!r}{nearest(name, found)}")
    return found[name]


def _interval(found: Estimate) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def gap(reports: Reports, figure: str, *words: str) -> str:
    content = reports.figure(figure)
    return _interval(_pick(content.gaps if len(words) == 1 else _pick(content.also, words[0]).gaps, words[-1]))


def standardised(reports: Reports, figure: str, name: str) -> str:
    return _interval(_pick(reports.figure(figure).gaps, name).standardised)


def bar(reports: Reports, figure: str, *words: str) -> str:
    content = reports.figure(figure)
    own = {each.bar: each for each in content.bars}
    return f"{_pick(own if len(words) == 1 else _pick(content.also, words[0]).bars, words[-1]).mean:.3f}"


def effect(reports: Reports, claim: str) -> str:
    return _interval(reports.claim(claim).estimate)


def verdict(reports: Reports, claim: str) -> str:
    return reports.claim(claim).verdict


def seeds(reports: Reports, claim: str) -> str:
    found = reports.claim(claim).estimate.by_seed
    return f"{min(found):+.3f} to {max(found):+.3f}, {sum(each > 0 for each in found)} of {len(found)} above 0"


def say(reports: Reports, claim: str, supported: str, against: str, undecided: str) -> str:
    words = {"supported": supported, "not supported": against, "undecided": undecided}
    return words[reports.claim(claim).verdict]


def count(reports: Reports, verdict: str = "") -> str:
    return str(sum(claim.verdict == (verdict or claim.verdict) for claim in reports.claims))


def table(reports: Reports, family: str) -> str:
    """Every claim of a family with its effect, what its seeds say and its verdict."""
    lines = ["", "| claim | figure | effect, 95% interval | t interval over seeds | verdict |", "|---|---|---|---|---|"]
    for claim in reports.claims:
        if claim.family == family:
            found = claim.estimate
            seeds = f"[{found.over_seeds[0]:+.3f}, {found.over_seeds[1]:+.3f}]" if found and found.over_seeds else "–"
            lines.append(f"| {claim.sentence} | {claim.figure} | {_interval(found) if found else '–'} | {seeds} | "
                         f"{claim.verdict} |")
    if len(lines) == 3:
        raise UserError(f"no family {family!r}; expected the paper's or ours")
    return "\n".join([*lines, ""])


def _elsewhere(reports: Reports, folder: str) -> list[tuple[Claim, Claim]]:
    """Claims that were decided there too, by the same question from other scores: that one's, and ours."""
    def question(claim: Claim) -> list:
        return [getattr(claim, name) for name in ("figure", "contrast", "against", "measure", "over", "test", "margin")]

    there = {claim.id: claim for claim in reports.of(folder).claims if claim.estimate}
    return [(there[claim.id], claim) for claim in reports.claims if claim.estimate and claim.id in there
            and claim.made_from != there[claim.id].made_from and question(claim) == question(there[claim.id])]


def again(reports: Reports, folder: str) -> str:
    found = [one.verdict == other.verdict for one, other in _elsewhere(reports, folder)]
    return f"{sum(found)} of {len(found)}"


def moved(reports: Reports, folder: str) -> str:
    """Every claim with another verdict there, with both effects."""
    lines = ["", "| claim | figure | there | | here | |", "|---|---|---|---|---|---|"]
    lines += [f"| {here.sentence} | {here.figure} | " + " | ".join(
        f"{_interval(each.estimate)} | {each.verdict}" for each in (there, here)) + " |"
        for there, here in _elsewhere(reports, folder) if there.verdict != here.verdict]
    return "\n".join([*lines, ""])


KINDS: dict[str, Callable[..., str]] = {each.__name__: each for each in (
    gap, standardised, bar, effect, verdict, seeds, say, count, table, again, moved)}


def fill(text: str, reports: Reports, name: str) -> str:
    """The text with every slot filled.

    Raises:
        UserError: one line with the file, the slot and what it lacks.
    """
    def value(slot: re.Match) -> str:
        kind, *words = [word.strip() for word in slot[2].split(";")]
        kind, _, scale = kind.partition("@")
        try:
            if kind not in KINDS:
                raise UserError(f"no kind of slot {kind!r}{nearest(kind, KINDS)}")
            return slot[1] + KINDS[kind](reports.of(scale), *words) + slot[4]
        except (UserError, TypeError) as error:
            line = text[: slot.start()].count("\n") + 1
            raise UserError(f"{name}:{line}: {slot[2]}: {error}") from None

    return SLOT.sub(value, text)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, help="the folder of a scale's figures and claims, such as reports/mini")
    parser.add_argument("texts", type=Path, nargs="+", help="files with slots")
    a = parser.parse_args()
    reports = Reports(a.reports)
    for path in a.texts:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, reports, str(path))
        if filled != text:
            with stage.writing(path) as scratch:
                scratch.write_text(filled, encoding="utf-8")
        print(f"{path}: {len(SLOT.findall(text))} slots{', some of them changed' if filled != text else ''}")


if __name__ == "__main__":
    stage.main(_command)

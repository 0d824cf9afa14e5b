"""Decide the claims of claims.yaml from the figures' per-prompt scores; stats.py has the tests and their rules.

    python -m roads.report.claims claims.yaml reports/mini     # writes reports/mini/claims.{json,csv} and prints them
"""

import argparse
import csv
import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from roads import config, stage, stats, strict
from roads.report.schema import Bar, Figure, read
from roads.stage import UserError
from roads.strict import Positive, Strict, nearest

Weight = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
VERDICTS = ("supported", "not supported", "undecided", "not run")


class Claim(Strict):
    id: Annotated[str, Field(pattern="^[a-z0-9-]{1,40}$")]  # the table's first column
    sentence: Text
    source: Text  # a place in the paper, or 'ours'
    figure: Text
    contrast: dict[str, Weight]  # bar -> weight, per prompt and seed
    test: Literal["greater", "equivalent"]
    margin: Positive  # the smallest effect of interest, in the figure's unit
    paired: bool = True  # false: bars of different x are of different worlds, whose prompts have no order in common

    @field_validator("contrast")
    @classmethod
    def _contrast(cls, weights: dict[str, float]) -> dict[str, float]:
        if not weights or not all(weights.values()) or abs(sum(weights.values())) > 1e-9:
            raise ValueError(f"expected weights other than 0 that sum to 0, got {weights}")
        return weights


class Hypothesis(Strict):
    id: Text
    says: Text
    predicts: Text
    claims: list[str]  # ids of the claims that bear on it


class Claims(Strict):
    alpha: Annotated[float, Field(gt=0, lt=1)]
    hypotheses: list[Hypothesis]
    claims: Annotated[list[Claim], Field(min_length=1)]

    @model_validator(mode="after")
    def _ids(self) -> "Claims":
        ids = [claim.id for claim in self.claims]
        for name, found in (("claims", ids), ("hypotheses", [each.id for each in self.hypotheses])):
            twice = [key for key, count in Counter(found).items() if count > 1]
            if twice:
                raise ValueError(f"{name}: expected distinct ids, got {twice[0]!r} twice")
        for hypothesis in self.hypotheses:
            for key in hypothesis.claims:
                if key not in ids:
                    raise ValueError(f"hypotheses.{hypothesis.id}.claims: no claim {key!r}{nearest(key, ids)}")
        return self


def load(path: Path) -> Claims:
    """Read and check the claims.

    Raises:
        UserError: one line with the file, the claim, the key and what was expected.
    """
    raw = strict.read(path, f"the keys {', '.join(Claims.model_fields)}")
    found, table = strict.check(Claims, raw, str(path)), Path(path).with_name(config.FIGURES.name)
    known = config.load_figures(table) if table.exists() else {claim.figure: None for claim in found.claims}
    for claim in found.claims:
        if claim.figure not in known:
            raise UserError(f"{path}: claims.{claim.id}.figure: no figure {claim.figure!r} in {table.name}"
                            f"{nearest(claim.figure, known)}")
    return found


def read_figure(path: Path) -> Figure | None:
    """A figure's bars and where their scores are; None where the figure was never made.

    Raises:
        UserError: the file is not one that a figure writes.
    """
    return read(path, Figure, f"make {path.stem}") if path.exists() else None


def read_scores(figure: Figure, bar: Bar, path: Path) -> np.ndarray:
    """Scores [seeds, prompts] of a bar, from the very files that the figure was made from.

    Raises:
        UserError: a file is missing, has changed since, or holds something else.
    """
    rows, make = [], f"`make {path.stem}`"
    for name in bar.scores:
        if not Path(name).exists():
            raise UserError(f"{name}: not found; claims need every prompt's score: {make} makes it")
        if hashlib.sha256(Path(name).read_bytes()).hexdigest() != figure.provenance.files.get(name):
            raise UserError(f"{name}: not the file that {path} was made from (sha256 differs); {make} makes both anew")
        with np.load(name) as arrays:
            if bar.key not in arrays:
                raise UserError(f"{name}: no array {bar.key!r}{nearest(bar.key, arrays.files)}")
            rows.append(arrays[bar.key].astype(float))
    if len(rows) != len(figure.seeds) or len({row.shape for row in rows}) != 1 or rows[0].ndim != 1:
        raise UserError(f"{path}: {bar.bar}: expected as many prompts for each of the seeds {figure.seeds}, "
                        f"got arrays of shape {[row.shape for row in rows]}")
    scores = np.stack(rows)
    if not np.isfinite(scores).all():
        raise UserError(f"{path}: {bar.bar}: a score is not a finite number")
    return scores


def contrast(claim: Claim, figure: Figure, path: Path) -> list[np.ndarray]:
    """The claim's contrast [seeds, prompts]; where prompts are not paired, one part for each world.

    Raises:
        UserError: bars whose prompts cannot be paired.
    """
    bars = {bar.bar: bar for bar in figure.bars}
    parts = {}
    for name, weight in claim.contrast.items():
        world = None if claim.paired else bars[name].x
        if not claim.paired and world is None:
            raise UserError(f"claim {claim.id}: {path}: {name} has no x; `paired: false` tells worlds apart by it")
        term = weight * read_scores(figure, bars[name], path)
        if world in parts and parts[world].shape != term.shape:
            raise UserError(f"claim {claim.id}: {path}: {name} has {term.shape[1]} prompts, expected "
                            f"{parts[world].shape[1]}; `paired: false` is for bars of different worlds")
        parts[world] = parts.get(world, 0) + term
    return list(parts.values())


def measure(claim: Claim, figure: Figure, path: Path) -> dict:
    """Estimate and unadjusted p of a claim."""
    parts = contrast(claim, figure, path)
    found, resampled = stats.total(parts)
    if claim.test == "equivalent":
        p = stats.p_equivalent(resampled, claim.margin)
    else:
        p = max(stats.p_above(resampled), stats.sign_test(parts[0]) if claim.paired else 0.0)
    return {"estimate": found, "p": p, "n": min(part.shape[1] for part in parts), "seeds": figure.seeds}


def decide(claims: Claims, reports: Path) -> list[dict]:
    """Every claim with its verdict, in the order of claims.yaml; Holm over those whose figure was made."""
    figures = {name: read_figure(reports / f"{name}.json") for name in {claim.figure for claim in claims.claims}}
    rows = []
    for claim in claims.claims:
        row = claim.model_dump(exclude={"paired"} if claim.paired else None)
        figure, path = figures[claim.figure], reports / f"{claim.figure}.json"
        lacking = figure and [name for name in claim.contrast if name not in (known := [b.bar for b in figure.bars])]
        if figure and not lacking:
            row |= measure(claim, figure, path)
        else:  # a scale can have other points of a dial than mini, about which the claims are
            if lacking:
                _exists_at_mini(claim, lacking[0], path)
            why = (f"{path} has no bar {lacking[0]!r}; it has: {', '.join(known)}" if figure else
                   f"{path} is not there; `make {claim.figure}` makes it")
            row |= {"estimate": None, "p": None, "p_adjusted": None, "n": None, "seeds": [], "verdict": "not run",
                    "why": why}
        rows.append(row)
    run = [row for row in rows if row["estimate"]]
    for row, adjusted in zip(run, stats.holm([row["p"] for row in run])):
        row["p_adjusted"] = adjusted
        row["verdict"], row["why"] = stats.verdict(row["test"], row["estimate"], adjusted, row["margin"], claims.alpha)
        seeds = row["estimate"]["by_seed"]
        if min(seeds) < 0 < max(seeds):
            row["why"] += f"; seeds of both signs: {', '.join(f'{x:+.4f}' for x in seeds)}"
    return rows


def _exists_at_mini(claim: Claim, bar: str, path: Path) -> None:
    """Raises UserError where mini's report of the figure, which the claims are about, lacks a bar: a mistake."""
    figure = read_figure(path.parents[1] / "mini" / path.name)
    if figure and bar not in (names := [other.bar for other in figure.bars]):
        raise UserError(f"claims.{claim.id}.contrast: {claim.figure} has no bar {bar!r}{nearest(bar, names)}")


def save(claims: Claims, rows: list[dict], reports: Path) -> None:
    """Write claims.json and claims.csv under `reports`, each complete or not at all."""
    columns = ["id", "verdict", "mean", "low", "high", "test", "margin", "p", "p_adjusted", "n", "figure", "source",
               "sentence", "why"]
    with stage.writing_all(reports / "claims.json", reports / "claims.csv") as (as_json, as_csv):
        stage.write_json(as_json, {
            "scale": reports.resolve().name, "alpha": claims.alpha, "claims": rows,
            "hypotheses": [hypothesis.model_dump() for hypothesis in claims.hypotheses]})
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row | (row["estimate"] or {}) for row in rows)


def table(rows: list[dict]) -> str:
    """The verdicts as text, at most 120 columns wide."""
    wide = max(5, *(len(row["id"]) for row in rows))
    lines = [f"{'claim':{wide}}  {'verdict':13}  {'effect':>7}  {'95% interval':18}  {'adjusted p':10}  test"]
    for row in rows:
        found = row["estimate"]
        numbers = f"{'':39}"
        if found:
            interval = f"[{found['low']:+.4f}, {found['high']:+.4f}]"
            numbers = f"{found['mean']:+.4f}  {interval:18}  {row['p_adjusted']:<10.4f}"
        sign = {"greater": "> 0, margin ", "equivalent": "within +-"}[row["test"]]
        lines.append(f"{row['id']:{wide}}  {row['verdict']:13}  {numbers}  {sign}{row['margin']:g}")
    missing = sorted({row["figure"] for row in rows if row["why"].endswith("makes it")})
    odd = [row for row in rows if row["verdict"] == "not run" and row["figure"] not in missing]
    counts = Counter(row["verdict"] for row in rows)
    lines.append(f"{len(rows)} claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    if missing:
        lines.append(f"not run: `make {' '.join(missing)}` makes the figures")
    lines += [f"not run: {row['id']}: {row['why']}" for row in odd]
    return "\n".join(lines)


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", type=Path, help="claims.yaml")
    parser.add_argument("reports", type=Path, help="the folder of a scale's figures, such as reports/mini")
    args = parser.parse_args()
    claims = load(args.claims)
    if not args.reports.is_dir():
        raise UserError(f"{args.reports}: no such folder; expected the figures of a scale, such as reports/mini")
    rows = decide(claims, args.reports)
    save(claims, rows, args.reports)
    print(table(rows))


if __name__ == "__main__":
    stage.main(_command)

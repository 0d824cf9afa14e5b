"""Decide the claims of claims.yaml from the figures' per-prompt scores; stats.py has the tests and their rules.

    python -m roads.report.claims claims.yaml reports/mini     # writes reports/mini/claims.{json,csv} and prints them

A claim whose figures were not made here, as in a fresh clone, keeps claims.json's estimate if the hashes of its scores
match.
"""

import argparse
import csv
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from roads import stage, stats
from roads.report import schema
from roads.report.bars import Bars, Lacking, common, read_figure, read_scores
from roads.report.claim import Claim, Claims, load
from roads.report.schema import Bar, Figure, read
from roads.stage import UserError

VERDICTS = ("supported", "not supported", "undecided", "not run")


def contrast(claim: Claim, found: dict[str, tuple[Figure, Bar, Path]]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The claim's contrast [seeds, prompts]; where prompts are not paired, one part for each world. And its prompts'
    posts.

    Raises:
        UserError: bars whose prompts cannot be paired.
    """
    parts, post, seeds = {}, None, common(found)
    for name, weight in claim.contrast.items():
        figure, bar, path = found[name]
        world = None if claim.paired else bar.x
        if not claim.paired and world is None:
            raise UserError(f"claim {claim.id}: {path}: {name} has no x; `paired: false` tells worlds apart by it")
        scores, post = read_scores(figure, bar, path, claim.measure, seeds)
        term = weight * scores
        if world in parts and parts[world].shape != term.shape:
            raise UserError(f"claim {claim.id}: {path}: {name} has {term.shape[1]} prompts, expected "
                            f"{parts[world].shape[1]}; `paired: false` is for bars of different worlds")
        parts[world] = parts.get(world, 0) + term
    return list(parts.values()), post if claim.paired else None


def over_worlds(claim: Claim, found: dict[str, tuple[Figure, Bar, Path]], seeds: list[int]) -> dict:
    """`measure` where each world, or kind of reward, is an observation. A correlation has r of each seed; else by_seed
    is by world."""
    cells = list(dict.fromkeys(bar.bar.removeprefix(f"{bar.series} ") for _, bar, _ in found.values()))
    worlds: dict[str, list[str]] = {}
    for cell in cells:
        worlds.setdefault(cell.partition(" n=")[0] if claim.over == "kinds" else cell, []).append(cell)

    def of(name: str) -> list[float]:
        figure, bar, _ = found[name]
        return [bar.by_seed[figure.seeds.index(seed)] for seed in seeds]

    def means(weights: dict[str, float]) -> np.ndarray:
        """[seeds, worlds]"""
        return sum(weight * np.stack([np.mean([of(f"{name} {cell}") for cell in those], 0)
                                      for those in worlds.values()], 1) for name, weight in weights.items())

    if len(worlds) < (least := 3 if claim.test == "correlated" else 2):
        raise Lacking(f"{claim.figure}: {len(worlds)} of at least {least} {claim.over}")
    gaps = means(claim.contrast)
    if claim.test == "correlated":
        places = means(claim.against)
        if np.ptp(places.mean(0)) == 0:
            raise Lacking(f"{' - '.join(claim.against)} is the same in all {len(worlds)} {claim.over}")
        line = stats.regression(places.mean(0), gaps.mean(0))
        by_seed = [stats.regression(x, y)["r"] for x, y in zip(places, gaps, strict=True)]
        estimate, p = {"mean": line["r"], "low": line["r_low"], "high": line["r_high"], "by_seed": by_seed}, line["p"]
    else:
        estimate = stats.over_units(gaps.mean(0).tolist(), claim.margin if claim.test == "equivalent" else None)
        p = estimate.pop("p")
        estimate["by_seed"] = gaps.mean(0).tolist()
        p = min(1.0, 2 * min(p, 1 - p)) if claim.test == "different" else p
    return {"estimate": estimate, "p": p, "n": len(worlds), "seeds": seeds}


def measure(claim: Claim, found: dict[str, tuple[Figure, Bar, Path]]) -> dict:
    """Estimate and unadjusted p of a claim from the bars that it names.

    Raises:
        Lacking: they have no seed in common.
    """
    seeds = common(found)
    if not seeds:
        raise Lacking(f"{' and '.join(sorted({path.name for _, _, path in found.values()}))} have no seed in common")
    if claim.over != "prompts":
        return over_worlds(claim, found, seeds)
    if claim.test == "correlated":
        sides = [[read_scores(*found[name], claim.measure, seeds)[0] for name in names]
                 for names in (claim.contrast, claim.against)]
        estimate, resampled = stats.correlation(*sides)
        return {"estimate": estimate, "p": stats.p_above(resampled), "n": sides[0][0].shape[1], "seeds": seeds}
    parts, post = contrast(claim, found)
    estimate, resampled = stats.total(parts, post)
    if claim.test == "equivalent":
        p = stats.p_equivalent(resampled, claim.margin)
    elif claim.test == "different":
        p = min(1.0, 2 * min(stats.p_above(resampled), stats.p_above(-resampled)))
    else:
        p = max(stats.p_above(resampled), stats.sign_test(parts[0], post=post) if claim.paired else 0.0)
    return {"estimate": estimate, "p": p, "n": min(part.shape[1] for part in parts), "seeds": seeds}


def made_from(claim: Claim, found: dict[str, tuple[Figure, Bar, Path]]) -> str:
    """A hash of what an estimate follows from: the claim's numbers, and the scores of its bars."""
    asked = claim.model_dump(exclude={"id", "sentence", "source", "changed"})
    scores = {name: [bar.key, [figure.provenance.files.get(path) for path in bar.scores], figure.seeds]
              for name, (figure, bar, _) in found.items()}
    return hashlib.sha256(json.dumps([asked, scores], sort_keys=True).encode()).hexdigest()[:16]


def decided(reports: Path) -> dict[str, dict]:
    """The claims of an earlier run that have an estimate, by what they were made from."""
    path = reports / "claims.json"
    rows = read(path, schema.Claims, "make claims").claims if path.exists() else []
    return {row.made_from: row.model_dump() for row in rows if row.estimate and row.made_from}


def decide(claims: Claims, reports: Path) -> list[dict]:
    """Every claim with its verdict, in the order of claims.yaml; Holm in each family, over those decided."""
    others = [name.partition("/")[0] for claim in claims.claims for name in [*claim.contrast, *claim.against]
              if "/" in name]
    bars, rows, before = Bars(reports, {claim.figure for claim in claims.claims} | set(others)), [], decided(reports)
    for claim in claims.claims:
        row = claim.model_dump(exclude={"paired"} if claim.paired else None) | {"family": claim.family}
        try:
            found = bars.needed(claim)
            row["made_from"] = made_from(claim, found)
            is_here = all(Path(name).exists() for _, bar, _ in found.values() for name in bar.scores)
            kept = None if is_here else before.get(row["made_from"])
            row |= {key: kept[key] for key in ("estimate", "p", "n", "seeds")} if kept else measure(claim, found)
        except Lacking as why:  # a scale can have other points of a dial than mini
            row |= dict.fromkeys(("made_from", "estimate", "p", "p_adjusted", "n"))
            row |= {"seeds": [], "verdict": "not run", "why": str(why)}
        rows.append(row)
    for family in ("the paper's", "ours"):
        run = [row for row in rows if row["estimate"] and row["family"] == family]
        for row, adjusted in zip(run, stats.holm([row["p"] for row in run])):
            row["p_adjusted"] = adjusted
            _judge(row, claims.alpha)
    return rows


def _judge(row: dict, alpha: float) -> None:
    """Verdict of a claim and why, with what its seeds say."""
    found = row["estimate"]
    row["verdict"], row["why"] = stats.verdict(row["test"], found, row["p_adjusted"], row["margin"], alpha)
    row["beyond_margin"] = row["test"] != "equivalent" and found["low"] > row["margin"]
    seeds, found["over_seeds"] = found["by_seed"], stats.over_seeds(found["by_seed"])
    if min(seeds) < 0 < max(seeds):
        of = row["over"] if row["over"] != "prompts" and row["test"] != "correlated" else "seeds"
        row["why"] += f"; {of} of both signs: {', '.join(f'{x:+.4f}' for x in seeds)}"
    elif row["verdict"] == "supported" and row["test"] == "greater" and (t := found["over_seeds"]) and t[0] < 0:
        row["why"] += f"; over seeds alone the t interval [{t[0]:+.4f}, {t[1]:+.4f}] has 0 in it"


def metrics(rows: list[dict], reports: Path) -> dict:
    """For `dvc metrics`: the mean of every bar of the figures that are there, and how many claims have each verdict."""
    means = {name: {bar.bar: round(bar.mean, 4) for bar in read_figure(reports / f"{name}.json").bars}
             for name in schema.figures(reports)}
    return means | {"claims": dict(Counter(row["verdict"] for row in rows))}


def save(claims: Claims, rows: list[dict], reports: Path) -> None:
    """Write claims.json, claims.csv and metrics.json under `reports`, complete or not at all."""
    columns = ["id", "family", "verdict", "beyond_margin", "mean", "low", "high", "by_seed", "over_seeds", "test",
               "margin", "p", "p_adjusted", "n", "figure", "source", "sentence", "changed", "why"]
    files = [reports / name for name in ("claims.json", "claims.csv", "metrics.json")]
    with stage.writing_all(*files) as (as_json, as_csv, as_metrics):
        stage.write_json(as_metrics, metrics(rows, reports))
        stage.write_json(as_json, {
            "scale": reports.resolve().name, "alpha": claims.alpha, "headline": claims.headline, "claims": rows,
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
        sign = {"greater": "> 0, margin ", "equivalent": "within +-", "different": "not 0, margin ",
                "correlated": "r > 0, margin "}[row["test"]]
        lines.append(f"{row['id']:{wide}}  {row['verdict']:13}  {numbers}  {sign}{row['margin']:g}")
    wanted = {row["id"]: re.search(r"\.json is not there; `make (\w+)` makes it$", row["why"]) for row in rows}
    missing = sorted({found[1] for found in wanted.values() if found})
    odd = [row for row in rows if row["verdict"] == "not run" and not wanted[row["id"]]]
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

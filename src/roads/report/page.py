"""One page with everything that was found: claims, hypotheses, figures and theory, in reports/<scale>/index.html.

    python -m roads.report.page reports/mini

It reads every <figure>.json with its .png and .csv, claims.json, and the theory in the folder `theory` beside. What
is not there is named, with the command that makes it. The page is one file that asks for nothing from outside, and
the same inputs give the same bytes: what it says of the run comes from the figures' own provenance.
"""

import argparse
import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from roads import config, stage
from roads.report import schema
from roads.report.schema import Broken, Claim, Claims, Complexity, Estimate, Figure, Gap, Statements, read

TEMPLATE = Path(__file__).with_suffix(".html")
PICTURES = {
    "fig2": "Figure 2, computed: offline and two-stage projections of the same data. They part where the rewards are"
            " not those of the policies, and agree where they are.",
    "complexity": "H6 in closed form: error of every estimator by number of pairs, by horizon, and by how much of the"
                  " reward is simple.",
    "finite_pairs": "Theorem 2.2 on finite data: the two optima agree once the estimate is unique.",
}


def picture(path: Path) -> dict | None:
    """A PNG as a data URI with its size in pixels; None where there is none.

    Raises:
        UserError: the file is no PNG.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise stage.UserError(f"{path}: expected a PNG picture")
    return {"uri": "data:image/png;base64," + base64.b64encode(data).decode(), "stem": path.stem,
            "width": int.from_bytes(data[16:20], "big"), "height": int.from_bytes(data[20:24], "big")}


def number(value: float | None, sign: bool = False) -> str:
    """Three decimals, less for large numbers, with a true minus; a dash for nothing and for NaN."""
    if value is None or math.isnan(value):
        return "–"
    digits = 3 if abs(value) < 10 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def sentence(text: str) -> str:
    """With a capital first."""
    return text[:1].upper() + text[1:]


def slug(text: str) -> str:
    """`text` as an anchor."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)


def label(name: str, title: str) -> tuple[str, str]:
    """The short name of a figure, and its title without it: ("Fig. 3", "online against offline")."""
    found = re.fullmatch(r"fig(\d+)", name)
    short = f"Fig. {found[1]}" if found else sentence(name)
    return short, re.sub(rf"^{re.escape(short)}\s*[:.]\s*", "", title)


def contrast(claim: Claim) -> str:
    """What is tested, as a formula: "Online(DPO) − DPO > 0"; bars of one setting ("... K=2") side by side."""
    if claim.test == "correlated":
        joint = " − " if claim.over != "prompts" else ", "
        return f"r of {joint.join(claim.contrast)} with {joint.join(claim.against)} >\u00a00"

    def setting_first(item: tuple[str, float]) -> tuple[str, float]:
        last = item[0].rpartition(" ")[2]
        return last if "=" in last else "", -item[1]

    terms = ""
    for bar, weight in sorted(claim.contrast.items(), key=setting_first):
        size = "" if abs(weight) == 1 else f"{abs(weight):g} × "
        terms += (" − " if weight < 0 else " + ") + size + bar
    terms = terms.removeprefix(" + ").strip()
    return {"greater": f"{terms} >\u00a00", "different": f"{terms} ≠\u00a00",
            "equivalent": f"|{terms}| <\u00a0{claim.margin:g}"}[claim.test]


def forest(estimate: Estimate, far: float, margin: float = 0.0) -> dict:
    """Where a forest plot's marks are, in percent of its width: zero in the middle, `far` near either end."""
    def place(value: float) -> str:
        return f"{50 + 48 * value / far if math.isfinite(value) else 50:.2f}%"

    marks = {key: place(getattr(estimate, key)) for key in ("low", "mean", "high")}
    return marks | {"from": place(-margin), "width": f"{96 * margin / far:.2f}%"}


def reach(estimates: list[Estimate], margins: Sequence[float] = ()) -> float:
    """The largest distance from zero, of intervals' ends and margins."""
    ends = [abs(end) for e in estimates for end in (e.low, e.mean, e.high) if math.isfinite(end)]
    return max([*ends, *margins], default=0) or 1.0


def alt(title: str, figure: Figure) -> str:
    """The picture in words; of many bars only the range, as the table below it has them all."""
    if len(figure.bars) <= 8:
        found = "; ".join(f"{bar.bar} {number(bar.mean)}" for bar in figure.bars)
    else:
        low, high = (end(figure.bars, key=lambda bar: bar.mean) for end in (min, max))
        found = f"{len(figure.bars)} points, from {low.bar} {number(low.mean)} to {high.bar} {number(high.mean)}"
    return f"{title}. {sentence(figure.measure)}: {found}."


def gap_rows(gaps: dict[str, Gap]) -> list[dict]:
    far = reach(list(gaps.values()))
    return [{"name": name.replace(" - ", " − "), "gap": gap, "forest": forest(gap, far)} for name, gap in gaps.items()]


def paper_bars(figure: Figure) -> list[str]:
    """The bars of the paper's figure, in this figure's order; those that it has not, at the end."""
    series = figure.paper.series if figure.paper else []
    named = dict.fromkeys(bar for one in series for bar in one.values)
    ours = [bar.bar for bar in figure.bars if bar.bar in named]
    return ours + [bar for bar in named if bar not in ours]


def figure_section(folder: Path, name: str, figure: Figure, claims: list[dict]) -> dict:
    short, title = label(name, figure.title)
    return {
        "name": name, "id": f"figure-{slug(name)}", "short": short, "title": title, "figure": figure,
        "picture": picture(folder / f"{name}.png"), "alt": alt(f"{short}: {title}", figure),
        "gaps": gap_rows(figure.gaps), "csv": (folder / f"{name}.csv").exists(),
        "also": {other: {"bars": found.bars, "gaps": gap_rows(found.gaps)} for other, found in figure.also.items()},
        "paper_bars": paper_bars(figure), "judged": any("position_consistency" in bar.judge for bar in figure.bars),
        "claims": [claim for claim in claims if claim["claim"].figure == name],
    }


def elsewhere(folder: Path) -> dict[str, dict[str, Claim]]:
    """What other scales' reports say of the same claims: scale -> id -> claim, of those that were run there."""
    paths = sorted(path for path in folder.resolve().parent.glob("*/claims.json") if path.parent != folder.resolve())
    found = {path.parent.name: read(path, Claims, f"make claims SCALE={path.parent.name}") for path in paths}
    return {scale: {claim.id: claim for claim in other.claims if claim.estimate} for scale, other in found.items()}


def claim_rows(claims: list[Claim], figures: dict[str, Figure], table: dict[str, config.Figure],
               others: dict[str, dict[str, Claim]]) -> list[dict]:
    """Claims as rows of the table, with what other scales say; those of one measure share the scale of their plots."""
    measures = {claim.id: "correlation" if claim.test == "correlated" else claim.measure or (
        figures[claim.figure].measure if claim.figure in figures else "") for claim in claims}
    rows = []
    for claim in claims:
        alike = [other for other in claims if other.estimate and measures[other.id] == measures[claim.id]]
        far = reach([other.estimate for other in alike], [other.margin for other in alike])
        estimate, known = claim.estimate, claim.figure in figures or claim.figure in table
        rows.append({"claim": claim, "id": f"claim-{slug(claim.id)}", "contrast": contrast(claim),
                     "measure": measures[claim.id], "short": label(claim.figure, "")[0],
                     "link": f"figure-{slug(claim.figure)}" if known else None,
                     "forest": forest(estimate, far, claim.margin) if estimate else None,
                     "others": {scale: told[claim.id] for scale, told in others.items() if claim.id in told}})
    return rows


def of_paper(claim: Claim, figure: Figure | None) -> dict[str, float]:
    """A claim's difference in the paper's own numbers, by its series; of those that have all of its bars."""
    paper = figure.paper if figure else None
    unit = 100 if paper and "%" in paper.unit else 1
    found = {}
    for one in paper.series if paper else []:
        terms = [weight * value / unit for bar, weight in claim.contrast.items()
                 if (value := one.values.get(bar)) is not None]
        if len(terms) == len(claim.contrast):
            found[one.name] = sum(terms)
    return found


def answer(ids: list[str], rows: dict[str, dict], figures: dict[str, Figure]) -> list[dict]:
    """The claims that the page opens with as one plot: a scale for each measure, the paper's values among the marks."""
    shown = [(rows[i], of_paper(rows[i]["claim"], figures.get(rows[i]["claim"].figure)))
             for i in ids if i in rows and rows[i]["claim"].estimate]
    found = []
    for row, paper in shown:
        alike = [(other["claim"], values) for other, values in shown if other["measure"] == row["measure"]]
        far = reach([claim.estimate for claim, _ in alike],
                    [abs(value) for claim, values in alike for value in (claim.margin, *values.values())])
        marks = [{"name": name, "value": value, "at": f"{50 + 48 * value / far:.2f}%"} for name, value in paper.items()]
        found.append(row | {"forest": forest(row["claim"].estimate, far, row["claim"].margin), "paper": marks})
    return found


def flatten(params: dict, prefix: str = "") -> dict[str, str]:
    """Nested parameters as dotted key -> value."""
    flat = {}
    for key, value in params.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value, ensure_ascii=False)}
    return flat


def by_value(values: dict[str, str | None]) -> list[tuple[str | None, str | None]]:
    """Each value with the figures that have it; None instead of their names where all agree."""
    groups: dict = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return [(value, None if len(groups) == 1 else ", ".join(names)) for value, names in groups.items()]


def provenance(figures: dict[str, Figure]) -> dict:
    """What was run, as the figures themselves recorded it."""
    params = {name: flatten(figure.provenance.params) for name, figure in figures.items()}
    keys = sorted({key for flat in params.values() for key in flat})
    sizes = sorted({bar.n for figure in figures.values() for bar in figure.bars})
    return {
        "notes": by_value({name: figure.note for name, figure in figures.items()}),
        "seeds": by_value({name: ", ".join(map(str, figure.seeds)) for name, figure in figures.items()}),
        "n": f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else "–",
        "commit": by_value({name: figure.provenance.commit for name, figure in figures.items()}),
        "lock": by_value({name: figure.provenance.lock for name, figure in figures.items()}),
        "params": {key: by_value({name: flat[key] for name, flat in params.items() if key in flat}) for key in keys},
    }


def theory_section(folder: Path) -> dict | None:
    """What reports/theory says, in short; None where it was not run."""
    if not (folder / "statements.json").exists():
        return None
    checked = read(folder / "statements.json", Statements, "make theory")
    found = {"statements": checked.rows, "holding": sum(row.status == "holds" for row in checked.rows),
             "error": max(row.max_error for row in checked.rows), "n": max(row.n for row in checked.rows),
             "pictures": [{"caption": PICTURES[name], **image} for name in PICTURES
                          if (image := picture(folder / f"{name}.png"))],
             "broken": [], "ratios": {}, "account": (folder / "theory.md").exists()}
    if (folder / "broken.json").exists():
        found["broken"] = read(folder / "broken.json", Broken, "make theory").rows
    if (folder / "complexity.json").exists():
        limits = read(folder / "complexity.json", Complexity, "make theory").limits
        simple = [row for row in limits if row.get("share") == 0]
        means = {row["horizon"]: {other["class"] == "R_sim": other["mean"] for other in simple
                                  if other["horizon"] == row["horizon"]} for row in simple}
        found["ratios"] = {horizon: f"{mean[False] / mean[True]:.2g}" for horizon, mean in sorted(means.items())}
    return found


def page(folder: Path) -> str:
    """The page of one folder of reports.

    Raises:
        UserError: no such folder, no figure in it, or a file that is not what `make` writes.
    """
    if not folder.is_dir():
        raise stage.UserError(f"{folder}: no such folder; expected reports/<scale>, which `make figures` makes")
    scale = folder.resolve().name
    names = set(schema.figures(folder))
    if not names:
        raise stage.UserError(f"{folder}: expected a folder of figures; `make figures SCALE={scale}` makes them")
    table = config.load_figures()
    # Known ones in the order of figures.yaml, others behind them.
    order = [name for name in table if name in names] + sorted(names - set(table))
    figures = {name: read(folder / f"{name}.json", Figure, f"make {name} SCALE={scale}") for name in order}
    path = folder / "claims.json"
    found = read(path, Claims, f"make claims SCALE={scale}") if path.exists() else None
    claims = claim_rows(found.claims if found else [], figures, table, elsewhere(folder))
    by_id = {row["claim"].id: row for row in claims}
    verdicts = [row["claim"].verdict for row in claims]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)
    environment.filters |= {"number": number, "p": p_value, "slug": slug, "sentence": sentence}
    tally = {v: verdicts.count(v) for v in ("supported", "not supported", "undecided", "not run") if v in verdicts}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        scale=scale, run=provenance(figures), claims=claims,
        browse=(folder / "browse.html").exists(), csv=(folder / "claims.csv").exists(),
        alpha=found and found.alpha, answer=answer(found.headline if found else [], by_id, figures),
        tally=tally,
        filters={"verdict": list(tally),
                 "family": list(dict.fromkeys(row["claim"].family for row in claims if row["claim"].family))},
        hypotheses=[{"hypothesis": h, "claims": [by_id[i] for i in h.claims if i in by_id]}
                    for h in (found.hypotheses if found else [])],
        figures=[figure_section(folder, name, figure, claims) for name, figure in figures.items()],
        missing=[{"name": name, "id": f"figure-{name}", "short": label(name, "")[0], "what": label(name, row.title)[1]}
                 for name, row in table.items() if name not in figures],
        curves=picture(folder / "curves.png"), theory=theory_section(folder.resolve().parent / "theory"),
    )


def write(folder: Path) -> Path:
    """Write index.html into `folder`, complete or not at all."""
    text = page(folder)
    with stage.writing(folder / "index.html") as scratch:
        scratch.write_text(text, encoding="utf-8")
    return folder / "index.html"


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where a scale's figures are: reports/<scale>")
    path = write(parser.parse_args().folder)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    stage.main(_command)

"""Compare two folders of reports, bar by bar and claim by claim: a machine's results with those that came with the
code.

    python -m roads.report.diff reports/mini ELSEWHERE/reports/mini     # or: make diff A=reports/mini B=ELSEWHERE/…

Prints a line for every figure that both have, with the bar that differs most; with --all every bar that differs. Exits
with 0 where all numbers are the same, and 1 where some are not, as diff does.
"""

import argparse
from pathlib import Path

from roads import stage
from roads.report import schema
from roads.report.schema import Bar, Claims, Figure, read
from roads.stage import UserError


def figures(folder: Path) -> dict[str, Figure]:
    """Every figure of a folder of reports, by name.

    Raises:
        UserError: there is none, or a file that no figure wrote.
    """
    names = schema.figures(folder)
    if not names:
        raise UserError(f"{folder}: no figures; expected a folder of reports, such as reports/mini")
    return {name: read(folder / f"{name}.json", Figure, f"make {name}") for name in names}


def apart(ours: Bar, theirs: Bar) -> bool:
    """Whether two intervals have nothing in common."""
    return ours.high < theirs.low or theirs.high < ours.low


def compare(ours: Figure, theirs: Figure, every: bool) -> tuple[list[str], bool]:
    """What is to be said of a figure that both have, and whether a number differs."""
    a, b = ({bar.bar: bar for bar in figure.bars} for figure in (ours, theirs))
    common = [name for name in a if name in b]
    moved = sorted((name for name in common if a[name].mean != b[name].mean or a[name].by_seed != b[name].by_seed),
                   key=lambda name: -abs(b[name].mean - a[name].mean))
    lines = [f"{ours.figure:14} {len(common) - len(moved)} of {len(common)} bars the same"]
    if moved:
        far = sum(apart(a[name], b[name]) for name in moved)
        lines[0] += f"; farthest {moved[0]}: {a[moved[0]].mean:.4f} and {b[moved[0]].mean:.4f}"
        lines[0] += f"; intervals apart: {far}" * (far > 0)
    for name in moved if every else []:
        left, right = a[name], b[name]
        lines.append(f"  {name}: {left.mean:.4f} and {right.mean:.4f} ({right.mean - left.mean:+.4f})"
                     + ", apart" * apart(left, right))
    lines += [f"  only in one of them: {', '.join(sorted(set(a) ^ set(b)))}"] * (set(a) != set(b))
    return lines, bool(moved) or set(a) != set(b)


def verdicts(folder: Path) -> dict[str, str]:
    path = folder / "claims.json"
    return {claim.id: claim.verdict for claim in read(path, Claims, "make claims").claims} if path.exists() else {}


def diff(ours: Path, theirs: Path, every: bool = False) -> tuple[list[str], bool]:
    """The whole comparison, line by line, and whether anything differs."""
    a, b = figures(ours), figures(theirs)
    lines, differs = [], set(a) != set(b)
    for name in [name for name in a if name in b]:
        found, moved = compare(a[name], b[name], every)
        lines, differs = lines + found, differs or moved
    for folder, names in ((ours, set(a) - set(b)), (theirs, set(b) - set(a))):
        lines += [f"only in {folder}: {', '.join(sorted(names))}"] * bool(names)
    left, right = verdicts(ours), verdicts(theirs)
    common = [name for name in left if name in right]
    moved = [name for name in common if left[name] != right[name]]
    lines += [f"{len(common) - len(moved)} of {len(common)} verdicts the same"] * bool(common)
    lines += [f"  {name}: {left[name]} and {right[name]}" for name in moved]
    return lines, differs or bool(moved)


def _command() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path, help="a folder of reports, such as reports/mini")
    parser.add_argument("theirs", type=Path, help="another")
    parser.add_argument("--all", action="store_true", help="every bar that differs")
    a = parser.parse_args()
    lines, differs = diff(a.ours, a.theirs, a.all)
    print("\n".join(lines))
    return int(differs)


if __name__ == "__main__":
    stage.main(_command)

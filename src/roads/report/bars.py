"""The bars that claims name, in the figures of a folder of reports, and the per-prompt scores behind them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from roads import arrays, config, stage
from roads.report.claim import Claim, Measure
from roads.report.schema import Bar, Figure, read
from roads.stage import UserError
from roads.strict import nearest

# What a claim is about where that is not the score: a function of scores, or an array of scores.npz.
MEASURES = {"accuracy": lambda p: (p > 0.5).astype(float), "log-likelihood": np.log}
ARRAYS = {"by quality": "by_quality", "held-out": "held_out", "noisy judge": "noisy", "no penalty": "penalty0"}


class Lacking(Exception):
    """Why a claim cannot be decided from the figures that exist."""


def read_figure(path: Path) -> Figure | None:
    """A figure's bars and where their scores are; None where the figure was never made.

    Raises:
        UserError: the file is not one that a figure writes.
    """
    return read(path, Figure, f"make {path.stem}") if path.exists() else None


def read_scores(figure: Figure, bar: Bar, path: Path, measure: Measure | None = None,
                seeds: list[int] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores [seeds, prompts] of a bar, from the very files that the figure was made from, and the prompts' posts where
    they share some; of a measure, and of some of the figure's seeds.

    Raises:
        Lacking: a file is missing, or has changed since.
        UserError: it holds something else.
    """
    rows, make, post = [], f"`make {path.stem}`", None
    key = arrays.beside(bar.key, ARRAYS[measure]) if measure in ARRAYS else bar.key
    for name in bar.scores:
        if not Path(name).exists():
            raise Lacking(f"{name}: not found; claims need every prompt's score: {make} makes it")
        if stage.sha256(name) != figure.provenance.files.get(name):
            raise Lacking(f"{name}: not the file that {path} was made from (sha256 differs); {make} makes both again")
        with np.load(name) as file:
            if key not in file:
                raise UserError(f"{name}: no array {key!r}{nearest(key, file.files)}")
            rows.append(file[key].astype(float))
            post = arrays.post_of(file, key)
    if len(rows) != len(figure.seeds) or len({row.shape for row in rows}) != 1 or rows[0].ndim != 1:
        raise UserError(f"{path}: {bar.bar}: expected as many prompts for each of the seeds {figure.seeds}, "
                        f"got arrays of shape {[row.shape for row in rows]}")
    scores = np.stack([row for row, seed in zip(rows, figure.seeds) if seeds is None or seed in seeds])
    if not np.isfinite(scores).all():
        raise UserError(f"{path}: {bar.bar}: a score is not a finite number")
    return MEASURES[measure](scores) if measure in MEASURES else scores, post


class Bars:
    """The bars that claims name, of all figures of a folder of reports."""

    def __init__(self, reports: Path, names: Iterable[str]):
        self.reports, self.figures = reports, {name: read_figure(reports / f"{name}.json") for name in names}

    def find(self, claim: Claim, name: str) -> tuple[Figure, Bar, Path]:
        """A bar by its name or a role, in the claim's figure or in another.

        Raises:
            Lacking: its figure was not made, or the scale has no such bar.
            UserError: mini's figure, which claims are written for, lacks it: a mistake in claims.yaml.
        """
        other, _, rest = name.partition("/")
        wanted, label = (other, rest) if rest and other in self.figures else (claim.figure, name)
        figure, path = self.figures[wanted], self.reports / f"{wanted}.json"
        if figure is None:
            raise Lacking(f"{path} is not there; `make {wanted}` makes it")
        found = [bar for bar in figure.bars if label == bar.bar or label in bar.roles]
        if not found:
            known = [bar.bar for bar in figure.bars]
            _exists_at_mini(claim, label, path)
            raise Lacking(f"{path} has no bar {label!r}; it has: {', '.join(known)}")
        return figure, found[0], path

    def series(self, claim: Claim, name: str) -> dict[str, tuple[Figure, Bar, Path]]:
        """The bars of a series of a figure, by their worlds: `DPO w03` is DPO's of w03. Raises as `find` does."""
        figure, path = self.figures[claim.figure], self.reports / f"{claim.figure}.json"
        first = next((bar.bar for bar in figure.bars if bar.series == name), name) if figure else name
        self.find(claim, first)
        return {bar.bar.removeprefix(f"{name} "): (figure, bar, path) for bar in figure.bars if bar.series == name}

    def needed(self, claim: Claim) -> dict[str, tuple[Figure, Bar, Path]]:
        """Every bar that a claim names, or is of a series that it names.

        Raises:
            Lacking: as `find`; or two roles are one bar at this scale.
        """
        if claim.over != "prompts":
            return {f"{name} {world}": bar for name in [*claim.contrast, *claim.against]
                    for world, bar in self.series(claim, name).items()}
        found = {name: self.find(claim, name) for name in [*claim.contrast, *claim.against]}
        if len({(path, bar.bar) for _, bar, path in found.values()}) < len(found):
            raise Lacking(f"at this scale {' and '.join(map(repr, claim.contrast))} are one bar")
        return found


def common(found: dict[str, tuple[Figure, Bar, Path]]) -> list[int]:
    """The seeds that all figures of a claim have."""
    first, *others = [figure.seeds for figure, _, _ in found.values()]
    return [seed for seed in first if all(seed in seeds for seeds in others)]


def _exists_at_mini(claim: Claim, bar: str, path: Path) -> None:
    """Raises UserError where mini's report of the figure, which the claims are about, lacks a bar: a mistake; Lacking
    where the bar is of an arm that params.yaml has and that report has not."""
    figure = read_figure(path.parents[1] / "mini" / path.name)
    names = [name for other in figure.bars for name in (other.bar, *other.roles)] if figure else []
    if figure and bar not in names:
        arms = config.load().arms_of("mini", path.stem) if config.PARAMS.exists() else {}
        words = {word for name in names for word in name.split()}
        if set(bar.split()) & set(arms) - words:
            raise Lacking(f"{path} was made before it had {bar!r}; `make {path.stem}` makes it")
        raise UserError(f"claims.{claim.id}.contrast: {path.stem} has no bar {bar!r}{nearest(bar, names)}")

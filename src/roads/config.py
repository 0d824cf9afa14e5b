"""The experiment's files that people write, and no program does: params.yaml, a block per scale with its arms, and
figures.yaml, a row per figure. active.py has what runs of them.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from roads import strict
from roads.schema import Policy, Scale, Task
from roads.stage import UserError
from roads.strict import Seed, Strict, nearest

PARAMS, FIGURES = Path("params.yaml"), Path("figures.yaml")
MORE = "human/more"  # the folder of seeds that the graph does not run
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # it becomes part of commands, of folders and of DVC's keys
MODULES = Path(__file__).with_name("figures")
SEEDS = TypeAdapter(Annotated[list[Seed], Field(min_length=1)], config=ConfigDict(strict=True))


class Active(Strict):
    """active.yaml: the scale, and the lists of dvc.yaml that follow from it."""

    scale: str
    data_from: str | None  # null for a world
    tasks: list[Task]  # whose preferences there are
    figures: dict[str, list[str]]  # figure -> the scale, where it has it
    arms: dict[str, list[str]]  # figure -> its arms
    figure_seeds: dict[str, list[str]]  # figure -> the seeds that it shows
    run_seeds: dict[str, list[str]]  # graph: of the scale's own runs; more: of Figs 3 and 7 beyond those; figure -> of
    # its arms', which others show too
    more: str  # the folder of those under runs/<scale>; where there are none, one that every figure follows from
    from_world: list[str]  # the scale, where its data are a world's
    from_posts: list[str]  # or posts'
    arms_from_world: list[str]  # arms with an SFT checkpoint of their own, as figure.arm, whose data are a world's
    arms_from_posts: list[str]
    arms_with_sft: list[str]  # the two together
    sizes: list[str]  # full names of the scale and of the arms of Fig 9 with a model of their own, which it crosses
    fig9_models: list[str]  # those arms
    fig9_rewards: list[str]  # and those with nothing but a reward model of their own


class Figure(Strict):
    """A row of figures.yaml."""

    title: str
    module: str  # of roads.figures
    task: Task  # whose preferences it is about: readers', or ROUGE-L's
    reads: list[str] = []  # of the scale's own runs: folders under runs/<scale>
    # Whose SFT checkpoint its arms start from: the scale's (shared), their own, or those of the arms of another figure,
    # which have the same names; null: it has no arms.
    sft: str | None = None
    policies: list[Policy] = []  # that each of its arms trains, unless it says otherwise
    borrows: list[str] = []  # figures whose arms it shows too
    world: bool = False  # whether it needs a synthetic world
    folders: bool = False  # its arms keep what the graph's own runs keep, the local RM's likelihood included


@dataclass(frozen=True)
class Params:
    """params.yaml and figures.yaml, checked."""

    seeds: dict[str, list[int]]
    scales: dict[str, Scale]
    figures: dict[str, Figure]
    arms: dict[str, Scale]  # by full name, as mini.horizon.k4

    @property
    def blocks(self) -> dict[str, Scale]:
        """Scales and arms, by their full names."""
        return self.scales | self.arms

    def arms_of(self, scale: str, figure: str) -> dict[str, Scale]:
        """The arms of a figure at a scale, by their short names."""
        return {name: self.arms[f"{scale}.{figure}.{name}"] for name in self.scales[scale].arms.get(figure, {})}

    def seeds_of(self, figure: str, scale: str) -> list[int]:
        return self.seeds.get(f"{scale}.{figure}", self.seeds.get(figure, self.seeds["default"]))

    def graph_seeds(self, scale: str) -> list[int]:
        """Seeds of the scale's own runs: those of the figures that show more of them than human/more has."""
        return sorted({seed for name, row in self.figures.items() if row.reads and MORE not in row.reads
                       for seed in self.seeds_of(name, scale)})

    def more_seeds(self, scale: str) -> list[int]:
        """Seeds of Figs 3 and 7 beyond those: each is one process (stage arm)."""
        shown = {seed for name, row in self.figures.items() if MORE in row.reads for seed in self.seeds_of(name, scale)}
        return sorted(shown - set(self.graph_seeds(scale)))


def load(path: Path = PARAMS) -> Params:
    """Read and check params.yaml, and figures.yaml beside it.

    Raises:
        UserError: one line with the file, the key, what was expected and the nearest valid key.
    """
    raw, figures = _read(path), load_figures(Path(path).with_name(FIGURES.name))
    scales, arms = {}, {}
    for name, block in raw.items():
        if name == "seeds":
            continue
        scales[name] = _scale(path, name, block)
        for figure, arm, key in _arms(path, name, scales[name], figures):
            arms[key] = _expand(path, raw[name], scales[name], figure, arm, key, figures)
        for figure, arm, key in _arms(path, name, scales[name], figures):
            of = figures[figure].sft
            start, whose = (scales[name], name) if of == "shared" else (arms.get(f"{name}.{of}.{arm}"), f"{of}.{arm}")
            if of != "own" and (start is None or arms[key].made_from() != start.made_from()):
                raise UserError(f"{path}: {name}.arms.{figure}.{arm}: differs from {whose} in what SFT is made from; "
                                "expected the same source, model, base, sft and data")
    return Params(_seeds(path, raw.get("seeds"), figures, list(scales)), scales, figures, arms)


def load_scale(name: str, path: Path = PARAMS) -> Scale:
    """The checked block of one scale, or of an arm of one, as mini.horizon.k4."""
    raw = _read(path)
    scale, _, rest = name.partition(".")
    if scale not in raw or scale == "seeds":
        raise UserError(f"{path}: no block named {name!r}{nearest(name, set(raw) - {'seeds'})}")
    if not rest:
        return _scale(path, name, raw[name])
    figures = load_figures(Path(path).with_name(FIGURES.name))
    whole = _scale(path, scale, raw[scale])
    known = {key: (figure, arm) for figure, arm, key in _arms(path, scale, whole, figures)}
    if name not in known:
        raise UserError(f"{path}: {scale}.arms: no arm named {rest!r}{nearest(name, known)}")
    return _expand(path, raw[scale], whole, *known[name], name, figures)


def is_name(name: object) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _read(path: Path) -> dict:
    """params.yaml as it stands, with names that no shell, folder or key of DVC takes amiss."""
    raw = strict.read(path, "the keys seeds and one block per scale")
    if "seeds" not in raw:
        close = difflib.get_close_matches("seeds", map(str, raw), n=1)
        said = f"{close[0]}: unknown key; did you mean 'seeds'?" if close else "seeds: missing"
        raise UserError(f"{path}: {said}")
    for name, block in raw.items():
        if name == "seeds":
            continue
        if not is_name(name):
            raise UserError(f"{path}: {name!r}: expected a block name of letters, digits, _ and -, a letter first")
        if not isinstance(block, dict):
            raise UserError(f"{path}: {name}: unknown key{nearest(name, ['seeds'])}")
        if name in Active.model_fields:  # DVC reads both files' keys beside each other
            raise UserError(f"{path}: {name}: a key of active.yaml cannot name a scale")
    return raw


def load_figures(path: Path = FIGURES) -> dict[str, Figure]:
    """Read and check figures.yaml.

    Raises:
        UserError: as `load`.
    """
    figures = {}
    for name, row in strict.read(path, "a row for every figure").items():
        if not is_name(name):
            raise UserError(f"{path}: {name!r}: expected a name of letters, digits, _ and -, a letter first")
        figures[name] = figure = strict.check(Figure, row, str(path), name)
        if not (MODULES / f"{figure.module}.py").exists():
            known = sorted(file.stem for file in MODULES.glob("[a-z]*.py"))
            raise UserError(f"{path}: {name}.module: no module {figure.module!r}{nearest(figure.module, known)}")
    for name, figure in figures.items():
        if figure.sft not in (None, "shared", "own"):
            known = ["shared", "own", *(it for it in figures if figures[it].sft == "own")]
            if figure.sft not in known:
                raise UserError(f"{path}: {name}.sft: expected shared, own or a figure whose arms have their own, got "
                                f"{figure.sft!r}{nearest(figure.sft, known)}")
        for other in figure.borrows:
            if other not in figures or not figures[other].sft:
                known = [it for it in figures if figures[it].sft]
                raise UserError(f"{path}: {name}.borrows: no figure with arms {other!r}{nearest(other, known)}")
    return figures


def _scale(path: Path, name: str, block: dict) -> Scale:
    for key, why in (("policies", "trains all of them"), ("rounds", "has one"), ("sizes", "has one")):
        if key in block:
            raise UserError(f"{path}: {name}.{key}: unknown key; an arm has {key}, a scale {why}")
    recipe = block.get("dpo")
    if isinstance(recipe, dict) and recipe.get("online_loss", "dpo") != "dpo":
        raise UserError(f"{path}: {name}.dpo.online_loss: expected dpo; only an arm may have another")
    return strict.check(Scale, block, str(path), name)


def _seeds(path: Path, raw: Any, figures: dict[str, Figure], scales: list[str]) -> dict[str, list[int]]:
    """Seeds by `default`, by a figure, or by a figure at one scale, as mini.fig3."""
    if not isinstance(raw, dict) or "default" not in raw:
        raise UserError(f"{path}: seeds: expected a mapping with the key default, as {{default: [0, 1, 2]}}; got "
                        f"{strict.shown(raw)}")
    for name, seeds in raw.items():
        known = ["default", *figures, *(f"{scale}.{figure}" for scale in scales for figure in figures)]
        if name not in known:
            raise UserError(f"{path}: seeds.{name}: unknown key{nearest(name, known)}")
        try:
            SEEDS.validate_python(seeds)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("seeds", name, *first["loc"])))
            raise UserError(f"{path}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}, got "
                            f"{strict.shown(first['input'])}") from None
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{path}: seeds.{name}: expected distinct values, got {seeds}")
    return raw


def _arms(path: Path, name: str, scale: Scale, figures: dict[str, Figure]) -> Iterator[tuple[str, str, str]]:
    """Figure, short name and full name of every arm of a scale."""
    for figure, arms in scale.arms.items():
        if figure not in figures or not figures[figure].sft:
            known = [it for it in figures if figures[it].sft]
            raise UserError(f"{path}: {name}.arms.{figure}: no figure with arms{nearest(figure, known)}")
        for arm in arms:
            if not is_name(arm):
                raise UserError(f"{path}: {name}.arms.{figure}: {arm!r}: expected a name of letters, digits, _ and -, "
                                "a letter first")
            yield figure, arm, f"{name}.{figure}.{arm}"


def _expand(path: Path, block: dict, scale: Scale, figure: str, arm: str, name: str,
            figures: dict[str, Figure]) -> Scale:
    """The block of an arm, whose full name is given: its scale's, with what the arm changes."""
    key, policies = name.replace(".", ".arms.", 1), figures[figure].policies
    merged = merge({part: value for part, value in block.items() if part != "arms"}, block["arms"][figure][arm])
    expanded = strict.check(Scale, {"policies": policies, **merged}, str(path), key)
    if bool(expanded.sizes) != (figures[figure].module == "learnt"):
        raise UserError(f"{path}: {key}.sizes: " + ("an arm of this figure has none" if expanded.sizes else
                                                    "missing; numbers of pairs, each with epochs"))
    if expanded.model_dump() == scale.model_dump() | {"policies": policies, "arms": {}}:
        raise UserError(f"{path}: {key}: changes nothing")
    return expanded


def merge(block: dict, changes: dict) -> dict:
    """A block with changes: mappings go into each other, anything else takes the place of what was there.

    >>> merge({"dpo": {"lr": 1.0, "beta": 0.1}, "base": None}, {"dpo": {"beta": 0.2}})
    {'dpo': {'lr': 1.0, 'beta': 0.2}, 'base': None}
    """
    both = {key: merge(block[key], value) if isinstance(value, dict) and isinstance(block.get(key), dict) else value
            for key, value in changes.items()}
    return {**block, **both}

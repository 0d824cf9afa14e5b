"""active.yaml: which scale runs, and the lists of dvc.yaml that follow from it, as names and never numbers.

    python -m roads.active check                                  # that it follows from params.yaml and figures.yaml
    python -m roads.active set --scale real-cpu --data PATH       # write it

`make` writes it, and nobody else does; DVC reads it (`vars` in dvc.yaml).
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML

from roads import config, stage, strict
from roads.config import Active
from roads.sources import SUFFIXES
from roads.stage import UserError, main
from roads.strict import nearest

FILE = Path("active.yaml")
HEAD = "# What runs, as names, from params.yaml and figures.yaml: `make … SCALE= DATA=` writes it.\n"

# What the data of a scale are made from, by the kind of its source, unless DATA= says otherwise: the posts in this
# repository, or what to download. A world is made from nothing. The arms of a scale read the same.
DATA_FROM = {"posts": "data/tldr", "jsonl": "data/tldr_sample", "openai": "data/openai.json",
             "two_word": "data/openai.json", "preferences": "data/ultrafeedback.json"}


def follow(scale: str, data_from: str | None, params: config.Params) -> Active:
    """What of the graph a scale has: posts may come without preferences, and not every scale has arms."""
    cfg, table = params.scales[scale], params.figures
    tasks = ["human", "rouge"] if cfg.samples.human else ["rouge"]
    arms = {name: list(cfg.arms.get(name, {})) for name, row in table.items() if row.sft}

    def has(name: str, row: config.Figure) -> bool:
        own_arms = bool(arms[name]) if row.sft else all(arms[other] for other in row.borrows)
        return row.task in tasks and own_arms and (cfg.synthetic or not row.world)

    shown = [name for name, row in table.items() if has(name, row)]

    def named(seeds: Iterable[int]) -> list[str]:
        return [f"s{seed}" for seed in sorted(set(seeds))]

    def run_seeds(figures: list[str]) -> list[str]:
        return named(seed for name in figures for seed in params.seeds_of(name, scale))

    show_arms = {name: [other for other in shown if name == other or name in table[other].borrows] for name in arms}
    # An arm of Fig 9 may be a reward model alone, on the SFT checkpoint of its scale.
    rewards = [arm for arm in arms.get("fig9", []) if params.arms[f"{scale}.fig9.{arm}"].made_from() == cfg.made_from()]
    models = [arm for arm in arms.get("fig9", []) if arm not in rewards]
    own = {f"{name}.{arm}": params.arms[f"{scale}.{name}.{arm}"].synthetic for name in arms for arm in arms[name]
           if table[name].sft == "own" and not (name == "fig9" and arm in rewards)}
    more = params.more_seeds(scale) if "fig3" in shown else []
    return Active(
        scale=scale, data_from=data_from, tasks=tasks, figures={name: [scale] * (name in shown) for name in table},
        arms=arms, figure_seeds={name: run_seeds([name]) for name in table},
        run_seeds={"graph": named(params.graph_seeds(scale)), "more": named(more),
                   **{name: run_seeds(others) for name, others in show_arms.items()}},
        more=config.MORE if more else "sft", from_world=[scale] * cfg.synthetic,
        from_posts=[scale] * (not cfg.synthetic),
        arms_from_world=[name for name, synthetic in own.items() if synthetic],
        arms_from_posts=[name for name, synthetic in own.items() if not synthetic], arms_with_sft=list(own),
        sizes=[scale, *(f"{scale}.fig9.{arm}" for arm in models)], fig9_models=models, fig9_rewards=rewards)


def load(path: Path = config.PARAMS, params: config.Params | None = None) -> Active:
    """Read and check active.yaml beside params.yaml: that it follows from the other two files (`params`, where they are
    read already).

    Raises:
        UserError: it does not; `make` writes it.
    """
    params, place = params or config.load(path), Path(path).with_name(FILE.name)
    active = strict.check(Active, strict.read(place, "what is active"), str(place))
    if active.scale not in params.scales:
        raise UserError(f"{place}: scale: no block named {active.scale!r}{nearest(active.scale, params.scales)}")
    expected = follow(active.scale, active.data_from, params)
    for key in Active.model_fields:
        if getattr(active, key) != getattr(expected, key):
            raise UserError(f"{place}: {key}: expected {getattr(expected, key)} for scale {active.scale}, got "
                            f"{getattr(active, key)}; `python -m roads.active set` rewrites it")
    if params.scales[active.scale].synthetic != (active.data_from is None):
        wanted = "null" if active.data_from else "a folder of posts, or data/openai.json"
        raise UserError(f"{place}: data_from: expected {wanted} for scale {active.scale}, got {active.data_from!r}")
    return active


def scale_name(path: Path = config.PARAMS) -> str:
    """The name of the active scale, whatever else active.yaml says."""
    place = Path(path).with_name(FILE.name)
    name = strict.read(place, "what is active").get("scale")
    if not isinstance(name, str):
        raise UserError(f"{place}: scale: expected a name, got {name!r}")
    return name


def write(scale: str | None = None, data: str | None = None, path: Path = config.PARAMS) -> config.Params:
    """Write active.yaml for a scale, or for the one that it names; posts stay while the scale does.

    Raises:
        UserError: no such scale, a folder of posts for a scale that makes its own data, or no such folder.
    """
    params, place = config.load(path), Path(path).with_name(FILE.name)
    before = {}
    try:
        before = strict.read(place, "what is active") if scale is None or place.exists() else {}
    except UserError as error:
        if scale is None:
            raise UserError(f"{error}; `make FIGURE SCALE=mini`, or another scale, writes it") from None
        if not isinstance(error, strict.Malformed):  # with a scale it is written anew, whatever stood in it
            raise
    scale = scale or scale_name(path)
    if scale not in params.scales:
        raise UserError(f"{path}: no block named {scale!r}{nearest(scale, params.scales)}")
    cfg = params.scales[scale]
    if data is not None and cfg.synthetic:
        raise UserError(f"DATA={data}: scale {scale} makes its own data; use a scale of real posts")
    if data is not None:
        _check_data(Path(data), cfg.source.kind)
    if data is None and not cfg.synthetic:
        known = before.get("data_from") if before.get("scale") == scale else None
        data = known if isinstance(known, str) else DATA_FROM[cfg.source.kind]
    active = follow(scale, data, params)
    text = _text(active)
    if not place.exists() or place.read_text(encoding="utf-8") != text:
        with stage.writing(place) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return params


def _check_data(data: Path, kind: str) -> None:
    """Raises UserError where DATA is not what a scale's data are made from; what is in the files is for stage data."""
    if kind in ("openai", "two_word"):
        if not data.is_file():
            raise UserError(f"DATA={data}: not found; expected a file that says what to download, as data/openai.json "
                            "does")
        return
    if kind == "preferences":
        if data.is_dir() and any((data / f"train{suffix}").is_file() for suffix in SUFFIXES) or data.suffix == ".json":
            return
        raise UserError(f"DATA={data}: expected a folder with train.jsonl or train.parquet, or a file that names a "
                        "dataset of the hub, as data/ultrafeedback.json does")
    names = [f"{split}.jsonl{'.xz' if kind == 'posts' else ''}" for split in ("train", "valid", "test")]
    missing = [name for name in names if not (data / name).is_file()]
    if not data.is_dir():
        raise UserError(f"DATA={data}: not found; expected a folder with {', '.join(names)}")
    if missing:
        raise UserError(f"DATA={data}: no {missing[0]} in it; expected a folder with {', '.join(names)}")


def _text(active: Active) -> str:
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style, yaml.width = None, 118
    yaml.representer.add_representer(type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.dump(active.model_dump(), text)
    return f"{HEAD}{text.getvalue()}"


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="validate active.yaml, params.yaml and figures.yaml")
    setter = commands.add_parser("set", help="switch the active scale")
    setter.add_argument("--scale", help="a block of params.yaml (default: the active one)")
    setter.add_argument("--data", help="folder with the rows, or a file that says what to download")
    args = parser.parse_args()
    if args.command == "set":
        write(args.scale, args.data)
    else:
        load()


if __name__ == "__main__":
    main(_command)

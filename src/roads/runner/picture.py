"""What figures.yaml asks of dvc.yaml (wiring.py), and a drawing of dvc.yaml, docs/graph.md: `make graph`.

A box for each entry that is written by hand, whatever it is repeated over; an arrow where one reads what another
writes, as DVC finds at the scales that have them all. What is written from figures.yaml is two boxes, arms and figures.
"""

import argparse
import re
from pathlib import Path

from ruamel.yaml import YAML

from roads import config, stage
from roads.runner import plan, wiring
from roads.stage import main

OUT = Path("docs/graph.md")
SCALES = "mini", "real", "paper"
KINDS = {  # what an entry does -> the modules that do it, and the box's fill and line
    "data": (("data",), "#ededed", "#8a8a8a"), "training": (("base", "sft", "reward", "dpo"), "#dde7f1", "#4878a8"),
    "sampling": (("sample", "rank"), "#dbeeef", "#3f9aa0"),
    "evaluation": (("evaluate", "likelihood", "value", "best_of_n", "kl"), "#e0eee3", "#5f9e6e"),
    "comparison": (("arm", "anatomy", "limits"), "#e9e2f2", "#8a6fae"), "figure": (("figures",), "#f9e4d3", "#d1762c"),
}  # fmt: skip
TEXT = """# The graph

Written by `make graph` from [dvc.yaml](../dvc.yaml). A box is an entry there; below its name, what it is repeated over.
*arms* stands for the entries of the figures that have arms of their own, a seed of the whole comparison each, and
*figures* for all figures. `make dag` prints every stage.

```mermaid
flowchart TD
{lines}
```
"""


def shown(entry: str, figures: dict[str, config.Figure]) -> str:
    """The box of an entry."""
    return "figures" if entry in figures else "arms" if entry.removesuffix("_arms") in figures else entry


def boxes(figures: dict[str, config.Figure]) -> dict[str, tuple[str, str]]:
    """Box -> what it is repeated over beside scales, and what it does; in the order of dvc.yaml."""
    found = {}
    for name, entry in YAML(typ="safe").load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        command = entry["cmd"] if isinstance(entry["cmd"], str) else entry["cmd"][0]
        module = re.search(r"-m roads\.(?:stages\.)?(\w+)", command)[1]
        kind = next((kind for kind, (modules, *_) in KINDS.items() if module in modules), "other")
        by = [key for key, values in entry.get("matrix", {}).items()
              if key != "scale" and not (isinstance(values, list) and len(values) == 1)]
        found.setdefault(shown(name, figures), (" × ".join(by), kind))
    return found


def arrows(figures: dict[str, config.Figure]) -> list[tuple[str, str]]:
    """Pairs of boxes: the second reads what the first writes."""
    found = set()
    for scale in SCALES:
        with plan.switched(scale, None) as (repo, *_):
            found |= {tuple(shown(plan.entry_of(stage.addressing), figures) for stage in edge)
                      for edge in repo.index.graph.edges}
    return sorted((written, reader) for reader, written in found if reader != written)


def draw() -> str:
    figures = config.load_figures()
    found = boxes(figures)
    lines = [f'  {name}["{name}{f"<br><small>{by}</small>" if by else ""}"]:::{kind}'
             for name, (by, kind) in found.items()]
    lines += [f"  {written} --> {reader}" for written, reader in arrows(figures)]
    lines += [f"  classDef {kind} fill:{fill},stroke:{line},color:#1c1c1c" for kind, (_, fill, line) in KINDS.items()]
    return TEXT.format(lines="\n".join(lines))


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    wiring.write()
    with stage.writing(OUT) as scratch:
        scratch.write_text(draw(), encoding="utf-8")
    print(f"figures.yaml -> {wiring.DVC}, {OUT}")


if __name__ == "__main__":
    main(command)

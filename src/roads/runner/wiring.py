"""The entries of dvc.yaml that follow from figures.yaml: the figures', and their arms'. `make graph` writes them.

They stand below a line that says so. In every entry, written by hand or not, the list of modules is computed from what
its command imports. DVC is told of a figure: the folders whose runs it shows, the arms and seeds it reads, its row.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from roads import config, stage
from roads.config import Figure

DVC = Path("dvc.yaml")
LINE = "  # Written from figures.yaml by `make graph` from here on.\n"
SOURCES = Path(__file__).parents[2]
# They only carry: parameters, folders, arrays, files of a pinned revision, curves to look at, questions and answers.
CARRIERS = {"config", "schema", "sources", "judge_settings", "strict", "active", "stage", "arrays", "kept", "process",
            "hub", "tracking", "client", "endpoint", "batches", "ledger"}
# What arm.py reads of a block.
ARM_READS = ["compute", "source", "data", "reward", "dpo", "samples.human", "samples.online", "samples.evaluate",
             "samples.value", "judge"]
ARMS = "arms of {name}, one seed of the whole comparison each"


@cache
def _direct(module: Path) -> frozenset[Path]:
    """The modules of ours that a module imports, anywhere in it; not the carriers."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("roads"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("roads.")}
    paths = {SOURCES / f"{name.replace('.', '/')}.py" for name in names}
    return frozenset(path for path in paths if path.exists() and path.stem not in CARRIERS)


def modules(name: str) -> list[str]:
    """The files that a stage's module depends on: itself, what it imports, and so on; a judge's prompts with it."""
    found: set[Path] = set()
    todo = [SOURCES / f"{name.replace('.', '/')}.py"]
    while todo:
        if (here := todo.pop()) not in found:
            found.add(here)
            todo += _direct(here)
    files = {f"src/{path.relative_to(SOURCES).as_posix()}" for path in found}
    return sorted(files | ({"src/roads/judge/prompts"} if "src/roads/judge/protocol.py" in files else set()))


def wrapped(key: str, words: list[str], joint: str = ", ", ends: str = "[]") -> str:
    """A key with a list, in lines of at most 120 characters."""
    start = f"    {key}: {ends[:1]}"
    lines, line = [], start
    for k, word in enumerate(words):
        word += (joint.rstrip() if k < len(words) - 1 else ends[1:])
        if len(line) + 1 + len(word) > 120:
            lines, line = [*lines, line.rstrip()], " " * len(start) if ends else "      "
        line += ("" if line.isspace() or line == start else " ") + word
    return "\n".join([*lines, line]) + "\n"


def arms_entry(name: str, figure: Figure) -> str:
    """One seed of the whole comparison for each arm of a figure, from whichever SFT checkpoint it has."""
    block = f"${{item.scale}}.{name}.${{item.arm}}"
    home = {"shared": "${item.scale}", "own": block}.get(figure.sft, f"${{item.scale}}.{figure.sft}.${{item.arm}}")
    out = f"runs/${{item.scale}}/{name}/${{item.arm}}/${{item.seed}}"
    command = (f"python -m roads.stages.arm runs/{home}/data runs/{home}/sft {out} --scale {block} "
               "--seed ${item.seed}").split(" ") + ["--folders"] * figure.folders
    command += ["--task", figure.task] * (figure.task != "human")
    blocks = [block.replace("human", figure.task) for block in ARM_READS]
    blocks += [*["local"] * figure.folders, f"arms.{name}.${{item.arm}}"]
    params = [f'"${{item.scale}}.{block}"' for block in blocks] + [f"figures.yaml: [{name}.policies]"]
    return (f"  {name}_arms:\n    desc: {ARMS.format(name=name)}\n"
            f'    matrix: {{scale: ["${{scale}}"], arm: "${{arms.{name}}}", seed: "${{run_seeds.{name}}}"}}\n'
            + wrapped("cmd", command, " ", "")
            + wrapped("deps", [f'"runs/{home}/data"', f'"runs/{home}/sft"', *modules("roads.stages.arm")])
            + wrapped("params", params) + f'    outs: ["{out}"]\n')


def figure_entry(name: str, figure: Figure) -> str:
    """A figure: which runs it shows, by folder, and which of their arms and seeds."""
    shown = [*figure.borrows, *[name] * bool(figure.sft)]
    reads = ["${more}" if folder == config.MORE else folder for folder in figure.reads]
    folders = [f'"runs/${{item.scale}}/{folder}"' for folder in [*reads, *shown]]
    params = [*(f'"${{item.scale}}.arms.{other}"' for other in shown), f"figures.yaml: [{name}]",
              f"active.yaml: [figure_seeds.{name}]"]
    command = (f"python -m roads.figures.{figure.module} runs reports/${{item.scale}} --scale ${{item.scale}} "
               f"--figure {name}").split(" ")
    title = json.dumps(figure.title, ensure_ascii=False)
    return (f"  {name}:\n    desc: {title}\n" f'    matrix: {{scale: "${{figures.{name}}}"}}\n'
            + wrapped("cmd", command, " ", "")
            + wrapped("deps", [*folders, "data/paper_numbers.json", *modules(f"roads.figures.{figure.module}")])
            + wrapped("params", params)
            + "    outs:\n" + "".join(f"      - reports/${{item.scale}}/{name}.{kind}: {{cache: false}}\n"
                                      for kind in ("png", "csv", "json")))


def entries(figures: dict[str, Figure]) -> str:
    """Everything below LINE."""
    arms = [arms_entry(name, row) for name, row in figures.items() if row.sft and row.policies]
    return LINE + "\n".join([*arms, *(figure_entry(name, row) for name, row in figures.items())])


def with_modules(entry: str) -> str:
    """An entry of dvc.yaml with the modules that its commands import, in place of those that it lists."""
    def listed(found: re.Match) -> str:
        others = [item for item in re.split(r",\s+", found[1]) if not item.startswith("src/")]
        wanted = {path for name in re.findall(r"python -m (\S+)", entry) for path in modules(name)}
        return wrapped("deps", [*others, *sorted(wanted)])

    return re.sub(r"^    deps: \[(.*?)\]\n", listed, entry, flags=re.M | re.S)


def write(path: Path = DVC) -> None:
    """dvc.yaml with the entries that figures.yaml asks for; of what stands above the line, the lists of modules."""
    above = path.read_text(encoding="utf-8").partition(LINE)[0].rstrip("\n") + "\n\n"
    above = "".join(map(with_modules, re.split(r"^(?=  \w+:\n)", above, flags=re.M)))
    text = above + entries(config.load_figures(path.with_name("figures.yaml")))
    try:
        YAML(typ="safe").load(text)
    except YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise stage.UserError(f"{path}: not written, as DVC could not read it: {reason}; a row of figures.yaml has the "
                              "name of another entry, or a title of several lines") from None
    with stage.writing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")

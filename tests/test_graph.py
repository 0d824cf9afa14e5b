"""docs/graph.md draws dvc.yaml, whole; and dvc.yaml is written from figures.yaml whole or not at all."""

import re
import subprocess
import sys

import pytest
from conftest import ENV, ROOT
from ruamel.yaml import YAML

from roads import config
from roads.runner import plan, wiring
from roads.stage import UserError

DRAWN = (ROOT / "docs/graph.md").read_text(encoding="utf-8")
BOXES = re.findall(r'^  (\w+)\["(\w+)[^"]*"\]:::\w+$', DRAWN, re.M)
ARROWS = set(re.findall(r"^  (\w+) --> (\w+)$", DRAWN, re.M))
FIGURES = config.load_figures(ROOT / "figures.yaml")


def box(stage: str) -> str:
    entry = plan.entry_of(stage)
    arms = any(entry == f"{name}_arms" for name in FIGURES)
    return "figures" if entry in FIGURES else "arms" if arms else entry


def test_make_graph_gives_these_bytes():
    script = "from roads.runner import picture; print(picture.draw(), end='')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV | {"PYTHONHASHSEED": "7"},
                          capture_output=True, text=True)
    assert done.stdout == DRAWN, f"`make graph` draws it again\n{done.stderr}"


def test_every_entry_has_its_box():
    entries = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert [name for name, _ in BOXES] == list(dict.fromkeys(map(box, entries)))
    assert all(name == said for name, said in BOXES) and len(BOXES) > 45
    assert 'sft["sft"]:::training' in DRAWN and 'pairs["pairs<br><small>task × split</small>"]:::sampling' in DRAWN


@pytest.mark.parametrize("scale", ["mini", "real"])
def test_every_dependency_has_its_arrow(monkeypatch, scale):
    monkeypatch.chdir(ROOT)
    expected = set()
    with plan.switched(scale, None) as (repo, *_):
        outs = [(out.def_path, stage.addressing) for stage in repo.index.stages for out in stage.outs]
        for stage in repo.index.stages:
            for dep in {dep.def_path for dep in stage.deps if dep.def_path.startswith(("runs", "reports"))}:
                expected |= {(box(name), box(stage.addressing)) for out, name in outs
                             if f"{out}/".startswith(f"{dep}/") or f"{dep}/".startswith(f"{out}/")}
    assert {edge for edge in expected if edge[0] != edge[1]} <= ARROWS
    assert {"mini": ("world_data", "sft"), "real": ("judge_reports", "judges")}[scale] in expected
    assert all(end in dict(BOXES) for edge in ARROWS for end in edge)


@pytest.mark.parametrize("name, title, told", [("mine", 'The \\"gap\\" against noise: é', None),
                                               ("dpo", "Mine", "not written, as DVC could not read it: ")])
def test_a_row_of_figures_yaml_is_written_whole_or_not_at_all(tmp_path, name, title, told):
    for file in ("dvc.yaml", "figures.yaml", "params.yaml"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    row = f'{name}:\n  title: "{title}"\n  module: policies\n  task: human\n  reads: [human/scores]\n'
    with (tmp_path / "figures.yaml").open("a", encoding="utf-8") as file:
        file.write(row)
    if told:
        with pytest.raises(UserError, match=told):
            wiring.write(tmp_path / "dvc.yaml")
        assert (tmp_path / "dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    else:
        wiring.write(tmp_path / "dvc.yaml")
        stages = YAML(typ="safe").load((tmp_path / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        assert stages[name]["desc"] == 'The "gap" against noise: é'

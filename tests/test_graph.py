"""docs/graph.svg is the picture of dvc.yaml, whole and readable."""

import re
import subprocess
import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest
from conftest import ENV, ROOT
from ruamel.yaml import YAML

from roads.runner import plan, wiring
from roads.stage import UserError

SVG = "{http://www.w3.org/2000/svg}"
PICTURE = (ROOT / "docs/graph.svg").read_text(encoding="utf-8")
TREE = ElementTree.fromstring(PICTURE)
ENTRIES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
ARROWS = {(path.get("data-from"), path.get("data-to")): path.get("d") for path in TREE.iter(f"{SVG}path")
          if path.get("data-from")}


def boxes() -> dict[str, tuple[float, ...]]:
    """Entry -> left, top, right, bottom."""
    found = {}
    for group in TREE.iter(f"{SVG}g"):
        if entry := group.get("data-entry"):
            x, y, width, height = (float(group.find(f"{SVG}rect").get(key)) for key in ("x", "y", "width", "height"))
            found[entry] = x, y, x + width, y + height
    return found


def test_make_graph_gives_these_bytes():
    script = "from roads.runner import picture; print(picture.draw(picture.read()), end='')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV | {"PYTHONHASHSEED": "7"},
                          capture_output=True, text=True)
    assert done.stdout == PICTURE, f"`make graph` draws it anew\n{done.stderr}"


def test_every_entry_has_its_box_and_says_what_it_is():
    groups = {group.get("data-entry"): group for group in TREE.iter(f"{SVG}g") if group.get("data-entry")}
    assert set(groups) == set(ENTRIES)
    for entry, group in groups.items():
        assert group.find(f"{SVG}text").text == entry
        assert group.find(f"{SVG}title").text.startswith(f"{entry}: {ENTRIES[entry].get('desc', '')}")


def test_every_dependency_has_its_arrow(monkeypatch):
    monkeypatch.chdir(ROOT)
    expected = set()
    with plan.switched("mini", None) as (repo, *_):
        outs = [(out.def_path, stage.addressing) for stage in repo.index.stages for out in stage.outs]
        for stage in repo.index.stages:
            for dep in {dep.def_path for dep in stage.deps if dep.def_path.startswith(("runs", "reports"))}:
                expected |= {(plan.entry_of(name), plan.entry_of(stage.addressing)) for out, name in outs
                             if f"{out}/".startswith(f"{dep}/") or f"{dep}/".startswith(f"{out}/")}
    assert set(ARROWS) == expected and ("world_data", "sft") in ARROWS


def test_arrows_go_down_from_box_to_box():
    place = boxes()
    for (written, reader), way in ARROWS.items():
        numbers = [float(number) for number in re.findall(r"[\d.]+", way)]
        (left, _, right, bottom), (left_to, top_to, right_to, _) = place[written], place[reader]
        assert left < numbers[0] < right and numbers[1] == bottom < numbers[-1] == top_to
        across = float(re.findall(r"([\d.]+) [\d.]+(?=[VC]|$)", way)[-1])  # where the last bend, or the start, is
        assert left_to < across < right_to, (written, reader)


def test_boxes_lie_apart_and_on_the_card():
    _, _, width, height = map(float, TREE.get("viewBox").split())
    for left, top, right, bottom in boxes().values():
        assert 0 < left < right < width and 0 < top < bottom < height
    for one, other in combinations(boxes().values(), 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    card = TREE.find(f"{SVG}rect")
    assert (card.get("width"), card.get("fill")) == (TREE.get("width"), "#ffffff")
    assert 900 <= width <= 1100  # of a README column


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

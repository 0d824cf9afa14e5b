"""docs/fidelity.md: every key that it names is one of scale paper, and every test is there."""

import re

from conftest import ROOT

from roads import config

PAGE = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in
        PAGE.partition("\n## ")[0].splitlines() if line.startswith("| ") and "---" not in line][1:]


def value(key: str) -> object:
    """What params.yaml has at a key of scale paper, or of the whole file."""
    params = config.load(ROOT / "params.yaml")
    here = {"seeds": params.seeds, **params.scales["paper"].model_dump()}
    for part in key.split("."):
        here = here[part]
    return here


def test_every_key_is_one_of_scale_paper():
    keys = [key for row in ROWS for key in re.findall(r"`([\w.-]+)`", row[2])]
    assert len(ROWS) > 30 and len(keys) > 35
    for key in keys:
        assert value(key) is not None, key
    switches = re.findall(r"`paper\.([\w.]+)", PAGE)
    assert len(switches) == 3 and all(value(key.rpartition(".")[0]) for key in switches)


def test_every_arm_is_there():
    named = set(re.findall(r"arm `(recipe\w*\.[\w-]+)`", PAGE)) | {"recipe_data.sft-query", "recipe.unclipped"}
    assert named | {"recipe.author-code"} == {f"{figure}.{arm}" for figure in ("recipe", "recipe_data") for arm in
                                              value("arms")[figure]}


def test_every_test_is_there():
    for row in ROWS:
        file, name = row[4].split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row[4]

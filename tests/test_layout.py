"""The folders tell the experiment: imports go one way, and examples in docstrings are true."""

import ast
import doctest
import importlib
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SRC = ROOT / "src"
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.glob("roads/**/*.py"))}
GROUND = {"config", "schema", "sources", "judge_settings", "strict", "active", "stage", "hub", "stats", "process"}
LAYERS = ["ground", "shared", "stages", "figures", "runner"]  # each may import what comes before it


def layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else "ground"
    folder = {"theory": "figures", "report": "runner"}.get(part, part)
    return LAYERS.index("ground" if part in GROUND else folder if folder in LAYERS else "shared")


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES) - {module}


IMPORTS = {module: imports(module) for module in MODULES}


def test_the_map_has_every_module():
    drawn = (ROOT / "docs/code.md").read_text(encoding="utf-8")
    modules = {path.relative_to(ROOT).as_posix() for path in MODULES.values() if not path.name.startswith("__")}
    assert len(modules) > 80 and {path for path in modules if f"(../{path})" not in drawn} == set()


def test_no_module_imports_upward():
    assert IMPORTS["roads.stages.dpo"] >= {"roads.train", "roads.model", "roads.config"}  # they are found at all
    upward = [(module, other) for module, others in IMPORTS.items() for other in others if layer(other) > layer(module)]
    assert upward == []


def test_imports_make_no_circle():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) >= len(MODULES)  # CycleError names the circle


def test_of_the_stages_only_whole_comparisons_call_others():
    callers = {module for module, others in IMPORTS.items() if module.startswith("roads.stages.")
               and any(other.startswith("roads.stages.") for other in others)}
    assert callers == {"roads.stages.arm", "roads.stages.anatomy"}


def test_a_module_is_read_in_one_go():
    assert [name for name, path in MODULES.items() if len(path.read_text(encoding="utf-8").splitlines()) > 320] == []


EXAMPLES = [module for module, path in MODULES.items() if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_are_true(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried and not failed

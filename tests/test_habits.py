"""What developers' tools are told: hooks and workflow call what there is."""

import re
import shlex
import subprocess

from conftest import ROOT
from ruamel.yaml import YAML

YAML_OF = YAML(typ="safe")


def test_hooks_call_what_there_is():
    (repo,) = YAML_OF.load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local" and len(repo["hooks"]) == 4
    for hook in repo["hooks"]:
        words = shlex.split(hook["entry"])
        module = words[words.index("-m") + 1]
        assert words[words.index("-m") - 1] == ".venv/bin/python" and hook["language"] == "system"
        if module.startswith("roads."):
            assert (ROOT / f"src/{module.replace('.', '/')}.py").exists() and "PYTHONPATH=src" in words
            assert any(re.search(hook["files"], name) for name in ("figures.yaml", "reports/mini/fig3.json"))
        else:
            assert f"-m {module}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_workflow_is_ci_itself_on_both_pythons():
    job = YAML_OF.load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"] and (ROOT / ".ci/run").exists()
    wanted = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.11,<3.13"' in wanted and job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    checkout = next(step for step in job["steps"] if "checkout" in step.get("uses", ""))
    assert checkout["with"]["fetch-depth"] == 0  # margins against results: the whole history


PHRASES = r"\b(goes on|that is there|lies in|makes? anew|(is|are|be) to be had)\b"


def test_no_phrase_of_the_list_is_left():
    """Words that a reader stumbles over; in what git has of code, pages and settings."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.splitlines()
    kinds = (".py", ".md", ".yaml", ".toml", ".sh", ".html", "Makefile", "Dockerfile", ".txt")
    read = [path for path in listed if path.endswith(kinds) and not path.startswith(("data/", "requirements/"))]
    assert len(read) > 100
    found = [f"{path}: {match[0]}" for path in read if path != "tests/test_habits.py"
             for match in re.finditer(PHRASES, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found

"""The paper's code path, whole and small: `make figures SCALE=rehearsal`, with one seed.

A checkpoint in the hub's layout, OpenAI's row schema, the judge over HTTP, and for Fig 7 training under `accelerate
launch` in two processes.
"""

import json
import re

import numpy as np
import pytest
from conftest import clone, make, run
from fake_openai import Fake
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow  # starts stages, or DVC, many times

FIGURES = [f"fig{n}" for n in range(3, 13)]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    where = clone(tmp_path_factory.mktemp("rehearsal"))
    log = make(where, "fig7", "SCALE=rehearsal", "LAUNCH=2-cpu")
    return where, log + make(where, "figures", "SCALE=rehearsal")


@pytest.mark.slow
def test_it_draws_every_figure_of_the_paper(rehearsed):
    where, log = rehearsed
    for figure in FIGURES:
        content = json.loads((where / f"reports/rehearsal/{figure}.json").read_text(encoding="utf-8"))
        assert content["note"] == "real posts, scale rehearsal" and content["provenance"]["params"]
        assert (where / f"reports/rehearsal/{figure}.png").stat().st_size > 10_000
        assert all(bar["n"] >= 8 for bar in content["bars"]), figure
    assert "Up to date" in make(where, "figures", "SCALE=rehearsal")


@pytest.mark.slow
def test_training_was_launched_in_two_processes(rehearsed):
    """And its results are those of stages that DVC then takes as done, whatever LAUNCH says."""
    where, log = rehearsed
    launched = re.findall(r"^start (sft|reward|local|dpo)@rehearsal(?:-human-s0)?$", log, re.M)
    assert {"sft", "reward", "local", "dpo"} <= set(launched) and len(launched) == len(set(launched))
    lock = YAML(typ="safe").load((where / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert all("accelerate" not in stage["cmd"] for stage in lock.values())


@pytest.mark.slow
def test_the_pairs_are_peoples_and_the_judges(rehearsed):
    """Fig 3's pairs come with the rows, preferred first; Fig 10's from the judge, who prefers the longer summary."""
    where, _ = rehearsed
    rows = np.load(where / "runs/rehearsal/data/preferences.npz")
    pairs = np.load(where / "runs/rehearsal/human/pairs/preferences/pairs.npz")
    assert all((pairs[name] == rows[name]).all() for name in ("query", "chosen", "rejected"))
    two = np.load(where / "runs/rehearsal.fig10.two-word/data/preferences.npz")
    assert two["chosen"].shape[1] == 5 and len(two["chosen"]) > 20
    assert not (two["chosen"] == two["rejected"]).all(1).any()


@pytest.mark.slow
def test_no_answer_is_paid_twice(rehearsed):
    """All that a scored file needs is in the cache: scoring it again asks the server nothing."""
    where, _ = rehearsed
    status = run(where, "roads.judge", "status")
    answers = int(re.search(r"gpt-4o-2024-08-06: \$[\d.]+, ([\d,]+) answers", status)[1].replace(",", ""))
    assert answers > 300 and "0 answers under way, 0 lost" in status
    completions, data = "runs/rehearsal/human/completions/dpo/s0", "runs/rehearsal/data"
    found = run(where, "roads.judge", "estimate", completions, data, "--scale", "rehearsal")
    assert "0 are not in the cache and cost $0.00 at most" in found
    with Fake() as server:
        env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k"}
        run(where, "roads.stages.evaluate", completions, data, "runs/again", "--scale", "rehearsal", "--task", "human",
            env=env)
        assert not server.asked
    again, before = (np.load(where / folder / "scores.npz")
                     for folder in ("runs/again", "runs/rehearsal/human/scores/dpo/s0"))
    assert all((again[name] == before[name]).all() for name in before)


@pytest.mark.slow
def test_without_its_judge_it_says_so_before_it_runs(rehearsed):
    where, _ = rehearsed
    module = where / "src/roads/stages/evaluate.py"
    before = module.read_text(encoding="utf-8")
    module.write_text(before + "\n", encoding="utf-8")
    done = run(where, "roads.runner.repro", "fig3", code=2, env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    module.write_text(before, encoding="utf-8")
    assert done.count("\n") == 1 and "127.0.0.1:9: the judge does not answer" in done

"""The graph as a user runs it, on the scale `tiny` and on the posts in the repository.

One checkout runs every figure. A second one is killed in the middle, run again, and must end with the same bits.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ENV, FIGURES, ROOT, clone, edit, make, run
from ruamel.yaml import YAML


@pytest.fixture
def scratchpad(checkout):
    """The checkout; params.yaml and the sources are put back after the test."""
    before = {path: path.read_bytes() for path in [checkout / "params.yaml", *checkout.glob("src/roads/**/*.py")]}
    yield checkout
    for path, content in before.items():
        path.write_bytes(content)


# What a run leaves


ALL = ["SFT", "DPO", "DPO 2x", "Online(SFT)", "Online(DPO)"]


@pytest.mark.parametrize("figure, bars", [
    ("fig3", ALL), ("fig7", ["Global RM", "Local RM", "DPO RM"]), ("fig11", ALL),
    ("fig12", ["DPO n=60", "Online(SFT) n=60", "DPO n=120", "Online(SFT) n=120"]),
])  # fmt: skip
def test_a_figure_is_png_csv_and_json(checkout, figure, bars):
    reports = checkout / "reports/tiny"
    content = json.loads((reports / f"{figure}.json").read_text(encoding="utf-8"))
    assert [bar["bar"] for bar in content["bars"]] == bars and content["seeds"] == [0]
    assert content["note"] == "synthetic world: evidence about the mechanism, not about TL;DR"
    assert all(bar["low"] <= bar["mean"] <= bar["high"] and bar["n"] > 50 for bar in content["bars"])
    assert content["provenance"]["files"].keys() == {path for bar in content["bars"] for path in bar["scores"]}
    assert content["provenance"]["params"]["tiny.base"]["lr"] == 3e-3 and content["provenance"]["lock"]
    for path, digest in content["provenance"]["files"].items():
        assert hashlib.sha256((checkout / path).read_bytes()).hexdigest() == digest
    rows = list(csv.DictReader((reports / f"{figure}.csv").open(encoding="utf-8")))
    assert [row["bar"] for row in rows if row["seed"] == "all"] == bars
    assert (reports / f"{figure}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_every_stage_says_what_it_read_and_wrote_and_what_it_used(checkout):
    log = (checkout / "log").read_text(encoding="utf-8")
    folders = {path.parent for path in checkout.glob("runs/tiny/**/params.json")}
    assert len(folders) == len(set(re.findall(r"^start (?!fig\d+@)(\S+)$", log, re.M))) > 30
    for folder in folders:
        name = folder.relative_to(checkout).as_posix()
        assert re.search(rf"-> {name} \([\d.]+ MiB\) in [\d.]+ s", log), name
        assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    used = json.loads((checkout / "runs/tiny/human/dpo_2x/s0/params.json").read_text(encoding="utf-8"))
    assert used["dpo"]["epochs"] == 2 and used["seed"] == 0 and used["temperature"] == 1.0
    assert "dpo s0" in log and "loss=" in log  # progress with the loss


def test_dpo_starts_at_ln_2_on_every_kind_of_pairs(checkout):
    for kind in ("dpo", "online"):
        metrics = json.loads((checkout / f"runs/tiny/rouge/{kind}/s0/metrics.json").read_text(encoding="utf-8"))
        assert metrics["loss"]["first"] == pytest.approx(0.693147, abs=1e-4)  # its first tenth is step 0


# What runs again


STATUS = """
import sys
import networkx
from dvc.repo import Repo
from roads.runner import dvc_patches

with Repo() as repo, repo.lock, dvc_patches.params_read_once():
    graph = repo.index.graph
    targets = {stage for stage in graph if stage.addressing in sys.argv[1:]}
    wanted = targets.union(*(networkx.descendants(graph, stage) for stage in targets))
    print(*(stage.addressing for stage in wanted if stage.status()), sep="\\n")
"""


def stale(where: Path) -> set[str]:
    """What DVC finds changed, as `dvc status --with-deps` does, which takes five times as long: it reads dvc.lock anew
    for each target."""
    return set(run(where, "-c", STATUS, *FIGURES).split())


def test_nothing_runs_twice(scratchpad):
    assert stale(scratchpad) == set()
    start = time.monotonic()
    assert "Up to date: fig11@tiny" in make(scratchpad, "fig11")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("old, new, file, expected", [
    ("dpo: &tiny-dpo {lr: 3.0e-4, schedule: linear, batch_size: 32, epochs: 1, beta: 0.1,",
     "dpo: &tiny-dpo {lr: 3.0e-4, schedule: linear, batch_size: 32, epochs: 1, beta: 0.3,", "params.yaml",
     ["dpo", "dpo_2x", "online", "online_sft", "likelihood@human-dpo-0", "fig12_arms"]),
    ("seeds: [0]", "seeds: [0, 1]", "params.yaml",
     ["fig3", "fig7", "fig11", "fig12", "reward@1", "local@human-1", "dpo@1", "dpo_2x@1", "online_candidates@1",
      "online_pairs@1", "online@1", "online_sft_pairs@1", "online_sft@1", "completions@1", "scores@1",
      "likelihood@human-1", "fig12_arms@1"]),
    ("preferences: 60, online: 60", "preferences: 60, online: 50", "params.yaml", ["fig12_arms"]),
    ("    seed: 0\n    subreddits: 2", "    seed: 7\n    subreddits: 2", "params.yaml",
     ["data", "pairs", "scores_sft", "scores", "fig12_arms"]),
    ("Stage reward:", "Stage reward, edited:", "src/roads/stages/reward.py", ["reward", "fig12_arms"]),
    ("Stage arm:", "Stage arm, edited:", "src/roads/stages/arm.py", ["fig12_arms"]),
    ("Fig. 7:", "Figure 7:", "src/roads/figures/likelihood.py", ["fig7"]),
])  # fmt: skip
def test_a_change_reruns_what_depends_on_it(scratchpad, old, new, file, expected):
    """expected: stages by name, or name@parts where each part is one of the words after the @ of the full name."""
    edit(scratchpad, old, new, file)
    found = stale(scratchpad)
    assert found

    def matches(full: str, pattern: str) -> bool:
        name, *parts = pattern.split("@")
        words = full.split("@")[1].split("-")
        return full.split("@")[0] == name and all(part in words for part in "-".join(parts).split("-") if part)

    missed = [pattern for pattern in expected if not any(matches(full, pattern) for full in found)]
    surplus = [full for full in found if not any(matches(full, pattern) for pattern in expected)]
    assert not missed and not surplus


def test_repro_runs_just_that(scratchpad):
    edit(scratchpad, "batch_size: 32, epochs: 1, beta: 0.5,", "batch_size: 32, epochs: 1, beta: 0.4,")
    log = run(scratchpad, "roads.runner.repro", *FIGURES)
    started = set(re.findall(r"^start (\S+)$", log, re.M))
    assert started == {"local@tiny-human-0", "likelihood@tiny-human-local-0", "fig7@tiny"}
    edit(scratchpad, "batch_size: 32, epochs: 1, beta: 0.4,", "batch_size: 32, epochs: 1, beta: 0.5,")
    run(scratchpad, "dvc", "repro", "-q", "fig7@tiny")  # and back, by DVC alone, from its run cache
    assert stale(scratchpad) == set()


# Of parameters, folders, files, answers: no number is made there.
CARRIERS = {"config", "stage", "hub", "client", "endpoint", "batches", "ledger", "process"}


@functools.cache
def direct_imports(module: Path) -> set[Path]:
    """The modules of roads that a module imports, anywhere in it; not the carriers."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("roads"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("roads.")]
        paths = [ROOT / "src" / f"{name.replace('.', '/')}.py" for name in names]
        found |= {path for path in paths if path.exists() and path.stem not in CARRIERS}
    return found


def imports(module: Path) -> set[Path]:
    """A module, those that it imports, and theirs."""
    found, todo = set(), [module]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += direct_imports(here)
    return found


ENTRIES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def unlike_imports(name: str, entry: dict) -> set[str]:
    """The modules that an entry of dvc.yaml lists and does not import, or the other way round."""
    commands = entry["cmd"] if isinstance(entry["cmd"], list) else [entry["cmd"]]
    modules = [re.match(r"python -m (\S+)", command)[1].replace(".", "/") for command in commands]
    expected = {path.relative_to(ROOT).as_posix() for module in modules
                for path in imports(ROOT / "src" / f"{module}.py")}
    expected |= {"src/roads/judge/prompts"} if "src/roads/judge/protocol.py" in expected else set()
    return {dep for dep in entry["deps"] if dep.startswith("src/")} ^ expected


@pytest.mark.parametrize("name", ENTRIES)
def test_every_stage_depends_on_the_modules_it_imports(name):
    """And no listed module can be taken out unseen."""
    entry = ENTRIES[name]
    assert unlike_imports(name, entry) == set()
    listed = [dep for dep in entry["deps"] if dep.startswith("src/")]
    assert listed
    for dep in listed:
        assert unlike_imports(name, entry | {"deps": [other for other in entry["deps"] if other != dep]}) == {dep}


def shows(entry: dict) -> set[str]:
    """The lists of params.yaml that a figure reads, by the folders whose runs it shows."""
    folders = [re.fullmatch(r"runs/\$\{item\.scale\}/(\w+)", dep) for dep in entry["deps"]]
    names = {folder[1] for folder in folders if folder}
    return {"seeds"} | {"sizes" if name == "fig9" else f"arms.{name}" for name in names}


FIGURE_ENTRIES = [name for name, entry in ENTRIES.items() if "roads.figures" in str(entry["cmd"])]


@pytest.mark.parametrize("name", FIGURE_ENTRIES)
def test_every_figure_depends_on_the_lists_of_what_it_shows(name):
    assert len(FIGURE_ENTRIES) == 18 and set(ENTRIES[name]["params"]) == shows(ENTRIES[name])


# Numbers that move nothing; where posts are, a dependency by itself; and what a dial's blocks say of themselves.
UNLISTED = {"machine", "spending", "data_from"}
# What an entry reads elsewhere: the judge writes Fig 10's data, ROUGE asks for no labels, not every arm samples online.
ELSEWHERE = {"data": {"judge"}, "pairs": {"samples.rouge"}, "budget_arms": {"samples.online"}}


@pytest.mark.slow
def test_every_stage_depends_on_the_parameters_it_reads_and_on_no_others(tmp_path):
    """All of them, but for figures, run at tiny and are watched."""
    where = clone(tmp_path / "watched")
    (where / ".dvc/tmp").mkdir()
    done = subprocess.run([sys.executable, ROOT / "tests/reads.py", "reads.json"], cwd=where, env=ENV, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads((where / "reads.json").read_text(encoding="utf-8"))
    assert len(stages) > 30 and {"dpo", "online_pairs", "fig12_arms"} <= set(stages)
    for name, entry in stages.items():
        assert unlike_reads(name, entry["read"], set(entry["listed"])) == set(), name
        for key in entry["listed"]:  # none can be taken out unseen
            assert key in unlike_reads(name, entry["read"], set(entry["listed"]) - {key}), f"{name}: {key}"


def unlike_reads(name: str, read: list[str], listed: set[str]) -> set[str]:
    """The parameters that an entry lists and does not read, or the other way round. `samples` is read on the way to
    `samples.online`."""
    wanted = set(read) - UNLISTED | ELSEWHERE.get(name, set())
    parents = {key.split(".")[0] for key in wanted if "." in key}
    return listed ^ (wanted - parents)


# What goes wrong


@pytest.mark.slow
def test_a_killed_training_goes_on_at_its_checkpoint(checkout, tmp_path):
    where = clone(tmp_path / "killed")
    edit(where, "batch_size: 64, epochs: 2}", "batch_size: 64, epochs: 20}")  # 640 steps, a checkpoint every 200
    data = str(checkout / "runs/tiny/data")
    run(where, "roads.stages.base", data, "whole", "--scale", "tiny")
    command = [sys.executable, "-m", "roads.stages.base", data, "killed", "--scale", "tiny"]
    process = subprocess.Popen(command, cwd=where, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(where.glob("runs/.scratch/*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (where / "killed").exists()
    assert re.search("base: goes on at step [246]00 of 640", run(where, *command[2:]))
    assert (where / "killed/model.safetensors").read_bytes() == (where / "whole/model.safetensors").read_bytes()
    assert (where / "killed/metrics.json").read_bytes() == (where / "whole/metrics.json").read_bytes()
    assert not list(where.glob("runs/.scratch/*"))


def test_bad_params_stop_before_anything_runs(scratchpad):
    edit(scratchpad, "karma_weight: 8.0", "karma_wait: 8.0")
    expected = "error: params.yaml: mini.source.karma_wait: unknown key; did you mean 'karma_weight'?\n"
    assert run(scratchpad, "roads.runner.repro", "fig11@tiny", code=2) == expected
    assert run(scratchpad, "roads.stages.data", "src/roads/world.py", "out", "--scale", "tiny", code=2) == expected
    assert expected in make(scratchpad, "fig11", code=2) and not (scratchpad / "out").exists()


@pytest.mark.parametrize("line, message", [
    (b'{"id": "x"}', "train.jsonl:3: no field 'subreddit'"),
    (b"not json", "train.jsonl:3: not JSON"),
    (b'{"id": "caf\xe9"}', "train.jsonl:3: not UTF-8"),
])  # fmt: skip
def test_a_bad_row_leaves_nothing_half_written(scratchpad, tmp_path, line, message):
    shutil.copytree(ROOT / "data/tldr_sample", tmp_path / "posts")
    rows = (tmp_path / "posts/train.jsonl").read_bytes().split(b"\n")
    (tmp_path / "posts/train.jsonl").write_bytes(b"\n".join([*rows[:2], line, *rows[2:]]))
    posts, out = str(tmp_path / "posts"), str(tmp_path / "out/data")
    said = run(scratchpad, "roads.stages.data", posts, out, "--scale", "real-cpu", code=2)
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_cell_of_a_figure_is_named(checkout, tmp_path):
    shutil.copytree(checkout / "runs/tiny/rouge/scores", tmp_path / "tiny/rouge/scores")
    (tmp_path / "tiny/rouge/scores/online/s0/scores.npz").unlink()
    said = run(checkout, "roads.figures.policies", str(tmp_path), str(tmp_path / "reports"), "--scale", "tiny",
               "--figure", "fig11", code=2)
    assert "scores/online/s0/scores.npz: not found; `make fig11` makes it" in said
    assert not (tmp_path / "reports").exists()


def test_a_cell_gives_the_very_scores_of_the_graph(checkout, tmp_path):
    out = tmp_path / "cell"
    run(checkout, "roads.stages.arm", "runs/tiny/data", "runs/tiny/sft", str(out), "--scale", "tiny", "--seed", "0")
    found, metrics = np.load(out / "scores.npz"), json.loads((out / "metrics.json").read_text())
    for policy in ("sft", "dpo", "dpo_2x", "online_sft", "online"):
        place = checkout / "runs/tiny/human/scores" / policy / ("" if policy == "sft" else "s0")
        assert (found[policy] == np.load(place / "scores.npz")["score"]).all(), policy
    graph = json.loads((checkout / "runs/tiny/human/likelihood/dpo/s0/metrics.json").read_text())
    assert metrics["dpo_rm"]["accuracy"] == graph["accuracy"]
    assert not list(checkout.glob("runs/.scratch/*"))


@pytest.mark.slow
def test_a_killed_cell_takes_up_what_it_had_finished(checkout, tmp_path):
    where = clone(tmp_path / "killed")
    data, sft = (str(checkout / f"runs/tiny/{name}") for name in ("data", "sft"))
    command = [sys.executable, "-m", "roads.stages.arm", data, sft, "out", "--scale", "tiny", "--seed", "0"]
    process = subprocess.Popen(command, cwd=where, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(where.glob("runs/.scratch/*/dpo")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    reward = next(where.glob("runs/.scratch/*/reward/model.safetensors"))
    before = reward.stat().st_mtime_ns
    assert not (where / "out").exists()
    (reward.parent.parent / "dpo/model.safetensors").stat()  # done, so not done again
    again = subprocess.Popen(command, cwd=where, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while again.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it is deleted in the end
            assert reward.stat().st_mtime_ns == before
        time.sleep(0.005)
    assert again.returncode == 0 and not list(where.glob("runs/.scratch/*"))
    run(checkout, *command[2:4], sft, str(tmp_path / "whole"), *command[6:])
    for name in ("scores.npz", "metrics.json", "params.json"):
        assert (where / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_full_disk_is_one_line(checkout, tmp_path):
    """A real one: a file system of 64 KiB, in a mount namespace of its own."""
    script = (f"mount -t tmpfs -o size=64k none {tmp_path} && cd {checkout} && "
              f"exec {sys.executable} -m roads.stages.base runs/tiny/data {tmp_path}/base --scale tiny")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.rstrip().splitlines()[-1].startswith("error: no space left")


# Real posts


@pytest.mark.slow
def test_real_posts_run_the_same_graph(checkout):
    edit(checkout, "rouge: {n: 25, temperature: 0.7}\n    online: {n: 25, temperature: 0.7,",
         "rouge: {n: 3, temperature: 0.7}\n    online: {n: 3, temperature: 0.7,")
    edit(checkout, "base: 100000, sft: 100000, preferences: 500, more: 0, online: 500, valid: 1000, test: 1000",
         "base: 60, sft: 60, preferences: 40, more: 0, online: 40, valid: 20, test: 20")
    edit(checkout, "best_of_n: 100}", "best_of_n: 20}")
    before = (checkout / "params.yaml").read_bytes()
    try:
        shutil.copytree(ROOT / "data/tldr_sample", checkout / (posts := "my 'posts'; $(touch owned)"))
        make(checkout, "fig11", "SCALE=real-cpu", f"DATA={posts}")
        assert not (checkout / "owned").exists()
        content = json.loads((checkout / "reports/real-cpu/fig11.json").read_text(encoding="utf-8"))
        assert content["note"] == "real posts, scale real-cpu" and [bar["n"] for bar in content["bars"]] == [20] * 5
        assert "Up to date: fig11@real-cpu" in make(checkout, "fig11")
        run(checkout, "roads.config", "set", "--scale", "tiny")
        assert stale(checkout) == set()  # the results of two scales lie side by side
    finally:
        (checkout / "params.yaml").write_bytes(before)

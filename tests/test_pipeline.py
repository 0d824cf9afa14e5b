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
import torch
from conftest import ENV, FIGURES, ROOT, clone, edit, make, run
from ruamel.yaml import YAML

from roads import config, model, schema
from roads.runner import wiring
from roads.tldr import EOS, PAD


@pytest.fixture
def scratchpad(checkout):
    """The checkout; parameters and sources are put back after the test."""
    names = ["params.yaml", "figures.yaml", "active.yaml", "dvc.yaml"]
    before = {path: path.read_bytes() for path in [*map(checkout.joinpath, names),
                                                   *checkout.glob("src/roads/**/*.py")]}
    yield checkout
    for path, content in before.items():
        path.write_bytes(content)


# What a run leaves


ALL = ["SFT", "DPO", "DPO 2x", "Online(SFT)", "Online(DPO)"]


@pytest.mark.parametrize("figure, bars", [
    ("fig3", ALL), ("fig7", ["Global RM", "Local RM", "DPO RM", "Base"]), ("fig11", [*ALL, "Online(DPO) 2x"]),
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
    started = set(re.findall(r"^start (?!fig\d+@)(\S+)$", log, re.M))
    # rouge_online_2x is three commands, a folder each.
    assert len(folders) == len(started) + 2 * sum(name.startswith("rouge_online_2x@") for name in started) > 30
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


def test_every_training_writes_a_line_a_step(checkout):
    """And what a person watches by the clock lies where no stage and no hash looks."""
    sides = ["accuracy", "margin", "chosen_reward", "rejected_reward"]
    for place, more in {"base": [], "sft": [], "human/reward/s0": sides,
                        "human/local/s0": [*sides, "chosen_logp", "rejected_logp"],
                        "rouge/online/s0": [*sides, "chosen_logp", "rejected_logp"]}.items():
        folder = checkout / "runs/tiny" / place
        rows = list(csv.DictReader((folder / "curves.csv").open(encoding="utf-8")))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert list(rows[0]) == ["step", "lr", "loss", "grad_norm", *more], place
        assert [row["step"] for row in rows] == [str(step + 1) for step in range(metrics["steps"])]
        assert float(rows[0]["lr"]) > float(rows[-1]["lr"]) > 0 and all(float(row["grad_norm"]) > 0 for row in rows)
    first = next(csv.DictReader((checkout / "runs/tiny/rouge/online/s0/curves.csv").open(encoding="utf-8")))
    assert float(first["margin"]) == pytest.approx(0, abs=1e-5)  # the policy is its reference still
    assert float(first["loss"]) == pytest.approx(0.693147, abs=1e-5)
    logs = list((checkout / "runs/.log").glob("dpo-s0-*.csv"))
    assert logs and all(file.read_text().startswith("step,seconds,tokens_per_second,gpu_bytes\n") for file in logs)


def test_figures_say_what_their_policies_were_trained_on(checkout):
    bars = {bar["bar"]: bar["trained"] for bar in json.loads(
        (checkout / "reports/tiny/fig3.json").read_text(encoding="utf-8"))["bars"]}
    offline = json.loads((checkout / "runs/tiny/human/pairs/preferences/metrics.json").read_text(encoding="utf-8"))
    assert bars["DPO 2x"]["steps"] == [2 * bars["DPO"]["steps"][0]] and bars["DPO"]["rows"] == [offline["pairs"]]
    online = json.loads((checkout / "runs/tiny/human/online_pairs/s0/metrics.json").read_text(encoding="utf-8"))
    assert bars["Online(DPO)"]["rows"] == [online["pairs"]]
    assert bars["Online(DPO)"]["dropped_as_ties"] == [online["dropped_as_ties"]] == [120 - online["pairs"]]
    arm = json.loads((checkout / "runs/tiny/fig12/n60/s0/metrics.json").read_text(encoding="utf-8"))["dpo"]
    content = json.loads((checkout / "reports/tiny/fig12.json").read_text(encoding="utf-8"))
    found = next(bar["trained"] for bar in content["bars"] if bar["bar"] == "DPO n=60")
    assert found["kl"] == [arm["kl"]] and found["steps"] == [arm["training"]["steps"]] and 0 < found["rows"][0] <= 60


@pytest.mark.parametrize("place", ["base", "sft", "human/dpo/s0", "rouge/online/s0"])
def test_every_policy_opens_with_transformers_as_it_is(checkout, place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkout / "runs/tiny" / place
    tokenizer, policy = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD) == (
        policy.config.eos_token_id, policy.config.pad_token_id)
    rows = np.load(checkout / "runs/tiny/human/completions/dpo/s0/completions.npz")
    ids = [token for token in rows["completions"][0, 0].tolist() if token not in (EOS, PAD)]
    text = tokenizer.decode(ids)
    assert len(text.split()) == len(ids) > 0 and tokenizer(text)["input_ids"] == ids
    prompt = torch.from_numpy(rows["query"][:1]).long()
    ours = model.load_policy(folder)(prompt).logits
    assert torch.equal(policy(prompt).logits, ours) and ours.shape[-1] == policy.config.vocab_size


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


TRAINED = ["dpo", "dpo_2x", "online", "online_sft", "rouge_online_2x", "likelihood@human-dpo-s0", "fig12_arms"]
S1 = ["reward@s1", "local@human-s1", "dpo@s1", "dpo_2x@s1", "online_candidates@s1", "online_pairs@s1", "online@s1",
      "online_sft_pairs@s1", "online_sft@s1", "completions@s1", "scores@s1", "likelihood@human-s1", "kl@s1",
      "rouge_online_2x@s1"]
SAMPLED = ["candidates@human", "candidates@rouge", "online_candidates", "online_sft_candidates", "completions_sft",
           "completions"]
# Line of params.yaml that begins so, of the block tiny -> what is out of date when any of its values changes.
KEYS = {
    "compute": ["base", "sft", *SAMPLED, "online_pairs", "online_sft_pairs", "reward", "local", "likelihood",
                "likelihood_base", "kl", *TRAINED],
    "source": ["world_data", "pairs", "scores_sft", "scores", "likelihood", "likelihood_base", "fig12_arms"],
    "data": ["world_data", "fig12_arms"], "model": ["world_data", "base"], "base": ["base"], "sft": ["sft"],
    "reward": ["reward", "likelihood@human-reward-s0", "fig12_arms"],
    "local": ["local", "likelihood@human-local-s0"],
    "dpo": TRAINED, "machine": [],
    "human": ["candidates@human", "pairs@human", "fig12_arms"], "rouge": ["candidates@rouge", "pairs@rouge"],
    "online": ["online_candidates", "online_sft_candidates", "online_pairs", "online_sft_pairs", "online", "online_sft",
               "rouge_online_2x", "fig12_arms"],
    "evaluate": ["completions_sft", "completions", "rouge_online_2x", "fig12_arms"], "value": ["kl", "fig12_arms"],
    "best_of_n": [],
    "judge": ["world_data", "pairs", "scores_sft", "scores", "fig12_arms"],
}  # fmt: skip
OTHER = {"cpu": "gpu", "fp32": "bf16", "sdpa": "flash", "tree": "vllm", "cosine": "linear", "linear": "cosine",
         "attributes": "quality",
         "world": "posts", "new": "packaged", "annotators": "judge", "gold": "openai", "null": "2", "false": "true"}


ONE_BY_ONE = """
import json, sys, time
from pathlib import Path
import networkx
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from roads.runner import dvc_patches

params, found = Path("params.yaml"), []
with Repo() as repo, repo.lock:
    graph = repo.index.graph
    targets = {stage for stage in graph if stage.addressing in sys.argv[1:]}
    wanted = targets.union(*(networkx.descendants(graph, stage) for stage in targets))
    for text in json.load(open("edited.json")):
        params.write_text(text, encoding="utf-8")
        with dvc_patches.params_read_once():
            found.append(sorted(stage.addressing for stage in wanted if any(
                dep.status() for dep in stage.deps if isinstance(dep, ParamsDependency))))
print(json.dumps(found))
"""


def edited(text: str) -> dict[str, tuple[str, list[str]]]:
    """params.yaml with one value of the block tiny, or of an arm that FIGURES show, changed, each value in turn: its
    place -> the text, and what is out of date then."""
    tiny = re.search(r"^tiny:\n.*?(?=^real-cpu:)", text, re.M | re.S)[0]
    found = {}
    for key, expected in KEYS.items():
        line = re.search(rf"^ +{key}: \{{.*?\}}", tiny, re.M | re.S)[0]
        for name, value in re.findall(r"(\w+): ([^\s,{}\[]+)", line.partition("{")[2]):
            new = OTHER.get(value) or (f"{float(value) * 1.5:g}" if "." in value else str(int(value) + 1))
            changed = tiny.replace(line, re.sub(rf"\b{name}: {re.escape(value)}", f"{name}: {new}", line, count=1))
            assert changed != tiny
            found[f"{key}.{name}"] = text.replace(tiny, changed), expected
    for name in ("preferences", "online"):
        found[f"arms.fig12.n60.data.{name}"] = text.replace(f"{name}: 60", f"{name}: 50"), ["fig12_arms", "fig12"]
    other = text.replace("bold: {policies: [dpo], dpo: {beta: 0.02}}", "bold: {policies: [dpo], dpo: {beta: 0.03}}")
    return found | {"arms.budget.bold.dpo.beta": (other, [])}


@pytest.mark.slow
def test_whichever_value_is_edited_the_right_stages_are_out_of_date_and_no_others(scratchpad):
    text = (scratchpad / "params.yaml").read_text(encoding="utf-8")
    changes = edited(text)
    assert len(changes) > 70 and all(new != text for new, _ in changes.values())
    (scratchpad / "edited.json").write_text(json.dumps([new for new, _ in changes.values()]), encoding="utf-8")
    found = json.loads(run(scratchpad, "-c", ONE_BY_ONE, *FIGURES).splitlines()[-1])
    for (name, (_, expected)), stages in zip(changes.items(), found, strict=True):
        assert unlike(set(stages), expected) == ([], []), name


USED = """
import json
from roads import config

json.dump({name: config.load_scale(name).model_dump() for name in NAMES}, open("used.json", "w"))
"""


@pytest.mark.slow
def test_dvc_exp_run_sets_one_value_of_any_scale_and_of_an_arm(tmp_path):
    """`dvc exp run -S KEY=VALUE`: DVC writes it to params.yaml, and what a stage then reads is that value."""
    where = clone(tmp_path / "set")
    wanted = {f"{scale}.dpo.beta": (scale, "dpo.beta", round(0.1 + 0.001 * k, 3))
              for k, scale in enumerate(config.load(ROOT / "params.yaml").scales)}
    wanted |= {"tiny.arms.fig12.n60.data.online": ("tiny.fig12.n60", "data.online", 50),
               "mini.arms.horizon.k4.source.tau": ("mini.horizon.k4", "source.tau", 2.5)}
    (where / "dvc.yaml").write_text(
        "vars: [active.yaml]\nstages:\n  used:\n    cmd: python used.py\n"
        f"    params: [{', '.join(wanted)}]\n    outs: [{{used.json: {{cache: false}}}}]\n", encoding="utf-8")
    (where / "used.py").write_text(f"NAMES = {[name for name, _, _ in wanted.values()]}\n{USED}", encoding="utf-8")
    commit = "git add -A && git -c user.name=a -c user.email=a@b commit -qm all"
    subprocess.run(commit, shell=True, cwd=where, check=True)
    options = [word for key, (_, _, value) in wanted.items() for word in ("-S", f"{key}={value}")]
    run(where, "dvc", "exp", "run", "-q", *options)
    used = json.loads((where / "used.json").read_text(encoding="utf-8"))
    for key, (name, path, value) in wanted.items():
        assert functools.reduce(lambda part, step: part[step], path.split("."), used[name]) == value, key


@pytest.mark.parametrize("old, new, file, expected", [
    ("seeds: {default: [0]", "seeds: {default: [0, 1]", "params.yaml",
     ["fig3", "fig7", "fig11", "fig12", *S1, "fig12_arms@s1"]),
    ("seeds: {default: [0]", "seeds: {default: [0], fig12: [0, 1]", "params.yaml",
     ["fig12", *S1, "fig12_arms@s1"]),
    ("seeds: {default: [0]", "seeds: {default: [0], fig5: [0, 1]", "params.yaml", S1),
    ("seeds: {default: [0]", "seeds: {default: [0], fig6: [0, 1]", "params.yaml", []),
    ("preferences: 60, online: 60", "preferences: 60, online: 50", "params.yaml", ["fig12_arms", "fig12"]),
    ("policies: [dpo, online_sft]\nrouge_warm", "policies: [dpo]\nrouge_warm", "figures.yaml", ["fig12_arms", "fig12"]),
    ('"Fig. 7: validation', '"Figure 7: validation', "figures.yaml", ["fig7"]),
    ("Stage reward:", "Stage reward, edited:", "src/roads/stages/reward.py", ["reward", "fig12_arms"]),
    ("Stage arm:", "Stage arm, edited:", "src/roads/stages/arm.py", ["fig12_arms"]),
    ("Figure 7, also", "Fig. 7, also", "src/roads/figures/likelihood.py", ["fig7"]),
])  # fmt: skip
def test_a_change_reruns_what_depends_on_it(scratchpad, old, new, file, expected):
    edit(scratchpad, old, new, file)
    if file.endswith(".yaml"):
        run(scratchpad, "roads.active", "set")  # as make does
    assert unlike(stale(scratchpad), expected) == ([], [])


def unlike(found: set[str], expected: list[str]) -> tuple[list[str], list[str]]:
    """What is missed of what is expected, and what is too much. expected: stages by name, or name@parts where each
    part is one of the words after the @ of the full name."""

    def matches(full: str, pattern: str) -> bool:
        name, *parts = pattern.split("@")
        words = full.split("@")[1].split("-")
        return full.split("@")[0] == name and all(part in words for part in "-".join(parts).split("-") if part)

    missed = [pattern for pattern in expected if not any(matches(full, pattern) for full in found)]
    surplus = [full for full in found if not any(matches(full, pattern) for pattern in expected)]
    return missed, surplus


def test_repro_runs_just_that(scratchpad):
    edit(scratchpad, "batch_size: 32, epochs: 1, beta: 0.5,", "batch_size: 32, epochs: 1, beta: 0.4,")
    log = run(scratchpad, "roads.runner.repro", *FIGURES)
    started = set(re.findall(r"^start (\S+)$", log, re.M))
    assert started == {"local@tiny-human-s0", "likelihood@tiny-human-local-s0", "fig7@tiny"}
    edit(scratchpad, "batch_size: 32, epochs: 1, beta: 0.4,", "batch_size: 32, epochs: 1, beta: 0.5,")
    run(scratchpad, "dvc", "repro", "-q", "fig7@tiny")  # and back, by DVC alone, from its run cache
    assert stale(scratchpad) == set()


# Of parameters, folders, files, answers: no number is made there.
CARRIERS = {"config", "schema", "sources", "judge_settings", "strict", "active", "stage", "arrays", "kept", "hub",
            "tracking", "client", "endpoint", "batches", "ledger", "process"}


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


TABLE = YAML(typ="safe").load((ROOT / "figures.yaml").read_text(encoding="utf-8"))
WITH_ARMS = {name for cfg in config.load(ROOT / "params.yaml").scales.values() for name in cfg.arms}


@pytest.mark.parametrize("name", TABLE)
def test_every_figure_depends_on_the_arms_and_seeds_of_what_it_shows(name):
    entry = ENTRIES[name]
    folders = [re.fullmatch(r"runs/\$\{item\.scale\}/(\w+)", dep) for dep in entry["deps"]]
    shown = [folder[1] for folder in folders if folder and folder[1] in WITH_ARMS]  # not anatomy's own runs
    assert entry["params"] == [*(f"${{item.scale}}.arms.{other}" for other in shown), {"figures.yaml": [name]},
                               {"active.yaml": [f"figure_seeds.{name}"]}]


def test_the_entries_of_figures_and_arms_are_those_that_the_table_asks_for():
    above, line, below = (ROOT / "dvc.yaml").read_text(encoding="utf-8").partition(wiring.LINE)
    assert line + below == wiring.entries(config.load(ROOT / "params.yaml").figures), "`make graph` writes it anew"
    assert "roads.figures" not in above


# Numbers that move nothing; and what an arm alone may say, in its own line, which is listed.
UNLISTED = {"machine", "spending", "rounds", "sizes"}
# What an entry reads elsewhere: the judge writes Fig 10's data, ROUGE asks for no labels, not every arm samples online.
ELSEWHERE = {"world_data": {"judge"}, "arm_world_data": {"judge"}, "pairs": {"samples.rouge"},
             "budget_arms": {"samples.online"}, "anatomy_own": {"samples.rouge"}, "anatomy_told": {"samples.rouge"}}


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


DUMMY = """from roads import stage
from roads.figures import figure
from roads.figures.figure import Bar

FIGURES = ("dummy",)


def bars_of(scale, name):
    return [Bar(policy, *figure.policy(scale, policy)) for policy in ("sft", "dpo")]


if __name__ == "__main__":
    parser = stage.arguments(__doc__, "runs", "out")
    parser.add_argument("--figure", choices=FIGURES)
    a = parser.parse_args()
    figure.save(a.out, a.figure, a.runs, bars_of(a.scale, a.figure), {"dpo - sft": {"dpo": 1, "sft": -1}}, a.scale,
                "Of the test.", "winrate", lambda content: figure.bar_chart(content, 0))
"""


@pytest.mark.slow
def test_a_figure_is_a_row_and_a_module(scratchpad):
    row = "dummy:\n  title: A figure of the test\n  module: dummy\n  task: human\n  reads: [human/scores]\n"
    (scratchpad / "figures.yaml").write_text((scratchpad / "figures.yaml").read_text(encoding="utf-8") + row)
    module = scratchpad / "src/roads/figures/dummy.py"
    module.write_text(DUMMY, encoding="utf-8")
    try:
        make(scratchpad, "graph")
        assert "dummy" in make(scratchpad, "help") and "done  dummy@tiny" in make(scratchpad, "dummy")
        content = json.loads((scratchpad / "reports/tiny/dummy.json").read_text(encoding="utf-8"))
        assert content["title"] == "A figure of the test" and [bar["bar"] for bar in content["bars"]] == ["sft", "dpo"]
        assert "Up to date: dummy@tiny" in make(scratchpad, "dummy")
    finally:
        module.unlink()


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
    assert re.search("base s0: resuming at step [246]00 of 640", run(where, *command[2:]))
    assert (where / "killed/model.safetensors").read_bytes() == (where / "whole/model.safetensors").read_bytes()
    for name in ("metrics.json", "curves.csv"):
        assert (where / "killed" / name).read_bytes() == (where / "whole" / name).read_bytes()
    assert not list(where.glob("runs/.scratch/*"))


def test_bad_params_stop_before_anything_runs(scratchpad):
    edit(scratchpad, "tag_weight: 8.0", "tag_wait: 8.0")
    expected = "error: params.yaml: mini.source.tag_wait: unknown key; did you mean 'tag_weight'?\n"
    assert run(scratchpad, "roads.runner.repro", "fig11@tiny", code=2) == expected
    ours = expected.replace("mini.", "tiny.")  # the same line in each; a stage reads the block of its scale
    assert run(scratchpad, "roads.stages.data", "out", "--scale", "tiny", code=2) == ours
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
    run(checkout, "roads.stages.arm", "runs/tiny/data", "runs/tiny/sft", str(out), "--scale", "tiny", "--seed", "0",
        "--folders")
    found, metrics = np.load(out / "scores.npz"), json.loads((out / "metrics.json").read_text())
    for policy in ("sft", "dpo", "dpo_2x", "online_sft", "online"):
        place = checkout / "runs/tiny/human/scores" / policy / ("" if policy == "sft" else "s0")
        assert (found[policy] == np.load(place / "scores.npz")["score"]).all(), policy
    graph = json.loads((checkout / "runs/tiny/human/likelihood/dpo/s0/metrics.json").read_text())
    assert metrics["dpo_rm"]["accuracy"] == graph["accuracy"]
    # A seed that the graph does not run has the same folders (human/more).
    for part in [*(f"scores/{policy}" for policy in schema.POLICIES), "likelihood/local", "likelihood/reward"]:
        there = checkout / f"runs/tiny/human/{part}/s0"
        ours, theirs = (np.load(place / "scores.npz") for place in (out / part, there))
        assert set(ours.files) == set(theirs.files) and all((ours[name] == theirs[name]).all() for name in ours.files)
    of_dpo = "kl/dpo", "runs/tiny/human/kl/dpo/s0"
    assert (out / of_dpo[0] / "metrics.json").read_bytes() == (checkout / of_dpo[1] / "metrics.json").read_bytes()
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
    looked = 0
    again = subprocess.Popen(command, cwd=where, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while again.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it is deleted in the end
            assert reward.stat().st_mtime_ns == before
            looked += 1
        time.sleep(0.005)
    assert looked > 100 and again.returncode == 0 and not list(where.glob("runs/.scratch/*"))
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
    before = {checkout / name: (checkout / name).read_bytes() for name in ("params.yaml", "active.yaml")}
    edit(checkout, "rouge: {n: 25, temperature: 0.7}\n    online: {n: 25, temperature: 0.7,",
         "rouge: {n: 3, temperature: 0.7}\n    online: {n: 3, temperature: 0.7,")
    edit(checkout, "base: 100000, sft: 100000, preferences: 500, more: 0, online: 500, valid: 1000, test: 1000",
         "base: 60, sft: 60, preferences: 40, more: 0, online: 40, valid: 20, test: 20")
    edit(checkout, "best_of_n: 100}", "best_of_n: 20}")
    try:
        shutil.copytree(ROOT / "data/tldr_sample", checkout / (posts := "my 'posts'; $(touch owned)"))
        make(checkout, "fig11", "SCALE=real-cpu", f"DATA={posts}")
        assert not (checkout / "owned").exists()
        content = json.loads((checkout / "reports/real-cpu/fig11.json").read_text(encoding="utf-8"))
        assert content["note"] == "real posts, scale real-cpu" and [bar["n"] for bar in content["bars"]] == [20] * 5
        assert "Up to date: fig11@real-cpu" in make(checkout, "fig11")
        run(checkout, "roads.active", "set", "--scale", "tiny")
        assert stale(checkout) == set()  # the results of two scales lie side by side
    finally:
        for path, content in before.items():
            path.write_bytes(content)

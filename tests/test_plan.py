"""The plan: what DVC would do, on a made-up project, and the cost model against what was measured."""

import csv
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT
from pyarrow import Table, parquet
from ruamel.yaml import YAML

from roads import active, config, generate, generate_tree, lockfile, model, schema
from roads.runner import cost, devices, plan, repro, status
from roads.runner import work as work_of
from roads.stage import UserError

DVC_YAML = """
vars: [active.yaml]
stages:
  words:
    matrix: {scale: ["${scale}"]}
    cmd: echo words >> log; mkdir -p runs/${item.scale}/words; cp words.txt runs/${item.scale}/words/
    deps: [words.txt]
    outs: ["runs/${item.scale}/words"]
  count:
    matrix: {scale: ["${scale}"], seed: [0, 1]}
    cmd: echo count >> log; mkdir -p runs/${item.scale}/counts/s${item.seed}; wc runs/${item.scale}/words/words.txt
      > runs/${item.scale}/counts/s${item.seed}/count.txt
    deps: ["runs/${item.scale}/words/words.txt"]
    params: ["${item.scale}.sft.epochs"]
    outs: ["runs/${item.scale}/counts/s${item.seed}"]
  fig3:
    matrix: {scale: "${figures.fig3}"}
    cmd: echo fig3 >> log; mkdir -p reports/${item.scale}; cat runs/${item.scale}/counts/s*/*
      > reports/${item.scale}/fig3.csv
    deps: ["runs/${item.scale}/counts"]
    outs: [{"reports/${item.scale}/fig3.csv": {cache: false}}]
  fig11:
    matrix: {scale: "${figures.fig11}"}
    cmd: echo fig11 >> log; mkdir -p reports/${item.scale}; cp runs/${item.scale}/words/words.txt
      reports/${item.scale}/fig11.csv
    deps: ["runs/${item.scale}/words"]
    outs: [{"reports/${item.scale}/fig11.csv": {cache: false}}]
"""
TO_RUN, IN_CACHE, UP_TO_DATE = status.TO_RUN, status.IN_CACHE, status.UP_TO_DATE


@pytest.fixture
def project(tmp_path, monkeypatch):
    from dvc.repo import Repo

    # DVC's handlers write to what was stderr when some test before first imported it, which may be closed by now.
    monkeypatch.setattr(logging.getLogger("dvc"), "handlers", [])
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "figures.yaml"):
        shutil.copy(ROOT / name, name)
    Path("dvc.yaml").write_text(DVC_YAML)
    Path("words.txt").write_text("one two three\n")
    active.write("mini")
    Repo.init(no_scm=True).close()
    return tmp_path


def reproduce() -> None:
    from dvc.repo import Repo

    with Repo() as repo:
        repo.reproduce()


def fates(figure: str = "all", scale: str | None = None) -> dict[str, str]:
    return {cell.name: cell.status for cell in plan.plan(figure, scale)[0]}


def contents(where: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in where.rglob("*") if path.is_file() and ".dvc" not in path.parts}


def edit_epochs(old: int, new: int) -> None:
    block = re.search(r"^mini:.*?^  sft: .*?$", Path("params.yaml").read_text(), re.M | re.S)[0]
    changed = re.sub(rf"(\n  sft: .*epochs: ){old}", rf"\g<1>{new}", block)
    assert changed != block
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace(block, changed))


@pytest.mark.slow
def test_fates_are_what_dvc_then_does(project):
    everything = {"words@mini", "count@mini-0", "count@mini-1", "fig3@mini", "fig11@mini"}
    assert fates() == dict.fromkeys(everything, TO_RUN)
    assert set(fates("fig11")) == {"words@mini", "fig11@mini"} and fates("11") == fates("fig11")
    reproduce()
    assert fates() == dict.fromkeys(everything, UP_TO_DATE) and repro.out_of_date([])[0] == {}

    edit_epochs(1, 7)
    expected = {"count@mini-0": TO_RUN, "count@mini-1": TO_RUN, "fig3@mini": TO_RUN}
    assert {name: fate for name, fate in fates().items() if fate != UP_TO_DATE} == expected
    assert repro.out_of_date(["fig3@mini", "fig11@mini"])[0] == {
        "count@mini-0": set(), "count@mini-1": set(), "fig3@mini": {"count@mini-0", "count@mini-1"}}
    Path("words.txt").write_text("one two three four\n")
    assert set(fates().values()) == {TO_RUN}
    reproduce()

    # Back to what has run before, with the work tree gone: DVC has it all but the reports, which it does not cache.
    Path("words.txt").write_text("one two three\n")
    edit_epochs(7, 1)
    shutil.rmtree("runs")
    assert fates() == {name: TO_RUN if "fig" in name else IN_CACHE for name in everything}
    Path("log").unlink()
    reproduce()
    assert sorted(Path("log").read_text().split()) == ["fig11", "fig3"] and set(fates().values()) == {UP_TO_DATE}
    shutil.rmtree("runs")  # reports stay, as in a fresh checkout with the cache fetched
    assert fates("fig3") == {"words@mini": IN_CACHE, "count@mini-0": IN_CACHE, "count@mini-1": IN_CACHE,
                             "fig3@mini": UP_TO_DATE}


def test_another_scale_is_planned_without_a_trace(project):
    reproduce()
    before = contents(project)
    assert fates("fig3", "tiny") == dict.fromkeys(["words@tiny", "count@tiny-0", "count@tiny-1", "fig3@tiny"], TO_RUN)
    assert set(fates("fig3", "mini").values()) == {UP_TO_DATE}
    assert contents(project) == before


def test_measured_seconds_are_the_last_real_run_and_what_nobody_knows_is_said(project):
    Path("runs").mkdir()
    repro.TIMES.write_text("words@mini,50.0\nwords@mini,40.0\nwords@mini,0.4\ncount@mini-0,300.0\n")
    cells, device, width = plan.plan("fig3")
    assert {cell.name: (cell.seconds, cell.source) for cell in cells} == {
        "words@mini": (40.0, "measured"), "count@mini-0": (300.0, "measured"), "count@mini-1": (None, "unknown"),
        "fig3@mini": (None, "unknown")}
    assert plan.longest(cells) == 340 and (device, width) == ("cpu", 1)
    said = plan.totals(cells, device, width, cores=2)
    assert "0.09 core-hours, 100% of them measured" in said and "about 5.7 min, 2 at once" in said
    assert "judge    $0.00" in said and "unknown  count, fig3: " in said
    row = next(line for line in plan.table(cells).splitlines() if line.startswith("count"))
    assert row.split() == "count measured, unknown 2 - - 2 5.0 min 5.0 min".split()


@pytest.mark.parametrize("figure, scale, message", [
    ("all", "lunar", r"params.yaml: no block named 'lunar'; expected one of: .*mini, tiny.*"),
    ("fig33", None, r"figure 'fig33': not at this scale; expected one of: fig3, fig11, all"),
    ("3", "real-cpu", r"figure 'fig3': not at this scale; expected one of: fig11, all"),
])  # fmt: skip
def test_a_bad_figure_or_scale_is_one_line(project, figure, scale, message):
    with pytest.raises(UserError) as error:
        plan.plan(figure, scale)
    assert re.fullmatch(message, str(error.value))


def test_a_figure_that_make_would_refuse_is_refused_here(project):
    path = Path("figures.yaml")
    path.write_text(re.sub(r"(\nfig3:.*?module: )policies", r"\1best_of_n", path.read_text(), count=1, flags=re.S))
    with pytest.raises(UserError, match="figures.yaml: fig3.module: best_of_n draws .*, and not fig3; teach it, or"):
        plan.plan("fig3")
    assert set(fates("fig11")) == {"words@mini", "fig11@mini"}


def test_a_folder_with_fewer_posts_counts_as_it_is(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n{}\n{}\n")
    wanted = {"sft": 100, "preferences": 2, "valid": 50, "test": 9, "best_of_n": 5}
    assert plan.as_many_as_there_are(tmp_path, wanted) == {"sft": 3, "preferences": 2, "valid": 0, "test": 0,
                                                          "best_of_n": 0}
    (tmp_path / "train.jsonl").write_text("{}\n" * 60)
    parquet.write_table(Table.from_pylist([{"prompt": "x"}] * 4), tmp_path / "test.parquet")
    assert plan.as_many_as_there_are(tmp_path, wanted) == {"sft": 60, "preferences": 2, "valid": 6, "test": 4,
                                                          "best_of_n": 4}


# dvc.lock


def single(*stages: str) -> int:
    """`python -m roads.runner.single STAGE`, one after the other; how many of them fail."""
    env = ENV | {"PYTHONPATH": str(ROOT / "src")}
    return sum(subprocess.run([sys.executable, "-m", "roads.runner.single", name], env=env).returncode != 0
               for name in stages)


def lock() -> dict:
    return YAML(typ="safe").load(Path("dvc.lock"))


@pytest.mark.slow
def test_the_runner_writes_the_lock_that_dvc_writes(project):
    reproduce()
    theirs = lock()
    for path in ("dvc.lock", "runs", "reports", ".dvc/cache", ".dvc/tmp"):
        path = Path(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path(".dvc/tmp").mkdir()
    stages = ["words@mini", "count@mini-0", "count@mini-1", "fig3@mini", "fig11@mini"]
    assert set(stages) == set(theirs["stages"]) and single(*stages) == 0
    assert lock() == theirs and list(lock()["stages"]) == stages
    Path("words.txt").write_text("four\n")
    assert single("words@mini", "count@mini-1") == 0
    ours = lock()
    assert list(ours["stages"]) == stages  # in their places, and the others as they were
    assert [name for name in stages if ours["stages"][name] != theirs["stages"][name]] == ["words@mini", "count@mini-1"]
    reproduce()  # and DVC continues from it
    assert Path("log").read_text().split().count("words") == 3
    assert lock()["stages"]["words@mini"] == ours["stages"]["words@mini"]


def test_params_are_read_once_and_a_change_of_them_is_seen(project, monkeypatch):
    from dvc.dependency import param

    reproduce()
    load, read = param.load_path, []
    monkeypatch.setattr(param, "load_path", lambda path, *args: read.append(path) or load(path, *args))
    assert repro.out_of_date([]) == ({}, {}) and len(read) == 1
    before = Path("params.yaml").read_text()
    for there in (", epochs: 2}", "}"):  # another value, and none
        Path("params.yaml").write_text(re.sub(r"^(  sft: .*), epochs: 1}", rf"\1{there}", before, count=1, flags=re.M))
        todo, _ = repro.out_of_date([])
        assert set(todo) == {"count@mini-0", "count@mini-1", "fig3@mini"}


def test_a_lock_in_the_middle_of_a_merge_is_left_alone(project):
    reproduce()
    Path("dvc.lock").write_text(broken := "<<<<<<< HEAD\n" + Path("dvc.lock").read_text())
    Path("words.txt").write_text("four\n")
    assert single("words@mini") == 1 and Path("dvc.lock").read_text() == broken


def test_a_lock_with_more_than_stages_in_it_is_written_by_dvc(project):
    reproduce()
    whole = Path("dvc.lock").read_text()
    entry, at = lockfile.entry_of("fig11@mini", whole)
    Path("dvc.lock").write_text(whole[:at] + whole[at + len(entry) :] + "datasets: []\n")
    assert single("fig11@mini") == 0
    assert lock() == {**YAML(typ="safe").load(whole), "datasets": []}


def test_an_arm_in_the_lock_keeps_it_one_that_is_read_by_entry(project):
    """Its name has a dot; DVC alone reads and writes all of the lock, which takes seconds for every stage."""
    name = "arm_sft@mini-horizon.k4"
    arm = "  {}:\n    cmd: true\n    outs:\n    - path: runs/mini.horizon.k4/sft\n".format(name)
    assert lockfile.LAYOUT.fullmatch(lockfile.LOCK + arm)
    assert lockfile.entry_of(name, lockfile.LOCK + arm) == (arm, len(lockfile.LOCK))


def test_every_entry_of_the_committed_lock_is_found():
    text = (ROOT / "dvc.lock").read_text(encoding="utf-8")
    assert text.startswith(lockfile.LOCK) and lockfile.LAYOUT.fullmatch(text)
    at, stages = len(lockfile.LOCK), YAML(typ="safe").load(text)["stages"]
    assert list(entries := lockfile.entries(text)) == list(stages)
    for name, known in stages.items():
        entry, begins = lockfile.entry_of(name, text)
        assert begins == at and entry.startswith(f"  {name}:\n") and entry == entries[name]
        for kind in "deps", "outs":
            assert lockfile.paths(kind, entry) == [item["path"] for item in known.get(kind, [])]
        at += len(entry)
    assert at == len(text) and lockfile.entry_of("fig3", text) == lockfile.entry_of("no@such", text) == ("", at)


# The cost model


def test_the_stages_of_mini_take_what_the_model_says(monkeypatch):
    """Total seconds of the stages of docs/stages.md against the model, 30% either way."""
    monkeypatch.chdir(ROOT)
    page = Path("docs/stages.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+@\S+) \| \d+ \| ([\d.]+) \|", page, re.M)
    measured = {name: float(seconds) for name, seconds in rows if float(seconds) > plan.CACHED}
    modelled, known = {}, 0
    with plan.switched("mini", None) as (repo, _, blocks):
        for stage in repo.index.stages:
            seconds = measured.get(stage.addressing) or measured.get(re.sub(r"-s\d+$", "", stage.addressing))
            if seconds and (work := cost.work(stage.cmd, blocks)):
                modelled[stage.addressing] = work.seconds(devices.DEVICES["cpu"])
                known += seconds
    assert len(modelled) >= 30
    assert sum(modelled.values()) == pytest.approx(known, rel=0.3)


PYTHIA = {
    "source": {"kind": "openai", "max_query_tokens": 512, "max_response_tokens": 53, "max_preference_tokens": 53},
    "data": {"base": 0, "sft": 116722, "preferences": 92858, "online": 92858, "valid": 83802, "test": 600,
             "best_of_n": 600},
    "model": {"kind": "pretrained", "parameters": 1.4e9}, "policies": ["dpo", "dpo_2x", "online_sft", "online"],
    "sft": {"batch_size": 64, "epochs": 1}, "reward": {"batch_size": 64, "epochs": 1},
    "local": {"batch_size": 128, "epochs": 1}, "dpo": {"batch_size": 128, "epochs": 1},
    "samples": {"human": {"n": 2, "labels": "rows"}, "online": {"n": 25, "temperature": 0.1},
                "evaluate": {"n": 1, "temperature": 0.01}, "value": {"n": 2, "temperature": 1.0},
                "best_of_n": {"n": 25, "temperature": 0.1}},
    "compute": {"sampler": "vllm"},
    "judge": {"kind": "openai", "model": "gpt-4o-2024-08-06"}, "spending": {"input": 2.5, "output": 10.0,
                                                                            "batch_discount": 0.5},
}  # fmt: skip
REWARD, DPO = "reward R/pairs/preferences S O", "dpo R/pairs/preferences S O"
ONLINE = ["sample P D/online.npz O --samples online", "rank R/online_candidates/s0 O --by reward",
          "dpo R/online_pairs/s0 P O --online"]
WINRATE = "evaluate C D O --task human"


def hours(command: str, device: str = "H100", **changes) -> float:
    return work(command, **changes).seconds(devices.DEVICES[device]) / 3600


def test_odd_files_do_not_stop_a_plan(tmp_path):
    (tmp_path / "times.csv").write_text("data@mini,30.5\n\nbase@mi\nsft@mini,9x\ndata@mini,0.1\nsft@mini,7\n")
    assert list(repro.times(tmp_path / "times.csv")) == [("data@mini", 30.5), ("data@mini", 0.1), ("sft@mini", 7.0)]
    assert plan.measured(tmp_path / "times.csv") == {"data@mini": 30.5, "sft@mini": 7.0}
    (tmp_path / "train.parquet").write_bytes(b"PAR1xxxxPAR1")
    assert plan.rows_of(tmp_path, "train") is None and not list(repro.times(tmp_path / "none.csv"))


def work(command: str, **changes) -> cost.Work:
    return cost.work(f"python -m roads.{command} --scale paper", {"paper": PYTHIA | changes})


def test_a_pythia_is_hours_of_a_gpu():
    """DPO of 1.4B parameters on 92,858 pairs: 4.8e17 FLOPs of training and 1.6e17 of the reference, at 4e14/s."""
    dpo = hours(DPO)
    assert dpo == pytest.approx(8 * 1.4e9 * 92858 * 618 / 3.96e14 / 3600 + 20 / 3600)
    assert hours(f"{DPO} --times 2") == pytest.approx(dpo * 14 / 8, rel=0.02)
    assert hours(f"{DPO} --local") == pytest.approx(dpo * 6 / 8, rel=0.02)
    assert hours(DPO, "A100") > 3 * dpo
    assert hours(DPO, model={"kind": "pretrained", "parameters": 2.8e9}) == pytest.approx(2 * dpo, rel=0.02)
    assert work(ONLINE[0]).decoded == 1.4e9 * 92858 * 25 * 53
    assert work(ONLINE[0], compute={"sampler": "tree"}).decoded == 1.4e9 * 92858 * 25 * work_of.SHARED * 53
    total = sum(map(hours, ["sft D B O", REWARD, DPO, *ONLINE, WINRATE]))
    print(f"Online DPO of a Pythia of 1.4B: {total:.1f} H100-hours a seed")
    assert 3 < total < 10


def test_a_sampled_token_is_a_pass_for_as_many_prompts_as_the_sampler_takes():
    source = {"kind": "jsonl", "vocab_size": 4096, "max_query_tokens": 256, "max_response_tokens": 53}
    size = {"kind": "new", "hidden_size": 96, "layers": 2}
    net = model.new_policy(schema.FromScratch(**size, heads=4, max_positions=512), 4096, seed=0)
    assert (cost.ROWS, cost.MEMORY) == (generate.ROWS, generate.MEMORY)
    for n, prompts in ((25, 300), (1, 5000)):
        fit = min(generate.ROWS // n, generate_tree.places_for(net, 256, n, 53, generate.MEMORY))
        found = work("sample P D/online.npz O --samples online", source=source, model=size, data={"online": prompts,
                     "preferences": 0}, samples={"online": {"n": n, "temperature": 1.0}}, compute={"sampler": "tree"})
        assert 1 < fit < prompts and found.layers == -(-prompts // fit) * 53 * 2


def test_a_cell_is_the_sum_of_its_stages():
    cell = work("arm D S O --seed 0")
    parts = sum(map(work, [REWARD, DPO, f"{DPO} --times 2", *ONLINE, *ONLINE]), cost.Work())
    assert parts.flops < cell.flops < 1.3 * parts.flops and cell.steps == parts.steps  # the rest is evaluation
    assert cell.judged == 2 * 5 * 600 and cell.size == 8 * 5 * 600


def test_a_cell_of_sizes_and_one_of_rounds_are_sums_too():
    epochs = {"dpo": 3, "reward": 2}
    whole = work("arm D S O --seed 0", sizes={500: epochs, 1000: epochs})
    parts = [work("arm D S O --seed 0", data=PYTHIA["data"] | {"preferences": n, "online": n},
                  dpo=PYTHIA["dpo"] | {"epochs": 3}, reward=PYTHIA["reward"] | {"epochs": 2}) for n in (500, 1000)]
    assert whole.steps == sum(part.steps for part in parts) and whole.judged == sum(part.judged for part in parts)
    once, thrice = (work("arm D S O --seed 0", policies=["dpo", "online"], rounds=n) for n in (1, 3))
    assert thrice.steps - once.steps == 2 * work(DPO).steps and thrice.judged == once.judged


def test_a_cell_of_rouge_asks_no_judge_and_one_that_is_kept_trains_the_local_rm():
    samples = PYTHIA["samples"] | {"rouge": {"n": 25, "temperature": 1.0}}
    human, rouge, kept = (work(f"arm D S O --seed 0{option}", samples=samples)
                          for option in ("", " --task rouge", " --folders"))
    assert human.judged and not rouge.judged
    assert kept.steps - human.steps == work(f"{DPO} --local").steps
    data = PYTHIA["data"]  # there are no samples of rows' pairs; 25 of each are ROUGE-L's, and its test is `valid`
    more = 25 * (data["preferences"] + data["valid"]) + 5 * (data["valid"] - data["test"])
    assert rouge.decoded - human.decoded == pytest.approx(1.4e9 * 53 * more, rel=1e-6)


def test_the_anatomy_is_twenty_trainings():
    mini = config.load(ROOT / "params.yaml").scales["mini"].model_dump()
    found = cost.work("python -m roads.stages.anatomy D S O --scale mini --seed 0", {"mini": mini})
    steps = 2 * -(-6000 // 32)
    assert found.steps == 19 * steps + 2 * (steps // 2)  # two of one epoch


def test_the_limits_of_rouge_train_nothing():
    mini = config.load(ROOT / "params.yaml").scales["mini"].model_dump()
    found = cost.work("python -m roads.stages.limits D S R P O --scale mini --seed 0", {"mini": mini})
    assert found.steps == 0 and found.judged == 0 and found.decoded > 0 and found.flops > 0


def test_completions_are_drawn_once_and_counted_once():
    """By whoever runs first: what the SFT policy draws of a split is the graph's, every seed's and every arm's."""
    drawn = set()
    data = PYTHIA["samples"] | {"human": {"n": 2, "temperature": 1.0, "labels": "annotators"}}
    blocks = {"paper": PYTHIA | {"samples": data}}

    def tokens(command: str) -> float:
        return cost.work(f"python -m roads.stages.{command} --scale paper", blocks, drawn).decoded

    graph = [tokens(f"sample runs/sft runs/data/{split}.npz O --samples {kind} --seed 0")
             for split, kind in (("preferences", "human"), ("valid", "human"), ("online", "online"))]
    assert all(graph) and not tokens("sample runs/sft runs/data/online.npz P --samples online --seed 0")  # another task
    assert tokens("sample runs/dpo/s0 runs/data/online.npz O --samples online --seed 0") > 0  # another policy
    first, second = (tokens(f"arm runs/data runs/sft O --seed {seed}") for seed in (0, 1))
    alone = cost.work("python -m roads.stages.arm runs/data runs/sft O --scale paper --seed 0", blocks).decoded
    sft = 1.4e9 * 600 * 53  # completions of the SFT policy for its winrate, which the first seed draws
    assert first == pytest.approx(alone - sum(graph)) and second == pytest.approx(first - sft)


def test_the_judge_is_paid_by_the_answer():
    scored = work(WINRATE)
    assert scored.judged == 1200 and scored.dollars / 2 == pytest.approx(1.1, rel=0.01)  # as others paid for one order
    batch = work(WINRATE, judge=PYTHIA["judge"] | {"kind": "batch"})
    assert batch.dollars == pytest.approx(scored.dollars / 2) and batch.judged == 1200
    cells = [plan.PlannedStage("scores@paper", TO_RUN, 60.0, "modelled", scored.judged, scored.dollars, 1e9, set())]
    said = plan.totals(cells, "H100", 1, cores=16, price=2.0)
    assert "1 at once (H100: measured, nvidia-h100-80gb-hbm3.json)" in said
    assert "judge    $2.20: 1,200 answers" in said and "GPU      $0.03 at $2 an hour" in said
    for judge in ({"kind": "gold"}, None):
        assert work(WINRATE, judge=judge).judged == 0
    assert work("evaluate C D O --task rouge").judged == 0


def test_pairs_that_come_with_the_data_are_neither_sampled_nor_judged():
    sampled, ranked = "sample P D/preferences.npz O --samples human", "rank R/candidates/preferences O --by human"
    for command in (sampled, ranked):
        found = work(command)
        assert found.flops == found.decoded == found.judged == 0 < found.size
    judged = PYTHIA["samples"] | {"human": {"n": 2, "temperature": 0.1, "labels": "judge"}}
    assert work(sampled, samples=judged).decoded == 1.4e9 * 92858 * 2 * 53
    assert work(ranked, samples=judged).dollars == pytest.approx(2 * 175, rel=0.05)  # as others paid, in one order
    cell = "arm D S O --seed 0"
    assert work(cell, samples=judged).judged == work(cell).judged + 2 * 92858  # no label that nothing is trained on
    one_order = PYTHIA["judge"] | {"label_orders": 1}
    assert work(cell, samples=judged, judge=one_order).judged == work(cell).judged + 92858


def test_two_words_are_written_and_compared():
    two_word = PYTHIA["source"] | {"kind": "two_word", "max_preference_tokens": 5}
    data = {"base": 0, "sft": 100, "preferences": 30, "valid": 20, "test": 10}
    assert work("data F O", source=two_word, data=data).judged == 4 * 50 + 10  # of test, one is written each
    assert work("data F O", data=data).judged == 0
    assert work(DPO, source=two_word).flops < work(DPO).flops


def test_attention_counts_where_a_small_model_reads_much():
    """1 layer of width 8: 24 d^2 FLOPs a token, 4 d for each of 618 that it reads, and 2 d for each of 4 words at
    106."""
    new = {"kind": "new", "layers": 1, "hidden_size": 8}
    source = PYTHIA["source"] | {"kind": "jsonl", "vocab_size": 4}
    flops = work(f"{DPO} --local", model=new, source=source).flops
    assert flops == 3 * 92858 * (618 * (24 * 64 + 4 * 8 * 618) + 106 * 2 * 8 * 4)
    assert work_of.parameters({"model": new, "source": source | {"vocab_size": None}}) > 8e5


def test_what_the_model_does_not_know_is_none():
    assert work("nonsense A B") is None and work("sample P D O --samples nowhere") is None
    assert cost.work("cp a b", {}) is None
    two = cost.work([f"python -m roads.{REWARD} --scale paper"] * 2, {"paper": PYTHIA})
    assert two == work(REWARD) + work(REWARD)  # a stage may have several commands


def test_times_of_make_times_are_read(tmp_path):
    path = tmp_path / "times.csv"
    csv.writer(path.open("w")).writerows([["a@mini", 12.5], ["b@mini", 1.0]])
    assert plan.measured(path) == {"a@mini": 12.5} and plan.measured(tmp_path / "none.csv") == {}


def test_the_plan_counts_as_many_held_out_pairs_as_eq_2_has():
    pairs = "runs/paper/human/pairs"
    value = f"stages.value P {pairs}/preferences {pairs}/valid S O --seed 0"
    many, most, fewer = (work(value, data=PYTHIA["data"] | {"valid": n}).flops
                         for n in (4 * schema.HELD_OUT, schema.HELD_OUT, schema.HELD_OUT // 2))
    assert many == most > fewer

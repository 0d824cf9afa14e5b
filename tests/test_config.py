"""params.yaml is strict: every mistake is one line with the file, the key, what was expected and the nearest key."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from roads import config
from roads.stage import UserError

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def params(tmp_path):
    """Write params.yaml with one replacement and return its path."""

    def write(old="", new=""):
        assert TEXT.count(old) >= 1
        path = tmp_path / "params.yaml"
        path.write_text(TEXT.replace(old, new, 1) if old else TEXT, encoding="utf-8")
        return path

    return write


def test_the_file_in_the_repository_is_good(params):
    loaded = config.load(params())
    assert loaded.scale == "mini" and {"mini", "tiny", "real-cpu"} < set(loaded.scales)
    assert all(scales == ["mini"] for scales in loaded.figures.values())
    assert set(loaded.figures) == set(config.FIGURES) | set(config.SHARED) | set(config.APART)


def test_an_arm_is_its_scale_with_one_thing_changed():
    """mini and each of mini's arms: what differs is named in the arm's own lines, and nothing else does."""
    loaded = config.load(ROOT / "params.yaml")
    arms = {arm for arms in loaded.studies["mini"].values() for arm in arms}

    def differ(a: dict, b: dict, prefix="") -> set[str]:
        return {path for key in a for path in (differ(a[key], b[key], f"{prefix}{key}.") if isinstance(a[key], dict)
                                               else {prefix + key} if a[key] != b[key] else ())}

    changed = {arm: differ(loaded.scales["mini"].model_dump(), loaded.scales[arm].model_dump()) - {"policies"}
               for arm in arms}
    assert changed["mini-k2"] == {"source.slots", "source.candidates", "source.tau"}
    assert changed["mini-750"] == {"data.preferences", "data.online"}
    assert changed["mini-loader"] == {"dpo.shards"} and changed["mini-prompts"] == {"data.online"}
    assert changed["mini-author-code"] == (
        changed["mini-schedule"] | changed["mini-rm-batch"] | changed["mini-loader"])
    assert all(changed.values()), "an arm that changes nothing"


@pytest.mark.parametrize("old, new, message", [
    ("scale: mini", "scale: mni", "scale: no block named 'mni'; did you mean 'mini'?"),
    ("scale: mini", "scael: mini", "scael: unknown key; did you mean 'scale'?"),
    ("seeds: [0, 1, 2]", "seeds: []", "seeds: list should have at least 1 item"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1, 0]", "seeds: expected distinct values, got [0, 1, 0]"),
    ("seeds: [0, 1, 2]", "seeds: [0, -1]", "seeds.1: input should be greater than or equal to 0, got -1"),
    ("seeds: [0, 1, 2]", "seeds: [0, 1.5]", "seeds.1: input should be a valid integer, got 1.5"),
    ("beta: 0.05", "beta: 0", "mini.dpo.beta: input should be"),
    ("beta: 0.05", "beta: .nan", "mini.dpo.beta: input should be"),
    ("beta: 0.05", "bata: 0.05", "mini.dpo.bata: unknown key; did you mean 'beta'?"),
    ("beta: 0.05", 'beta: "0.05"', "mini.dpo.beta: input should be a valid number, got '0.05'"),
    ("    tau: ", "    taus: ", "mini.source.taus: unknown key; did you mean 'tau'?"),
    ("    karma_noise: 0.5\n", "", "mini.source.karma_noise: missing"),
    ("    kind: world", "    kind: wrold", "mini.source: input tag 'wrold'"),
    ("rouge: {n: 25", "rouge: {n: 1", "mini.samples.rouge.n: input should be greater than or equal to 2, got 1"),
    ("    human: {n: 2, temperature: 1.0, labels: annotators}\n", "", "mini.samples.human: missing"),
    ("    value: {n: 2, temperature: 1.0}\n", "", "mini.samples.value: missing"),
    ("labels: annotators", "labels: crowd", "mini.samples.human.labels: input should be 'annotators', 'judge' or"),
    ("more: 18000, online: 6000", "more: 0, online: 6001", "data.online: expected at most preferences + more"),
    ("best_of_n: 2000", "best_of_n: 5001", "data.best_of_n: expected at most test=5000, got 5001"),
    ("fig6: [mini-judge]", "fig6: [mini-juge]", "studies.mini.fig6: no block named 'mini-juge'; did you mean"),
    ("fig6: [mini-judge]", "fig6: [mini-k2]", "studies.mini.fig6: mini-k2 differs from mini in what SFT is made from"),
    ("fig6: [mini-judge]", "fig3: [mini-judge]", "studies.mini.fig3"),
    ("candidates: 2", "candidates: 13", "mini.source.candidates: expected 2 to words=12, got 13"),
    ("heads: 2", "heads: 3", "mini.model.heads: expected a divisor of hidden_size=64, got 3"),
    ("schedule: linear", "schedule: liner", "mini.local.schedule: input should be 'linear' or 'cosine', got 'liner'"),
    ("temperature: 0.01", "temperature: 0.0", "mini.samples.evaluate.temperature: input should be greater than 0"),
    ("data_from: src/roads/world.py", "data_from: data/tldr_sample", "data_from: expected src/roads/world.py"),
    ("attention: sdpa, sampler", "attention: flash, sampler", "mini.compute.attention: flash needs precision"),
    ("device: cpu", "device: tpu", "mini.compute.device: input should be 'cpu' or 'gpu', got 'tpu'"),
    ("micro_batch: null", "micro_batch: 0", "mini.machine.micro_batch: input should be greater than or equal to 1"),
    ("kind: new, hidden_size", "kind: new, revision: x, hidden_size", "mini.model.revision: unknown key"),
    ("model: &pythia {kind: pretrained,", "model: &pythia {kind: pretrained, nam: x,", "paper.model.nam: unknown key"),
    ("  base: null\n", "  base: {lr: 1.0, schedule: linear, batch_size: 1, epochs: 1}\n", "real.base: expected"),
    ("judge: {kind: gold}", "judge: {kind: gould}", "mini.judge: input tag 'gould'"),
    ("judge: {kind: gold}", "judge: null", "mini.judge: expected a block where there is samples.human"),
    ("model: gpt-4o-2024-08-06, prompt", "modle: gpt-4o-2024-08-06, prompt", "paper.judge.modle: unknown key"),
    ("data: {<<: *rehearsal-data, more: 0}", "data: {<<: *rehearsal-data, more: 8}",
     "rehearsal-two-word.data.more: expected 0 for two_word"),
    ("budget: 500.0", "budget: 0", "paper.spending.budget: input should be"),
    ("temperature: null, labels: rows", "temperature: 1.0, labels: rows", "paper.samples.human.temperature: expected"),
    ("temperature: null, labels: rows", "temperature: 1.0, labels: annotators", "paper.samples.human.labels: expected"),
    ("tasks: [human, rouge]", "tasks: [rouge]", "tasks: expected ['human', 'rouge'] for scale mini"),
    ("fig3: [mini]", "fig3: [tiny]", "figures: expected {'fig3': ['mini']"),
    ("worlds: [mini, mini-small", "worlds: [mini-small", "worlds: expected ['mini', 'mini-small'"),
    ("scale: mini", "scale: [", "params.yaml:"),
])  # fmt: skip
def test_a_mistake_is_named(params, old, new, message):
    path = params(old, new)
    with pytest.raises(UserError) as error:
        config.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}") and message in text and "\n" not in text


@pytest.mark.parametrize("scale", ["paper", "lite"])
def test_the_large_scales_have_all_of_the_papers_figures(params, scale):
    path = params()
    config.switch(scale, None, path)
    there = config.load(path)
    assert {f"fig{n}" for n in range(3, 13)} <= {name for name, scales in there.figures.items() if scales}
    assert there.data_from == "data/openai.json" and there.tasks == ["human", "rouge"]
    assert "." not in "".join(there.scales)  # DVC reads a dot in a name as a key below


def test_the_papers_recipe_is_that_of_its_tables():
    """Tables 2 to 4 and Appendix B: batch, lr, schedule, beta, lengths, temperatures."""
    paper = config.load(ROOT / "params.yaml").scales["paper"]
    table = [(it.batch_size, it.lr, it.schedule, it.epochs) for it in (paper.sft, paper.reward, paper.dpo, paper.local)]
    assert table == [(64, 3e-6, "cosine", 1)] * 2 + [(128, 3e-7, "linear", 1)] * 2
    assert (paper.dpo.beta, round(1 / paper.local.beta)) == (0.05, 53)
    samples = paper.samples
    assert (samples.online.n, samples.online.temperature, samples.evaluate.temperature) == (25, 0.1, 0.01)
    assert samples.online.logits_divided_by == samples.online.temperature
    assert (paper.source.max_query_tokens, paper.source.max_response_tokens, paper.data.test) == (512, 53, 600)


@pytest.mark.parametrize("name", ["../x", "a b", "$(touch owned)", "a;b", "a'b", "a.b", "-a", "1a", "a\n", "é", ""])
def test_a_block_has_a_name_that_no_shell_or_folder_takes_amiss(params, name):
    path = params("\nmini-timid: {", f"\n{json.dumps(name)}: {{")
    with pytest.raises(UserError) as error:
        config.load(path)
    said = f"{path}: {name!r}: expected a block name of letters, digits, _ and -, a letter first"
    assert str(error.value) == said
    if name == "a b":
        with pytest.raises(UserError, match=re.escape(said)):
            config.switch("tiny", None, path)
        with pytest.raises(UserError, match=re.escape(said)):
            config.switch(name, None, path)


@pytest.mark.parametrize("old, new", [
    ("scale: mini\n", "scale: $(x)\n"),
    ("studies:\n", "studies:\n  $(x): {}\n"),
    ("studies:\n  mini:\n", "studies:\n  $(x):\n"),
    ("fig6: [mini-judge]", "fig6: [$(x)]"),
    ("sizes: [mini,", "sizes: [$(x),"),
    ("worlds: [mini,", "worlds: [$(x),"),
    ("  fig6: [mini-judge]\n  fig12: ", "  fig6: [$(x)]\n  fig12: "),
    ("  fig3: [mini]", "  fig3: [$(x)]"),
])  # fmt: skip
def test_whatever_names_a_block_names_one_that_is_there(params, old, new):
    with pytest.raises(UserError, match=r"no block named '\$\(x\)'|expected .*mini.* for scale mini, got .*\$\(x\)"):
        config.load(params(old, new))


@pytest.mark.parametrize("name", ["../x", "$(touch owned)"])
def test_no_other_name_is_a_scale(name, params):
    command = [sys.executable, "-m", "roads.stages.data", "out", "--scale", name]
    done = subprocess.run(command, cwd=params().parent, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 2 and done.stderr.startswith(f"error: params.yaml: no block named {name!r}; ")
    assert done.stdout == "" and done.stderr.count("\n") == 1 and len(list(params().parent.iterdir())) == 1


def test_no_file_and_no_mapping(tmp_path):
    with pytest.raises(UserError, match="not found; run from the root"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        config.load(tmp_path / "params.yaml")


def test_switching_the_scale_keeps_comments_and_comes_back(params):
    path = params()
    config.switch("real-cpu", str(ROOT / "data/tldr_sample"), path)
    there = config.load(path)
    assert (there.scale, there.tasks, there.data_from) == ("real-cpu", ["rouge"], str(ROOT / "data/tldr_sample"))
    assert {name for name, scales in there.figures.items() if scales} == {"fig11"} and there.worlds == ["real-cpu"]
    assert not there.sizes and not any(there.arms.values())
    config.switch("real-cpu", None, path)
    assert config.load(path) == there  # its folder of posts stays while the scale does
    config.switch("mini", None, path)
    assert config.load(path) == config.load(ROOT / "params.yaml")
    config.switch("mini-k4", None, path)  # every arm is a scale
    assert {name for name, scales in config.load(path).figures.items() if scales} == set(config.FIGURES)
    comments = [line.split("#", 1)[1] for line in TEXT.splitlines() if "#" in line]
    assert all(comment in path.read_text(encoding="utf-8") for comment in comments)


@pytest.mark.parametrize("scale, data, message", [
    ("mini", "data/tldr_sample", "scale mini makes its own data"),
    ("real-cpu", "no/such/folder", "DATA=no/such/folder: not found; expected a folder with train.jsonl"),
    ("reel-cpu", None, "no block named 'reel-cpu'; did you mean 'real-cpu'?"),
])  # fmt: skip
def test_a_bad_switch_changes_nothing(params, scale, data, message):
    path = params()
    with pytest.raises(UserError, match=message):
        config.switch(scale, data, path)
    assert path.read_text(encoding="utf-8") == TEXT and len(list(path.parent.iterdir())) == 1


def test_the_command_line_says_it_in_one_line_and_exits_with_2(params):
    path = params("beta: 0.05", "bata: 0.05")
    command = [sys.executable, "-m", "roads.config", "check"]
    env = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: params.yaml: mini.dpo.bata: unknown key; did you mean 'beta'?\n"

"""params.yaml, figures.yaml and active.yaml are strict: every mistake is one line with the file, the key, what was
expected and the nearest key."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from roads import active, config
from roads.figures import figure, policies
from roads.stage import UserError

TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("params.yaml", "figures.yaml", "active.yaml")}


@pytest.fixture
def params(tmp_path):
    """Write the three files with one replacement in one of them; the path of params.yaml."""

    def write(old="", new="", file="params.yaml"):
        assert not old or TEXT[file].count(old) >= 1
        for name, text in TEXT.items():
            changed = text.replace(old, new, 1) if name == file and old else text
            (tmp_path / name).write_text(changed, encoding="utf-8")
        return tmp_path / "params.yaml"

    return write


def refused(read, path, named, message):
    """The files are refused in one line that begins with the name of one of them."""
    with pytest.raises(UserError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(str(named)) and message in text and "\n" not in text


def test_the_files_in_the_repository_are_good(params):
    loaded, now = config.load(params()), active.load(params())
    assert now.scale == "mini" and {"mini", "tiny", "real-cpu"} < set(loaded.scales)
    assert {name for name, scales in now.figures.items() if not scales} == {"rewards", "recipe_data"}  # of posts
    assert all(scales in ([], ["mini"]) for scales in now.figures.values())
    assert set(now.figures) == set(loaded.figures) and len(now.figures) == 35
    # What were 260 lines with 74 scales and arms: an arm is a line or two, and a scale no more than it has to say.
    assert len(TEXT["params.yaml"].splitlines()) <= 260 / 74 * (len(loaded.scales) + len(loaded.arms))
    assert not re.search(r"[&*]\w|<<:", TEXT["params.yaml"])
    assert all(isinstance(leaf, str | None) for leaf in leaves(now.model_dump()))  # names, never numbers


def leaves(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inside is None else [leaf for part in inside for leaf in leaves(part)]


def differ(a: dict, b: dict, prefix="") -> set[str]:
    return {path for key in a for path in (
        differ(a[key], b[key], f"{prefix}{key}.") if isinstance(a[key], dict) and a[key]
        else {prefix + key} if a[key] != b[key] else ())}


def test_an_arm_is_its_scale_with_what_its_line_says():
    loaded = config.load(ROOT / "params.yaml")
    ours = loaded.scales["mini"].model_dump(exclude={"arms", "policies"})
    changed = {name: differ(ours, cfg.model_dump(exclude={"arms", "policies"})) for name, cfg in loaded.arms.items()
               if name.startswith("mini.")}
    assert len(changed) == 104 and all(changed.values())
    assert changed["mini.fig10.k2"] == {"source.slots", "source.candidates", "source.tau", "base.epochs", "reward.lr",
                                        "reward.epochs"}
    assert changed["mini.fig12.n750"] == {"data.preferences", "data.online"}
    assert changed["mini.recipe.loader"] == {"dpo.shards"} and changed["mini.fig5.prompts"] == {"data.online"}
    assert changed["mini.recipe.author-code"] == (
        changed["mini.recipe.schedule"] | changed["mini.recipe.rm-batch"] | changed["mini.recipe.loader"])
    trained = {name: cfg.policies for name, cfg in loaded.arms.items()}
    assert trained["mini.fig5.prompts"] == ["online_sft"] and trained["mini.budget.warm"] == ["dpo", "online"]
    assert trained["mini.horizon.k4"] == ["dpo", "dpo_2x", "online"]
    assert config.load_scale("mini.horizon.k4", ROOT / "params.yaml") == loaded.arms["mini.horizon.k4"]


def test_a_new_arm_is_one_line_in_one_place(params):
    path = params("    horizon:  #", "    horizon:  #")
    line = "      k12: {source: {slots: 12"
    path.write_text(TEXT["params.yaml"].replace(line, "      k6: {source: {slots: 6}}\n" + line, 1), encoding="utf-8")
    active.write(None, None, path)
    now = active.load(path)
    assert now.arms["horizon"] == ["k4", "k6", "k12"] and "horizon.k6" in now.arms_from_world
    assert config.load_scale("mini.horizon.k6", path).source.slots == 6


@pytest.mark.parametrize("old, new, message", [
    ("default: [0, 1, 2]", "default: []", "seeds.default: list should have at least 1 item"),
    ("default: [0, 1, 2]", "default: [0, 1, 0]", "seeds.default: expected distinct values, got [0, 1, 0]"),
    ("default: [0, 1, 2]", "default: [0, -1]", "seeds.default.1: input should be greater than or equal to 0, got -1"),
    ("default: [0, 1, 2]", "default: [0, 1.5]", "seeds.default.1: input should be a valid integer, got 1.5"),
    ("{default: [0, 1, 2]", "{defalt: [0, 1, 2]", "seeds: expected a mapping with the key default, as {default:"),
    ("{default: [0, 1, 2]", "{default: [0], fig33: [1]", "seeds.fig33: unknown key; did you mean 'fig3'?"),
    ("mini.fig3:", "mini.fig33:", "seeds.mini.fig33: unknown key; did you mean 'mini.fig3'?"),
    ("seeds: {default", "seds: {default", "seds: unknown key; did you mean 'seeds'?"),
    ("epochs: 2, beta: 0.1", "epochs: 2, beta: 0", "mini.dpo.beta: input should be"),
    ("dpo: {lr: 1.0e-4", "dpo: {lr: 1.0e+300", "mini.dpo.lr: input should be less than or equal to 1, got 1e+300"),
    ("temperature: 0.1, logits", "temperature: 1.0e-300, logits", "mini.samples.online.temperature: input should be"),
    ("data: {base: 80000", "data: {base: 1000000000000000000000000000000", "mini.data.base: input should be less"),
    ("k2: {source: {slots: 2", "k2: {sizes: {60: {dpo: 2, reward: 1}}, source: {slots: 2", "mini.arms.fig10.k2.sizes: "
     "an arm of this figure has none"),
    ("epochs: 2, beta: 0.1", "epochs: 2, beta: .nan", "mini.dpo.beta: input should be"),
    ("epochs: 2, beta: 0.1", "epochs: 2, bata: 0.1", "mini.dpo.bata: unknown key; did you mean 'beta'?"),
    ("epochs: 2, beta: 0.1", 'epochs: 2, beta: "0.1"', "mini.dpo.beta: input should be a valid number, got '0.1'"),
    ("tau: 3.5", "taus: 3.5", "mini.source.taus: unknown key; did you mean 'tau'?"),
    ("tag_noise: 0.5, ", "", "mini.source.tag_noise: missing"),
    ("taste: [1.0, -1.0]", "taste: [0.0]", "mini.source.taste: expected a weight for each attribute, not all 0"),
    ("kind: world", "kind: wrold", "mini.source: input tag 'wrold'"),
    ("rouge: {n: 25", "rouge: {n: 1", "mini.samples.rouge.n: input should be greater than or equal to 2, got 1"),
    ("    human: {n: 2, temperature: 1.0, labels: annotators}\n", "", "mini.samples.human: missing"),
    ("    value: {n: 2, temperature: 1.0}\n", "", "mini.samples.value: missing"),
    ("labels: annotators", "labels: crowd", "mini.samples.human.labels: input should be 'annotators', 'judge' or"),
    ("more: 18000, online: 6000", "more: 0, online: 6001", "data.online: expected at most preferences + more"),
    ("best_of_n: 2000", "best_of_n: 5001", "data.best_of_n: expected at most test=5000, got 5001"),
    ("n750: {data: {preferences: 750, online", "n750: {data: {preferences: 750, onlin",
     "mini.arms.fig12.n750.data.onlin: unknown key; did you mean 'online'?"),
    ("n750: {data: {preferences: 750, online: 750}}", "n750: {sft: {lr: 1.0}}",
     "mini.arms.fig12.n750: differs from mini in what SFT is made from"),
    ("n750: {data: {preferences: 750, online: 750}}", "n750: {dpo: {beta: 0.1}}",
     "mini.arms.fig12.n750: changes nothing"),
    ("n750: {data", "750: {data", "mini.arms.fig12.750: "),
    ("    fig12:", "    fig3:", "mini.arms.fig3: no figure with arms"),
    ("    fig12:", "    fig21:", "mini.arms.fig21: no figure with arms; did you mean 'fig12'?"),
    ("  compute: {device: cpu", "  policies: [dpo]\n  compute: {device: cpu", "mini.policies: unknown key; an arm has"),
    ("\nmini:", "\ntasks:", "tasks: a key of active.yaml cannot name a scale"),
    ("seed: 3, subreddits", "seed: 1000000000000000000000000000000, subreddits",
     "mini.source.seed: input should be less than 4294967296"),
    ("hidden_size: 64", "hidden_size: 200000000", "mini.model.hidden_size: input should be less than"),
    ("  reward: {lr: 5.0e-4, schedule", "  reward: {layers: 3, lr: 5.0e-4, schedule",
     "reward.layers: expected at most model.layers=2"),
    ("hidden_size: 64", "hidden_size: 66", "mini.model.heads: expected heads of an even width"),
    ("batch_size: 128", "batch_size: 100000000000000000000000", "mini.base.batch_size: input should be less than"),
    ("candidates: 2", "candidates: 13", "mini.source.candidates: expected 2 to words=12, got 13"),
    ("heads: 2", "heads: 3", "mini.model.heads: expected a divisor of hidden_size=64, got 3"),
    ("schedule: linear", "schedule: liner", "mini.local.schedule: input should be 'linear' or 'cosine', got 'liner'"),
    ("temperature: 0.01", "temperature: 0.0", "mini.samples.evaluate.temperature: input should be greater"),
    ("attention: sdpa, sampler", "attention: flash, sampler", "mini.compute.attention: flash needs precision"),
    ("device: cpu", "device: tpu", "mini.compute.device: input should be 'cpu' or 'gpu', got 'tpu'"),
    ("micro_batch: null", "micro_batch: 0", "mini.machine.micro_batch: input should be greater than or equal to 1"),
    ("kind: new, hidden_size", "kind: new, revision: x, hidden_size", "mini.model.revision: unknown key"),
    ("model: {kind: pretrained,", "model: {kind: pretrained, nam: x,", "paper.model.nam: unknown key"),
    ("  base: null", "  base: {lr: 1.0, schedule: linear, batch_size: 1, epochs: 1}", "real.base: expected"),
    ("judge: {kind: gold}", "judge: {kind: gould}", "mini.judge: input tag 'gould'"),
    ("judge: {kind: gold}", "judge: none", "mini.judge: expected a block where there is samples.human"),
    ("model: gpt-4o-2024-08-06, prompt", "modle: gpt-4o-2024-08-06, prompt", "paper.judge.modle: unknown key"),
    ("data: {more: 0, valid: 600", "data: {more: 8, valid: 600",
     "paper.arms.fig10.two-word.data.more: expected 0 for two_word"),
    ("budget: 500.0", "budget: 0", "paper.spending.budget: input should be"),
    ("temperature: null, labels: rows", "temperature: 1.0, labels: rows", "paper.samples.human.temperature: expected"),
    ("temperature: null, labels: rows", "temperature: 1.0, labels: annotators", "paper.samples.human.labels: expected"),
    ("seeds: {", "seeds: [", "params.yaml:"),
])  # fmt: skip
def test_a_mistake_is_named(params, old, new, message):
    path = params(old, new)
    refused(config.load, path, path, message)


@pytest.mark.parametrize("old, new, message", [
    ("scale: mini", "scale: mni", "scale: no block named 'mni'; did you mean 'mini'?"),
    ("scale: mini", "scael: mini", "scael: unknown key; did you mean 'scale'?"),
    ("scale: mini", "scale: $(x)", "scale: no block named '$(x)'"),
    ("tasks: [human, rouge]", "tasks: [rouge]", "tasks: expected ['human', 'rouge'] for scale mini"),
    ("fig3: [mini]", "fig3: [tiny]", "figures: expected {'fig3': ['mini']"),
    ("fig6: [judge, noisy]", "fig6: [$(x)]", "arms: expected {'fig5': ['prompts'"),
    ("sizes: [mini, ", "sizes: [tiny, ", "sizes: expected ['mini', 'mini.fig9.small'"),
    ("graph: [s0, s1, s2]", "graph: [s0, s1, s3]", "run_seeds: expected {'graph': ['s0', 's1', 's2']"),
    ("graph: [s0, s1, s2]", "graph: [0, 1, 2]", "run_seeds.graph.0: input should be a valid string, got 0"),
    ("data_from: null", "data_from: data/tldr_sample", "data_from: expected null for scale mini"),
])  # fmt: skip
def test_an_active_yaml_that_does_not_follow_is_named(params, old, new, message):
    path = params(old, new, "active.yaml")
    refused(active.load, path, path.with_name("active.yaml"), message)
    active.write("mini", None, path)
    assert path.with_name("active.yaml").read_text(encoding="utf-8") == TEXT["active.yaml"]


@pytest.mark.parametrize("old, new, message", [
    ("module: policies", "module: polices", "fig3.module: no module 'polices'; did you mean 'policies'?"),
    ("task: rouge", "task: rogue", "fig11.task: input should be 'human' or 'rouge', got 'rogue'"),
    ("borrows: [fig12]", "borrows: [fig11]", "more_data.borrows: no figure with arms 'fig11'; did you mean 'fig1"),
    ("policies: [online_sft]", "polices: [online_sft]", "fig5.polices: unknown key; did you mean 'policies'?"),
    ("fig3:\n", "$(x):\n", "'$(x)': expected a name of letters, digits, _ and -, a letter first"),
])  # fmt: skip
def test_a_mistake_in_the_table_of_figures_is_named(params, old, new, message):
    path = params(old, new, "figures.yaml")
    refused(config.load, path, path.with_name("figures.yaml"), message)


def test_a_figure_may_have_seeds_of_its_own(params):
    path = params("{default: [0, 1, 2]", "{default: [0, 1, 2], horizon: [0, 1, 2, 7], fig11: [3]")
    active.write(None, None, path)
    now = active.load(path)
    assert now.figure_seeds["horizon"] == ["s0", "s1", "s2", "s7"] and now.figure_seeds["fig11"] == ["s3"]
    assert now.run_seeds["verifier"] == ["s0", "s1", "s2"] and now.run_seeds["horizon"] == ["s0", "s1", "s2", "s7"]
    assert now.run_seeds["graph"] == ["s0", "s1", "s2", "s3", "s7"]
    # Those of Figs 3 and 7 beyond the graph's are one process each; only mini has them.
    ten = [f"s{seed}" for seed in range(10)]
    assert now.figure_seeds["fig3"] == now.run_seeds["fig10"] == ten and now.more == "human/more"
    assert now.run_seeds["more"] == ["s4", "s5", "s6", "s8", "s9"]
    active.write("tiny", None, path)
    now = active.load(path)
    assert now.figure_seeds["fig3"] == ["s0", "s1", "s2"] and now.run_seeds["more"] == [] and now.more == "sft"


@pytest.mark.parametrize("scale", ["paper", "lite"])
def test_the_large_scales_have_all_of_the_papers_figures(params, scale):
    path = params()
    active.write(scale, None, path)
    there = active.load(path)
    assert {f"fig{n}" for n in range(3, 13)} <= {name for name, scales in there.figures.items() if scales}
    assert there.data_from == "data/openai.json" and there.tasks == ["human", "rouge"]


def test_the_second_size_of_the_paper_is_one_command(params):
    """Figs 3, 5 and 7 at 2.8B: `make sizes sizes_judges`, with all but the model and Fig 5's prompts the same."""
    loaded = config.load(params())
    own, large = loaded.scales["paper"], loaded.arms["paper.sizes.p2800m"]
    changed = differ(own.model_dump(exclude={"arms"}), large.model_dump(exclude={"arms"}))
    assert changed == {"model.name", "model.parameters"} and large.policies == own.policies
    prompts = loaded.arms["paper.sizes.p2800m-prompts"]
    assert prompts.data.online == loaded.arms["paper.fig5.prompts"].data.online and prompts.model == large.model
    found = active.follow("paper", None, loaded)
    assert found.figures["sizes"] == found.figures["sizes_judges"] == ["paper"]
    assert {"sizes.p2800m", "sizes.p2800m-prompts"} <= set(found.arms_with_sft)


def test_real_has_all_of_the_papers_figures_and_a_dial_of_its_own():
    """At scale real the arms of Fig 9 are reward models alone, on the SFT checkpoint of the scale."""
    params = config.load(ROOT / "params.yaml")
    for scale in ("real", "real-tiny"):
        found = active.follow(scale, "data/tldr", params)
        assert all(found.figures[name] == [scale] for name in (*(f"fig{n}" for n in range(3, 13)), "rewards"))
        assert found.fig9_rewards and not found.fig9_models and found.sizes == [scale]
        assert not [name for name in found.arms_with_sft if name.startswith("fig9.")]
    mini = active.follow("mini", None, params)
    assert mini.fig9_models == mini.arms["fig9"] and not mini.fig9_rewards and not mini.figures["rewards"]


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


def test_the_papers_fig_10():
    """B.1, B.4: five tokens, every prompt of the preference set, winrates on 6,000 posts."""
    params = config.load(ROOT / "params.yaml")
    for scale in ("paper", "lite"):
        own, arm = params.scales[scale], params.arms[f"{scale}.fig10.two-word"]
        assert arm.data.preferences == arm.data.online == own.data.preferences and arm.data.test == 6000
        assert arm.source.max_preference_tokens == 5 and arm.judge.prompt == "two_word"


@pytest.mark.parametrize("name", ["../x", "a b", "$(touch owned)", "a;b", "a'b", "a.b", "-a", "1a", "a\n", "é", ""])
def test_a_block_has_a_name_that_no_shell_or_folder_takes_amiss(params, name):
    path = params("\nreal-cpu:", f"\n{json.dumps(name)}:")
    with pytest.raises(UserError) as error:
        config.load(path)
    said = f"{path}: {name!r}: expected a block name of letters, digits, _ and -, a letter first"
    assert str(error.value) == said
    if name == "a b":
        with pytest.raises(UserError, match=re.escape(said)):
            active.write("tiny", None, path)
        with pytest.raises(UserError, match=re.escape(said)):
            active.write(name, None, path)


@pytest.mark.parametrize("name", ["a b", "$(x)", "a.b", "1a"])
def test_an_arm_has_such_a_name_too(params, name):
    with pytest.raises(UserError, match=r"mini.arms.fig12: .*expected a name of letters, digits, _ and -"):
        config.load(params("      n750: {", f"      {json.dumps(name)}: {{"))


@pytest.mark.parametrize("name", ["../x", "$(touch owned)"])
def test_no_other_name_is_a_scale(name, params):
    command = [sys.executable, "-m", "roads.stages.data", "out", "--scale", name]
    done = subprocess.run(command, cwd=params().parent, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 2 and done.stderr.startswith(f"error: params.yaml: no block named {name!r}; ")
    assert done.stdout == "" and done.stderr.count("\n") == 1 and len(list(params().parent.iterdir())) == 3


def test_what_is_no_file_is_one_line_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it: a reader would wait for ever
    for name in ("folder", "fifo"):
        with pytest.raises(UserError, match=f"{name}: expected a file"):
            config.load(tmp_path / name)


@pytest.mark.parametrize("value, said", [
    ("2020-13-45", "month must be in 1..12"), ("9" * 5000, "4300 digits"), ("!!int x", "invalid literal for int"),
    ("!!bool x", "KeyError 'x'"), ("!!float x", "could not convert string"), ("!foo 1", "tag '!foo'")])  # fmt: skip
def test_a_value_that_is_not_what_its_form_says_is_named_by_its_line(params, value, said):
    line = TEXT["params.yaml"].split("seed: ")[0].count("\n") + 1
    path = params("seed: 3", f"seed: {value}")
    with pytest.raises(UserError) as error:
        active.write("tiny", None, path)
    assert str(error.value).startswith(f"{path}:{line}: not YAML: ") and said in str(error.value)


def test_a_few_aliases_for_millions_of_values_are_shown_short(params):
    rows = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    old = re.search(r"^seeds: .*?\}", TEXT["params.yaml"], re.M | re.S)[0]
    path = params(old, f"seeds:\n  a0: &a0 [x, x]\n{rows}  default: [*a8]")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"seeds.a0: unknown key"):
        config.load(path)
    path = params("schedule: cosine", "schedule: *a8")
    path.write_text(f"x:\n  a0: &a0 [x, x]\n{rows}" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError) as error:
        config.load_scale("mini", path)
    assert len(str(error.value)) < 1000 and time.monotonic() - start < 5


def test_no_file_and_no_mapping(tmp_path):
    with pytest.raises(UserError, match="not found; run from the root"):
        config.load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        config.load(tmp_path / "params.yaml")


def test_switching_the_scale_writes_active_yaml_alone_and_comes_back(params):
    path = params()
    active.write("real-cpu", str(ROOT / "data/tldr_sample"), path)
    there = active.load(path)
    assert (there.scale, there.tasks, there.data_from) == ("real-cpu", ["rouge"], str(ROOT / "data/tldr_sample"))
    assert {name for name, scales in there.figures.items() if scales} == {"fig11"}
    assert there.from_posts == ["real-cpu"] and not there.from_world and not any(there.arms.values())
    active.write("real-cpu", None, path)
    assert active.load(path) == there  # its folder of posts stays while the scale does
    active.write("mini", None, path)
    assert {name: path.with_name(name).read_text(encoding="utf-8") for name in TEXT} == TEXT


def test_an_active_yaml_of_any_kind_is_written_anew_where_a_scale_is_named(params):
    path = params()
    place = path.with_name("active.yaml")
    for text in ("<<<<<<< ours\nscale: mini\n", "scale: [", "", None):
        place.unlink(missing_ok=True)
        if text is not None:
            place.write_text(text)
        with pytest.raises(UserError, match="active.yaml.*; `make FIGURE SCALE=mini`, or another scale, writes it"):
            active.write(None, None, path)
        active.write("mini", None, path)
        assert place.read_text(encoding="utf-8") == TEXT["active.yaml"]


def test_bars_of_one_name_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    bar = figure.Bar("DPO n=60", "mini/fig12/n60/s{seed}")
    with pytest.raises(UserError, match="fig12: two arms have the bar 'DPO n=60'; let them differ in what the figure"):
        figure.read("fig12", tmp_path, [bar, figure.Bar("DPO n=60", "mini/fig12/bold/s{seed}")], [0], [])
    arms = config.load().arms_of("mini", "fig9")
    with pytest.raises(UserError, match="sizes: arms 'small' and 'deep' are both 'width 32'"):
        policies.size_bars("mini", arms | {"deep": arms["small"]})
    with pytest.raises(UserError, match="sizes: arms 'of the scale' and 'same' are both 'width 64'"):
        policies.size_bars("mini", {"same": config.load_scale("mini")})
    fig5 = config.load().arms_of("mini", "fig5")
    with pytest.raises(UserError, match="fig5: arms 'prompts' and 'again' are both 'Online.SFT. 3x prompts'"):
        policies.arm_bars("mini", "fig5", fig5 | {"again": fig5["prompts"]})


def test_data_that_stage_data_could_not_read_is_found_before_anything_is_written(params, tmp_path):
    path, before = params(), params().with_name("active.yaml").read_bytes()
    (tmp_path / "posts").mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / "posts" / name).touch()
    with pytest.raises(UserError, match=r"^DATA=.*posts: no test.jsonl in it; expected a folder with train.jsonl"):
        active.write("real-cpu", str(tmp_path / "posts"), path)
    with pytest.raises(UserError, match=r"^DATA=.*posts: no train.jsonl.xz in it"):
        active.write("real-tiny", str(tmp_path / "posts"), path)
    with pytest.raises(UserError, match=r"^DATA=.*posts: not found; expected a file that says what to download"):
        active.write("lite", str(tmp_path / "posts"), path)
    assert path.with_name("active.yaml").read_bytes() == before


@pytest.mark.parametrize("scale, data, message", [
    ("mini", "data/tldr_sample", "scale mini makes its own data"),
    ("real-cpu", "no/such/folder", "DATA=no/such/folder: not found; expected a folder with train.jsonl"),
    ("reel-cpu", None, "no block named 'reel-cpu'; did you mean 'real-cpu'?"),
])  # fmt: skip
def test_a_bad_switch_changes_nothing(params, scale, data, message):
    path = params()
    with pytest.raises(UserError, match=message):
        active.write(scale, data, path)
    assert {file.name: file.read_text(encoding="utf-8") for file in path.parent.iterdir()} == TEXT


def test_the_command_line_says_it_in_one_line_and_exits_with_2(params):
    path = params("epochs: 2, beta: 0.1", "epochs: 2, bata: 0.1")
    command = [sys.executable, "-m", "roads.active", "check"]
    env = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: params.yaml: mini.dpo.bata: unknown key; did you mean 'beta'?\n"


@pytest.mark.parametrize("text", ["data_from: 3", "data_from: [a]", ""])
def test_a_data_from_that_is_none_is_written_anew(params, text):
    path = params()
    active.write("real-cpu", None, path)
    good = path.with_name("active.yaml").read_text(encoding="utf-8")
    bad = re.sub(r"^data_from: .*\n", f"{text}\n", good, flags=re.M)
    path.with_name("active.yaml").write_text(bad, encoding="utf-8")
    with pytest.raises(UserError, match=r"active.yaml: data_from: "):
        active.load(path)
    active.write("real-cpu", None, path)
    assert path.with_name("active.yaml").read_text(encoding="utf-8") == good


def test_a_full_disk_leaves_nothing_half_written(params, monkeypatch):
    path, before = params(), params().with_name("active.yaml").read_bytes()

    def full(self, *_, **__):
        Path(self).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        active.write("tiny", None, path)
    assert path.with_name("active.yaml").read_bytes() == before
    assert not [other for other in path.parent.iterdir() if "writing" in other.name]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "params.yaml").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"params.yaml: input/output error; expected the keys seeds"):
        config.load(tmp_path / "params.yaml")

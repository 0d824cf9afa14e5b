"""What would stop a run hours later is one line before it starts."""

import importlib.util
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT
from fake_openai import Fake

from roads import active, config
from roads.figures.check import check
from roads.runner import preflight, repro
from roads.stage import LAUNCH, UserError

H100, L4 = (81559, "580.65.06"), (23034, "580.65.06")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with vLLM, room on its disk and these GPUs, as a real nvidia-smi on PATH has it: (MiB, driver) each."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name == "vllm" or found(name, *more))
    monkeypatch.delenv(LAUNCH, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))

    def with_gpus(*gpus):
        rows = "\n".join(f"{i}, GPU-{i}f00-ba, NVIDIA of the test, {memory}, {driver}"
                         for i, (memory, driver) in enumerate(gpus))
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<END\n{rows}\nEND\n" if gpus else "#!/bin/sh\necho 'No devices'; exit 9\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return with_gpus


def stages(scale: str, module: str = "sft", name: str = "sft") -> dict[str, str]:
    return {f"{name}@{scale}": f"python -m roads.{module} runs/{scale}/data runs/{scale}/base runs/{scale}/{name} "
                               f"--scale {scale} --seed 0"}


@pytest.fixture
def params(monkeypatch):
    monkeypatch.chdir(ROOT)
    return config.load()


def test_a_world_needs_nothing(machine, params):
    machine()
    preflight.check(stages("mini"), params, "mini")


@pytest.mark.parametrize("flags, said", [("sse2 avx512f", True), ("sse2 avx512_bf16", False), ("amx_bf16", False)])
def test_a_cpu_that_does_not_multiply_bf16_is_told(machine, params, monkeypatch, tmp_path, capsys, flags, said):
    machine()
    (tmp_path / "cpuinfo").write_text(f"model name\t: of the test\nflags\t\t: {flags}\n")
    monkeypatch.setattr(preflight, "CPUINFO", tmp_path / "cpuinfo")
    preflight.check(stages("mini"), params, "mini")
    assert not capsys.readouterr().err
    monkeypatch.setattr(preflight, "_check_hub", lambda models: None)  # its weights are a package's
    monkeypatch.setattr(preflight.hub, "installed", lambda *_: None)
    preflight.check(stages("real-short"), params, "real-short")
    message = "real-short: compute.precision: bf16, and this CPU does not multiply it (no AVX-512 BF16, no AMX)"
    assert capsys.readouterr().err.startswith(message) == said


@pytest.mark.parametrize("gpus, scale, message", [
    ((), "lite", "scale lite needs an NVIDIA GPU and nvidia-smi shows none; run the image with `--gpus all`"),
    ((), "real", "needs none; with compute: .* these stages would take about [0-9,]+ hours on [0-9]+ cores"),
    (((81559, "550.1"),), "lite", "NVIDIA driver 550: CUDA 13 needs 580 or newer"),
    ((L4,), "paper", r"paper: training 1.4e9 parameters takes 26 GiB of a GPU and the smallest here has 22"),
    ((H100,), "paper.fig9.p6900m", "training 6.9e9 parameters takes 128 GiB .* LAUNCH=8-gpu-fsdp"),
])
def test_the_wrong_gpu_is_one_line(machine, params, gpus, scale, message):
    machine(*gpus)
    with pytest.raises(UserError, match=message) as error:
        preflight.check(stages(scale), params, "mini")
    assert "\n" not in str(error.value)


def test_the_right_gpu_is_not(machine, params):
    machine(H100, H100)
    preflight.check(stages("paper") | stages("paper.fig9.p2800m"), params, "mini")


def test_small_models_share_a_gpu_and_large_ones_do_not(machine, params, monkeypatch):
    real, paper, lite = (params.scales[name] for name in ("real", "paper", "lite"))
    machine(H100)
    assert [preflight.stages_per_gpu(cfg, [cfg], None) for cfg in (real, lite, paper)] == [4, 2, 1]
    assert preflight.stages_per_gpu(real, [real, paper], None) == 1  # the largest model that will run
    assert preflight.stages_per_gpu(real, [real], 6) == 6
    assert preflight.stages_per_gpu(params.scales["mini"], [], 9) == 1
    machine(H100, H100)
    assert preflight.stages_per_gpu(real, [real], 6) == 3  # JOBS, over both
    machine((24 * 1024, "580.65"))
    many = real.model_copy(update={"machine": real.machine.model_copy(update={"stages_per_gpu": 40})})
    with pytest.raises(UserError, match=r"stages_per_gpu: 40 stages on a GPU take \d+ GiB .* has 24; \d+ of them"):
        preflight.stages_per_gpu(many, [many], None)
    with pytest.raises(UserError, match=r"JOBS=30: 30 stages on a GPU take \d+ GiB of it"):
        preflight.stages_per_gpu(real, [real], 30)
    monkeypatch.setenv(LAUNCH, str(ROOT / "configs/accelerate/8-gpu.yaml"))
    assert preflight.stages_per_gpu(real, [real], None) == 1  # each trains on all of them


@pytest.mark.parametrize("file, old, new, figure, message", [
    ("params.yaml", "judge: {samples: {human: {temperature: 0.5, labels: judge}}}", "judge: {policies: [dpo], samples: "
     "{human: {temperature: 0.5, labels: judge}}}", "fig6", r"params.yaml: tiny.arms.fig6.judge.policies: expected "
     r"online_sft among them, which figure fig6 shows; got \['dpo'\]"),
    ("figures.yaml", "fig3:", "gap13: {title: A gap, module: policies, task: human, reads: [human/scores]}\nfig3:",
     "gap13", "figures.yaml: gap13.module: policies draws fig3, .*, and not gap13; teach it, or name another"),
    ("params.yaml", "      two: {sizes: {60:", "      one: {dpo: {beta: 0.2}, sizes: {60: {dpo: 2, reward: 1}}}\n"
     "      two: {sizes: {60:", "learnt", None),
    ("params.yaml", "recipe: {loader: {dpo: {shards: 8}}}", "recipe: {paper: {dpo: {shards: 8}}}", "recipe",
     "recipe: arms 'of the scale' and 'paper' are both 'paper'; let them differ"),
])
def test_a_figure_that_cannot_be_drawn_is_said_before_its_arms_train(tmp_path, monkeypatch, file, old, new, figure,
                                                                    message):
    for name in ("params.yaml", "figures.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        head, tiny, rest = text.partition("\ntiny:") if name == "params.yaml" else ("", "", text)
        assert name != file or old in rest
        (tmp_path / name).write_text(head + tiny + (rest.replace(old, new, 1) if name == file else rest), "utf-8")
    monkeypatch.chdir(tmp_path)
    found = config.load()
    if message is None:
        return check([figure], "tiny", found)
    with pytest.raises(UserError, match=message):
        check([figure], "tiny", found)


def test_every_figure_of_every_scale_can_be_drawn(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = config.load()
    for scale in ("mini", "real", "paper"):
        check([name for name, scales in active.follow(scale, None, found).figures.items() if scales], scale, found)


@pytest.mark.parametrize("module", ["anatomy", "limits"])
def test_a_world_too_large_to_list_is_one_line(machine, params, monkeypatch, module):
    machine()
    large = params.scales["mini"].source.model_copy(update={"slots": 10, "candidates": 4})
    monkeypatch.setitem(params.scales, "mini", params.scales["mini"].model_copy(update={"source": large}))
    with pytest.raises(UserError, match=r"mini.source: 4\^10 summaries of 5000 prompts cannot be listed in \d+ GiB"):
        preflight.check(stages("mini", f"stages.{module}"), params, "mini")
    preflight.check(stages("mini", "stages.arm"), params, "mini")


def test_vllm_that_is_not_there_is_one_line(machine, params, monkeypatch):
    machine(H100)
    lite = params.scales["lite"]
    compute = lite.compute.model_copy(update={"sampler": "vllm"})
    monkeypatch.setitem(params.scales, "lite", lite.model_copy(update={"compute": compute}))
    mini = params.scales["mini"]  # on a CPU too
    monkeypatch.setitem(params.scales, "mini", mini.model_copy(update={
        "compute": mini.compute.model_copy(update={"sampler": "vllm"})}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for scale in ("lite", "mini"):
        with pytest.raises(UserError, match=f"{scale}: compute.sampler: vllm, and the package vllm is not there"):
            preflight.check(stages(scale), params, "mini")


def test_stages_share_out_the_gpus(machine, params, monkeypatch):
    machine(*[H100] * 8)
    paper = params.scales["paper"]
    assert repro.workers(paper, None) == (8, list("01234567")) and repro.workers(paper, 3)[0] == 3
    pairs = paper.model_copy(update={"machine": paper.machine.model_copy(update={"tensor_parallel": 2})})
    assert repro.workers(pairs, None) == (4, ["0,1", "2,3", "4,5", "6,7"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f00,9")  # the last is not there
    assert repro.workers(paper, None) == (2, ["5", "GPU-7f00"])
    monkeypatch.setenv(LAUNCH, "configs/accelerate/8-gpu.yaml")
    assert repro.workers(paper, None) == (1, [])
    assert repro.workers(params.scales["mini"], 3) == (3, [])
    machine(H100)
    monkeypatch.delenv(LAUNCH)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert repro.workers(params.scales["real"], None, 4) == (4, ["0"] * 4)


def test_results_whose_models_are_elsewhere_are_not_begun_anew(machine, params, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports/mini").mkdir(parents=True)
    (tmp_path / "reports/mini/machine.txt").write_text("gpus: NVIDIA H100\n")
    with pytest.raises(UserError, match="its models are on the machine that reports/mini/machine.txt names"):
        preflight.check({}, params, "mini")
    (tmp_path / "runs/mini/sft").mkdir(parents=True)
    (tmp_path / "runs/mini/sft/model.safetensors").touch()
    preflight.check({}, params, "mini")


def test_launch_is_looked_at(machine, params, monkeypatch, tmp_path):
    machine(H100)
    monkeypatch.setenv(LAUNCH, str(ROOT / "configs/accelerate/8-gpu.yaml"))
    with pytest.raises(UserError, match="LAUNCH asks for 8 GPUs and there are 1"):
        preflight.check(stages("paper"), params, "mini")
    monkeypatch.setenv(LAUNCH, str(ROOT / "configs/accelerate/9-gpu.yaml"))
    with pytest.raises(UserError, match="9-gpu.yaml: not found; LAUNCH is one of: .*8-gpu"):
        preflight.check(stages("paper"), params, "mini")
    machine(*[H100] * 8)
    monkeypatch.setenv(LAUNCH, str(ROOT / "configs/accelerate/8-gpu-fsdp.yaml"))
    preflight.check(stages("paper.fig9.p6900m"), params, "mini")  # an eighth of it on each


def test_only_the_gpus_that_may_be_used_count(machine, params, monkeypatch):
    machine(H100, L4)
    h100, l4 = (card.memory for card in preflight.cards())
    for visible, memory in {"1": [l4], "1,0": [l4, h100], "GPU-1f00": [l4], "-1": [], "0,7,1": [h100],
                            "GPU-9": [], "MIG-4c": [h100]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [card.memory for card in preflight.cards()] == memory, visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="nvidia-smi shows none"):
        preflight.check(stages("lite"), params, "mini")


def test_a_disk_too_small_is_one_line(machine, params, monkeypatch):
    machine(H100)
    monkeypatch.setattr(preflight, "_links", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9))
    with pytest.raises(UserError, match="these stages write about 11 GB, DVC's cache included, and 3 GB are free"):
        preflight.check(stages("paper"), params, "mini")
    monkeypatch.setattr(preflight, "_links", lambda: True)  # then there is one copy
    with pytest.raises(UserError, match="these stages write about 5.7 GB, DVC's cache included, and 3 GB are free"):
        preflight.check(stages("paper"), params, "mini")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6e9))
    preflight.check(stages("paper"), params, "mini")


def test_links_are_those_of_dvcs_own_settings_or_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system = pytest.importorskip("dvc_objects.fs.system")

    def no(source, target):
        raise OSError("no such call")

    monkeypatch.setattr(system, "reflink", no)
    assert not preflight._links()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config.local").write_text("[cache]\n    type = hardlink,copy\n")
    assert preflight._links()
    (tmp_path / ".dvc/config.local").unlink()
    monkeypatch.setattr(system, "reflink", lambda source, target: None)
    assert preflight._links() and sorted(path.name for path in tmp_path.iterdir()) == [".dvc"]


def test_a_gpu_that_shares_the_systems_memory_has_that(machine):
    machine(("[N/A]", "580.95.05"))
    (card,) = preflight.cards()
    assert card.driver == 580 and 1e9 < card.memory < 1e14


def test_what_is_free_is_told_in_its_own_unit(machine, params, monkeypatch):
    machine(H100)
    monkeypatch.setattr(preflight, "_links", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e6))
    with pytest.raises(UserError, match="these stages write about 1.6 GB, .*, and 3 MB are free"):
        preflight.check(stages("lite"), params, "lite")


@pytest.mark.parametrize("name", ["runs", "reports", ".dvc/cache"])
def test_a_file_in_a_folders_place_is_one_line(machine, params, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"^{name}: expected a folder; move that file away"):
        preflight.check(stages("mini"), params, "mini")


# The judge is the one of scale rehearsal, behind a server of ours; the stage is one that asks it.
ASKS = {"scores@rehearsal-human-dpo-0": "python -m roads.stages.evaluate runs/rehearsal/human/completions/dpo/s0 "
                                        "runs/rehearsal/data OUT --scale rehearsal --task human"}


@pytest.mark.parametrize("address, key, message", [
    (None, "k", "no 'gpt-4o-2024-08-06'; it has some-other-model"),
    ("http://127.0.0.1:9/v1", "k", r"127.0.0.1:9: the judge does not answer \(no connection"),
    ("127.0.0.1", "k", "OPENAI_BASE_URL: expected http://HOST:PORT/v1"),
    ("https://judge.example.org/v1", "", "OPENAI_API_KEY is not set"),
])
def test_a_judge_that_is_not_there_is_one_line(params, monkeypatch, address, key, message):
    with Fake(models=["some-other-model"]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", address or server.url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=message) as error:
            preflight.check(ASKS, params, "mini")
        assert "\n" not in str(error.value) and not server.asked


def test_a_judge_that_is_there_is_asked_nothing(params, monkeypatch):
    with Fake() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        preflight.check(ASKS, params, "mini")
        assert not server.asked
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    preflight.check(stages("rehearsal"), params, "mini")  # this one asks nobody


def test_a_model_that_is_nowhere_is_one_line(machine, params, monkeypatch):
    machine(H100)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="EleutherAI/pythia-1.4b-deduped"):
        preflight.check(stages("paper", "base", "base"), params, "mini")


def test_a_launch_that_names_no_number_of_processes_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\n")
    monkeypatch.setenv(LAUNCH, str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match="mine.yaml: num_processes: expected how many processes train together"):
        preflight.launched()

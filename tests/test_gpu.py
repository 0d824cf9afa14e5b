"""What needs a CUDA GPU: `make test-gpu`. Every stage there against the CPU; memory that does not suffice; NCCL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ENV as WITHOUT_PACKAGES
from conftest import ROOT

from roads import generate_tree, model, packed, schema, stage, train
from roads.tldr import EOS, PAD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PATHS = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]  # a bare machine's packages are named there
ENV = WITHOUT_PACKAGES | {"PYTHONPATH": os.pathsep.join(PATHS)}
IDS = {"vocab_size": 320, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "max_position_embeddings": 512}
CONFIGS = {
    "neox": transformers.GPTNeoXConfig(hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                                       intermediate_size=512, rotary_pct=0.25, **IDS),
    "llama": transformers.LlamaConfig(hidden_size=576, num_hidden_layers=3, num_attention_heads=9,
                                      num_key_value_heads=3, intermediate_size=1024, **IDS),
}  # fmt: skip


def new(name: str, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa", **options)


def pairs(count: int):
    """Rows of as many lengths as real ones have."""
    draw = torch.Generator().manual_seed(1)

    def side(width: int, left: bool):
        rows = torch.full((count, width), PAD)
        for row, length in zip(rows, torch.randint(2, width + 1, (count,), generator=draw).tolist(), strict=True):
            own = torch.randint(2, 320, (length,), generator=draw)
            if not left:
                own[-1] = EOS
            row[width - length if left else 0 : width if left else length] = own
        return rows

    return side(300, True), side(40, False), side(40, False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Outputs of every stage at tiny; on the GPU each reads what the CPU wrote."""
    place = tmp_path_factory.mktemp("stages")

    def run(device: str, precision: str, *more) -> Path:
        out = place / f"{device}-{precision}"
        if not out.exists():
            out.mkdir()
            done = subprocess.run([sys.executable, ROOT / "tests/device.py", "none", out, "--device", device,
                                   "--precision", precision, *more], cwd=out, capture_output=True, text=True, env=ENV)
            assert done.returncode == 0, done.stderr[-4000:]
        return out

    return run


def read(out: Path, name: str) -> dict:
    return stage.read_json(out / name / "metrics.json")


@pytest.mark.parametrize("precision, near", [("fp32", 2e-3), ("bf16", 0.05)])
def test_every_stage_has_the_numbers_of_the_cpu(stages, precision, near):
    cpu = stages("cpu", "fp32")
    gpu = stages("cuda", precision, "--reads", str(cpu))
    for name in ("base", "sft", "reward", "dpo", "local", "online"):
        ours, theirs = read(gpu, name)["loss"], read(cpu, name)["loss"]
        assert ours == pytest.approx(theirs, rel=near, abs=near), name
    for name in ("candidates", "online_candidates", "best", "completions"):
        drawn = [np.load(out / name / "completions.npz")["completions"] for out in (gpu, cpu)]
        same = (drawn[0] == drawn[1]).all(-1).mean()
        print(f"{name}, {precision}: {same:.1%} of the completions are the CPU's")
        assert same > (0.97 if precision == "fp32" else 0.7), name
    for kind in ("reward", "local", "dpo"):
        ours, theirs = (read(out, f"likelihood-{kind}")["log_loss"] for out in (gpu, cpu))
        assert ours == pytest.approx(theirs, rel=near), kind


@pytest.mark.parametrize("name", CONFIGS)
def test_completions_are_those_of_the_cpu(name):
    net, draw = new(name).eval(), torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 320, (length,), generator=draw) for length in (200, 180, 90, 33, 7, 1)]
    draws = torch.rand(len(prompts), 20, 10, dtype=torch.double, generator=draw)

    def grow(net):
        requests = ((i, prompt, draws[i]) for i, prompt in enumerate(prompts))
        found = dict(generate_tree.grow(net, requests, 200, 10, 20, 0.9, 3))
        return torch.stack([found[i] for i in range(len(prompts))])

    expected, found = grow(net), grow(net.cuda())
    assert (found == expected).all(2).float().mean() > 0.9
    assert (found[..., 0] == expected[..., 0]).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_packed_rows_are_those_of_padded_ones(name):
    """Also where several pieces are added up: compiled layers may hand one buffer to two weights."""
    net, rows = new(name).cuda().train(), pairs(12)

    def gradients() -> dict:
        for weight in net.parameters():
            weight.grad = torch.zeros_like(weight)
        for i in (slice(0, 12, 2), slice(1, 12, 2)):
            logps = model.pair_logps(net, *(side[i] for side in rows))
            (logps[0] - 0.5 * logps[1]).mean().backward()
        return {name: weight.grad.clone() for name, weight in net.named_parameters()}

    expected = gradients()
    packed.prepare(net.base_model)
    found = gradients()
    for weight, ours in found.items():
        assert (ours - expected[weight]).norm() <= 2e-3 * expected[weight].norm() + 1e-7, weight


def test_a_step_is_the_same_in_one_piece_and_in_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, norms = pairs(16), []
    recipe = schema.Train(lr=1e-4, schedule="linear", batch_size=16, epochs=1)
    for micro_batch in (16, 4):
        net = new("neox").cuda()
        packed.prepare(net.base_model)

        def loss(i, net=net):
            logps = model.pair_logps(net, *(side[i] for side in rows))
            return (logps[1] - logps[0]).mean(), {}

        log = train.fit(train.Job(net, loss, train.tokens(*rows)), recipe, seed=0, key=f"pieces-{micro_batch}",
                        label="pieces", micro_batch=micro_batch)
        norms.append(log[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_memory_that_does_not_suffice_halves_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net, rows = new("neox").cuda(), pairs(512)
    packed.prepare(net.base_model)

    def loss(i):
        logps = model.pair_logps(net, *(side[i] for side in rows))
        return (logps[1] - logps[0]).mean(), {}

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / total)
    try:
        recipe = schema.Train(lr=1e-4, schedule="linear", batch_size=512, epochs=1)
        log = train.fit(train.Job(net, loss, train.tokens(*rows)), recipe, seed=0, key="memory", label="memory")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(log) == 1 and "rows do not fit; retrying with" in capsys.readouterr().err


def test_two_stages_share_a_gpu(tmp_path):
    """Two samplers at once, each with its share of the memory."""
    code = ("import torch, sys; sys.path.insert(0, 'tests'); import test_gpu; from roads import generate; "
            "net = test_gpu.new('neox').cuda().eval(); query = torch.randint(2, 320, (40, 30)); "
            "print(generate.complete(net, query, 25, 20, 1.0, torch.Generator().manual_seed(0)).sum())")
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE)
               for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running) and said[0].startswith("tensor(")


def test_one_process_with_nccl_trains_as_none(stages, tmp_path):
    cpu = stages("cpu", "fp32")
    code = ("import sys; from pathlib import Path; from roads import config, stage; from roads.stages import dpo\n"
            "cfg = config.load(Path('params.yaml')).scales['tiny']\n"
            "cfg = cfg.model_copy(update={'compute': cfg.compute.model_copy(update={'device': 'gpu'})})\n"
            "def command(): dpo.dpo(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), cfg, 0)\n"
            "stage.main(command, launch=True)\n")
    (tmp_path / "one.py").write_text(code)  # a module, as stages are: accelerate launches it by its name
    env = ENV | {"PYTHONPATH": os.pathsep.join([*PATHS, str(tmp_path)])}
    losses = []
    # accelerate launches one process without a group of processes; torch's own launcher makes one.
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "1"]):
        out = tmp_path / f"dpo-{len(losses)}"
        done = subprocess.run([sys.executable, *launcher, "-m", "one", cpu / "pairs", cpu / "sft", out], cwd=ROOT,
                              env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append(json.loads((out / "metrics.json").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_gpu_is_what_the_log_says():
    """The card and versions that these results are of, for the log."""
    print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__, os.cpu_count())
    assert torch.cuda.get_device_capability() >= (7, 0)

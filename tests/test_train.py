"""The training loop in one process and in several, with sharded weights, out of memory, killed, in bf16.

As a program it is what the tests start under `accelerate launch`: python tests/test_train.py JOB.json
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from roads import candidates, distributed, generate, kept, model, preferences, schema, stage, train
from roads.preference_losses import dpo_loss
from roads.stages import dpo, rank, reward, sample, sft
from roads.tldr import EOS, PAD

ROOT = Path(__file__).parents[1]
LAUNCHES = ["2-cpu", "2-cpu-fsdp"]
RECIPE = {"lr": 1e-3, "schedule": "linear", "batch_size": 8, "epochs": 2}


def random_rows(n: int, width: int, generator, left: bool = False) -> torch.Tensor:
    """Token rows [n, width] of lengths 1 to width, padded right or left; padded right they end in EOS."""
    rows = torch.randint(2, 20, (n, width), generator=generator)
    length = torch.randint(1, width + 1, (n, 1), generator=generator)
    at = torch.arange(width)
    if left:
        return rows.where(at >= width - length, PAD)
    return rows.where(at < length - 1, PAD).where(at != length - 1, EOS)


def small(architecture: type):
    """The configuration of a small model; Qwen2's ties its embeddings."""
    return architecture(
        vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
        tie_word_embeddings=architecture is Qwen2Config)


def problem(kind: str, n: int, seen: list | None = None, sleep: float = 0.0):
    """A tiny policy or reward model, its loss, and what a Job is told of its rows."""
    generator = torch.Generator().manual_seed(1)
    query = random_rows(n, 6, generator, left=True)
    chosen, rejected = (random_rows(n, 5, generator) for _ in range(2))
    size = schema.FromScratch(kind="new", hidden_size=32, layers=2, heads=2, max_positions=64)
    net = model.new_policy(size, 20, seed=3)
    if kind == "tied":  # input and output embeddings are one, and activations are computed again
        torch.manual_seed(3)
        net = AutoModelForCausalLM.from_config(small(Qwen2Config))
        net.gradient_checkpointing_enable({"use_reentrant": False})
    lengths = (chosen != PAD).sum(1)
    if kind == "reward":
        net = model.RewardModel(net.base_model)

    def loss(i):
        if seen is not None:
            seen.append(i.tolist())
        time.sleep(sleep)
        if kind != "reward":
            return sft.sft_loss(model.response_logps(net, query[i], chosen[i]), lengths[i]), {}
        better, worse = model.pair_rewards(net, query[i], chosen[i], rejected[i])
        return reward.reward_loss(better, worse).mean(), {"accuracy": (better > worse).float().mean()}

    told = {"lengths": train.tokens(query, chosen, rejected)} | ({} if kind == "reward" else {"weights": lengths})
    return net, loss, told


def fit(folder: Path, kind: str, n: int, micro_batch: int | None = None, epochs: int = 2, sleep: float = 0.0,
        key: str = "test") -> list[dict]:
    """Train, and write what came of it: the log, the weights, and the rows that this process saw."""
    torch.set_num_threads(1)
    seen = []
    net, loss, told = problem(kind, n, seen, sleep)
    log = train.fit(train.Job(net, loss, **told), schema.Train(**RECIPE | {"epochs": epochs}), seed=0, key=key,
                    label=kind, micro_batch=micro_batch)
    folder.mkdir(parents=True, exist_ok=True)
    distributed.save(net, folder)
    number, _ = distributed.rank_and_world_size()
    (folder / f"rows-{number}.json").write_text(json.dumps(seen))
    (folder / f"log-{number}.json").write_text(json.dumps(log))
    return log


def start(where: Path, launch: str, jobs: list[dict], **options) -> subprocess.Popen:
    """`accelerate launch` of two processes that do all of `jobs`, in the folder `where`."""
    where.mkdir(exist_ok=True)
    (where / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / f"configs/accelerate/{launch}.yaml"), str(Path(__file__).resolve()), "jobs.json"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **options)


def finish(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]
    return output


def losses(folder: Path, number: int = 0) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / f"log-{number}.json").read_text())]


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_train_as_one(tmp_path, monkeypatch, launch):
    """Batches of 8, the last of 7 rows, and of one row, of which the second process has none."""
    jobs = [{"kind": "reward", "n": 23}, {"kind": "sft", "n": 17, "micro_batch": 3},
            {"kind": "tied", "n": 16, "epochs": 1}]
    finish(start(tmp_path / "two", launch, [{"folder": str(i), **job} for i, job in enumerate(jobs)]))
    monkeypatch.chdir(tmp_path)
    for i, job in enumerate(jobs):
        one, two = tmp_path / f"one-{i}", tmp_path / f"two/{i}"
        log = fit(one, job["kind"], job["n"], epochs=job.get("epochs", 2))
        assert losses(two) == pytest.approx(losses(one), rel=1e-5) and losses(two, 1) == losses(two)
        assert json.loads((two / "log-0.json").read_text())[-1] == pytest.approx(log[-1], rel=1e-5)
        for name in ("model", "head") if job["kind"] == "reward" else ("model",):
            ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (two, one))
            assert set(ours) == set(theirs)
            for key in ours:
                assert torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=2e-6), key
    rows = [json.loads((tmp_path / f"two/0/rows-{number}.json").read_text()) for number in (0, 1)]
    for epoch in (0, 1):  # three steps each, a piece each
        seen = [row for one in rows for piece in one[3 * epoch : 3 * epoch + 3] for row in piece]
        assert sorted(seen) == list(range(23))


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_killed_processes_go_on_and_end_with_the_same_bits(tmp_path, launch):
    job = {"kind": "reward", "n": 23, "epochs": 8, "every": 4, "folder": "out"}  # 24 steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, launch, [job]))
    process = start(killed, launch, [job | {"sleep": 0.2}])
    kept = killed / "runs/.scratch/test"
    while not [*kept.glob("checkpoint.pt"), *kept.glob("shards-*")]:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    for pid in children(process.pid):  # the launcher and what it started, at once
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "out").exists()
    output = finish(start(killed, launch, [job]))
    assert re.search(r"resuming at step (4|8|12|16|20) of 24", output)
    assert losses(killed / "out") == losses(whole / "out") and len(losses(whole / "out")) == 24
    for name in ("model.safetensors", "head.safetensors"):
        assert (killed / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


def test_equal_trainings_at_once_have_a_checkpoint_each(tiny, tmp_path, monkeypatch):
    """Arms may repeat one: the key is of the place too, and a run that resumes finds its own."""
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train, "save_checkpoint", lambda key, *rest: saved.append(key))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/tokenizer.json").write_text("{}")

    def job() -> train.Job:
        net, loss, told = problem("sft", 24)
        return train.Job(net, loss, pack=False, **told)

    def key(out: str, cfg: schema.Scale = tiny) -> str:
        train.run(tmp_path / out, job, schema.Train(**RECIPE), cfg, used={}, reads=[tmp_path / "sft"], seed=0,
                  name="sft")
        assert len(saved) == 2 and len(set(saved)) == 1  # 6 steps: after 2 and 4
        used = json.loads((tmp_path / out / "params.json").read_text())
        assert used == {"compute": cfg.compute.model_dump()}
        return (saved.pop(), saved.pop())[0]

    keys = [key(out) for out in ("one", "two", "one")]
    assert keys[0] == keys[2] != keys[1]
    bf16 = with_block(tiny, "compute", precision="bf16")
    monkeypatch.setattr(model, "for_training", lambda *args, **options: None)
    assert key("one") == keys[0] != key("one", bf16)
    monkeypatch.setattr(stage, "code", lambda *modules: "edited")  # since a run was killed: it is not continued
    assert key("one") != keys[0]


def test_code_is_of_all_that_computes_or_of_what_is_named(tmp_path, monkeypatch):
    package = tmp_path / "roads"
    for folder in (package, package / "stages", package / "judge", package / "figures"):
        folder.mkdir()
        (folder / "one.py").write_text("x = 1\n")
    monkeypatch.setattr(stage, "__file__", str(package / "stage.py"))
    before = stage.code()
    (package / "figures/one.py").write_text("x = 2\n")
    assert stage.code() == before != stage.code(train)
    for folder in ("", "stages", "judge"):
        (package / folder / "one.py").write_text("x = 2\n")
        assert before != (before := stage.code()), folder


def test_more_shards_than_pairs_is_one_line():
    assert [len(rows) for rows in train.batches(8, 4, 1, 0, shards=8)] == [4, 4]
    with pytest.raises(stage.UserError, match="shards: 8, and there are 7 pairs; lower it in params.yaml"):
        train.batches(7, 4, 1, 0, shards=8)


def children(pid: int) -> list[int]:
    """A process and all its descendants."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, table[::2]), map(int, table[1::2])))
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.mark.parametrize("n, world, micro_batch", [(16, 2, None), (7, 2, 2), (1, 2, 3), (23, 8, 1), (3, 16, None)])
def test_every_row_is_in_one_micro_batch_of_one_process(n, world, micro_batch):
    rows, lengths = torch.randperm(n) + 5, torch.randint(1, 50, (n + 5,))
    parts = [train.micro_batches(rows, number, world, micro_batch, lengths) for number in range(world)]
    assert sorted(torch.cat([piece for part in parts for piece in part]).tolist()) == sorted(rows.tolist())
    assert len({len(part) for part in parts}) == 1  # FSDP: all of them run the model as often
    assert max(len(piece) for part in parts for piece in part) <= (micro_batch or n)


def test_the_docstring_of_micro_batches():
    lengths = torch.tensor([0, 8, 0, 3, 9, 0, 0, 2])
    rows = torch.tensor([4, 7, 1, 3])
    found = [[part.tolist() for part in train.micro_batches(rows, number, 2, None, lengths)] for number in (0, 1)]
    assert found == [[[7, 1]], [[3, 4]]]
    assert train.micro_batches(rows, 0, 1, None, lengths)[0].tolist() == [4, 7, 1, 3]  # nothing is cut: as it was


def test_the_loop_is_a_plain_one(monkeypatch, tmp_path):
    """Learning rate, backward, clip, step: the same weights to the bit, and what is logged."""
    monkeypatch.chdir(tmp_path)
    ours, loss, told = problem("reward", 23)
    log = train.fit(train.Job(ours, loss, **told), schema.Train(**RECIPE), seed=0, key="plain", label="plain")
    theirs, loss, _ = problem("reward", 23)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RECIPE["lr"], eps=1e-5, weight_decay=0.01)
    plan = train.batches(23, RECIPE["batch_size"], RECIPE["epochs"], 0)
    for step, rows in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, len(plan), schema.Train(**RECIPE))
        value, _ = loss(rows)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert log[step]["loss"] == float(value.detach()) and log[step]["grad_norm"] == float(norm)
    assert len(log) == len(plan) and log[0]["lr"] == RECIPE["lr"]
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


def test_a_loss_that_is_no_number_says_what_to_lower(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    net, loss, told = problem("reward", 23)
    steps = []

    def diverges(i):
        steps.append(i)
        value, values = loss(i)
        return value * (float("nan") if len(steps) == 3 else 1), values

    with pytest.raises(stage.UserError, match="^reward s0: the loss is nan at step 2; lower the learning rate"):
        train.fit(train.Job(net, diverges, **told), schema.Train(**RECIPE), seed=0, key="none", label="reward s0")


def test_what_curves_say_of_two_pairs():
    found = preferences.told_apart(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.5]))
    assert {name: float(value) for name, value in found.items()} == {
        "accuracy": 0.5, "margin": 0.0, "chosen_reward": 0.75, "rejected_reward": 0.75}


def test_curves_hold_every_step_as_exact_as_floats_are(tmp_path):
    train.write_curves(tmp_path / "curves.csv", [{"lr": 1e-4, "loss": 0.1 + 0.2}, {"lr": 5e-5, "loss": 1.0}])
    assert (tmp_path / "curves.csv").read_text() == "step,lr,loss\n1,0.0001,0.30000000000000004\n2,5e-05,1.0\n"


def test_a_launch_without_its_file_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv(stage.LAUNCH, "configs/accelerate/9-gpu.yaml")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        stage.main(lambda: pytest.fail("it ran"), launch=True)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "9-gpu.yaml: not found" in line and "configs/accelerate/8-gpu-fsdp.yaml" in line


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for work, said in ((lambda: (tmp_path / "file/more").read_text(), "file/more: not a directory"),
                       (tmp_path.read_text, f"{tmp_path.name}: is a directory"),
                       ((tmp_path / "none").read_text, "none: no such file or directory")):
        with pytest.raises(SystemExit, match="2"):
            stage.main(work)
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.endswith(f"{said}\n") and line.count("\n") == 1
    with pytest.raises(OSError, match="no file at all"):  # a fault of ours keeps its traceback
        stage.main(lambda: (_ for _ in ()).throw(OSError("no file at all")))


def test_one_process_alone_writes_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with stage.output(tmp_path / "out", {}) as folder:
        (folder / "model").touch()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    with stage.output(tmp_path / "out", {}) as folder:
        (folder / "model").touch()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model", "params.json"]


# Pieces of a batch, and memory


def gradients(monkeypatch, kind: str, **options) -> list[dict[str, torch.Tensor]]:
    """The gradients of every step of a short training."""
    found = []
    net, loss, told = problem(kind, 23)
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, norm):
        found.append({name: part.grad.clone() for name, part in net.named_parameters() if part.grad is not None})
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    job = train.Job(net, options.pop("wrap", lambda loss: loss)(loss), **told)
    log = train.fit(job, schema.Train(**RECIPE), seed=0, key="none", label=kind, **options)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    return found, log


def assert_alike(found, expected, rel=1e-5):
    (ours, our_log), (theirs, their_log) = found, expected
    for one, other in zip(our_log, their_log, strict=True):
        assert one == pytest.approx(other, rel=rel)
    for name in theirs[0]:  # of the first step: later ones start from other weights
        assert torch.allclose(ours[0][name], theirs[0][name], rtol=rel, atol=rel * theirs[0][name].abs().max()), name


@pytest.mark.parametrize("kind", ["reward", "sft"])
def test_pieces_of_a_batch_have_its_gradient(monkeypatch, kind):
    whole = gradients(monkeypatch, kind)
    for micro_batch in (1, 3, 8):
        assert_alike(gradients(monkeypatch, kind, micro_batch=micro_batch), whole)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch, capsys):
    def at_most_three(loss):
        def limited(rows):
            if len(rows) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss(rows)

        return limited

    assert_alike(gradients(monkeypatch, "sft", wrap=at_most_three), gradients(monkeypatch, "sft"))
    told = re.findall(r"sft: (\d) rows do not fit; retrying with (\d) at once", capsys.readouterr().err)
    assert told == [("8", "4"), ("4", "2")]


def test_a_piece_that_fails_half_way_counts_once(monkeypatch):
    """The second of two pieces does not fit: the gradient of the first is forgotten."""
    calls = []

    def second_fails(loss):
        def limited(rows):
            calls.append(len(rows))
            if len(calls) == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss(rows)

        return limited

    assert_alike(gradients(monkeypatch, "sft", wrap=second_fails, micro_batch=4), gradients(monkeypatch, "sft"))
    assert calls[:6] == [4, 4, 2, 2, 2, 2]


def test_a_row_that_does_not_fit_is_one_line(monkeypatch):
    def never(rows):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(stage.UserError, match="1 rows do not fit .* gradient_checkpointing"):
        gradients(monkeypatch, "sft", wrap=lambda loss: never)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        gradients(monkeypatch, "sft", wrap=lambda loss: broken)


def with_block(cfg: schema.Scale, block: str, **values) -> schema.Scale:
    return cfg.model_copy(update={block: getattr(cfg, block).model_copy(update=values)})


def test_activations_computed_again_are_the_same(tiny, rows, policy):
    query, response = rows
    found = []
    for again in (False, True):
        policy.zero_grad()
        model.for_training(policy, with_block(tiny, "machine", gradient_checkpointing=again))
        model.response_logps(policy.train(), query, response).sum().backward()
        found.append({name: part.grad.clone() for name, part in policy.named_parameters() if part.grad is not None})
    assert policy.is_gradient_checkpointing
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-6, atol=1e-7), name


# Precision and attention


def test_bf16_is_near_fp32_and_its_weights_stay_fp32(tmp_path, policy, rows):
    policy.save_pretrained(tmp_path / "policy")
    model.RewardModel(policy.base_model).save_pretrained(tmp_path / "rm")
    bf16 = model.PLAIN.model_copy(update={"precision": "bf16"})
    half, rm = model.load_policy(tmp_path / "policy", bf16), model.RewardModel.load(tmp_path / "rm", bf16)
    for net, function in ((half, lambda net: model.response_logps(net, *rows)), (rm, lambda net: net(*rows))):
        exact = model.load_policy(tmp_path / "policy") if net is half else model.RewardModel.load(tmp_path / "rm")
        found, expected = function(net), function(exact)
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert torch.allclose(found, expected, rtol=0.02, atol=0.02)
        found.sum().backward()
        assert {part.dtype for part in net.parameters()} == {torch.float32}
        assert all(part.grad.dtype == torch.float32 for part in net.parameters() if part.grad is not None)
    assert generate.complete(half, rows[0], 2, 4, 1.0, torch.Generator().manual_seed(0)).shape == (4, 2, 4)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])  # the second ties its embeddings
def test_what_is_saved_in_bf16_draws_the_same_and_scores_as_near(tmp_path, kind, rows):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(small(kind))
    rm = model.RewardModel(net.base_model)
    bf16 = model.PLAIN.model_copy(update={"precision": "bf16"})
    for precision in "fp32", "bf16":
        distributed.save(net, tmp_path / precision, precision)
        distributed.save(rm, tmp_path / "rm" / precision, precision)
    size = [os.path.getsize(tmp_path / precision / "model.safetensors") for precision in ("fp32", "bf16")]
    assert size[1] < 0.6 * size[0]
    one, other = (model.load_to_sample(tmp_path / precision, bf16).state_dict() for precision in ("fp32", "bf16"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(*(load_file(tmp_path / "rm" / precision / "head.safetensors")["weight"]
                         for precision in ("fp32", "bf16")))
    policies = [model.load_policy(tmp_path / precision, bf16) for precision in ("fp32", "bf16")]
    rms = [model.RewardModel.load(tmp_path / "rm" / precision, bf16) for precision in ("fp32", "bf16")]
    assert {part.dtype for part in policies[1].parameters()} == {torch.float32}
    for found in [model.response_logps(policy, *rows) for policy in policies], [rm(*rows) for rm in rms]:
        assert torch.allclose(*found, rtol=0.01, atol=0.01)


def test_weights_that_moved_are_cast_to_bf16_anew(tmp_path, policy, rows):
    policy.save_pretrained(tmp_path)
    half = model.load_policy(tmp_path, model.PLAIN.model_copy(update={"precision": "bf16"}))
    before = model.response_logps(half, *rows)
    with torch.no_grad():
        half.get_output_embeddings().weight.mul_(2)
    assert not torch.allclose(model.response_logps(half, *rows), before)


def test_flash_without_the_package_is_one_line(tiny, policy):
    with pytest.raises(stage.UserError, match="attention: flash needs the package flash_attn") as error:
        model.for_training(policy, with_block(tiny, "compute", attention="flash"))
    assert "\n" not in str(error.value)


def test_with_flash_the_sides_of_a_pair_run_one_by_one(monkeypatch, policy, rows):
    """Flash attention takes no mask of ours; here what it would run, run by sdpa."""
    query, chosen = rows
    rejected = chosen[[2, 3, 0, 1]]
    rm = model.RewardModel(policy.base_model).eval()
    packed = [*model.pair_logps(policy, query, chosen, rejected, 0.5), *model.pair_rewards(rm, query, chosen, rejected)]
    monkeypatch.setattr(model, "_flash", lambda trunk: True)
    monkeypatch.setattr(model, "_run_pair", lambda *_: pytest.fail("a mask of ours"))
    plain = [*model.pair_logps(policy, query, chosen, rejected, 0.5), *model.pair_rewards(rm, query, chosen, rejected)]
    for one, other in zip(packed, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(stage.UserError, match="compute.device: gpu, and torch .* sees none"):
        model.device(model.PLAIN.model_copy(update={"device": "gpu"}))


# Stages


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Files that the training stages read, and a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    query, chosen, rejected = (random_rows(40, width, generator, left).int().numpy()
                               for width, left in ((6, True), (5, False), (5, False)))
    (tmp_path / "data").mkdir()
    (tmp_path / "pairs").mkdir()
    np.savez("data/sft.npz", query=query, response=chosen)
    np.savez("pairs/pairs.npz", query=query, chosen=chosen, rejected=rejected)
    return tmp_path


@pytest.mark.parametrize("architecture", [LlamaConfig, Qwen2Config])
def test_any_causal_language_model_goes_through_the_stages(tiny, inputs, architecture):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(small(architecture))
    net.save_pretrained("base")
    data, pairs = Path("data"), Path("pairs")
    sft.sft(data, Path("base"), Path("sft"), tiny)
    reward.reward(pairs, Path("sft"), Path("rm"), tiny, 0)
    dpo.dpo(pairs, Path("sft"), Path("dpo"), tiny, 0)
    assert stage.read_json("dpo/metrics.json")["loss"]["first"] == pytest.approx(np.log(2), abs=1e-6)
    sample.sample(Path("dpo"), data / "sft.npz", Path("sampled"), tiny, "online", 0)
    rank.rank(Path("sampled"), Path("ranked"), tiny, "reward", model=Path("rm"))
    dpo.dpo(Path("ranked"), Path("dpo"), Path("online"), tiny, 0, online=True)
    before, after = (load_file(f"{name}/model.safetensors") for name in ("base", "online"))
    assert set(before) == set(after) and not any(torch.equal(before[name], after[name]) for name in before)
    assert type(model.load_policy(Path("online"))).__name__ == net.__class__.__name__


def test_what_another_training_begins_at_is_saved_in_fp32(tiny, inputs, policy):
    """Also where a scale computes in bf16: on bf16's grid a step of less than half of it would not be seen."""
    tiny = with_block(tiny, "compute", precision="bf16")
    policy.save_pretrained("base")
    sft.sft(Path("data"), Path("base"), Path("sft"), tiny)
    reward.reward(Path("pairs"), Path("sft"), Path("rm"), tiny, 0)
    kinds = {"dpo": {}, "dpo_2x": {"times": 2}, "local": {"local": True}, "online": {"online": True}}
    for name, options in kinds.items():
        dpo.dpo(Path("pairs"), Path("sft"), Path(name), tiny, 0, **options)
    dpo.dpo(Path("pairs"), Path("dpo"), Path("round"), tiny.model_copy(update={"rounds": 2}), 0, online=True)
    found = {name: {weight.dtype for weight in load_file(f"{name}/model.safetensors").values() if weight.dim() > 1}
             for name in ("sft", "dpo", "round", "rm", "dpo_2x", "local", "online")}
    assert found == dict.fromkeys(("sft", "dpo", "round"), {torch.float32}) | dict.fromkeys(
        ("rm", "dpo_2x", "local", "online"), {torch.bfloat16})
    moved = load_file("dpo/model.safetensors")["gpt_neox.embed_in.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())


def test_seeds_share_the_reference(tiny, inputs, monkeypatch, policy):
    policy.save_pretrained("sft")
    dpo.dpo(Path("pairs"), Path("sft"), Path("computed"), tiny, 1)
    assert len(list(kept.FOLDER.glob("reference-*.npy"))) == 1
    monkeypatch.setattr(candidates, "in_batches", lambda *_, **__: pytest.fail("computed again"))
    dpo.dpo(Path("pairs"), Path("sft"), Path("known"), tiny, 1)
    for name in ("model.safetensors", "metrics.json"):
        assert Path("known", name).read_bytes() == Path("computed", name).read_bytes()
    dpo.dpo(Path("pairs"), Path("sft"), Path("other"), tiny, 2, times=2)
    for change in ("weights", "temperature"):
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            if change == "weights":
                with torch.no_grad():
                    policy.get_input_embeddings().weight[5] += 1
                policy.save_pretrained("moved")
            dpo.dpo(Path("pairs"), Path("moved" if change == "weights" else "sft"), Path("new"), tiny, 1,
                    online=change == "temperature")


def test_the_references_used_longest_ago_are_dropped(inputs, monkeypatch, policy):
    query, _, response = preferences.load(Path("pairs"), Path("sft"))
    for key in "abc":
        preferences.reference_logps(policy, query, response[:, None], 1.0, key)
        if key == "a":
            monkeypatch.setattr(kept, "ROOM", 2 * (kept.FOLDER / "reference-a.npy").stat().st_size)
    assert sorted(file.name for file in kept.FOLDER.iterdir()) == ["reference-b.npy", "reference-c.npy"]


def test_sft_may_count_the_query_too(tiny, inputs, policy):
    """The loss of the first batch is the mean over all tokens but the first, by hand; REBEL's SFT (recipe_data)."""
    policy.save_pretrained("base")
    whole = tiny.model_copy(update={"sft": tiny.sft.model_copy(update={"on": "query and response", "epochs": 1})})
    sft.sft(Path("data"), Path("base"), Path("whole"), whole)
    rows = np.load("data/sft.npz")
    first = train.batches(len(rows["query"]), tiny.sft.batch_size, 1, 0)[0]
    total = count = 0.0
    for i in first.tolist():
        ids = [int(token) for part in ("query", "response") for token in rows[part][i] if token != PAD]
        logps = torch.log_softmax(policy(torch.tensor([ids])).logits[0, :-1], 1)
        total -= float(logps.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    with open("whole/curves.csv", encoding="utf-8") as file:
        assert float(next(csv.DictReader(file))["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_gradients_are_clipped_unless_the_recipe_says_otherwise(tiny, inputs, policy, monkeypatch):
    policy.save_pretrained("sft")
    after, step = {}, torch.optim.AdamW.step

    def look(optimizer, *args):
        grads = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        after.setdefault(clip, float(torch.stack([grad.norm() for grad in grads]).norm()))  # of the first step
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for clip in (1.0, 1e-3, None):
        recipe = tiny.dpo.model_copy(update={"clip": clip})
        dpo.dpo(Path("pairs"), Path("sft"), Path(f"dpo-{clip}"), tiny.model_copy(update={"dpo": recipe}), 0)
    weights = [load_file(f"dpo-{clip}/model.safetensors") for clip in (1.0, 1e-3, None)]
    norms = [stage.read_json(f"dpo-{clip}/metrics.json")["grad_norm"]["first"] for clip in (1.0, 1e-3, None)]
    assert norms[0] == norms[1] == norms[2]  # as it was before
    assert after[1e-3] == pytest.approx(1e-3, rel=1e-3) and after[None] == pytest.approx(norms[2], rel=1e-5)
    assert after[1.0] == pytest.approx(min(1.0, norms[0]), rel=1e-5)
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


def test_prompts_that_tie_may_be_kept(tiny, inputs, tmp_path):
    """As a pair of equal sides: a row of the batch without a gradient."""
    rng = np.random.default_rng(0)
    query, sampled = rng.integers(2, 9, (5, 4)), rng.integers(2, 9, (5, 3, 4))
    sampled[:2] = sampled[:2, :1]
    Path("drawn").mkdir()
    np.savez("drawn/completions.npz", query=query, completions=sampled)
    net = model.new_policy(schema.FromScratch(kind="new", hidden_size=8, layers=1, heads=1, max_positions=16), 12, 0)
    model.RewardModel(net.base_model).save_pretrained(Path("rm"))
    online = tiny.samples.online.model_copy(update={"ties": "keep"})
    kept = tiny.model_copy(update={"samples": tiny.samples.model_copy(update={"online": online})})
    for out, cfg in (("dropped", tiny), ("kept", kept)):
        rank.rank(Path("drawn"), Path(out), cfg, "reward", model=Path("rm"))
    told = {out: stage.read_json(f"{out}/metrics.json") for out in ("dropped", "kept")}
    assert [told[out]["pairs"] for out in told] == [3, 5] and [told[out]["ties"] for out in told] == [2, 2]
    assert [told[out]["dropped_as_ties"] for out in told] == [2, 0]
    pairs = np.load("kept/pairs.npz")
    assert (pairs["chosen"][:2] == pairs["rejected"][:2]).all() and (pairs["chosen"][2:] != pairs["rejected"][2:]).any()
    assert np.array_equal(pairs["chosen"][2:], np.load("dropped/pairs.npz")["chosen"])
    alike = tuple(torch.from_numpy(pairs[name][:2]) for name in ("query", "chosen", "rejected"))
    ours, theirs = model.pair_logps(net, *alike)
    dpo_loss(ours, theirs, torch.zeros(2), torch.zeros(2), 0.1).sum().backward()
    assert max(float(part.grad.abs().max()) for part in net.parameters() if part.grad is not None) < 1e-6


if __name__ == "__main__":
    model.device(model.PLAIN)  # joins the other process
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train.CHECKPOINT_EVERY = job.pop("every", train.CHECKPOINT_EVERY)
        fit(Path(job.pop("folder")), **job)

"""Every stage of the comparison at scale tiny, on a device of its own: what a GPU would refuse, it refuses.

    python tests/device.py OTHER.so OUT --device cpu|other|cuda --precision fp32|bf16 [--reads OTHER-OUT]

Writes metrics.json for every stage, and training once more as a run that was stopped and continues. With --reads every
stage reads what another run of this wrote, so that one stage's rounding is not the next one's input.
"""

import argparse
import types
from pathlib import Path

import numpy as np
import torch

from roads import config, model, schema, stage, train
from roads.stages import base, data, dpo, evaluate, kl, likelihood, rank, reward, sample, sft
from roads.stages.best_of_n import best_of_n
from roads.stages.value import value

ROOT = Path(__file__).resolve().parents[1]


def load(library: Path) -> torch.device:
    """The device of tests/device.cpp."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("other")
    torch._register_device_module("other", types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16]))
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device("other:0")


def refuses(where: torch.device) -> None:
    """It would be no test if it took a tensor of the CPU beside one of its own."""
    here, there = torch.ones(2, 2), torch.ones(2, 2, device=where)
    for mix in (lambda: here + there, lambda: there @ here, lambda: torch.cat([there, here]),
                lambda: torch.where(there > 0, there, here), lambda: there.gather(1, here.long()),
                lambda: torch.nn.functional.embedding(here.long(), there)):
        try:
            mix()
        except RuntimeError as error:
            assert "same device" in str(error), error
        else:
            raise AssertionError("took a tensor of the CPU")


def stages(out: Path, cfg: schema.Scale, reads: Path | None) -> None:
    def run(name: str, function, *args, **options) -> Path:
        function(*(out / name if arg is ... else arg for arg in args), **options)
        return (reads or out) / name

    where = run("data", data.data, None, ..., cfg)
    pretrained = run("base", base.base, where, ..., cfg)
    if cfg.compute.precision == "fp32":  # as stage base does with a model that is fetched
        posts = config.load(ROOT / "params.yaml").scales["real-tiny"].source
        few = cfg.model_copy(update={"source": posts.model_copy(update={"max_query_tokens": 16,
                                                                        "max_response_tokens": 6})})
        base.check_against_itself(model.load_policy(pretrained, cfg.compute).eval(), few, "base")
    start = run("sft", sft.sft, where, pretrained, ..., cfg)
    drawn = run("candidates", sample.sample, start, where / "preferences.npz", ..., cfg, "human", 0)
    pairs = run("pairs", rank.rank, drawn, ..., cfg, "human", data=where)
    judge = run("reward", reward.reward, pairs, start, ..., cfg, 0)
    offline = run("dpo", dpo.dpo, pairs, start, ..., cfg, 0)
    local = run("local", dpo.dpo, pairs, start, ..., cfg, 0, local=True)
    drawn = run("online_candidates", sample.sample, offline, where / "online.npz", ..., cfg, "online", 0)
    ranked = run("online_pairs", rank.rank, drawn, ..., cfg, "reward", model=judge)
    online = run("online", dpo.dpo, ranked, offline, ..., cfg, 0, online=True)
    best = run("best", sample.sample, start, where / "test_best_of_n.npz", ..., cfg, "best_of_n", 0)
    for kind, net in {"reward": judge, "local": local, "dpo": offline, "base": start}.items():
        run(f"likelihood-{kind}", likelihood.likelihood, net, pairs, start, ..., cfg, kind)
        run(f"best_of_n-{kind}", best_of_n, best, where, net, start, ..., cfg, kind)
    run("value", value, online, pairs, pairs, start, ..., cfg, 0)
    run("kl", kl.kl, online, start, where, ..., cfg, 0)
    drawn = run("completions", sample.sample, online, where / "test_human.npz", ..., cfg, "evaluate", 0)
    run("scores", evaluate.evaluate, drawn, where, ..., cfg, "human")
    goes_on(out, pairs, start, cfg)


def goes_on(out: Path, pairs: Path, start: Path, cfg: schema.Scale) -> None:
    """Training that is stopped after its third step and takes up its checkpoint ends with the same weights."""
    learning_rate, train.CHECKPOINT_EVERY = train.learning_rate, 2

    def stopping(step: int, *args) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate(step, *args)

    train.learning_rate = stopping
    try:
        dpo.dpo(pairs, start, out / "again", cfg, 0)
    except KeyboardInterrupt:
        assert list(stage.SCRATCH.glob("*/checkpoint.pt"))
    else:
        raise AssertionError("it was not stopped")
    train.learning_rate = learning_rate
    dpo.dpo(pairs, start, out / "again", cfg, 0)
    whole, again = (model.load_policy(out / name).state_dict() for name in ("dpo", "again"))
    same = torch.allclose if cfg.compute.device == "gpu" else torch.equal  # sums on a GPU are in no fixed order
    assert all(same(whole[name], again[name]) for name in whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cpu", "other", "cuda"], required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--reads", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.device == "other":
        where = load(a.library)
        refuses(where)
        model.device = lambda compute: where
    cfg = config.load(ROOT / "params.yaml").scales["tiny"]
    cfg = cfg.model_copy(update={
        "compute": cfg.compute.model_copy(update={"precision": a.precision,
                                                  "device": "gpu" if a.device == "cuda" else "cpu"}),
        "machine": cfg.machine.model_copy(update={"gradient_checkpointing": a.precision == "bf16", "micro_batch": 12})})
    stages(a.out, cfg, a.reads)
    assert np.load(a.out / "scores/scores.npz")["score"].shape == (cfg.data.test,)


if __name__ == "__main__":
    main()

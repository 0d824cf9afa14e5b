"""One side of the DPO comparison, as a process of its own so that its peak memory is its own.

    python benchmarks/step.py ours FOLDER      # or plain, or trl with TRL's environment

Reads FOLDER/policy, pairs.npz and settings.json, computes the reference log-probs and says so in a line of JSON. Then
it trains, a step for every line on its standard input: real training loops (`roads.train.fit`, `DPOTrainer.train`)
that wait before each step and afterwards answer with a line of JSON.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer


def memory(name: str) -> float:
    """VmRSS, what this process holds, or VmHWM, the most it held, in GiB."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


class Clock:
    """Waits before a step, times it, answers; `loss` is to be set in between."""

    def __init__(self, seconds: float, reference):
        self.started, self.loss = None, None
        self.answer(seconds=seconds, reference=reference.tolist())
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def answer(self, **values) -> None:
        values |= {"peak": memory("VmHWM"), "now": memory("VmRSS")}
        if torch.cuda.is_available():
            values["gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps(values), file=ANSWERS, flush=True)

    def begin(self) -> None:
        if self.started:
            self.end()
        sys.stdin.readline()
        self.started = time.perf_counter()

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.answer(seconds=time.perf_counter() - self.started, loss=self.loss)


def ours(folder: Path, settings: dict, share: bool) -> None:
    """`roads.stages.dpo` with the prompt run once for both sides, or with `response_logps` of one and of the other."""
    from roads import candidates, model, preference_losses, preferences, schema, train

    query, chosen, rejected = preferences.load(folder, folder / "policy")
    policy = model.load_policy(folder / "policy")
    start = time.perf_counter()
    both = torch.stack([chosen, rejected], 1)
    reference = candidates.in_batches(candidates.logps, policy, query, both, label="reference")
    clock = Clock(time.perf_counter() - start, reference)

    def loss(i):
        clock.begin()
        sides = query[i], chosen[i], rejected[i]
        logps = (model.pair_logps(policy, *sides) if share else
                 [model.response_logps(policy, sides[0], side) for side in sides[1:]])
        value = preference_losses.dpo_loss(*logps, *reference[i].T, settings["beta"]).mean()
        clock.loss = value.item()
        return value, {}

    recipe = schema.Train(lr=settings["lr"], schedule="linear", batch_size=settings["batch_size"], epochs=1)
    job = train.Job(policy, loss, train.tokens(query, chosen, rejected))
    train.fit(job, recipe, seed=settings["seed"], key="benchmark", label="ours")
    clock.end()


def trl(folder: Path, settings: dict) -> None:
    """TRL's DPOTrainer at its fastest here: nothing logged or saved. On a CPU fp32, a batch at once, nothing computed
    twice; on a GPU bf16, and what settings["gpu"] says: pairs at once, and more of DPOConfig's fields."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import numpy as np
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it has tokens already

        def _precompute_ref_logps(self, *args):
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*args)
            self.seconds = time.perf_counter() - start
            return found

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            clock.loss = loss.item()
            return loss

    class Waits(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

    pairs, pad = np.load(folder / "pairs.npz"), settings["pad"]
    names = {"prompt_ids": "query", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    rows = [{key: [int(token) for token in pairs[name][i] if token != pad] for key, name in names.items()}
            for i in pairs["order"]]
    gpu = settings.get("gpu", {"at_once": settings["batch_size"], "options": {}})
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(),
        beta=settings["beta"], per_device_train_batch_size=gpu["at_once"],
        gradient_accumulation_steps=settings["batch_size"] // gpu["at_once"], num_train_epochs=1,
        train_sampling_strategy="sequential", precompute_ref_log_probs=True, precompute_ref_batch_size=gpu["at_once"],
        dataloader_pin_memory=False, **{"gradient_checkpointing": False} | gpu["options"],
        learning_rate=settings["lr"], lr_scheduler_type="linear", adam_epsilon=1e-5, weight_decay=0.01,
        max_grad_norm=1.0, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>",
                                        pad_token="<|padding|>")
    trainer = Trainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                      callbacks=[Waits()])
    found = trainer.train_dataset
    reference = np.empty((len(rows), 2))
    reference[pairs["order"]] = np.stack([found["ref_chosen_logps"], found["ref_rejected_logps"]], 1)
    clock = Clock(trainer.seconds, reference)
    trainer.train()
    clock.end()


if __name__ == "__main__":
    side, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    if side == "trl":
        trl(folder, settings)
    else:
        ours(folder, settings, share=side == "ours")

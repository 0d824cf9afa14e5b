"""Measure this package against TRL, transformers and rouge-score, side by side in one run.

    python benchmarks/bench.py --trl .venv-trl                          # on data/tldr_sample: what `make bench` does
    python benchmarks/bench.py --trl .venv-trl --data path/to/folder    # on the train.jsonl in there

Model: Pythia-70m's shape with random weights, fp32. Rows: TL;DR posts and summaries at their real lengths. Whatever is
compared runs in turn, repeat by repeat, on the same rows with the same number of threads; a ratio is that of one
repeat, and the median and the range of the repeats are reported. After every part benchmarks/results.json and the
section of docs/measured.md between <!-- bench --> and <!-- end --> are written; they say what is not measured yet.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from roads import candidates, generate, model, rouge, stage, tldr, train
from roads.stage import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Settings:
    hidden_size: int = 512
    layers: int = 6
    heads: int = 8
    vocab_size: int = 50304
    bpe: int = 8192  # tokens of the small BPE: cuts these posts about as finely as Pythia's tokenizer does
    query: int = 512  # tokens at most, as in the paper; so is the next
    response: int = 53
    repeats: int = 5
    sampled: int = 2  # repeats of sampling, the slowest part
    warm_up: int = 2  # steps of DPO
    batch_size: int = 4  # pairs
    lr: float = 1e-5
    beta: float = 0.05
    n: int = 25  # candidates of a prompt
    prompts: int = 8  # sampled at once by ours; by generate one after the other, which suits it best
    posts: int = 300  # of a repeat of the ROUGE ranking
    seed: int = 2  # with this one `sharpen` writes completions of some 40 tokens, as long as the paper's
    pad: int = tldr.PAD


# Rows


def load(folder: Path, s: Settings):
    """Texts of the summaries, a tokenizer, and query [N, Q] and response [N, R] of TL;DR rows."""
    rows = tldr.read_rows(folder / "train.jsonl")
    if (folder / "tokenizer.json").exists():
        tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    else:
        tokenizer = tldr.train_bpe((text for row in rows for text in (row.title, row.post, row.summary)), s.bpe)
    if tokenizer.get_vocab_size() > s.vocab_size:
        raise UserError(f"{folder}: {tokenizer.get_vocab_size()} tokens; expected at most {s.vocab_size}")
    wanted = max((s.warm_up + s.repeats) * s.batch_size, s.repeats * s.prompts, s.repeats + s.n, s.posts, 2 * s.n)
    if len(rows) < wanted:
        raise UserError(f"{folder / 'train.jsonl'}: {len(rows)} rows; expected {wanted}")
    rows, task = rows[:wanted], tldr.Task(s.query, s.response)
    query = tldr.pad([task.query_ids(row, tokenizer) for row in rows], s.query, "left")
    response = tldr.pad([task.response_ids(row.summary, tokenizer) for row in rows], s.response, "right")
    return [row.summary for row in rows], tokenizer, torch.from_numpy(query), torch.from_numpy(response)


def distinct_responses(response: torch.Tensor, row: int, n: int) -> torch.Tensor:
    """n distinct responses [n, R], those of other rows."""
    others = torch.arange(row + 1, row + len(response)) % len(response)
    _, first = np.unique(response[others], axis=0, return_index=True)
    return response[others[np.sort(first)[:n]]]


# Models


def new_policy(s: Settings) -> GPTNeoXForCausalLM:
    torch.manual_seed(s.seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=s.vocab_size, hidden_size=s.hidden_size, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        intermediate_size=4 * s.hidden_size, rotary_pct=0.25, max_position_embeddings=2048, bos_token_id=tldr.EOS,
        eos_token_id=tldr.EOS, pad_token_id=tldr.PAD)).eval()


@torch.no_grad()
def sharpen(policy: GPTNeoXForCausalLM, factor: float = 20.0, eos: float = 2.3) -> GPTNeoXForCausalLM:
    """Make random weights write as a trained policy does, in place.

    Random weights find all words about equally likely and never stop. Logits that spread `factor` times as much make 25
    samples of temperature .1 agree for a while and then part: 3 differ within nine tokens, as with mini's policies. EOS
    gets a head start of `eos` standard deviations of a logit, so that it comes at all.
    """
    words = policy.get_output_embeddings().weight
    words *= factor
    policy.base_model.final_layer_norm.bias += eos * words[tldr.EOS] / words[tldr.EOS].norm()
    return policy


# Timing


def in_turn(sides: dict, repeats: int) -> tuple[dict[str, list[float]], list[dict]]:
    """Seconds [repeats] of every side's `function(repeat)`, and what each repeat returned; who begins changes."""
    names, seconds, found = list(sides), {name: [] for name in sides}, []
    for repeat in range(-1, repeats):  # -1: a warm-up
        found.append({})
        for name in names:
            start = time.perf_counter()
            found[-1][name] = sides[name](max(repeat, 0))
            seconds[name].append(time.perf_counter() - start)
        names.append(names.pop(0))
    return {name: values[1:] for name, values in seconds.items()}, found[1:]


def result(what: str, against: str, ours: list[float], theirs: list[float], goal: float | None, unit: str = "s",
           **more) -> dict:
    """A line of the table. `goal`: at least this many times faster, or at most this share of their memory."""
    ratios = [b / a if unit == "s" else a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    met = None if goal is None else middle >= goal if unit == "s" else middle <= goal
    return {"what": what, "against": against, "unit": unit, "ours": ours, "theirs": theirs, "ratios": ratios,
            "median": middle, "low": min(ratios), "high": max(ratios), "goal": goal, "met": met, **more}


# Comparisons


class Side:
    """A process of step.py: one way to train DPO."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int):
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
        self.log = open(folder / f"{name}.log", "w+")
        self.process = subprocess.Popen([python, HERE / "step.py", name, folder], env=env, cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.process.args}: stopped\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def step(self, _=None) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


def dpo_step(rows, s: Settings, trl: Path | None, threads: int) -> list[dict]:
    """A step of DPO, optimiser included: prompts run once for both sides, against plain and against TRL's trainer."""
    _, tokenizer, query, response = rows
    steps = s.warm_up + s.repeats
    n = steps * s.batch_size
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        new_policy(s).save_pretrained(folder / "policy")
        tokenizer.save(str(folder / "tokenizer.json"))
        order = torch.cat(train.batches(n, s.batch_size, 1, s.seed))
        np.savez(folder / "pairs.npz", query=query[:n], chosen=response[:n], rejected=response[:n].roll(1, 0),
                 order=order)
        stage.write_json(folder / "settings.json", asdict(s))
        pythons = {"ours": sys.executable, "plain": sys.executable} | ({"trl": trl / "bin/python"} if trl else {})
        sides, ready, answers = {}, {}, {name: [] for name in pythons}
        try:
            for name, python in pythons.items():  # one at a time: the reference log-probs are timed as well
                sides[name] = Side(name, python, folder, threads)
                ready[name] = sides[name].answer()
            names = list(sides)
            for number in range(steps):
                for name in names:
                    answers[name].append(sides[name].step())
                names.append(names.pop(0))
                if number + 1 == s.warm_up:
                    check = {name: max(abs(a["loss"] - b["loss"]) for a, b in zip(answers["ours"], answers[name]))
                             for name in names if name != "ours"}
                    print(f"  losses of the first steps: {[round(a['loss'], 6) for a in answers['ours']]}; largest "
                          f"difference: {check}", flush=True)
                    if max(check.values()) > 1e-4:
                        raise RuntimeError(f"the sides compute different losses: {answers}")
        finally:
            for side in sides.values():
                side.end()

    def seconds(name):
        return [answer["seconds"] for answer in answers[name][s.warm_up:]]

    def peak(name):
        return [max(answer["peak"] for answer in answers[name])]

    losses = {name: [answer["loss"] for answer in answers[name]] for name in answers}
    out = []
    for name, against in (("trl", "TRL"), ("plain", "chosen, then rejected")):
        if name not in answers:
            continue
        away = max(abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True))
        goals = (1.5, 0.7) if name == "trl" else (None, None)
        out += [result(f"DPO step, {s.batch_size} pairs", against, seconds("ours"), seconds(name), goals[0],
                       same={f"largest difference of a loss in {steps} steps": away},
                       losses={side: losses[side] for side in ("ours", name)}),
                result("DPO step, peak memory", against, peak("ours"), peak(name), goals[1], "GiB")]
    if trl:
        away = np.abs(np.array(ready["ours"]["reference"]) - ready["trl"]["reference"]).max()
        before = {name: ready[name]["now"] for name in ("ours", "trl")}
        out += [
            result("DPO step, memory at its peak over that before the first", "TRL",
                   *([peak(name)[0] - before[name]] for name in before), None, "GiB"),
            result(f"reference log-probs of {n} pairs, once", "TRL", *([ready[name]["seconds"]] for name in before),
                   None, same={"largest difference of a log-prob": float(away)}),
            result("reference log-probs, peak memory", "TRL", *([ready[name]["peak"]] for name in before), None, "GiB"),
        ]
    return out


@torch.inference_mode()
def scoring(rows, s: Settings) -> Iterator[dict]:
    """Rewards of a prompt's candidates, against one forward pass over every candidate with its prompt."""
    _, _, query, response = rows
    policy = sharpen(new_policy(s))
    rm = model.RewardModel(policy.base_model).eval()
    distinct = torch.stack([distinct_responses(response, i, s.n) for i in range(s.repeats)])
    generator = torch.Generator().manual_seed(s.seed)
    cold = generate.complete(policy, query[: s.repeats], s.n, s.response, 0.1, generator)
    for kind, completions in (("distinct", distinct), ("sampled at temperature 0.1", cold)):
        def ours(i, completions=completions):
            return candidates.rewards(rm, query[i : i + 1], completions[i : i + 1])[0]

        def theirs(i, completions=completions):
            return rm(query[i : i + 1].expand(s.n, -1), completions[i])

        seconds, found = in_turn({"ours": ours, "theirs": theirs}, s.repeats)
        away = max(float((values["ours"] - values["theirs"]).abs().max()) for values in found)
        if away > 1e-4:
            raise RuntimeError(f"{kind}: rewards differ by {away}")
        yield result(
            f"rewards of {s.n} candidates, {kind}", "a forward pass over each", seconds["ours"], seconds["theirs"], 5.0,
            same={"largest difference of a reward": away},
            distinct=statistics.mean(len(np.unique(part, axis=0)) for part in completions))


@torch.inference_mode()
def reference(rows, s: Settings) -> list[dict]:
    """Log-probs of a batch of pairs under the reference, against a forward pass of chosen and one of rejected."""
    query, response = rows[2:]
    policy = new_policy(s)
    both = torch.stack([response, response.roll(1, 0)], 1)

    def part(i):
        return slice(i * s.batch_size, (i + 1) * s.batch_size)

    def ours(i):
        return candidates.logps(policy, query[part(i)], both[part(i)])

    def theirs(i):
        sides = both[part(i)].unbind(1)
        return torch.stack([model.response_logps(policy, query[part(i)], side) for side in sides], 1)

    seconds, found = in_turn({"ours": ours, "theirs": theirs}, s.repeats)
    away = max(float((values["ours"] / values["theirs"] - 1).abs().max()) for values in found)
    if away > 1e-4:
        raise RuntimeError(f"log-probs differ by {away} of theirs")
    return [result(f"reference log-probs, {s.batch_size} pairs", "chosen, then rejected", seconds["ours"],
                   seconds["theirs"], None, same={"largest relative difference of a log-prob": away})]


def ranking(rows, s: Settings) -> list[dict]:
    """ROUGE-L of a post's candidates, against rouge-score. Every repeat stems every word anew."""
    summaries = rows[0]
    texts = [(summaries[i], [summaries[(i + j) % len(summaries)] for j in range(1, s.n + 1)]) for i in range(s.posts)]

    def ours(_):
        rouge._stem.cache_clear()
        return np.stack([rouge.rouge_l(*post) for post in texts])

    seconds, found = in_turn(
        {"ours": ours, "theirs": lambda _: np.stack([rouge.rouge_l_plain(*post) for post in texts])}, s.repeats)
    if not all(np.array_equal(values["ours"], values["theirs"]) for values in found):
        raise RuntimeError("the scores differ")
    return [result(f"ROUGE-L, {s.n} candidates of each of {s.posts} posts", "rouge-score", seconds["ours"],
                   seconds["theirs"], 20.0, same={"largest difference of a score": 0.0})]


@torch.inference_mode()
def sampling(rows, s: Settings) -> Iterator[dict]:
    """Completions of prompts, against transformers' generate with the same rules of stopping.

    generate gets a prompt at a time: two or four at once take it longer a prompt.
    """
    query, policy = rows[2], sharpen(new_policy(s))
    for temperature in (1.0, 0.1):
        def ours(i, temperature=temperature):
            generator = torch.Generator().manual_seed(i)
            return generate.complete(policy, query[i * s.prompts : (i + 1) * s.prompts], s.n, s.response, temperature,
                                   generator)

        def theirs(i, temperature=temperature):
            torch.manual_seed(i)
            found = torch.full((s.prompts, s.n, s.response), tldr.PAD)
            for row, one in zip(found, query[i * s.prompts : (i + 1) * s.prompts], strict=True):
                prompt = one[one != tldr.PAD].long()[None]
                written = policy.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=temperature, top_k=0,
                    top_p=1.0, num_return_sequences=s.n, max_new_tokens=s.response, eos_token_id=tldr.EOS,
                    pad_token_id=tldr.PAD, suppress_tokens=[tldr.PAD], forced_eos_token_id=tldr.EOS)
                row[:, : written.shape[1] - prompt.shape[1]] = written[:, prompt.shape[1] :]
            return found

        seconds, found = in_turn({"ours": ours, "theirs": theirs}, s.sampled)
        tokens = {name: statistics.mean(float((v[name] != tldr.PAD).sum(2).float().mean()) for v in found)
                  for name in ("ours", "theirs")}
        distinct = {name: statistics.mean(len(np.unique(part, axis=0)) for v in found for part in v[name])
                    for name in ("ours", "theirs")}
        yield result(f"{s.n} samples of each of {s.prompts} prompts, temperature {temperature:g}", "transformers",
                     seconds["ours"], seconds["theirs"], 6.0 if temperature == 1.0 else 4.0, tokens=tokens,
                     distinct=distinct)


PARTS = ["DPO step", "reference log-probs", "ROUGE-L", "candidates", "sampling"]


# Report


def machine(threads: int, trl: Path | None) -> dict:
    """What it ran on and with."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("torch", "transformers", "tokenizers", "numpy", "rouge-score", "rapidfuzz")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    if trl:
        say = "from importlib.metadata import version; print(*map(version, ('trl', 'torch', 'transformers')))"
        found = subprocess.run([trl / "bin/python", "-c", say], check=True, capture_output=True, text=True)
        versions |= dict(zip(("trl", "TRL's torch", "TRL's transformers"), found.stdout.split()))
    return {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "threads": threads,
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "versions": versions}


def verdict(r: dict) -> str:
    """A goal, and whether it is met."""
    return f"at {'least' if r['unit'] == 's' else 'most'} {r['goal']:g}: {'met' if r['met'] else 'missed'}"


def section(found: dict) -> str:
    """The results as Markdown."""
    def number(value):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"

    lines = ["| | ours | theirs | theirs are | times faster, or share of memory: median (range) | goal |",
             "|---|---|---|---|---|---|"]
    notes = []
    for r in found["results"]:
        ours, theirs = (f"{number(statistics.median(r[side]))} {r['unit']}" for side in ("ours", "theirs"))
        spread = f" ({number(r['low'])} to {number(r['high'])})" if len(r["ratios"]) > 1 else ""
        goal = "" if r["goal"] is None else verdict(r)
        lines.append(f"| {r['what']} | {ours} | {theirs} | {r['against']} | {number(r['median'])}{spread} | {goal} |")
        said = [f"{name} {value:.0e}" if value else f"{name} 0" for name, value in r.get("same", {}).items()]
        if "tokens" in r:
            said.append("{ours:.1f} and {theirs:.1f} tokens a sample".format(**r["tokens"]))
        if "distinct" in r:
            values = r["distinct"].values() if isinstance(r["distinct"], dict) else [r["distinct"]]
            said.append(" and ".join(f"{value:.1f}" for value in values) + f" distinct of {found['settings']['n']}")
        if said:
            notes.append(f"- {r['what']}, against {r['against']}: {'; '.join(said)}.")
    on, s = found["machine"], found["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    return "\n".join([
        *lines, "",
        *([f"Not measured yet: {', '.join(found['missing'])}.", ""] if found["missing"] else []),
        f"Medians of {s['repeats']} repeats ({s['sampled']} of sampling), in turn, after a warm-up; memory and TRL's "
        "reference log-probs: once.",
        f"torch has {on['threads']} threads on every side, ROUGE one; fp32. {found['rows']}.",
        f"{on['cpu']}, {on['cores']} cores, {on['ram_gib']} GiB.", f"{versions}.", "", *notes])


def rewrite(path: Path, text: str, name: str = "bench") -> None:
    """Replace what stands between <!-- name --> and the next <!-- end -->."""
    old = path.read_text(encoding="utf-8")
    new, times = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.S)
    if times != 1:
        raise UserError(f"{path}: {times} sections between <!-- {name} --> and <!-- end -->; expected 1")
    path.write_text(new, encoding="utf-8")


def bench(data: Path, trl: Path | None, threads: int, s: Settings, save=lambda found: None,
          kept: list[dict] = (), only: list[str] = PARTS) -> dict:
    """The comparisons, or `only` some beside `kept` results; without TRL's environment, all but TRL's. `save` is called
    with what there is after each."""
    torch.set_num_threads(threads)
    rows = load(data, s)
    lengths = [float((part != tldr.PAD).sum(1).float().mean()) for part in rows[2:]]
    parts = {"DPO step": partial(dpo_step, trl=trl, threads=threads), "reference log-probs": reference,
             "ROUGE-L": ranking, "candidates": scoring, "sampling": sampling}
    parts = {name: compare for name, compare in parts.items() if name in only}
    found = {"settings": asdict(s), "machine": machine(threads, trl), "results": list(kept), "missing": list(parts),
             "rows": f"{data.name}: {lengths[0]:.0f} tokens a query, {lengths[1]:.0f} a response"}
    for name, compare in parts.items():
        print(f"{name} (to come: {', '.join(found['missing'][1:]) or 'nothing'})", flush=True)
        start = time.perf_counter()
        for r in compare(rows, s):
            goal = "" if r["goal"] is None else f"; goal: {verdict(r)}"
            print(f"  {r['what']}, {r['against']}: {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}){goal}",
                  flush=True)
            found["results"].append(r | {"part": name})
        found["missing"].remove(name)
        save(found)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return found


def write(found: dict) -> None:
    stage.write_json(HERE / "results.json", found)
    rewrite(ROOT / "docs/measured.md", section(stage.read_json(HERE / "results.json")))  # in the file's order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/tldr_sample", help="a folder with train.jsonl")
    parser.add_argument("--trl", type=Path, help="a virtual environment with TRL")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these anew, keep the others")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on every side")
    a = parser.parse_args()
    if "DPO step" in a.only and not (a.trl and (a.trl / "bin/python").exists()):
        raise UserError(f"{a.trl}: no virtual environment; `make bench` makes it")
    kept, on = [], {}
    if a.only != PARTS:
        before = stage.read_json(HERE / "results.json")
        kept, on = [r for r in before["results"] if r["part"] not in a.only], before["machine"]

    def save(found: dict) -> None:  # of what is kept, versions that are not here
        found["machine"]["versions"] = on.get("versions", {}) | found["machine"]["versions"]
        write(found)

    bench(a.data, a.trl, a.threads, Settings(), save, kept, a.only)


if __name__ == "__main__":
    stage.main(main)

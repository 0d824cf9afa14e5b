"""Run a command as at the paper's scale, with everything that it would reach over a network made here, and small.

    python scripts/rehearsal.py python -m roads.runner.repro fig3      # what `make fig3 SCALE=rehearsal` does

Checkpoints in the hub's layout, with random weights (a GPT-NeoX and a Llama), lie in runs/rehearsal-hub; posts and
comparisons in OpenAI's schema in data/rehearsal; the judge is tests/fake_openai.py, a server that prefers the longer
summary, on a free port for as long as the command runs.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
HUB = Path("runs/rehearsal-hub")
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]


def checkpoints(where: Path, posts: Path) -> None:
    """Write the two models that params.yaml's rehearsal blocks name; both have one tokenizer, a BPE of the posts."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    from roads import tldr

    texts = [text for row in tldr.read_rows(posts) for text in (row.title, row.post, row.summary)]
    tokenizer = tldr.train_bpe(texts, 1024)
    shape = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 128, "max_position_embeddings": 256, "bos_token_id": tldr.EOS,
             "eos_token_id": tldr.EOS, "pad_token_id": tldr.PAD}
    for name, kind, config in (("medium", GPTNeoXForCausalLM, GPTNeoXConfig), ("llama", LlamaForCausalLM, LlamaConfig)):
        folder = where / f".{name}.writing"
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        kind(config(**shape)).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {"eos_token": tldr.SPECIAL[tldr.EOS], "pad_token": tldr.SPECIAL[tldr.PAD]}
        (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
        os.replace(folder, where / name)


def main() -> int:
    if not sys.argv[1:]:
        print(__doc__)
        return 2
    if not (HUB / "llama").exists():
        HUB.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(HUB / "medium", ignore_errors=True)
        checkpoints(HUB, ROOT / "data/tldr_sample/train.jsonl")
    started, starting = os.pipe()
    ends, lasts = os.pipe()  # this end of it is the command's: closed when that ends, whatever ends it
    if os.fork() == 0:
        serve(starting, ends, lasts)
    os.close(starting)
    os.close(ends)
    os.set_inheritable(lasts, True)
    url = os.read(started, 100).decode()
    env = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "of the rehearsal"}
    os.execvpe(sys.argv[1], sys.argv[1:], env)  # signals, and what make watches, are the command's


def serve(started: int, ends: int, lasts: int) -> NoReturn:
    """The judge, in a process of its own, as long as the command lasts."""
    from fake_openai import Fake

    os.close(lasts)
    os.setsid()  # Ctrl-C is for the command, which may still ask
    with Fake() as server:
        os.write(started, server.url.encode())
        os.close(started)
        os.read(ends, 1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

"""The answers of an outside judge, and what they cost.

    python -m roads.judge status                                     # what is stored: answers and dollars by model
    python -m roads.judge estimate COMPLETIONS DATA --scale paper    # what judging these would cost; asks nothing
    python -m roads.judge forget BATCH                               # wait no longer for a batch that is gone
"""

import argparse
from pathlib import Path

from roads import arrays, config
from roads.judge import ledger
from roads.judge.protocol import both_orders
from roads.schema import OUTSIDE
from roads.stage import UserError, main
from roads.tldr import load_tokenizer


def _command() -> None:
    parser = argparse.ArgumentParser(prog="python -m roads.judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="what the cache holds, and what it cost")
    gone = commands.add_parser("forget", help="wait no longer for a batch: it counts as paid, and is asked anew")
    gone.add_argument("batch", help="its id at the endpoint")
    judging = commands.add_parser("estimate", help="what it costs at most to judge completions against the references")
    judging.add_argument("completions", type=Path)
    judging.add_argument("data", type=Path)
    judging.add_argument("--scale", required=True, help="a block of params.yaml")
    a = parser.parse_args()
    with ledger.opened(ledger.CACHE):
        _run(a)


def _run(a: argparse.Namespace) -> None:
    if a.command == "status":
        return print(ledger.status())
    if a.command == "forget":
        return print(f"{a.batch}: {ledger.forget(a.batch)} requests are no longer waited for")
    cfg = config.load_scale(a.scale)
    if cfg.judge is None or cfg.judge.kind not in OUTSIDE:
        raise UserError(f"{a.scale}: judge.kind: expected openai or batch; its judge is not asked over a network")
    rows = arrays.tokens(a.completions / "completions.npz", "query", "completions")
    references, n = arrays.tokens(a.data / "test_human.npz", "response")["response"], len(rows["query"])
    if len(references) < n:
        raise UserError(f"{a.completions}: {n} prompts, and {a.data} has {len(references)} references; expected "
                        "completions of its test prompts")
    messages = both_orders(cfg.judge, load_tokenizer(a.data / "tokenizer.json"), rows["query"],
                           rows["completions"][:, 0], references[:n])
    count, dollars = ledger.estimate(messages, cfg.judge, cfg.spending)
    print(f"{len(messages):,} answers of {cfg.judge.model}, both orders; {count:,} are not in the cache and cost "
          f"${dollars:.2f} at most, ${dollars * ledger.SAMPLES:.2f} if none could be read")


if __name__ == "__main__":
    main(_command)

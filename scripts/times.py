"""Seconds of every stage's last run, seeds together, as the table of docs/stages.md: `make times`."""

import re
import sys
from collections import defaultdict

from roads.runner.repro import TIMES, times


def main() -> None:
    if not TIMES.exists():
        sys.exit(f"{TIMES}: not found; any figure's make target writes it")
    last = dict(times())
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, seconds in last.items():
        kinds[re.sub(r"-s?\d+$", "", name)].append(seconds)  # a stage without its seed
    print("| stage | seeds | seconds each | in all |\n|---|---|---|---|")
    for kind, seconds in kinds.items():
        print(f"| {kind} | {len(seconds)} | {sum(seconds) / len(seconds):.1f} | {sum(seconds):.0f} |")
    print(f"| all | {len(last)} | | {sum(last.values()):.0f} |")


if __name__ == "__main__":
    main()

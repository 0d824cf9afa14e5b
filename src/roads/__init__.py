"""Reproduction of "All Roads Lead to Likelihood": stages/ is the experiment; judge/, figures/, theory/, report/ and
runner/ say whose verdicts it takes, what is drawn and proven, what is concluded, and how it is run."""

import sys

# Where modules are now whose names stand in older notes: `python -m roads.client` says so.
STAGES = "base", "best_of_n", "data", "dpo", "evaluate", "likelihood", "rank", "reward", "sample", "sft", "value"
MOVED = {name: f"stages.{name}" for name in STAGES} | {
    "cell": "stages.arm", "client": "judge", "claims": "report.claims", "repro": "runner.repro", "plan": "runner.plan"}


def _old_name(words: list[str]) -> str:
    """The module that a command line `python -m MODULE ...` names, if it has moved; else ''."""
    name = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return name.removeprefix("roads.") if name.removeprefix("roads.") in MOVED and name.startswith("roads.") else ""


if old := _old_name(sys.orig_argv):
    print(f"error: roads.{old} is now roads.{MOVED[old]}: python -m roads.{MOVED[old]} --help", file=sys.stderr)
    sys.exit(2)

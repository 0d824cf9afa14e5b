"""dvc.lock as text: mini's has 2.4 MB, which takes seconds to parse, and an entry milliseconds."""

import re

LOCK = "schema: '2.0'\nstages:\n"
BODY = r"(?:    .*\n)+"
ENTRY = rf"  ([\w@.-]+):\n{BODY}"
LAYOUT = re.compile(f"{LOCK}(?:{ENTRY})*")  # as DVC writes dvc.lock, with nothing but stages in it


def entry_of(stage: str, lock: str) -> tuple[str, int]:
    """The text of a stage's entry in dvc.lock, '' if there is none, and where it begins, or would."""
    found = re.search(rf"^  {re.escape(stage)}:\n{BODY}", lock, re.M)
    return (found[0], found.start()) if found else ("", len(lock))


def with_entry(stage: str, entry: str, lock: str) -> str:
    """The text of dvc.lock with this entry of a stage, in the place of the one it has or at the end."""
    before, at = entry_of(stage, lock)
    return lock[:at] + entry + lock[at + len(before) :]


def entries(lock: str) -> dict[str, str]:
    """The text of every stage's entry, by its name.

    >>> entries(LOCK + "  sft@mini:\\n    cmd: true\\n  fig3@mini:\\n    cmd: false\\n")["fig3@mini"]
    '  fig3@mini:\\n    cmd: false\\n'
    """
    return {found[1]: found[0] for found in re.finditer(rf"^{ENTRY}", lock, re.M)}


def paths(kind: str, entry: str) -> list[str]:
    """The paths of an entry's `deps` or `outs`.

    >>> paths("outs", "  sft@mini:\\n    deps:\\n    - path: data\\n    outs:\\n    - path: runs/sft\\n")
    ['runs/sft']
    """
    found = re.search(rf"^    {kind}:\n((?:    [- ].*\n)+)", entry, re.M)
    return re.findall(r"^    - path: (.+)$", found[1], re.M) if found else []

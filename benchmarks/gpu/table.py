"""The GPU half of docs/measured.md: tables of what scripts/device.sh found, between <!-- gpu --> and <!-- end gpu -->.

    python benchmarks/gpu/table.py build/gpu          # what `make bench-gpu` does after scripts/device.sh build/gpu

Every ratio is of one file, and so of one card in one run. What is not in the folder reads "not measured".
"""

import argparse
import json
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/measured.md"
BEGIN, END = "<!-- gpu -->", "<!-- end gpu -->"
NONE = "Not measured yet by `make bench-gpu`."


def lines(file: Path) -> list[dict]:
    """The lines of a file of JSON; none where there is no such file. A line that was cut off is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def versions(found: list[dict]) -> str:
    """Card and versions, as the first line of a file names them."""
    first = found[0] if found else {}
    known = [first.get("card") or first.get("device")] + [f"{name} {first[name]}" for name in ("torch", "transformers")
                                                         if name in first]
    known += sorted({f"vLLM {line['version']}" for line in found if "version" in line})
    return ", ".join(filter(None, known))


def sampler(found: list[dict]) -> str:
    """Tokens a second of every side at its best, and our ratio to it."""
    best: dict[tuple[str, float], float] = {}
    for line in found:
        if "tokens_per_second" in line and line["side"] != "ours, first":
            at = line["side"], line["temperature"]
            best[at] = max(best.get(at, 0.0), line["tokens_per_second"])
    temperatures = sorted({temperature for _, temperature in best}, reverse=True)
    rows = [[side, *(f"{best[side, t]:,.0f}" if (side, t) in best else "not measured" for t in temperatures)]
            for side in ("ours", "vllm", "generate") if any((side, t) in best for t in temperatures)]
    for other in ("vllm", "generate"):
        ratios = [f"{best['ours', t] / best[other, t]:.2f}" if {("ours", t), (other, t)} <= best.keys() else
                  "not measured" for t in temperatures]
        rows.append([f"ours over {other}", *ratios])
    return table(["tokens a second", *(f"T {t:g}" for t in temperatures)], rows)


def steps(found: list[dict]) -> str:
    """Seconds of a step, share of the peak and memory of every way; and how often TRL's best takes our best's time."""
    ways = [line for line in found if "seconds" in line]
    rows = [[line["way"], f"{line['seconds']:.3f}", f"{line['peak']:.1f} %",
             f"{line['gib']:.1f}" if "gib" in line else "", f"{line['gradients_off']:.1e}" if "gradients_off" in line
             else ""] for line in sorted(ways, key=lambda line: line["seconds"])]
    failed = [[line["way"], line.get("left_out", "failed"), "", "", ""] for line in found
              if "error" in line or "left_out" in line]
    text = table(["way", "seconds", "share of the peak", "GiB", "gradients off fp32's"], rows + failed)
    theirs = [line for line in ways if line["way"].startswith("TRL")]
    ours = [line for line in ways if not line["way"].startswith("TRL") and "all bf16" not in line["way"]]
    if not theirs or not ours:
        return f"{text}\n\nAgainst TRL: not measured."
    a, b = (min(side, key=lambda line: line["seconds"]) for side in (ours, theirs))
    memory = f", in {a['gib'] / b['gib']:.2f} of its memory" if "gib" in a and "gib" in b else ""
    ratio = b["seconds"] / a["seconds"]
    return f"{text}\n\n{a['way']} takes a step in 1/{ratio:.2f} of the time of {b['way']}{memory}."


def scores(found: list[dict]) -> str:
    """How often best and worst of 25 differ from fp32's, a forward pass each."""
    sets = list(dict.fromkeys(line["completions"] for line in found if "completions" in line))
    ways = list(dict.fromkeys(line["way"] for line in found if "pair_differs" in line))
    cells = {(line["way"], line["completions"]): line for line in found if "pair_differs" in line}

    def cell(way: str, name: str) -> str:
        line = cells.get((way, name))
        return f"{line['pair_differs']:.2f}, {line['rank_correlation'] or 1:.3f}" if line else "not measured"

    return table(["best or worst differs, rank correlation", *sets],
                 [[way, *(cell(way, name) for name in sets)] for way in ways])


PARTS = {"sampler": ("25 completions of 53 tokens of a post", sampler), "step": ("A DPO step of 128 pairs", steps),
         "scores": ("Scores in bf16 against fp32", scores)}


def section(folder: Path) -> str:
    """The text between the two marks."""
    parts = []
    for name, (title, tell) in PARTS.items():
        found = lines(folder / f"{name}.jsonl")
        told = tell(found) if len(found) > 1 else NONE
        parts.append(f"**{title}** (benchmarks/gpu/{name}.py; {versions(found) or 'no run'}):\n\n{told}")
    return "\n\n".join(parts)


def write(folder: Path, page: Path) -> None:
    """Put the section in its place.

    Raises:
        ValueError: the page has no such place.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected {BEGIN} and, after it, {END}")
    page.write_text(f"{before}{BEGIN}\n\n{section(folder)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/device.sh wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    a = parser.parse_args()
    if not any((a.folder / f"{name}.jsonl").exists() for name in PARTS):
        expected = ", ".join(f"{name}.jsonl" for name in PARTS)
        print(f"error: {a.folder}: none of {expected}; scripts/device.sh writes them", file=sys.stderr)
        sys.exit(2)
    write(a.folder, a.page)
    print(f"{a.folder} -> {a.page}")


if __name__ == "__main__":
    main()

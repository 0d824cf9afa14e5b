"""Check the paper's theory on tiny token trees; write tables, figures and a report.

    python -m roads.theory.run reports/theory
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from roads import stage
from roads.theory import broken, complexity, figures, further, statements
from roads.theory.complexity import HORIZON, HORIZONS, MIX_PAIRS, MIXTURES, PAIRS, N
from roads.theory.figures import digits, interval

STATEMENTS = statements.STATEMENTS | further.STATEMENTS
STATEMENT_SEEDS, BROKEN_SEEDS = range(100), range(40)
TOLERANCE = 1e-6
WORKERS = 2
LIMIT_HORIZONS = [*HORIZONS, HORIZONS[-1] + 1]
TWO_STAGE = [name for name in figures.LOOKS if name.startswith("two-stage")]


def check(name: str, kind: dict) -> dict:
    """The largest distance of a statement over instances of one kind, in which its assumptions hold."""
    function, _ = STATEMENTS[name]
    error = max(function(statements.problem(seed, **kind)) for seed in STATEMENT_SEEDS)
    policies = "network" if name == "Theorem 2.4" else "prefix-blind" if kind.get("blind") else "all"
    return {"statement": name, "policies": policies, "max_error": digits(error, 2), "n": len(STATEMENT_SEEDS),
            "status": "holds" if error < TOLERANCE else "FAILS"}


def drop(kind: str, index: int) -> dict:
    """A statement's distance without an assumption: a row of `broken.PARTING` or of `broken.UNNEEDED`."""
    statement, assumption, function = getattr(broken, kind)[index]
    distances = np.array([function(seed) for seed in BROKEN_SEEDS])
    return {"kind": kind.lower(), "statement": statement, "assumption": assumption} | interval(distances) | {
        "max": digits(distances.max(), 2)}


def few(per_trajectory: int) -> dict:
    """Theorem 2.2's distance on finite data."""
    unique = [broken.finite_pairs(seed, per_trajectory)[1] for seed in BROKEN_SEEDS]
    distances = np.array([broken.few_pairs(seed, per_trajectory) for seed in BROKEN_SEEDS])
    row = {"comparisons_per_trajectory": per_trajectory, "unique_share": digits(np.mean(unique))} | interval(distances)
    return row | {"max_where_unique": digits(max(distances[unique]), 2) if any(unique) else None}


def learn(horizon: int, pairs: int, share: float) -> tuple[list[dict], list[dict]]:
    """One point of the curves: every estimator's error, and what every two-stage one gains on MLE over Π, paired."""
    found = complexity.errors(horizon, pairs, share)
    where = {"horizon": horizon, "pairs": pairs, "share": share}
    rows = [where | {"estimator": name, "penalty": digits(penalty, 3)} | interval(error)
            for name, (error, penalty) in found.items()]
    gains = [where | {"estimator": name} | interval(found["MLE over Π"][0] - found[name][0]) for name in TWO_STAGE]
    return rows, gains


def limit(horizon: int, share: float, simple: bool) -> dict:
    """N times the error of maximum likelihood as N grows, in closed form."""
    design = complexity.occurs(horizon) if simple else np.eye(complexity.VOCAB**horizon)
    return {"horizon": horizon, "share": share, "class": "R_sim" if simple else "R, or the isomorphic Π"} | interval(
        complexity.asymptote(horizon, share, design, complexity.SEEDS))


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table of `rows`: heading -> format of a row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(form.format(**row) for form in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


VALUE = "{mean:.2g} [{low:.2g}, {high:.2g}]"


def grid(rows: list[dict], row_key: str, column_key: str) -> str:
    """A Markdown table of means and intervals; columns are numbers, in order."""
    columns = sorted({row[column_key] for row in rows})
    cells = {(row[row_key], row[column_key]): VALUE.format(**row) for row in rows}
    wide = [{"name": name} | {f"c{i}": cells.get((name, at), "") for i, at in enumerate(columns)}
            for name in dict.fromkeys(row[row_key] for row in rows)]
    return table(wide, {"": "{name}"} | {f"{column_key} {at:g}": f"{{c{i}}}" for i, at in enumerate(columns)})


def report(checked: list[dict], dropped: list[dict], pairs: list[dict], rows: list[dict], gains: list[dict],
           limits: list[dict], distance: dict[str, float]) -> str:
    """The Markdown report."""
    def only(kept: list[dict], **where: object) -> list[dict]:
        return [row for row in kept if where.items() <= row.items()]

    trees = ", ".join(f"{x} x {a} x {h}" for x, a, h in statements.SHAPES)
    problems = [statements.problem(seed) for seed in STATEMENT_SEEDS]
    street = all(statements.reach(p) == (p.tree.horizon, 1) for p in problems)
    mixed = [gain | {"what": f"{gain['estimator']}, N = {gain['pairs']}"} for gain in gains
             if gain["horizon"] == HORIZON and gain["pairs"] in MIX_PAIRS and gain["estimator"] != TWO_STAGE[1]]
    kinds = {0.0: "simple", 1.0: "complex"}
    classes = [row | {"what": f"{row['class']}, {kinds[row['share']]} reward"} for row in limits]
    finite = [row | {"unique": "-" if row["max_where_unique"] is None else f"{row['max_where_unique']:.1e}"}
              for row in pairs]
    return f"""# The theory, checked exactly

Written by `make theory`. Trees (prompts x tokens x steps): {trees}; every trajectory enumerated, float64.
The two sides of a statement are built by different routes, from different starts. What each assumes is in the
docstrings of `src/roads/theory/statements.py` and `further.py`.

## What it says
{lead(rows, gains, dropped)}

## Statements
Largest difference of the two sides over {len(STATEMENT_SEEDS)} seeds; below {TOLERANCE:g} a statement holds.
"Prefix-blind" policies see the prompt and the position but not the tokens before, a class far smaller than all.

{table(checked, {"statement": "{statement}", "policies": "{policies}", "max error": "{max_error:.1e}", "seeds": "{n}",
                 "status": "{status}"})}

What the wording needs:
- Optima must be unique. A reward's is unique up to a shift for every prompt, where no group of completions always
  wins (Ford's condition). "Regardless of the coverage or the number of samples" (section 1) is true of the sets
  of optima, not of what a solver returns: see "Finite data" below.
- R = R(Π) is needed up to that shift only; and "r_π in R_sim" (Theorem 3.1) must be read so, for as printed it asks
  R_sim to contain log-normalised rewards.
- Eqs. 2 and 3 are what neither method minimises as printed: both end at π_mle, where the likelihood is greatest and the
  second term still has a slope (rows "minimised as printed" below). They optimise the two terms one after the other.
- Eq. 36 lacks the normaliser log Z(s0) of its right side. Nothing depends on it.
- The remark of section 2.3 is true of SFT as it stands. For labels of a 0/1 verifier each side needs a free constant
  for every prompt, since a reward can be positive and a log-probability cannot.
- Data processing (section 3.1): a reward model has at most the bits of its data about the true reward, samples with its
  labels at most those of the reward model. A simple one keeps fewer (row "bits" below).
- Eq. 13 is a bijection between rewards up to a shift for every prompt and Q-functions up to a shift for every prefix.
- Eq. 21 normalises over all trajectories, not prompt by prompt. The projection (Lemma A.1) is the same.
- The last display in the proof of Theorem 2.4 has a sign too many; as its value is zero, nothing follows from it.
- Over a restricted class soft RL has local optima, which "exact optimisation" assumes away: every solve here takes the
  best of ten starts (with three, one instance in 100 of Lemma A.1 ended in a local one).
- Eq. 14, no two-way street: one trajectory's reward moves the next-token distribution at all H prefixes on its way,
  one entry of Q at one prefix; in {"every instance" if street else "NOT every instance"} of {len(problems)}.

## What each assumption buys
One assumption dropped. Distance of the sides: largest absolute difference of P(ξ | s0), unless a row says otherwise;
mean over {len(BROKEN_SEEDS)} seeds and its 95% interval.

{table(only(dropped, kind="parting"), {"statement": "{statement}", "dropped": "{assumption}", "distance": VALUE})}

Not needed, though the statement or section assumes it: the sides agree all the same.

{table(only(dropped, kind="unneeded"), {"statement": "{statement}", "not needed": "{assumption}",
                                        "max distance": "{max:.1e}"})}

With a policy class that is too small, the detour gives the better policy on unlimited data ("regret of offline minus
online" above): soft RL projects onto Π by the very divergence that is measured, maximum likelihood by another one.
It needs no simple reward, so it is a benefit of online training besides H6.

### Finite data
Theorem 2.2, all policies and all rewards, pairs drawn uniformly and labelled by Bradley-Terry (`finite_pairs.png`).
Where the estimate is not unique, each side has a penalty of 5e-5 |x|² on its own parameters, logits or rewards.

{table(finite, {"comparisons per trajectory": "{comparisons_per_trajectory}", "distance": VALUE,
                "share with a unique estimate": "{unique_share:.2f}", "max distance where unique": "{unique}"})}

## Figure 2, computed
![Figure 2](fig2.png)

Largest difference of the offline and the two-stage policy: {"; ".join(f"{k}: {v:.1g}" for k, v in distance.items())}.

## H6 in closed form
![The curves](complexity.png)

{complexity.__doc__.split(chr(10), 2)[2].strip()}

Simple reward, H = {HORIZON}, by number of pairs:

{grid(only(rows, horizon=HORIZON, share=0.0), "estimator", "pairs")}

Reward as complex as the policy, H = {HORIZON}:

{grid(only(rows, horizon=HORIZON, share=1.0), "estimator", "pairs")}

Simple reward, N = {N}, by horizon:

{grid(only(rows, pairs=N, share=0.0), "estimator", "horizon")}

Error of MLE over Π minus error of a two-stage estimator, H = {HORIZON}, by the share of the reward's variance that no
simple reward explains (paired by seed; below zero the detour hurts):

{grid(mixed, "what", "share")}

N times the error as N grows, tr(F⁻¹G) / 2. The ratio of two classes is how many times more pairs one of them needs:

{grid(classes, "what", "horizon")}

What this says of H6:
{findings(rows, gains, limits)}
"""


def findings(rows: list[dict], gains: list[dict], limits: list[dict]) -> str:
    """H6's predictions, one by one, with the numbers that decide them."""
    def one(kept: list[dict], **where: object) -> dict:
        (row,) = (row for row in kept if where.items() <= row.items())
        return row

    def gain(horizon: int, pairs: int, share: float, name: str = "two-stage, R_sim") -> str:
        return VALUE.format(**one(gains, horizon=horizon, pairs=pairs, share=share, estimator=name))

    def ratio(horizon: int) -> float:
        wide, narrow = (one(limits, horizon=horizon, share=0.0, **{"class": name})["mean"]
                        for name in ("R, or the isomorphic Π", "R_sim"))
        return wide / narrow

    ratios = ", ".join(f"{ratio(h):.2g}" for h in LIMIT_HORIZONS)
    last, more = PAIRS[-1], MIX_PAIRS[1]
    every, first = TWO_STAGE[1:]
    floor = one(rows, horizon=HORIZON, pairs=last, share=0.0, estimator="MLE over policies of prefix features")
    here = gain(HORIZON, N, 0.0)
    return f"""- Simple reward, policy over the tree: the detour gains {here} nats at H = {HORIZON}, N = {N}.
- H = 1: no gap, as predicted; gain {gain(1, N, 0.0)}. Pairs that MLE over Π needs relative to the detour,
  H = {LIMIT_HORIZONS[0]} .. {LIMIT_HORIZONS[-1]}, from the limits above: {ratios}.
- Reward as complex as the policy: a detour through all rewards gains {gain(HORIZON, N, 1.0, every)} at
  N = {N}, {gain(HORIZON, last, 1.0, every)} at N = {last}. Through R_sim it loses: {gain(HORIZON, N, 1.0)}.
- Many pairs: the gap vanishes, to {gain(HORIZON, last, 0.0)} nats at N = {last}, but as 1 / N: the *ratio*
  of the errors stays. With one simple reward H6 gives no gap that is constant in nats as data grow; for its Fig. 12
  the paper supposes rewards that grow more complex with the data.
- Nearly simple reward (share 0.03): R_sim gains {gain(HORIZON, N, 0.03)} at N = {N} and
  {gain(HORIZON, more, 0.03)} at N = {more}. A class of all rewards that prefers simple ones gains
  {gain(HORIZON, N, 0.03, first)} and {gain(HORIZON, more, 0.03, first)}.
- It is the restriction that helps, not the detour: MLE over Π(R_sim) is as good as two stages over R_sim (Theorem
  3.1), and two stages over all rewards with no bias to simple ones gain {gain(HORIZON, N, 0.0, every)}.
- Nor is it the number of parameters: three of them in a policy that reads the prefix's features leave an error of
  {VALUE.format(**floor)} nats at N = {last}, because the soft-optimal policy is not in that class."""


def lead(rows: list[dict], gains: list[dict], dropped: list[dict]) -> str:
    """The results that matter most, first."""
    def of(kept: list[dict], **where: object) -> str:
        (row,) = (row for row in kept if where.items() <= row.items())
        return VALUE.format(**row)

    here = {"horizon": HORIZON, "pairs": N, "share": 0.0}
    restricted, wide = (of(rows, **here, estimator=name) for name in ("MLE over Π(R_sim)", "MLE over Π"))
    regret = of(dropped, assumption="the same on infinite data: regret of offline minus online, nats")
    return f"""\
- **What helps is the restriction to simple rewards, and not the detour.** Where the reward is simple, maximum
  likelihood over the policies that are best for simple rewards, with no reward model and no sampling, is as good as
  the two stages: an error of {restricted} nats, against {wide} over all policies
  (H = {HORIZON}, N = {N}). The two stages over all rewards, with no bias to simple ones, gain
  {of(gains, **here, estimator=TWO_STAGE[1])}. So H6 is a statement about the class of rewards that training prefers.
- **Online training can win for a reason that H6 does not speak of.** With a policy class that is too small it gives
  the better policy on unlimited data, however complex the reward: the regret of offline training is larger by
  {regret} nats.
- Every statement of the paper holds, and so does what it says in passing, with the wording below."""


def write(out: Path) -> None:
    """Compute everything and write statements, broken, finite_pairs, fig2, complexity and theory.md under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    points = {(HORIZON, pairs, share) for share in (0.0, 1.0) for pairs in PAIRS}
    points |= {(HORIZON, pairs, share) for pairs in MIX_PAIRS for share in MIXTURES}
    points |= {(horizon, pairs, 0.0) for horizon in HORIZONS for pairs in PAIRS}
    # Where the class contains the reward.
    closed = [(horizon, share, simple) for share, simple in [(0.0, True), (0.0, False), (1.0, False)]
              for horizon in LIMIT_HORIZONS]
    kinds = [(name, kind) for name, (_, kinds) in STATEMENTS.items() for kind in kinds]
    assumptions = [(kind, i) for kind in ("PARTING", "UNNEEDED") for i in range(len(getattr(broken, kind)))]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        started = [[pool.submit(function, *arguments) for arguments in todo] for function, todo in [
            (learn, sorted(points, reverse=True)), (limit, closed), (check, kinds), (drop, assumptions),
            (few, [(k,) for k in broken.PER_TRAJECTORY])]]
        learned, limits, checked, dropped, pairs = ([future.result() for future in batch] for batch in started)
    rows, gains = (sum(lists, []) for lists in zip(*learned))
    order = list(figures.LOOKS)
    for kept in (rows, gains):
        kept.sort(key=lambda row: (row["share"], row["horizon"], row["pairs"], order.index(row["estimator"])))

    figures.save(out, "statements", None, checked, {"seeds": list(STATEMENT_SEEDS), "tolerance": TOLERANCE})
    many = {"seeds": list(BROKEN_SEEDS), "interval": "95%, Student's t over seeds"}
    figures.save(out, "broken", None, dropped, many)
    figures.finite_pairs(out, pairs, many)
    distance = figures.figure_2(out)
    figures.complexity(out, rows, limits, gains, {
        "seeds": list(complexity.SEEDS), "development_seeds": list(complexity.DEVELOPMENT), "gains": gains,
        "limits": limits, "interval": many["interval"], "measure": "KL(pi || pi*) over completions, nats"})
    text = report(checked, dropped, pairs, rows, gains, limits, distance)
    (out / "theory.md").write_text(text, encoding="utf-8")
    for row in checked:
        print("{statement:<12} {policies:<13} max error {max_error:.1e} over {n} seeds: {status}".format(**row))
    if any(row["status"] != "holds" for row in checked):
        raise stage.UserError(f"a statement does not hold to {TOLERANCE:g}: see {out / 'theory.md'}")


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out)


if __name__ == "__main__":
    stage.main(_command)

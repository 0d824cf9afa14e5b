"""What `roads.theory.run` draws: the paper's Figure 2 as computed points, finite data, and the curves of H6."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from roads import stage
from roads.figures.figure import COLOURS
from roads.theory import complexity as c
from roads.theory import tree as t

GREY, BLUE, GREEN, ORANGE = (COLOURS[name] for name in ("SFT", "DPO", "Local RM", "Online(DPO)"))
PURPLE, SAND = "#8064a2", "#e0b088"
LOOKS = {  # estimator -> colour, marker, line
    "MLE over Π": (BLUE, "o", "-"),
    "MLE over Π(R_sim)": (GREEN, "s", "none"),
    "two-stage, R_sim": (ORANGE, ".", "-"),
    "two-stage, all rewards": (PURPLE, "x", "--"),
    "two-stage, all rewards, simple first": (SAND, "^", "-"),
    "MLE over policies of prefix features": (GREY, "v", "-"),
}


def interval(values: np.ndarray) -> dict:
    """Mean over seeds and its 95% interval (Student's t), to six digits; what is below 1e-10 is zero."""
    mean, half = np.mean(values), student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    ends = {"mean": mean, "low": mean - half, "high": mean + half}
    return {key: digits(round(x, 10)) + 0.0 for key, x in ends.items()} | {"n": len(values)}  # + 0.0: no "-0.0"


def digits(x: float, count: int = 6) -> float:
    return float(f"{x:.{count}g}")


def save(out: Path, name: str, figure: Figure, rows: list[dict], content: dict) -> None:
    """Write name.{csv,json} under `out`, and name.png where there is a figure; `rows` are the .csv and in the .json."""
    stage.write_json(out / f"{name}.json", content | {"rows": rows})
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if figure is not None:
        figure.savefig(out / f"{name}.png", dpi=160, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


# Figure 2

TRUE = [-1.2, 1.2, -1.6]  # reward of a completion with no, one and two tokens "1"


def projections(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Completion distributions [4] of the points of Figure 2, on the tree of two tokens and horizon 2.

    Pi: policies with one number, pi(1) at every prefix. R: rewards w * features [4]. Data: infinite, of `TRUE`.
    """
    tree, rho = t.make(1, 2, 2), torch.ones(1, dtype=torch.float64)
    truth = torch.tensor(TRUE, dtype=torch.float64)[tree.action.sum(1)]
    pairs, zero = t.population_pairs(tree, truth), torch.zeros(1, dtype=torch.float64)

    def policy(theta: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(3, dtype=torch.float64), theta.expand(3)], 1)

    def log_p(theta: torch.Tensor) -> torch.Tensor:
        return t.trajectory_log_prob(tree, policy(theta))

    mle = t.minimise(lambda x: t.bradley_terry(pairs, log_p(x)), zero)
    w = t.minimise(lambda x: t.bradley_terry(pairs, x * features), zero)
    rlhf = t.minimise(lambda x: -t.soft_return(tree, rho, w * features, policy(x)), zero)
    found = {"P_D": t.normalise(tree, truth), "P*_r_mle": t.normalise(tree, w * features),
             "pi_mle": log_p(mle), "pi_rlhf": log_p(rlhf)}
    return {name: log.exp() for name, log in found.items()}


def flat(p: np.ndarray) -> np.ndarray:
    """Plane coordinates [..., 2] of distributions over the number of tokens "1" [..., 3]: a triangle, 1 on top."""
    return np.stack([p[..., 2] + p[..., 1] / 2, p[..., 1] * 3**0.5 / 2], -1)


def counted(p: np.ndarray) -> np.ndarray:
    """Distribution over 0, 1, 2 tokens "1" [..., 3] of one over 00, 01, 10, 11 [..., 4]."""
    return np.stack([p[..., 0], p[..., 1] + p[..., 2], p[..., 3]], -1)


def figure_2(out: Path) -> dict[str, float]:
    """Draw Figure 2 twice, for unequal and for isomorphic classes; returns |pi_mle - pi_rlhf| of each."""
    ones = t.make(1, 2, 2).action.sum(1).double()
    panels = {'R = {w · 1[a "1" occurs]} is not R(Π)': (ones > 0).double(), 'R = {w · number of "1"} is R(Π)': ones}
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.6))
    rows, distance = [], {}
    theta = np.linspace(0.0005, 0.9995, 400)
    pi_curve = flat(np.stack([(1 - theta) ** 2, 2 * theta * (1 - theta), theta**2], -1))
    corner = np.linspace(0.004, 0.992, 220)
    a, b = np.meshgrid(corner, corner)
    grid = np.stack([a, b, 1 - a - b], -1)[a + b < 0.996]  # P of 0 and of 1 token "1"
    # The Bradley-Terry loss at every point of the triangle; 01 and 10 share the middle's probability.
    log_p = np.log(grid / [1, 2, 1])
    loss = sum(m * np.logaddexp(0, log_p[:, j] - log_p[:, i]) / (1 + np.exp(TRUE[j] - TRUE[i]))
               for i, j, m in [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 2), (2, 1, 2)])
    levels = loss.min() + np.array([0.003, 0.016, 0.05, 0.13, 0.32, 0.72, 1.44])
    for ax, (title, features) in zip(axes, panels.items()):
        points = {name: p.numpy() for name, p in projections(features).items()}
        place = {name: flat(counted(p)) for name, p in points.items()}
        distance[title] = digits(np.abs(points["pi_mle"] - points["pi_rlhf"]).max(), 3)
        rows += [{"panel": title, "point": name} | {f"P({k})": digits(x) for k, x in zip(["00", "01", "10", "11"], p)}
                 for name, p in points.items()]
        ax.fill(*flat(np.eye(3)).T, facecolor="none", edgecolor="black", lw=0.8)
        ax.tricontour(*flat(grid).T, loss, levels=levels, colors="0.8", linewidths=0.7)
        weights = np.linspace(-8, 8, 400)[:, None] * features.numpy()
        r_curve = flat(counted(np.exp(weights) / np.exp(weights).sum(1, keepdims=True)))
        ax.plot(*pi_curve.T, color=BLUE, lw=2, label="Π: policies that ignore the prefix")
        ax.plot(*r_curve.T, color=ORANGE, lw=2, ls=(0, (4, 3)), label="R: P*_r of its rewards (Eq. 11)")
        for start, end, colour in [("P_D", "pi_mle", BLUE), ("P_D", "P*_r_mle", ORANGE),
                                   ("P*_r_mle", "pi_rlhf", "black")]:
            if np.abs(place[start] - place[end]).max() > 0.01:
                ax.annotate("", place[end], place[start], zorder=4,
                            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 4, "shrinkB": 4})
        for name, marker, colour in [("P_D", "*", "black"), ("P*_r_mle", "s", ORANGE), ("pi_mle", "o", BLUE),
                                     ("pi_rlhf", "D", "black")]:
            ax.plot(*place[name], marker, color=colour, ms=11 if marker == "*" else 6, zorder=5)
        labels = {"P_D": ("D", (10, -4)), "P*_r_mle": (r"$\hat r_{mle}$", (10, 2)),
                  "pi_mle": (r"$\hat\pi_{mle}$", (-32, 3)), "pi_rlhf": (r"$\hat\pi_{rlhf}$", (2, -18))}
        for name, (label, shift) in labels.items():
            ax.annotate(label, place[name], shift, textcoords="offset points", fontsize=12)
        for corner_name, at in zip(["00", "01 or 10", "11"], flat(np.eye(3))):
            ax.annotate(corner_name, at, (0, 5 if at[1] else -14), textcoords="offset points", ha="center")
        apart = r"largest $|P_{\hat\pi_{mle}} - P_{\hat\pi_{rlhf}}|$: "
        ax.set_title(f"{title}\n{apart}{distance[title]:.1g}", fontsize=10, pad=22)
        ax.set_aspect("equal")
        ax.axis("off")
        ax.margins(0.08)
    axes[0].legend(loc="upper left", fontsize=8, frameon=False, bbox_to_anchor=(-0.08, 0.98))
    caption = ('Two tokens, two steps, infinite Bradley-Terry data D, drawn at the policy that fits it. Triangle: '
               'distributions over\ncompletions, by number of "1". Grey: level lines of the loss. Coloured arrows: '
               'forward-KL projections of D (Eqs. 6 and 9);\nblack arrow: reverse-KL projection (Eq. 10).')
    figure.text(0.5, 0.01, caption, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(out, "fig2", figure, rows, {"note": "computed, no randomness: no seeds, no intervals", "seeds": [], "n": 0,
                                     "true_reward_by_number_of_ones": TRUE, "distance": distance})
    return distance


def finite_pairs(out: Path, rows: list[dict], content: dict) -> None:
    """Theorem 2.2 on finite data: how far its sides part, and how often the estimate is unique."""
    figure, ax = plt.subplots(figsize=(5.6, 3.8))
    x, mean, low, high, unique = (np.array([row[key] for row in rows]) for key in (
        "comparisons_per_trajectory", "mean", "low", "high", "unique_share"))
    ax.fill_between(x, np.maximum(low, 0), high, color=ORANGE, alpha=0.25, lw=0)
    ax.plot(x, mean, "o-", color=ORANGE, label="max |P(offline) - P(two-stage)|")
    ax.plot(x, unique, "s--", color=BLUE, label="share of data sets with a unique estimate")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, x)
    ax.set_xlabel("comparisons per trajectory")
    ax.set_title("Theorem 2.2 on finite data, all policies and all rewards", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    caption = (f"{rows[0]['n']} seeds, 95% intervals. Where the estimate is unique the distance is below 1e-6;\n"
               "where it is not, each side has a small penalty on its own parameters.")
    figure.text(0.5, 0.01, caption, ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save(out, "finite_pairs", figure, rows, content)


def curve(ax: Axes, rows: list[dict], x: str, **where: object) -> None:
    """Mean and interval of every estimator against column x of the rows in which the columns `where` hold."""
    for name, (colour, marker, line) in LOOKS.items():
        chosen = [row for row in rows if row["estimator"] == name and where.items() <= row.items()]
        chosen.sort(key=lambda row: row[x])
        at, mean, low, high = (np.array([row[key] for row in chosen]) for key in (x, "mean", "low", "high"))
        ax.fill_between(at, np.maximum(low, mean / 30), high, color=colour, alpha=0.18, lw=0)
        hollow = {"markerfacecolor": "none", "ms": 8} if marker == "s" else {}
        ax.plot(at, mean, marker=marker, ls=line, color=colour, label=name, lw=1.4, **hollow)


def complexity(out: Path, rows: list[dict], limits: list[dict], gaps: list[dict], content: dict) -> None:
    """The curves of H6: error against pairs (simple and complex reward) and horizon, the gap against the mix."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.4))
    for ax, share, title in [(axes[0, 0], 0.0, "simple reward"), (axes[0, 1], 1.0, "reward as complex as the policy")]:
        curve(ax, rows, "pairs", share=share, horizon=c.HORIZON)
        x = np.array(c.PAIRS[2:])
        for limit in limits:
            if limit["horizon"] == c.HORIZON and limit["share"] == share:
                ax.plot(x, limit["mean"] / x, ":", color="black", lw=1, zorder=1)
        ax.set(xscale="log", yscale="log", xlabel="pairs N", title=f"{title}, H = {c.HORIZON}")
    curve(axes[1, 0], rows, "horizon", share=0.0, pairs=c.N)
    axes[1, 0].set(yscale="log", xlabel="horizon H", title=f"simple reward, N = {c.N}", xticks=c.HORIZONS)
    for ax in axes.flat[:3]:
        ax.set_ylabel("KL(π̂ ‖ π*), nats")
    axes[0, 1].sharey(axes[0, 0])
    ax = axes[1, 1]
    for pairs, line in zip(c.MIX_PAIRS, ["-", "--"]):
        for name in ("two-stage, R_sim", "two-stage, all rewards, simple first"):
            where = {"estimator": name, "pairs": pairs, "horizon": c.HORIZON}.items()
            chosen = [gap for gap in gaps if where <= gap.items()]
            at, mean, low, high = (np.array([gap[key] for gap in chosen]) for key in ("share", "mean", "low", "high"))
            ax.fill_between(at, low, high, color=LOOKS[name][0], alpha=0.18, lw=0)
            ax.plot(at, mean, color=LOOKS[name][0], marker=LOOKS[name][1], ls=line, label=f"{name}, N = {pairs}")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(-2, 20)
    ax.set(xlabel="share of the reward's variance that no simple reward explains",
           ylabel="error of MLE over Π minus error of ...", title=f"what the detour gains, H = {c.HORIZON}")
    ax.legend(fontsize=7, frameon=False, handlelength=4, loc="upper right")
    axes[0, 0].legend(fontsize=7, frameon=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    caption = (f"One prompt, 3 tokens; {len(c.SEEDS)} seeds, 95% intervals; penalties chosen on {len(c.DEVELOPMENT)} "
               "other seeds for every point. Dotted: tr(F⁻¹G) / 2N, the delta method's limit.")
    figure.text(0.5, 0.008, caption, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    save(out, "complexity", figure, rows, content)

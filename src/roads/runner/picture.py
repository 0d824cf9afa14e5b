"""What figures.yaml asks of dvc.yaml (wiring.py), and the picture of it all, docs/graph.svg: `make graph`.

One box for each entry, whatever it is repeated over; an arrow where one reads what another writes, as DVC finds at
scale `mini`, which has every figure. The layout is the usual layered one: rows by the longest way to a figure, the
order within a row by barycentres, and the long arrows of an entry on one trunk. The same dvc.yaml gives the same bytes.
"""

import argparse
import re
from html import escape
from itertools import pairwise
from pathlib import Path

import networkx as nx
from ruamel.yaml import YAML
from scipy.optimize import isotonic_regression

from roads import stage
from roads.runner import plan, wiring
from roads.stage import main

OUT = Path("docs/graph.svg")
SCALE = "mini"
WIDTH, MARGIN, TOP = 980, 24, 84  # of a row of boxes; around them; above the first row, for title and legend
BOX, ROW, GAP, TRUNK = 36, 78, 12, 4  # heights of a box and of a row; between boxes; what a passing trunk needs
STRAIGHT = 10  # how much more than an arrow's end a trunk pulls itself straight

# What an entry does, by the module it runs, and its line and fill colour.
KINDS = {
    "data": ("data",), "training": ("base", "sft", "reward", "dpo"), "sampling and ranking": ("sample", "rank"),
    "evaluation": ("evaluate", "likelihood", "value", "best_of_n"), "one seed of a whole comparison": ("arm",),
    "figure": ("figures",), "other": (),
}  # fmt: skip
COLOURS = {
    "data": ("#8a8a8a", "#ededed"), "training": ("#4878a8", "#dde7f1"), "sampling and ranking": ("#3f9aa0", "#dbeeef"),
    "evaluation": ("#5f9e6e", "#e0eee3"), "one seed of a whole comparison": ("#8a6fae", "#e9e2f2"),
    "figure": ("#d1762c", "#f9e4d3"), "other": ("#666666", "#ffffff"),
}  # fmt: skip


def read() -> nx.DiGraph:
    """The entries of dvc.yaml, in its order, with kind, note and desc; an edge from each to those that read it."""
    entries = YAML(typ="safe").load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    graph = nx.DiGraph()
    for name, entry in entries.items():
        command = entry["cmd"] if isinstance(entry["cmd"], str) else entry["cmd"][0]
        module = re.search(r"-m roads\.(?:stages\.)?(\w+)", command)
        kind = next((kind for kind, modules in KINDS.items() if module and module[1] in modules), "other")
        graph.add_node(name, kind=kind, note=note(entry.get("matrix", {})), desc=entry.get("desc", command))
    with plan.switched(SCALE, None) as (repo, *_):
        read = {tuple(plan.entry_of(stage.addressing) for stage in edge) for edge in repo.index.graph.edges}
    order = list(entries).index
    graph.add_edges_from(sorted(((written, reader) for reader, written in read if reader != written),
                                key=lambda edge: (order(edge[0]), order(edge[1]))))
    return graph


def note(matrix: dict) -> str:
    """What an entry is repeated over: 'task × seed'. Not the active scale, nor what has one value only."""
    words = []
    for key, values in matrix.items():
        if key != "scale" and not (isinstance(values, list) and len(values) == 1):
            words.append(key)
        elif key == "scale" and (other := re.fullmatch(r"\$\{(?!figures)(\w+)\}", str(values))):
            words.append(other[1])
    return " × ".join(words)


def box_width(graph: nx.DiGraph, name: object) -> float:
    if name not in graph:
        return TRUNK
    return max(7.2 * len(name), 5.6 * len(graph.nodes[name]["note"])) + 16


def with_trunks(graph: nx.DiGraph, rank: dict[str, int]) -> nx.DiGraph:
    """The graph with each arrow cut at the rows that it crosses; those of one entry share the points (entry, row)."""
    cut = nx.DiGraph()
    cut.add_nodes_from((name, {"row": rank[name]}) for name in graph)
    for edge in graph.edges:
        way = route(edge, rank)
        cut.add_nodes_from((point, {"row": point[1]}) for point in way[1:-1])
        nx.add_path(cut, way)
    return cut


def route(edge: tuple[str, str], rank: dict[str, int]) -> list:
    written, reader = edge
    return [written, *((written, row) for row in range(rank[written] + 1, rank[reader])), reader]


def crossings(cut: nx.DiGraph, rows: list[list]) -> int:
    """How many pairs of arrows between neighbouring rows cross."""
    total = 0
    for above, below in pairwise(rows):
        place = {node: i for i, node in enumerate(below)}
        ends = [place[end] for node in above for end in sorted(cut.successors(node), key=place.get)]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1:])
    return total


def ordered(cut: nx.DiGraph) -> list[list]:
    """The rows from the top, each in the order with the fewest crossings that sweeping down and up finds."""
    rows: list[list] = [[] for _ in range(1 + max(row for _, row in cut.nodes(data="row")))]
    for node, row in cut.nodes(data="row"):
        rows[row].append(node)
    best, fewest = rows, crossings(cut, rows)
    for sweep in range(24):
        down = sweep % 2 == 0
        rows = [list(row) for row in rows]
        for i in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            other = rows[i - 1 if down else i + 1]
            place = {node: j / len(other) for j, node in enumerate(other)}
            centre = {}
            for j, node in enumerate(rows[i]):
                ends = [place[end] for end in (cut.predecessors(node) if down else cut.successors(node))]
                centre[node] = sum(ends) / len(ends) if ends else j / len(rows[i])
            rows[i].sort(key=centre.get)
        if (found := crossings(cut, rows)) < fewest:
            best, fewest = rows, found
    return best


def layout(graph: nx.DiGraph) -> tuple[dict, dict[str, int]]:
    """x of the middle of every box and trunk, and the row of every entry; a row too wide becomes two."""
    rank = {name: -i for i, names in enumerate(nx.topological_generations(graph.reverse())) for name in names}
    while True:
        first = min(rank.values())
        rank = {name: rank[name] - first for name in graph}
        cut = with_trunks(graph, rank)
        rows = ordered(cut)
        needed = [sum(box_width(graph, node) + GAP for node in row) for row in rows]
        wide = next((i for i, (row, width) in enumerate(zip(rows, needed)) if width > WIDTH + GAP
                     and sum(node in graph for node in row) > 1), None)
        if wide is None:
            break
        lower = [node for node in rows[wide] if node in graph][1::2]
        rank = {name: row + (row > wide or name in lower) for name, row in rank.items()}
    x = {node: WIDTH * (i + 0.5) / len(row) for row in rows for i, node in enumerate(row)}
    for sweep in range(200):
        for row in rows if sweep % 2 else rows[::-1]:
            # As near to the middle of its neighbours as the order and the widths allow, in the least-squares sense.
            left, offsets = 0.0, []
            for node in row:
                offsets.append(left + box_width(graph, node) / 2)
                left += box_width(graph, node) + GAP
            pulls = [{end: STRAIGHT if end not in graph and node not in graph else 1
                      for end in (*cut.predecessors(node), *cut.successors(node))} or {node: 1} for node in row]
            weights = [sum(pull.values()) for pull in pulls]
            wanted = [sum(x[end] * weight for end, weight in pull.items()) / total - offset
                      for pull, total, offset in zip(pulls, weights, offsets)]
            free = isotonic_regression(wanted, weights=weights).x
            x |= {node: min(max(float(at), 0), max(WIDTH - left + GAP, 0)) + offset
                  for node, at, offset in zip(row, free, offsets)}
    return {node: round(at) for node, at in x.items()}, rank


def draw(graph: nx.DiGraph) -> str:
    """The SVG: text stays text, and the card behind it makes it readable on dark pages."""
    x, rank = layout(graph)
    width, height = WIDTH + 2 * MARGIN, TOP + ROW * max(rank.values()) + BOX + MARGIN
    used = [kind for kind in KINDS if any(found == kind for _, found in graph.nodes(data="kind"))]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" role="img">',
        f"<title>The {len(graph)} entries of dvc.yaml</title>", "<defs>"]
    lines += [f'<marker id="{_id(kind)}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
              f'orient="auto"><path d="M0 0.8 8 4 0 7.2z" fill="{COLOURS[kind][0]}"/></marker>' for kind in used]
    lines += ["</defs>", f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
              f'<text x="{MARGIN}" y="32" font-size="16" font-weight="600" fill="#222222">From data to figures: the '
              f"{len(graph)} entries of dvc.yaml, and below each what it is repeated over</text>"]
    at = MARGIN
    for kind in used:
        line, fill = COLOURS[kind]
        lines += [f'<rect x="{at}" y="46" width="14" height="14" rx="3" fill="{fill}" stroke="{line}"/>',
                  f'<text x="{at + 20}" y="57" font-size="12" fill="#444444">{kind}</text>']
        at += 20 + round(6.4 * len(kind)) + 22
    lines.append('<g fill="none" stroke-width="1.3" stroke-opacity="0.75">')
    for edge in graph.edges:
        kind = graph.nodes[edge[0]]["kind"]
        lines.append(f'<path data-from="{escape(edge[0])}" data-to="{escape(edge[1])}" stroke="{COLOURS[kind][0]}" '
                     f'marker-end="url(#{_id(kind)})" d="{_curve(route(edge, rank), x, rank)}"/>')
    lines.append("</g>")
    for name, node in graph.nodes.items():
        line, fill = COLOURS[node["kind"]]
        wide = round(box_width(graph, name))
        middle, top = MARGIN + x[name], TOP + ROW * rank[name]
        lines += [f'<g text-anchor="middle" data-entry="{escape(name)}">',
                  f'<title>{escape(name)}: {escape(node["desc"])}</title>',
                  f'<rect x="{middle - wide / 2:g}" y="{top}" width="{wide}" height="{BOX}" rx="6" fill="{fill}" '
                  f'stroke="{line}" stroke-width="1.3"/>',
                  f'<text x="{middle}" y="{top + (16 if node["note"] else 22)}" font-size="12.5" fill="#1c1c1c">'
                  f"{escape(name)}</text>"]
        if node["note"]:
            lines.append(f'<text x="{middle}" y="{top + 29}" font-size="10" fill="#555555">{node["note"]}</text>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>"]) + "\n"


def _id(kind: str) -> str:
    return "arrow-" + kind.replace(" ", "-")


def _curve(way: list, x: dict, rank: dict[str, int]) -> str:
    """Down from a box to a box: bends between the rows, straight lines past them."""
    left, y = MARGIN + x[way[0]], TOP + ROW * rank[way[0]] + BOX
    path = [f"M{left} {y}"]
    for point in way[1:]:
        right, top = MARGIN + x[point], TOP + ROW * (rank[point] if point in rank else point[1])
        half = (y + top) / 2
        path.append(f"C{left} {half:g} {right} {half:g} {right} {top}" if left != right else f"V{top}")
        left, y = right, top
        if point not in rank:
            y += BOX
            path.append(f"V{y}")
    return "".join(path)


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    wiring.write()
    OUT.parent.mkdir(exist_ok=True)
    with stage.writing(OUT) as scratch:
        scratch.write_text(draw(read()), encoding="utf-8")
    print(f"figures.yaml -> {wiring.DVC}, {OUT}")


if __name__ == "__main__":
    main(command)

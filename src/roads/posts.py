"""Where rows of real posts come from: a folder, or what a file like data/openai.json says to download."""

import hashlib
import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np

from roads import hub, schema, stage, tldr


def in_folder(folder: Path, source: schema.OpenAI) -> tuple[dict, dict]:
    """Posts and comparisons of a folder, by split and in order; comparisons only where there is a file of them."""
    if source.kind == "posts":
        suffix, development = ".jsonl.xz", source.held_out == "development"
        names = {"train": "train"} | {name: "development" if development else name for name in ("valid", "test")}
        posts = {split: tldr.read_rows(folder / f"{name}{suffix}") for split, name in names.items()}
        if development:  # each a half
            posts |= {"valid": posts["valid"][::2], "test": posts["test"][1::2]}
        return posts, {}
    posts = {name: tldr.read_rows(folder / f"{name}.jsonl") for name in ("train", "valid", "test")}
    files = {name: folder / f"comparisons_{name}.jsonl" for name in ("train", "valid")}
    there = any(path.exists() for path in files.values())
    return posts, {name: tldr.read_comparisons(path) for name, path in files.items()} if there else {}


def download(source: Path) -> tuple[dict, dict, dict]:
    """Posts and comparisons that a file like data/openai.json names, checked against what it expects of them.

    Each split comes in an order drawn once, so that the first n rows are a sample of them all.

    Returns:
        Posts by split, comparisons by split, and what was found: rows, SHA-256 and commit of each.
    Raises:
        UserError: not such a file, nothing to be had from the hub, or other rows than expected.
    """
    try:
        wanted = stage.read_json(source)
        parts = {part: [(name, split["files"], split["rows"], split["sha256"]) for name, split in
                        wanted[part]["splits"].items()] for part in ("sft", "comparisons")}
        places = {part: (wanted[part]["repository"], wanted[part]["revision"]) for part in parts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise stage.UserError(f"{source}: {type(error).__name__} {error}; expected what data/openai.json has") from None
    rows, found = {}, {}
    for part, splits in parts.items():
        name, revision = places[part]
        beside = source.parent / name
        folder, commit = hub.fetch(str(beside) if beside.is_dir() else name, revision,
                                   [files for _, files, _, _ in splits], "dataset")
        rows[part] = {}
        for split, files, count, digest in splits:
            read, batches = _read(folder, files, f"{source}: {part}.{split}", part == "comparisons")
            text = "".join(json.dumps(astuple(row), ensure_ascii=False) + "\n" for row in read)
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            dropped = {batch: n for batch, n in sorted(batches.items()) if batch in tldr.CNN_DM}
            seen = (f"{len(batches)} batches, of which {dropped or 'none'} left out; " if batches else "") + (
                f"first id {read[0].id}" if read else "nothing left")
            if count is not None and len(read) != count:
                raise stage.UserError(f"{source}: {part}.{split}: expected {count} rows of {name}, got {len(read)} "
                                      f"({seen})")
            if digest is not None and sha256 != digest:
                raise stage.UserError(f"{source}: {part}.{split}: the rows of {name} are others than those pinned: "
                                      f"expected SHA-256 {digest}, got {sha256} ({len(read)} rows; {seen})")
            if digest is None and commit:
                hub.pin(f"rows {part}.{split} of {name}", sha256)
            if digest is None:
                print(f"{part}.{split}: {len(read)} rows, SHA-256 {sha256}: pin it in {source}", flush=True)
            found[f"{part}.{split}"] = {"rows": len(read), "sha256": sha256, "commit": commit}
            rows[part][split] = [read[i] for i in np.random.default_rng(0).permutation(len(read))]
    return rows["sft"], rows["comparisons"], found


def _read(folder: Path, files: str, where: str, compared: bool) -> tuple[list, Counter]:
    """Rows of the jsonl or parquet files of a split, and how many of each batch the comparisons were."""
    paths, rows, batches = sorted(folder.glob(files)), [], Counter()
    if not paths:
        raise stage.UserError(f"{where}: no file {files} in {folder}")
    for path in paths:
        if path.suffix != ".parquet":
            values = list(tldr.objects(path))
        else:
            import datasets

            table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            names = tldr.FIELDS if not compared else ["info", "summaries", "choice", "batch"]
            missing = set(names) - set(table.column_names)
            if missing:
                raise stage.UserError(f"{where}: {path.name} has no column {', '.join(sorted(missing))}")
            values = [(value, f"{path}: row {i}") for i, value in enumerate(table.select_columns(names))]
        if compared:
            batches.update(str(value.get("batch")) for value, _ in values)
            values = [(value, at) for value, at in values if value.get("batch") not in tldr.CNN_DM]
        rows += [tldr.comparison_of(*value) if compared else tldr.row_of(*value) for value in values]
    return rows, batches

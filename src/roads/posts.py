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

    They come from a repository of the hub, or where that is gone from the files under `otherwise`. Both are held to the
    same rows: their order does not count, neither for the SHA-256 nor for the order that each split then has, which is
    drawn once, so that the first n rows are a sample of them all.

    Returns:
        Posts by split, comparisons by split, and what was found: rows, SHA-256 and commit of each.
    Raises:
        UserError: not such a file, the hub cannot be reached, or other rows than expected.
    """
    try:
        wanted = stage.read_json(source)
        parts = {part: [(name, split["files"], split["rows"], split["sha256"]) for name, split in
                        wanted[part]["splits"].items()] for part in ("sft", "comparisons")}
        places = {part: (wanted[part]["repository"], wanted[part]["revision"], wanted[part].get("otherwise"))
                  for part in parts}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise stage.UserError(f"{source}: {type(error).__name__} {error}; expected what data/openai.json has") from None
    rows, found = {}, {}
    for part, splits in parts.items():
        name, revision, otherwise = places[part]
        beside, commit, second = source.parent / name, None, None
        try:
            folder, commit = hub.fetch(str(beside) if beside.is_dir() else name, revision,
                                       [files for _, files, _, _ in splits], "dataset")
        except stage.UserError as gone:
            if not otherwise:
                raise
            print(f"{gone}; taking {otherwise['base']}", flush=True)
            second, name = otherwise, otherwise["base"]
        rows[part] = {}
        for split, files, count, digest in splits:
            label, compared = f"{source}: {part}.{split}", part == "comparisons"
            if second:
                paths, of = _fetch(second, split, label), second["splits"][split].get("split")
            else:
                paths, of = sorted(folder.glob(files)), None
                if not paths:
                    raise stage.UserError(f"{label}: no file {files} in {folder}")
            read, batches = _read(paths, label, compared, of)
            lines = [json.dumps(astuple(row), ensure_ascii=False) + "\n" for row in read]
            order = sorted(range(len(read)), key=lines.__getitem__)
            read = [read[i] for i in order]
            sha256 = hashlib.sha256("".join(lines[i] for i in order).encode()).hexdigest()
            dropped = {batch: n for batch, n in sorted(batches.items()) if batch in tldr.CNN_DM}
            seen = (f"{len(batches)} batches, of which {dropped or 'none'} left out; " if batches else "") + (
                f"first id {read[0].id}" if read else "nothing left")
            if count is not None and len(read) != count:
                raise stage.UserError(f"{source}: {part}.{split}: expected {count} rows of {name}, got {len(read)} "
                                      f"({seen})")
            if digest is not None and sha256 != digest:
                raise stage.UserError(f"{source}: {part}.{split}: the rows of {name} are not those pinned: "
                                      f"expected SHA-256 {digest}, got {sha256} ({len(read)} rows; {seen})")
            if digest is None and (commit or second):
                hub.pin(f"rows {part}.{split} of {source.name}", sha256)  # whichever of the two they came from
            if digest is None:
                print(f"{part}.{split}: {len(read)} rows, SHA-256 {sha256}: pin it in {source}", flush=True)
            found[f"{part}.{split}"] = {"rows": len(read), "sha256": sha256, "commit": commit}
            rows[part][split] = [read[i] for i in np.random.default_rng(0).permutation(len(read))]
    return rows["sft"], rows["comparisons"], found


def _fetch(otherwise: dict, split: str, label: str) -> list[Path]:
    """The files of a split, downloaded once (HF_HOME keeps them)."""
    from datasets.download import DownloadConfig, DownloadManager

    manager = DownloadManager(download_config=DownloadConfig(max_retries=3))
    paths = []
    for file in otherwise["splits"][split]["files"]:
        try:
            paths.append(Path(manager.download(otherwise["base"] + file)))
        except (OSError, ConnectionError) as error:
            raise stage.UserError(f"{label}: {otherwise['base']}{file}: not downloaded "
                                  f"({str(error).splitlines()[0][:120]})") from None
    return paths


def _read(paths: list[Path], where: str, compared: bool, of: list[str] | None) -> tuple[list, Counter]:
    """Rows of the jsonl or parquet files of a split, and how many of each batch the comparisons were; of files that
    hold several splits, the comparisons whose `split` is among `of`."""
    rows, batches = [], Counter()
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
        if of:
            values = [(value, at) for value, at in values if value.get("split") in of]
        if compared:
            batches.update(str(value.get("batch")) for value, _ in values)
            values = [(value, at) for value, at in values if value.get("batch") not in tldr.CNN_DM]
        rows += [tldr.comparison_of(*value) if compared else tldr.row_of(*value) for value in values]
    return rows, batches

"""What DVC would do about each stage of a figure: leave it, take it from its cache, or run it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage

STATUSES = UP_TO_DATE, IN_CACHE, TO_RUN = "up to date", "in DVC's cache", "to run"


def statuses(repo: "Repo", needs: dict, todo: set) -> dict:
    """Stage -> one of STATUSES, inputs first.

    A stage that DVC finds out of date is taken from its cache if it has run before on the very inputs that the
    stages before it leave, as far as those are known without running them.
    """
    files: dict[str, object] = {}  # what the stages leave behind -> hash; nothing of those that run
    found = {}
    for stage in sorted(needs, key=lambda s: (len(needs[s]), s.addressing)):
        made = {out.fs_path: found[other] != TO_RUN for other in needs[stage] for out in other.outs}
        outs = stage.outs
        if stage not in todo:
            found[stage] = UP_TO_DATE
        else:
            taken = _taken_instead(repo, stage, made, files)
            found[stage] = TO_RUN if not taken else UP_TO_DATE if taken is stage else IN_CACHE
            outs = taken.outs if taken else []
        for out in outs:
            files |= _files(repo, out)
    return found


def _taken_instead(repo: "Repo", stage: "Stage", made: dict[str, bool], files: dict) -> Any:
    """What DVC would take instead of running a stage: the stage as it is, an earlier run from its cache, or None.

    `made`: the outputs of the stages before this one -> whether `files` has what they will hold.
    """
    from dvc.dependency import ParamsDependency
    from dvc.stage.serialize import to_single_stage_lockfile
    from dvc_data.hashfile.meta import Meta

    inputs = []
    for dep in stage.deps:
        sources = [known for out, known in made.items() if _inside(out, dep.fs_path) or _inside(dep.fs_path, out)]
        if not all(sources):
            return None
        if isinstance(dep, ParamsDependency) or not sources:
            inputs.append(dep.get_hash() if dep.exists else None)
        else:
            inputs.append(_hash(dep.fs_path, files))
    if not all(inputs):
        return None
    as_locked = inputs == [dep.hash_info for dep in stage.deps] and not stage.changed_stage()
    if as_locked and not any(out.changed() for out in stage.outs):
        return stage
    for dep, hash_info in zip(stage.deps, inputs, strict=True):  # in place of what is on disk, or was
        dep.meta, dep.hash_info, dep.get_hash = Meta(), hash_info, lambda hash_info=hash_info: hash_info
    if as_locked and all(out.hash_info for out in stage.outs):
        entry = to_single_stage_lockfile(stage)
    else:
        entry = repo.stage_cache._load(stage)
    run = entry and repo.stage_cache._create_stage(entry, wdir=stage.wdir)
    return run if run and run.outs_cached() else None


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _files(repo: "Repo", out: Any) -> dict[str, object]:
    """The files of an output -> hash."""
    from dvc_data.hashfile.tree import Tree

    if not out.hash_info.isdir:
        return {out.fs_path: out.hash_info}
    return {os.path.join(out.fs_path, *key): value for key, _, value in Tree.load(repo.cache.local, out.hash_info)}


def _hash(path: str, files: dict[str, object]) -> Any:
    """DVC's hash of a file, or of a folder with just the files that are known; None if there are none."""
    from dvc_data.hashfile.tree import Tree

    if path in files:
        return files[path]
    tree = Tree()
    for file in files:
        if _inside(file, path):
            tree.add(Path(file).relative_to(path).parts, None, files[file])
    tree.digest()
    return tree.hash_info if len(tree) else None

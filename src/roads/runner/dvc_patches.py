"""What we change inside DVC, all of it. It is made for one version, and refuses another.

DVC 3.67 reads params.yaml several times for every stage, and parses and writes all of dvc.lock before and after every
stage: at mini that is two thirds of the seconds that a stage takes beside its command. It writes in place: a kill -9
leaves half of the file. And it enters outputs in dvc.lock that it could not keep in its cache, with an error that
`--quiet` hides.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from roads.lockfile import LAYOUT, LOCK, entry_of, with_entry
from roads.stage import UserError, expect_file, writing

VERSION = "3.67."
FILES = ("dvc.yaml", "dvc.lock", ".dvcignore", ".dvc/config", ".dvc/config.local")
PARSES = Path(".dvc/tmp/parses")  # the hash of a dvc.lock that has been parsed


def check_version() -> None:
    """Raises UserError where DVC is not the one that this module is made for."""
    from dvc import __version__

    if not __version__.startswith(VERSION):
        raise UserError(f"DVC {__version__}: the runner is made for {VERSION}x; `make setup` installs it, and plain "
                        "`dvc repro` needs none of this")


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """What DVC cannot read, as a UserError."""
    from dvc.exceptions import DvcException

    for name in FILES:
        expect_file(Path(name))
    try:
        yield
    except (DvcException, UnicodeDecodeError, OSError) as error:
        fix = "; `git checkout dvc.lock` brings back what was committed" if "dvc.lock" in str(error) else ""
        raise UserError(f"dvc: {because(error)}{fix}") from None


@contextlib.contextmanager
def params_read_once() -> Iterator[None]:
    """DVC 3.67 parses params.yaml again for every stage and walks through all of it for each of a stage's keys, which
    makes up most of a run with nothing to do."""
    from dvc.dependency import param

    read, files = param.read_param_file, {}

    def read_once(fs: Any, path: str, key_paths: list[str] | None = None, flatten: bool = False) -> dict:
        if path not in files:
            files[path] = read(fs, path)
        try:
            found = {key: functools.reduce(lambda part, name: part[name], key.split("."), files[path])
                     for key in key_paths or ()}
        except (KeyError, TypeError):
            found = {}
        return found if found and flatten else read(fs, path, key_paths, flatten)

    param.read_param_file = read_once
    try:
        yield
    finally:
        param.read_param_file = read


def reproduce(stage: str, run: Callable[[str, dict, str], int | None]) -> None:
    """`dvc repro --single-item STAGE`, which reads and writes no entry of dvc.lock but the stage's own.

    Args:
        run: runs a command in an environment and a folder, and returns its exit code; or None, and DVC runs it.
    Raises:
        DvcException: why the stage failed, as its cause where DVC has one.
    """
    check_version()
    from dvc.dvcfile import Lockfile
    from dvc.exceptions import DvcException
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo
    from dvc.stage import run as stage_run
    from dvc.stage.exceptions import StageCmdFailedError

    as_new_process, errors = stage_run._run, []
    load, dump = own_entry(stage, Lockfile._load, Lockfile.dump_stages)
    for name in "dvc", "dvc_data", "dvc_objects":
        logging.getLogger(name).handlers = [Errors(errors)]

    def run_command(executable: Any, command: str, **kwargs: object) -> None:
        code = run(command, kwargs["env"], kwargs["cwd"])
        if code is None:
            as_new_process(executable, command, **kwargs)
        elif code:
            raise StageCmdFailedError(command, code)

    def dump_what_is_kept(lockfile: Any, stages: Any, **kwargs: object) -> None:
        if errors:
            raise DvcException(errors[0])
        dump(lockfile, stages, **kwargs)

    stage_run._run, Lockfile._load, Lockfile.dump_stages = run_command, load, dump_what_is_kept
    logging.getLogger("dvc.progress").setLevel(logging.CRITICAL)
    # Read once: what dvc.lock says is then what the command began with, should params.yaml be edited while it runs.
    with set_loggers_level(logging.ERROR), params_read_once(), Repo(_wait_for_lock=True) as repo:
        repo.reproduce(stage, single_item=True)


class Errors(logging.Handler):
    """Keeps what DVC logs as an error, on one line each."""

    def __init__(self, errors: list[str]):
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.errors.append(record.getMessage() + (f": {because(cause)}" if cause else ""))


def own_entry(stage: str, load_all: Callable, dump_all: Callable) -> tuple[Callable, Callable]:
    """DVC's `Lockfile._load` and `Lockfile.dump_stages`, of one stage's entry alone where dvc.lock is as DVC writes it.

    What is written parses, or the old file stays.
    """
    from dvc.stage.serialize import to_lockfile

    def text_of(lockfile: Any) -> str | None:
        """None: in the middle of a merge, or changed by hand; DVC will know what to do."""
        text = Path(lockfile.path).read_text(encoding="utf-8") if lockfile.exists() else LOCK
        return text if LAYOUT.fullmatch(text) else None

    def load(lockfile: Any, **kwargs: object) -> tuple[dict, str]:
        if (text := text_of(lockfile)) is None:
            return load_all(lockfile, **kwargs)
        entry, _ = entry_of(stage, text)
        return YAML(typ="safe").load(LOCK + (entry or "  {}")), text

    def dump(lockfile: Any, stages: Any, **kwargs: object) -> None:
        path = Path(lockfile.path)
        with writing(path) as new:  # not in .dvc/tmp, which may be another file system
            if (text := text_of(lockfile)) is None:
                shutil.copyfile(path, new)
                lockfile.path = str(new)
                try:
                    dump_all(lockfile, stages, **kwargs)
                finally:
                    lockfile.path = str(path)
                expect_yaml(new.read_text(encoding="utf-8"))
            else:
                for done in stages:
                    entry = as_entry(to_lockfile(done, **kwargs))
                    before, text = text, with_entry(done.name, entry, text)
                    expect_yaml(text, before, entry)
                new.write_text(text, encoding="utf-8")

    return load, dump


def expect_yaml(lock: str, before: str = "", entry: str = "") -> None:
    """Parse a dvc.lock, which raises where it is no YAML; of one that was parsed `before`, the new entry alone."""
    known = PARSES.read_text() if PARSES.exists() else ""
    for _ in YAML(typ="safe").parse(LOCK + entry if known == digest(before) else lock):
        pass
    PARSES.write_text(digest(lock))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def as_entry(stages: dict) -> str:
    """Stages as dvc.lock has them below `stages:`, in DVC's own layout."""
    yaml, text = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.representer.add_representer(OrderedDict, lambda representer, value: representer.represent_dict(value))
    yaml.dump({"stages": stages}, text)
    return text.getvalue().removeprefix("stages:\n")


def because(error: BaseException | None) -> str:
    """An error and what it comes from, on one line."""
    said = []
    while error is not None:
        text = " ".join(str(error).split()) or type(error).__name__
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            text += " (of .dvc or runs; free some and run the same command again)"
        said += [text] if text not in " ".join(said) else []
        error = error.__cause__
    return ": ".join(said)

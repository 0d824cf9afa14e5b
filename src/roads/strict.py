"""YAML files that people write, read strictly: a mistake is one line with the file, the key, what was expected, and
the nearest key.
"""

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import YAMLError

from roads.stage import UserError, expect_file

# Numbers that params.yaml may hold. Their bounds keep out what no machine could do.
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Batch = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
LearningRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


class _Constructor(SafeConstructor):
    """Tells the line of a value that cannot be what its form or its tag says, as the date 2020-13-45."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            raise ConstructorError(None, None, f"{type(error).__name__} {error}", node.start_mark) from None


class Malformed(UserError):
    """A text that is no YAML, or no mapping."""


def read(path: Path, expected: str) -> dict:
    """The mapping in a YAML file, which `expected` describes.

    Raises:
        UserError: no such file, or none that can be read. Malformed: not YAML, or no mapping.
    """
    try:
        expect_file(path)
        yaml = YAML(typ="safe")
        yaml.Constructor = _Constructor
        found = yaml.load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the root of the project") from None
    except OSError as error:  # the one of a read itself names no file
        raise UserError(f"{path}: {str(error.strerror).lower()}; expected {expected}") from None
    except RecursionError:
        raise Malformed(f"{path}: not YAML that we read: nested too deeply") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise Malformed(f"{where}: not YAML: {reason}") from None
    if not isinstance(found, dict):
        raise Malformed(f"{path}: expected a mapping with {expected}")
    return found


def check(model: type[Model], value: Any, where: str, key: str = "") -> Model:
    """`value` as a model; `where` names the file and `key` the place in it, for errors. A list's entries go by id.

    Raises:
        UserError: the first mistake.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # An unknown key explains the missing one beside it: name it first.
        first = min(error.errors(), key=lambda it: it["type"] != "extra_forbidden")
        raise UserError(f"{where}: {explain(first, model, key, value)}") from None


def nearest(key: str, known: Iterable[str]) -> str:
    """What to say after an unknown key.

    >>> nearest("bata", ["lr", "beta"])
    "; did you mean 'beta'?"
    """
    names = list(map(str, known))
    close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(names)}"


def explain(error: Any, model: type[BaseModel], key: str = "", value: Any = None) -> str:
    """One of pydantic's errors in a value of `model` as 'key: what was expected'."""
    names, types = [key] if key else [], [model]
    known: list[str] = []
    for part in error["loc"]:
        models = [it for it in types if isinstance(it, type) and issubclass(it, BaseModel)]
        tagged = [it for it in models if part in _tags(it)]
        if part == "[key]":
            continue
        if tagged and len(models) > 1:  # pydantic's path has a step that the file has not: the kind of a block
            types = tagged
            continue
        inside = isinstance(value, list) or isinstance(value, dict) and part in value
        value = value[part] if inside else None
        is_entry = isinstance(part, int) and isinstance(value, dict)
        names.append(str(value.get("id", part) if is_entry else part))
        known = [name for it in models for name in it.model_fields]
        fields = [it.model_fields[part].annotation for it in models if part in it.model_fields]
        inner = [get_args(it)[-1] for it in types if get_origin(it) in (dict, list)]
        types = [leaf for it in fields + inner for leaf in _leaves(it)]
    place = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key{nearest(names[-1], known)}"
    if error["type"] == "missing":
        return f"{place}: missing"
    if error["type"] == "value_error":
        inside = str(error["ctx"]["error"])
        of_block = any(isinstance(it, type) and issubclass(it, BaseModel) for it in types)  # its error names the key
        return f"{place}{'.' if of_block else ': '}{inside}" if place else inside
    return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}, got {shown(error['input'])}"


def shown(value: Any) -> str:
    """A value in an error: cut where it is long, as a few aliases of YAML may stand for millions of values."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxstring, short.maxlong, short.maxother = 2, 8, 8, 80, 40, 80
    return short.repr(value)


def _leaves(annotation: Any) -> list:
    """The types that an annotation allows: those of unions, without what is annotated."""
    if get_origin(annotation) is Annotated:
        return _leaves(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [leaf for part in get_args(annotation) for leaf in _leaves(part)]
    return [annotation]


def _tags(model: type[BaseModel]) -> tuple:
    """The kinds that a model of several is for."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()

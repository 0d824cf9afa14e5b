"""What reports hold: the JSON of a figure, of the claims and of the theory, for everything that reads them."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from roads import stage

Model = TypeVar("Model", bound=BaseModel)


class Estimate(BaseModel):
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    by_seed: list[float] = []
    over_seeds: tuple[float, float] | None = None  # t interval of the seeds' means


class Bar(Estimate):
    """One mean of a figure: a bar, or a point of a line."""

    bar: str
    series: str
    x: float | None
    roles: list[str] = []  # what claims call it where scales name it differently
    n: int  # prompts
    scores: list[str]  # a scores.npz per seed
    key: str  # its array in them
    judge: dict[str, float] = {}  # position_consistency, parse_failures, ties, mean_tokens, mean_tokens_reference
    trained: dict[str, list[float]] = {}  # per seed: steps, rows, dropped_as_ties, kl


class Gap(Estimate):
    """A difference, paired by prompt and seed."""

    standardised: Estimate | None = None


class Measure(BaseModel):
    """What stands beside the measure that is drawn."""

    bars: dict[str, Estimate]
    gaps: dict[str, Gap]


class PaperSeries(BaseModel):
    name: str
    values: dict[str, float | None]


class Paper(BaseModel):
    source: str
    unit: str
    series: list[PaperSeries]


class Provenance(BaseModel):
    files: dict[str, str]  # path -> sha256
    commit: str | None
    lock: str | None  # a hash of what dvc.lock has of the runs behind
    params: dict


class Figure(BaseModel):
    """reports/<scale>/<figure>.json, as figures/figure.py writes it."""

    figure: str
    title: str
    caption: str
    note: str
    measure: str
    seeds: list[int]
    bars: list[Bar]
    gaps: dict[str, Gap]
    also: dict[str, Measure] = {}
    paper: Paper | None = None
    provenance: Provenance


class Claim(BaseModel):
    """A claim with its verdict, as claims.py writes it."""

    id: str
    sentence: str
    source: str
    figure: str
    contrast: dict[str, float]
    test: Literal["greater", "equivalent", "different", "correlated"]
    margin: float
    family: str = ""
    measure: str | None = None
    against: list[str] | dict[str, float] = []
    over: str = "prompts"
    made_from: str | None = None  # a hash of the claim and of the scores that decided it
    changed: str | None = None
    beyond_margin: bool = False
    verdict: Literal["supported", "not supported", "undecided", "not run"]
    estimate: Estimate | None = None
    p: float | None = None
    p_adjusted: float | None = None
    n: int | None = None
    seeds: list[int] = []
    why: str = ""


class Hypothesis(BaseModel):
    id: str
    says: str
    predicts: str
    claims: list[str]


class Claims(BaseModel):
    alpha: float
    headline: list[str] = []
    claims: list[Claim]
    hypotheses: list[Hypothesis]


class Statements(BaseModel):
    class Row(BaseModel):
        statement: str
        policies: str
        max_error: float
        n: int
        status: str

    rows: list[Row]
    tolerance: float


class Broken(BaseModel):
    class Row(Estimate):
        statement: str
        assumption: str
        kind: Literal["parting", "unneeded"]
        max: float

    rows: list[Row]


class Complexity(BaseModel):
    limits: list[dict]


def figures(folder: Path) -> list[str]:
    """The names of the figures that a folder of reports has."""
    names = {path.stem for path in folder.glob("*.json") if not path.name.startswith(".")}  # not what a killed run left
    return sorted(names - {"claims", "metrics"})


def read(path: Path, schema: type[Model], remedy: str) -> Model:
    """A JSON file as `schema`.

    Raises:
        UserError: no JSON, or a key that is missing or wrong; names the key and the command that writes the file anew.
    """
    try:
        return schema.model_validate(stage.read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        message = first["msg"][0].lower() + first["msg"][1:]
        raise stage.UserError(f"{path}: {key}: {message}; `{remedy}` writes it again") from None
    except ValueError as error:
        raise stage.UserError(f"{path}: not JSON ({error}); `{remedy}` writes it again") from None

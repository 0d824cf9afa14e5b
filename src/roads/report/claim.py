"""claims.yaml as frozen models: claims as contrasts of bars, and the hypotheses that they bear on."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from roads import config, strict
from roads.stage import UserError
from roads.strict import Positive, Strict, nearest

Weight = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Measure = Literal["accuracy", "log-likelihood", "by quality", "held-out", "noisy judge", "no penalty"]


class Claim(Strict):
    id: Annotated[str, Field(pattern="^[a-z0-9-]{1,40}$")]  # the table's first column
    sentence: Text
    source: Text  # a place in the paper, or 'ours': the two families
    figure: Text
    contrast: dict[str, Weight]  # bar or role -> weight, per prompt and seed; fig3/BAR is a bar of another figure
    test: Literal["greater", "equivalent", "different", "correlated"]
    margin: Positive  # the smallest effect of interest, in the figure's unit
    paired: bool = True  # false: bars of different x are of different worlds, whose prompts have no order in common
    measure: Measure | None = None  # null: the figure's
    # worlds: each is an observation, and the contrast names series of bars; kinds: so is each kind of reward, the mean
    # of its cells (`counts n=375`, `counts n=6000`), which share pairs and policies.
    over: Literal["prompts", "worlds", "kinds"] = "prompts"
    # Of `correlated`: for each bar of the contrast, the bar that goes with it; over worlds or kinds, a contrast too.
    against: list[Text] | dict[str, Weight] = []
    changed: Text | None = None  # when and why it was added or changed after results of its figure had been seen

    @property
    def family(self) -> str:
        return "ours" if self.source.startswith("ours") else "the paper's"

    @field_validator("contrast")
    @classmethod
    def _contrast(cls, weights: dict[str, float]) -> dict[str, float]:
        if not weights or not all(weights.values()):
            raise ValueError(f"expected weights other than 0, got {weights}")
        return weights

    @model_validator(mode="after")
    def _sums(self) -> "Claim":
        if self.over != "prompts" and not (isinstance(self.against, dict) if self.test == "correlated" else
                                          not self.against):
            raise ValueError(f"against: over {self.over}, expected weights of series for correlated, else none")
        if self.over != "prompts" and self.measure:
            raise ValueError(f"measure: over {self.over}, expected none")
        if self.test == "correlated" and self.over == "prompts":
            if not isinstance(self.against, list) or len(self.against) != len(self.contrast) or len(self.against) < 3:
                raise ValueError(f"against: expected a bar for each of at least 3 in contrast, got {self.against}")
        elif abs(sum(self.contrast.values())) > 1e-9:
            raise ValueError(f"contrast: expected weights other than 0 that sum to 0, got {self.contrast}")
        elif self.against and self.over == "prompts":
            raise ValueError("against: expected none but for a test correlated")
        return self


class Hypothesis(Strict):
    id: Text
    says: Text
    predicts: Text
    claims: list[str]  # ids of the claims that bear on it


class Claims(Strict):
    alpha: Annotated[float, Field(gt=0, lt=1)]
    headline: list[str] = []  # ids of the claims that the page opens with
    hypotheses: list[Hypothesis]
    claims: Annotated[list[Claim], Field(min_length=1)]

    @model_validator(mode="after")
    def _ids(self) -> "Claims":
        ids = [claim.id for claim in self.claims]
        for name, found in (("claims", ids), ("hypotheses", [each.id for each in self.hypotheses])):
            twice = [key for key, count in Counter(found).items() if count > 1]
            if twice:
                raise ValueError(f"{name}: expected distinct ids, got {twice[0]!r} twice")
        named = [(f"hypotheses.{each.id}.claims", each.claims) for each in self.hypotheses]
        for where, keys in [("headline", self.headline), *named]:
            for key in keys:
                if key not in ids:
                    raise ValueError(f"{where}: no claim {key!r}{nearest(key, ids)}")
        return self


def load(path: Path) -> Claims:
    """Read and check the claims.

    Raises:
        UserError: one line with the file, the claim, the key and what was expected.
    """
    raw = strict.read(path, f"the keys {', '.join(Claims.model_fields)}")
    found, table = strict.check(Claims, raw, str(path)), Path(path).with_name(config.FIGURES.name)
    known = config.load_figures(table) if table.exists() else {}
    for claim in found.claims:
        others = {name.partition("/")[0]: "contrast" for name in [*claim.contrast, *claim.against] if "/" in name}
        for figure, key in ({claim.figure: "figure"} | others).items() if table.exists() else ():
            if figure not in known:
                raise UserError(f"{path}: claims.{claim.id}.{key}: no figure {figure!r} in {table.name}"
                                f"{nearest(figure, known)}")
    return found

"""What params.yaml may say of a judge, and of what asking one may cost."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from roads.strict import Count, NonNegative, Positive, Strict


class Gold(Strict):
    kind: Literal["gold"]  # the world's own judge, which knows the quality


class Known(Strict):
    """A judge of real posts whose quality is computed from the text (judge/quality.py)."""

    kind: Literal["relevance", "calibrated", "sentiment", "rouge"]


OUTSIDE = ("openai", "batch")  # judges that are asked over a network
PROMPTS = Path(__file__).parent / "judge" / "prompts"
# What a judge's prompt has slots for: a post of TL;DR and two summaries, or any prompt as the policy reads it.
PROMPT_SLOTS = {"post": {"post", "summarya", "summaryb"}, "prompt": {"prompt", "responsea", "responseb"}}


class LLMJudge(Strict):
    """A judge behind an OpenAI-compatible endpoint (client.py): OPENAI_BASE_URL and OPENAI_API_KEY say where."""

    kind: Literal["openai", "batch"]  # one request an answer, or OpenAI's Batch API
    model: str  # dated, as gpt-4o-2024-08-06
    prompt: str  # a file of judge/prompts/, with slots for what was asked and two answers (PROMPT_SLOTS)
    temperature: NonNegative
    max_tokens: Count
    label_orders: Literal[1, 2] = 2  # in which it is shown pairs that it labels (Figs 6, 10); two that differ are a tie

    @property
    def about(self) -> str:
        """What its prompt is about: `post` or `prompt`, a key of PROMPT_SLOTS; "" where it has other slots."""
        slots = set(re.findall(r"{{(\w+)}}", (PROMPTS / f"{self.prompt}.txt").read_text(encoding="utf-8")))
        return next((key for key, wanted in PROMPT_SLOTS.items() if wanted == slots), "")

    @model_validator(mode="after")
    def _prompt(self) -> "LLMJudge":
        known = sorted(path.stem for path in PROMPTS.glob("*.txt") if not path.stem.startswith("write_"))
        if self.prompt not in known:
            raise ValueError(f"prompt: expected a file of src/roads/judge/prompts, one of {', '.join(known)}; got "
                             f"{self.prompt!r}")
        if not self.about:
            wanted = " or ".join(", ".join(f"{{{{{slot}}}}}" for slot in sorted(one)) for one in PROMPT_SLOTS.values())
            raise ValueError(f"prompt: {self.prompt}.txt: expected the slots {wanted}, and no other")
        return self


class Spending(Strict):
    """What asking may cost, and how it is done: no answer depends on it, and DVC does not look at it."""

    budget: Positive  # dollars, over all that was ever asked of the model; asking stops before it is passed
    input: NonNegative  # dollars per million tokens read
    output: NonNegative  # and written
    batch_discount: Annotated[float, Field(gt=0, le=1)]  # the Batch API's price, as a share
    concurrency: Count  # requests at once
    timeout: Positive  # seconds
    retries: Annotated[int, Field(ge=0)]
    batch_requests: Annotated[int, Field(ge=1, le=50_000)] = 50_000  # of a batch at most: the Batch API's own limit

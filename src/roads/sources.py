"""Where posts and summaries come from, as a block of params.yaml says it: the synthetic world, or posts of several
kinds."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from roads.strict import Count, Finite, NonNegative, Positive, Seed, Strict


class Terms(Strict):
    """What gold quality is made of, term by term (world.py); attributes count 1 where a world has a number alone."""

    attributes: NonNegative  # weight of the sum over words by which `taste` weighs them
    coherence: NonNegative = 0.0  # of squared counts of clusters
    counts: NonNegative = 0.0  # of a value of each cluster, summed over words
    order: NonNegative = 0.0  # of a value of each pair of clusters, summed over neighbours


class World(Strict):
    """The synthetic slot world (world.py)."""

    kind: Literal["world"]
    seed: Seed
    subreddits: Count
    slots: Count  # K; the horizon is K + 1 tokens, EOS included
    words: Count  # per slot
    candidates: Count  # words of a slot that a prompt offers
    clusters: Count
    taste: Annotated[list[Finite], Field(min_length=1, max_length=8)]  # weight of each attribute in the gold quality
    interaction: NonNegative | Terms  # weight of coherence there, or of every term
    tau: Positive  # temperature of the Bradley-Terry labels of task human, in units of quality
    tags: Literal["attributes", "quality", "topic"]  # what the last token of a base's document tells (world.py)
    tag_buckets: Count  # of each attribute, or of the quality
    tag_noise: NonNegative  # sd of the noise on what the tag tells
    tag_weight: NonNegative  # weight of the tag in the base's loss; a word weighs 1

    @model_validator(mode="after")
    def _choice(self) -> "World":
        if not 2 <= self.candidates <= self.words:
            raise ValueError(f"candidates: expected 2 to words={self.words}, got {self.candidates}")
        if not any(self.taste):
            raise ValueError(f"taste: expected a weight for each attribute, not all 0; got {self.taste}")
        if not any(self.terms.model_dump().values()):
            raise ValueError("interaction: expected a weight other than 0")
        return self

    @property
    def tag_shape(self) -> tuple[int, ...]:
        """How many values a tag has, by what it tells."""
        if self.tags == "topic":
            return (self.clusters,)
        return (self.tag_buckets,) * (len(self.taste) if self.tags == "attributes" else 1)

    @property
    def terms(self) -> Terms:
        given = self.interaction
        return given if isinstance(given, Terms) else Terms(attributes=1.0, coherence=given)


class OpenAI(Strict):
    """OpenAI's TL;DR posts and comparisons, downloaded as data/openai.json says."""

    kind: Literal["openai"]
    max_query_tokens: Annotated[int, Field(ge=16)]
    max_response_tokens: Annotated[int, Field(ge=2)]  # EOS included
    max_preference_tokens: Annotated[int, Field(ge=2)]  # of the sides of a comparison: people wrote up to 169
    winrate_prompts: Literal["test", "valid"] = "test"  # which posts; the authors' code takes those of validation


class TwoWord(OpenAI):
    """Fig 10: pairs of two-word summaries, at most max_preference_tokens long, that the judge writes and labels."""

    kind: Literal["two_word"]


class Jsonl(OpenAI):
    """Rows of your own: a folder with train.jsonl, valid.jsonl and test.jsonl, and maybe comparisons (tldr.py)."""

    kind: Literal["jsonl"]
    vocab_size: Annotated[int, Field(ge=258)] | None  # of a BPE, trained where there is no tokenizer.json


SUFFIXES = (".jsonl", ".parquet")  # of files of your own preferences


class OwnPreferences(Strict):
    """Rows of your own with prompt, chosen and rejected (own_preferences.py): a folder, or a dataset of the hub."""

    kind: Literal["preferences"]
    max_query_tokens: Annotated[int, Field(ge=1)]  # a longer prompt is left out
    max_response_tokens: Annotated[int, Field(ge=2)]  # EOS included
    max_preference_tokens: Annotated[int, Field(ge=2)]  # of chosen and rejected
    cut_at_most: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of rows too long, beyond which none is taken


class Posts(OpenAI):
    """The real posts of data/tldr, or rows of your own in its layout. Numbers are chosen on posts of their own."""

    kind: Literal["posts"]
    held_out: Literal["report", "development"]  # what valid and test are: the posts of reports, or those for choosing

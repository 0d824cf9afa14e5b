"""What a block of params.yaml may say, a scale or an arm of one, as frozen models. Unknown keys, wrong types and
impossible values are errors (strict.py).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from roads.judge_settings import OUTSIDE, Gold, Known, LLMJudge, Spending
from roads.sources import Jsonl, OpenAI, OwnPreferences, Posts, TwoWord, World
from roads.strict import Batch, Count, Finite, LearningRate, NonNegative, Positive, Seed, Strict, Temperature, Width

BEST_OF = (1, 2, 5, 10, 25)  # samples that a reward model picks from (Figs 8 and 9)
HELD_OUT = 5000  # pairs at most for Fig 4: there are 83,802 at scale paper, and a quarter of its time would go to them
POLICIES = ("dpo", "dpo_2x", "online_sft", "online")
Policy = Literal["dpo", "dpo_2x", "online_sft", "online"]
Task = Literal["human", "rouge"]


class Data(Strict):
    """How many rows each split has."""

    base: Annotated[int, Field(ge=0, le=10**9)]  # none where the base is pretrained
    sft: Count
    preferences: Count  # prompts of the preference set
    more: Annotated[int, Field(ge=0, le=10**9)]  # prompts beyond it (Fig 5), which the world's annotators can label too
    online: Count  # prompts, of the two together, that online DPO samples
    valid: Count  # prompts of the validation preference set
    test: Count  # prompts of the SFT test set, for winrates
    best_of_n: Count  # how many of those are used for best-of-N


class FromScratch(Strict):
    """A GPT-NeoX of random weights, which stage base trains."""

    kind: Literal["new"]
    hidden_size: Width
    layers: Annotated[int, Field(ge=1, le=1000)]
    heads: Width
    max_positions: Annotated[int, Field(ge=1, le=2**20)]

    @model_validator(mode="after")
    def _heads(self) -> "FromScratch":
        if self.hidden_size % self.heads:
            raise ValueError(f"heads: expected a divisor of hidden_size={self.hidden_size}, got {self.heads}")
        if self.hidden_size // self.heads % 2:
            raise ValueError(f"heads: expected heads of an even width (rotary positions turn pairs), got "
                             f"{self.hidden_size} / {self.heads} = {self.hidden_size // self.heads}")
        return self


class Pretrained(Strict):
    """Any causal language model of the hub, or of a folder; stage base fetches it."""

    kind: Literal["pretrained"]
    name: str
    revision: str | None  # of the hub; none for a folder
    parameters: Positive  # for `make plan`


class Packaged(Strict):
    """A language model of an installed package (hub.PACKAGES), or any GGUF file; stage base dequantises it."""

    kind: Literal["packaged"]
    name: str  # of hub.PACKAGES, or the path of a .gguf file
    eos: str | None  # the token that ends a text; null: as the file has it
    pad: str | None
    parameters: Positive  # for `make plan`


class Compute(Strict):
    """How numbers are computed: it may move them, by rounding (precision, attention) or other draws (sampler)."""

    device: Literal["cpu", "gpu"]
    precision: Literal["fp32", "bf16"]  # bf16: autocast; weights and optimiser stay fp32
    attention: Literal["sdpa", "flash"]
    sampler: Literal["tree", "vllm"]


class Machine(Strict):
    """What fits the machine and moves no number beyond rounding: DVC does not look at it."""

    threads: Count  # of the CPU, per stage
    micro_batch: Count | None  # rows, or pairs, that a GPU takes at once; null: halved until it fits
    gradient_checkpointing: bool
    tensor_parallel: Count  # GPUs that vLLM spreads a model over
    stages_per_gpu: Count | None = None  # at the same time; null: by the size of model and GPU


class Train(Strict):
    """AdamW with eps 1e-5 (Tables 2 and 3); weight decay .01 and no warm-up are those of the authors' code."""

    lr: LearningRate
    schedule: Literal["linear", "cosine"]
    batch_size: Batch  # rows, or pairs
    epochs: Count
    clip: Positive | None = 1.0  # the norm that gradients are clipped to; null: they are not


class Base(Train):
    seed: Seed = 0  # of the first weights and the order of documents; one base serves every seed of the study

    def told(self) -> dict[str, Any]:
        """For params.json; seed 0 goes without saying."""
        return self.model_dump(exclude={"seed"} if self.seed == 0 else None)


class SFT(Train):
    on: Literal["response", "query and response"] = "response"  # what the loss counts: REBEL's SFT counts both


class Reward(Train):
    layers: Count | None = None  # of the SFT policy's, from the bottom; null: all (Fig 9 at scale real)


class Preference(Train):
    beta: Positive
    shards: Count  # 1: every pair once an epoch. 8: what the authors' loader gives on 8 GPUs (train.batches)


class Policies(Preference):
    """What loss policies are trained with; preference_losses.py has them."""

    loss: Literal["dpo", "ipo", "simpo", "chi_po", "dpo_kl"] = "dpo"  # offline
    online_loss: Literal["dpo", "rebel"] = "dpo"
    kl: NonNegative = 0.0  # weight of the reverse KL in dpo_kl

    @model_validator(mode="after")
    def _weight(self) -> "Policies":
        if (self.loss == "dpo_kl") != (self.kl > 0):
            raise ValueError(f"kl: expected a weight above 0 for loss dpo_kl, and none for others; got {self.kl:g}")
        return self

    def told(self) -> dict[str, Any]:
        """For params.json; DPO's own losses go without saying."""
        plain = {"loss": "dpo", "online_loss": "dpo", "kl": 0.0}
        return {key: value for key, value in self.model_dump().items() if value != plain.get(key)}


class Epochs(Strict):
    """How often a training set of some size is gone through: more often where there are few pairs."""

    dpo: Count
    reward: Count


class Sampling(Strict):
    n: Count  # completions per prompt
    temperature: Temperature


# A prompt whose completions tie is dropped, or kept as a pair of equal sides, which has no gradient but takes steps.
Ties = Literal["drop", "keep"]


class BestOfN(Sampling):
    # The global RM's reward of a sample that was cut; null: that of its text with an EOS. The authors' code: -1e6.
    unfinished: Finite | None = None


class RankedSampling(Sampling):
    n: Annotated[int, Field(ge=2)]  # best and worst need two
    ties: Ties = "drop"


class PairSampling(Strict):
    n: Literal[2]
    temperature: Temperature | None  # none for rows
    ties: Ties = "drop"
    labels: Literal["annotators", "judge", "rows"]  # noisy Bradley-Terry ones; of winrates' judge (Fig 6); the data's
    # Of annotators: the temperature on posts, in standard deviations of a prompt's quality (a world has its own), the
    # weight of ln(length) and of being shown first, in logits, and the share of labels that are flipped.
    tau: Positive | None = None
    length_bias: Finite = 0.0
    position_bias: Finite = 0.0
    flipped: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    @model_validator(mode="after")
    def _sampled(self) -> "PairSampling":
        if (self.temperature is None) != (self.labels == "rows"):
            raise ValueError("temperature: expected a number, or null where labels are the rows' own")
        return self


class Online(RankedSampling):
    logits_divided_by: Temperature  # in training; the paper divides by the sampling temperature


class Samples(Strict):
    human: PairSampling | None = None  # what preferences are about, where there is someone to have them
    rouge: RankedSampling  # what ROUGE-L ranks, Fig 11
    online: Online  # what the global RM ranks
    evaluate: Sampling
    value: Sampling | None = None  # for the reverse KL of Eq. 2
    best_of_n: BestOfN | None = None  # Figs 8 and 9


def _or_none(value: Any) -> Any:
    """`judge: none`, where there are no preferences."""
    return None if value == "none" else value


class Scale(Strict):
    """One block of params.yaml, or an arm of one. Scales differ by numbers, never by code."""

    compute: Compute
    machine: Machine
    policies: list[Policy] = list(POLICIES)  # an arm may train fewer of them (figures.yaml)
    rounds: Count = 1  # of sampling, ranking and training online; an arm may have more
    sizes: dict[int, Epochs] = {}  # numbers of pairs, and of online prompts, that an arm goes through in one process
    source: Annotated[World | Posts | Jsonl | OpenAI | TwoWord | OwnPreferences, Field(discriminator="kind")]
    data: Data
    model: Annotated[FromScratch | Pretrained | Packaged, Field(discriminator="kind")]
    base: Base | None  # none for a model that is trained already
    sft: SFT
    reward: Reward
    local: Preference
    dpo: Policies
    samples: Samples
    judge: Annotated[Annotated[Gold | Known | LLMJudge, Field(discriminator="kind")] | None, BeforeValidator(_or_none)]
    spending: Spending | None = None  # none where nothing is asked over a network
    # figure -> name -> what the arm changes: a block like this one with some of its keys alone.
    arms: dict[str, dict[str, dict[str, Any]]] = {}

    @property
    def synthetic(self) -> bool:
        return isinstance(self.source, World)

    @model_validator(mode="after")
    def _complete(self) -> "Scale":
        if self.model.kind == "new" and (self.reward.layers or 1) > self.model.layers:
            raise ValueError(f"reward.layers: expected at most model.layers={self.model.layers}")
        for name in ("human", "value", "best_of_n") if self.synthetic or self.samples.human else ():
            if getattr(self.samples, name) is None:
                raise ValueError(f"samples.{name}: missing; preferences need it")
        if (self.samples.human is None) != (self.judge is None):
            raise ValueError("judge: expected a block where there is samples.human, and none elsewhere")
        if self.judge and self.synthetic != (self.judge.kind == "gold"):
            raise ValueError("judge.kind: expected gold for a world, and one of the others for posts")
        own = "rows" if self.judge and self.judge.kind in OUTSIDE else "annotators"  # or else the judge
        if self.samples.human and self.samples.human.labels not in (own, "judge"):
            raise ValueError(f"samples.human.labels: expected {own} or judge, got {self.samples.human.labels}")
        if self.samples.human and (self.samples.human.tau is not None) != (
                isinstance(self.judge, Known) and self.samples.human.labels == "annotators"):
            raise ValueError("samples.human.tau: expected a number for annotators of posts, and none elsewhere")
        if bool(self.judge and self.judge.kind in OUTSIDE) != (self.spending is not None):
            raise ValueError("spending: expected a block where the judge is asked over a network, and null elsewhere")
        if not (self.model.kind == "new") == (self.base is not None) == (self.data.base > 0):
            raise ValueError("base: expected a block and data.base > 0 for a new model, null and 0 for one pretrained")
        is_own, is_asked = self.source.kind == "preferences", bool(self.judge and self.judge.kind in OUTSIDE)
        if is_own and (self.model.kind == "new" or self.judge and not is_asked):
            raise ValueError("source.kind: preferences needs a pretrained or packaged model, and a judge of kind "
                             "openai or batch")
        if is_asked and (self.judge.about == "prompt") != is_own:
            wanted = "prompts, as response" if is_own else "posts, as summary"
            raise ValueError(f"judge.prompt: expected one about {wanted}, for source.kind {self.source.kind}; got "
                             f"{self.judge.prompt}")
        if self.compute.attention == "flash" and (self.compute.precision, self.compute.device) != ("bf16", "gpu"):
            raise ValueError("compute.attention: flash needs precision bf16 and device gpu")
        if self.source.kind == "two_word" and self.data.more:
            raise ValueError(f"data.more: expected 0 for two_word, as tied pairs leave the set; got {self.data.more}")
        if self.data.online > self.data.preferences + self.data.more:
            raise ValueError(f"data.online: expected at most preferences + more, got {self.data.online}")
        if sizes := [n for n in self.sizes if not 1 <= n <= self.data.preferences + self.data.more]:
            raise ValueError(f"sizes: expected from 1 to preferences + more pairs, got {sizes[0]}")
        if self.data.best_of_n > self.data.test:
            raise ValueError(f"data.best_of_n: expected at most test={self.data.test}, got {self.data.best_of_n}")
        return self

    def made_from(self) -> dict:
        """What the SFT checkpoint and the test prompts follow from: arms that agree in it share them. Where tags show
        attributes, no document of a world depends on what readers like."""
        data = self.data.model_dump(exclude={"preferences", "more", "online"})
        made = used(self, "source", "model", "base", "sft") | {"data": data}
        if self.synthetic and self.source.tags == "attributes":
            source = self.source.model_dump(exclude={"taste", "interaction", "tau"})
            made["source"] = source | {"attributes": len(self.source.taste)}
        return made


def used(scale: Scale, *blocks: str) -> dict:
    """The named blocks as plain values: what a stage writes to its params.json, and what DVC tracks for it."""
    return {block: scale.model_dump()[block] for block in blocks}

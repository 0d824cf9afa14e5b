"""Stage data: rows -> tokens. Source: the synthetic world, OpenAI's posts and comparisons, or jsonl rows of your own.

    python -m roads.stages.data OUT --scale mini              # nothing to read: a world is made
    python -m roads.stages.data FOLDER OUT --scale real-cpu   # train.jsonl, valid.jsonl, test.jsonl, maybe comparisons
    python -m roads.stages.data data/tldr OUT --scale real    # the posts of this repository
    python -m roads.stages.data data/openai.json OUT --scale paper   # what to download, and what must be in it
    python -m roads.stages.data FOLDER OUT --scale chat       # train.jsonl or .parquet: prompt, chosen, rejected

Writes tokenizer.json and one .npz per split. Queries [n, Q] are padded left, responses [n, R] right.
    base.npz         tokens [n, L], weights [n, L]: documents for pretraining and the loss weight of each token
    sft.npz          query, response
    preferences.npz  query, response: prompts of the preference set and each one's reference
    more.npz         the same, beyond the preference set
    online.npz       the same: the prompts, of those two, that online DPO samples
    valid.npz        the same, held out
    test_human.npz   query, response: prompts for winrates (the SFT test set) and the references to beat
    test_best_of_n.npz   the first of them
    test_rouge.npz   query, response: prompts for ROUGE-L (the validation preference set) and the references to match
Where the pairs come with the data, preferences.npz and valid.npz have chosen and rejected [n, P] too, and the reference
is the preferred summary.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from roads import active, config, hub, own_preferences, rouge, schema, stage, tldr
from roads.posts import download, in_folder
from roads.world import World

SPLITS = ("sft", "preferences", "valid", "test", "more")
STREAMS = {"more": 15, "base": 10, "sft": 11, "preferences": 12, "valid": 13, "test": 14}  # of the world's draws


def from_world(cfg: schema.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]]]:
    """The tokenizer and the splits of the synthetic world; every split has prompts of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    world = World(cfg.source)
    vocabulary = {word: i for i, word in enumerate(world.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|padding|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(tldr.SPECIAL)  # EOS and padding are no words: ROUGE must not count them
    splits = {}
    for split, stream in STREAMS.items():
        rng = np.random.default_rng([cfg.source.seed, stream])
        query = world.prompts(getattr(cfg.data, split), rng)
        # References of the preference set are of words that readers like, those of SFT and of the winrate are not: SFT
        # alone must not already solve the task.
        liked = split in ("preferences", "valid", "more")
        response = world.documents(query, rng) if split == "base" else world.summaries(query, rng, liked)
        splits[split] = {"query": query, "response": response}
    # One more column than a summary needs: when to stop is the policy's to learn.
    for split in SPLITS:
        splits[split]["response"] = np.pad(splits[split]["response"], ((0, 0), (0, 1)), constant_values=tldr.PAD)
    base = splits["base"]
    tokens = np.hstack([base["query"], base["response"], world.tags(base["query"], base["response"], rng)[:, None]])
    weights = np.ones(tokens.shape, np.float32)
    weights[:, : base["query"].shape[1]] = 0  # a post is random words: there is nothing in it to predict
    weights[:, -1] = cfg.source.tag_weight
    splits["base"] = {"tokens": tokens, "weights": weights}
    return tokenizer, splits


def tokenizer_for(cfg: schema.Scale, source: Path, rows: list[tldr.Row]) -> tuple[object, dict[str, int]]:
    """The model's tokenizer with EOS and padding as 0 and 1, and the ids that they had; for a new model the one beside
    the rows, or a BPE trained on them."""
    if cfg.model.kind == "packaged":
        tokenizer, eos_id, pad_id = packaged_tokenizer(cfg.model)
        return tokenizer, {"eos_id": eos_id, "pad_id": pad_id}
    if cfg.model.kind == "pretrained":
        folder, _ = hub.fetch(cfg.model.name, cfg.model.revision,
                              ["tokenizer.json", "tokenizer_config.json", "config.json"])
        settings = {}
        for name in ("config.json", "tokenizer_config.json"):
            settings |= stage.read_json(folder / name) if (folder / name).exists() else {}
        eos, pad = (token.get("content") if isinstance(token, dict) else token
                    for token in (settings.get("eos_token"), settings.get("pad_token")))
        if eos is None:
            eos = settings.get("eos_token_id")
            eos = eos[0] if isinstance(eos, list) else eos
        tokenizer, eos_id, pad_id = tldr.renumber_tokenizer(folder / "tokenizer.json", eos, pad)
        return tokenizer, {"eos_id": eos_id, "pad_id": pad_id}
    beside = source / "tokenizer.json"
    if beside.exists():
        tokenizer = tldr.load_tokenizer(beside)
        for expected, token in enumerate(tldr.SPECIAL):
            found = tokenizer.token_to_id(token)
            if found != expected:
                raise stage.UserError(f"{beside}: {token} has id {found}; expected {expected}, as in Pythia's")
        return tokenizer, {}
    vocab_size = getattr(cfg.source, "vocab_size", None)
    if vocab_size is None:
        raise stage.UserError(f"{beside}: not found; a new model's tokenizer is that, or has source.vocab_size tokens")
    return tldr.train_bpe((text for row in rows for text in (row.title, row.post, row.summary)), vocab_size), {}


def packaged_tokenizer(wanted: schema.Packaged) -> tuple[object, int, int]:
    """The tokenizer in a GGUF file as `tldr.renumber_tokenizer` has it."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    file = hub.gguf(wanted.name)
    whole = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = whole.backend_tokenizer
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.decoder = decoders.ByteLevel()  # transformers adds SentencePiece's, which turns "▁" into a space
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        return tldr.renumber_tokenizer(Path(folder, "tokenizer.json"), wanted.eos or whole.eos_token,
                                       wanted.pad or whole.pad_token)


def choose(cfg: schema.Scale, source: Path, posts: dict, pairs: dict) -> dict[str, list[tldr.Row]]:
    """The rows of each split: as many as params.yaml asks for, or of your own rows as many as there are.

    SFT and `more` are training posts. So is the preference set where there are no comparisons, and `more` begins
    where it ends.
    """
    start = 0 if pairs else cfg.data.preferences
    rows = {"sft": posts["train"], "preferences": (pairs or posts)["train"], "more": posts["train"][start:],
            "valid": (pairs or posts)["valid"], "test": posts[cfg.source.winrate_prompts]}
    for split in SPLITS:
        n = getattr(cfg.data, split)
        if cfg.source.kind != "jsonl" and len(rows[split]) < n:
            raise stage.UserError(f"{source}: data.{split}: {n} rows asked for, {len(rows[split])} there; lower it")
        rows[split] = rows[split][:n]
        if not rows[split] and split != "more":
            raise stage.UserError(f"{source}: no row for {split}; expected posts, and comparisons of posts if any")
    return rows


def from_posts(source: Path, cfg: schema.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]], dict]:
    """The tokenizer, the splits of real posts, and what metrics.json says of both."""
    posts, pairs, found = download(source) if source.is_file() else (*in_folder(source, cfg.source), {})
    is_two_word, lengths = cfg.source.kind == "two_word", cfg.source
    if cfg.samples.human and cfg.samples.human.labels == "rows" and not is_two_word and not pairs:
        raise stage.UserError(f"{source}/comparisons_train.jsonl: not found; samples.human.labels: rows needs it, and "
                              "comparisons_valid.jsonl")
    rows = choose(cfg, source, posts, pairs)
    lost, n = rouge.unseen([row.summary for row in rows["valid"]]), len(rows["valid"])
    if 2 * lost > n:
        raise stage.UserError(f"{source}: {lost} of {n} references lose most of their letters to ROUGE, which keeps a-z"
                              " and 0-9 (Fig 11); expected summaries in Latin letters")
    found |= {"references_lost_to_rouge": lost}
    tokenizer, ids = tokenizer_for(cfg, source, posts["train"])
    task = tldr.Task(lengths.max_query_tokens, lengths.max_response_tokens)
    side = replace(task, max_response_tokens=lengths.max_preference_tokens)
    memory = {}  # a post has several comparisons, and SFT and `more` share theirs

    def queries(split: str, task: tldr.Task = task) -> np.ndarray:
        out = []
        for row in tqdm(rows[split], desc=f"tokens of {split}", unit="row"):
            key = row.subreddit, row.title, row.post, task.end
            if key not in memory:
                memory[key] = np.array(task.query_ids(row, tokenizer), np.int32)
            out.append(memory[key])
        return tldr.pad(out, task.max_query_tokens, "left")

    def responses(texts: list[str], task: tldr.Task = task) -> np.ndarray:
        return tldr.pad([task.response_ids(text, tokenizer) for text in texts], task.max_response_tokens, "right")

    splits = {}
    for split in SPLITS:
        if is_two_word and split != "sft":
            query = queries(split, replace(task, end=tldr.TWO_WORD_END))
            splits[split] = two_word(query, split, tokenizer, cfg, lambda texts: responses(texts, side))
            continue
        splits[split] = {"query": queries(split), "response": responses([row.summary for row in rows[split]])}
        if pairs and split in ("preferences", "valid"):
            splits[split] |= {"chosen": responses([row.summary for row in rows[split]], side),
                              "rejected": responses([row.rejected for row in rows[split]], side)}
    if cfg.data.base:
        documents = [task.query_ids(row, tokenizer) + task.response_ids(row.summary, tokenizer)
                     for row in posts["train"][: cfg.data.base]]
        tokens = tldr.pad(documents, lengths.max_query_tokens + lengths.max_response_tokens, "right")
        splits["base"] = {"tokens": tokens, "weights": (tokens != tldr.PAD).astype(np.float32)}
    return tokenizer, splits, ids | {"found": found}


def two_word(query: np.ndarray, split: str, tokenizer: Tokenizer, cfg: schema.Scale,
             responses: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
    """Fig 10: the arrays of a split of queries [n, Q] whose two-word summaries the judge writes, and labels.

    A prompt without what the split needs (no summary written, or a pair that the judge cannot tell apart) is left out.
    """
    from roads.judge import protocol

    if split == "more":  # prompts alone
        return {"query": query, "response": responses([""] * len(query))}
    posts = protocol.posts_of(query, tokenizer)
    if split == "test":
        written = protocol.write_two_word(posts, cfg.judge, cfg.spending)
        keep = [i for i, text in enumerate(written) if text]
        return {"query": query[keep], "response": responses([written[i] for i in keep])}
    written = protocol.two_word_rows(posts, cfg.judge, cfg.spending)
    keep = [i for i, row in enumerate(written) if row["chosen"]]
    if not keep:
        raise stage.UserError(f"data.{split}: of {len(posts)} posts the judge tied every pair of two-word summaries")
    names = {"response": "reference", "chosen": "chosen", "rejected": "rejected"}
    return {"query": query[keep]} | {name: responses([written[i][key] for i in keep]) for name, key in names.items()}


def first(n: int, preferences: dict, more: dict) -> dict[str, np.ndarray]:
    """The first n prompts of the preference set and, after it, of those beyond."""
    return {name: np.concatenate([preferences[name], more[name]])[:n] for name in ("query", "response")}


def data(source: Path | None, out: Path, cfg: schema.Scale) -> None:
    """Write the tokenizer and every split under `out`."""
    blocks = ["model"] * (cfg.model.kind != "new") + ["judge"] * (cfg.source.kind == "two_word")
    with stage.output(out, schema.used(cfg, "data", "source", *blocks), [source] if source else []) as folder:
        if cfg.synthetic:
            tokenizer, splits, found = (*from_world(cfg), {})
        elif cfg.source.kind == "preferences":
            tokenizer, ids = tokenizer_for(cfg, source, [])
            splits, counts = own_preferences.splits_of(source, cfg, tokenizer)
            found = ids | {"found": counts}
        else:
            tokenizer, splits, found = from_posts(source, cfg)
        tldr.save_tokenizer(tokenizer, folder)
        prompts = {name: {key: splits[name][key] for key in ("query", "response")} for name in ("valid", "test")}
        splits["test_human"], splits["test_rouge"] = splits.pop("test"), prompts["valid"]
        splits["test_best_of_n"] = {name: part[: cfg.data.best_of_n] for name, part in prompts["test"].items()}
        splits["online"] = first(cfg.data.online, splits["preferences"], splits["more"])
        for split, arrays in splits.items():
            np.savez(folder / f"{split}.npz", **arrays)
        counts = {split: len(next(iter(arrays.values()))) for split, arrays in splits.items()}
        metrics = {"rows": counts, "vocab_size": max(tokenizer.get_vocab().values()) + 1}
        stage.write_json(folder / "metrics.json", metrics | found)


def _command() -> None:
    parser = stage.arguments(__doc__, "[source]", "out")
    a = parser.parse_args()
    # dvc.yaml leaves it out: the name of a folder of posts is not for a shell to read.
    cfg = config.load_scale(a.scale)
    source = a.source
    if not (source or cfg.synthetic):
        now = active.load()
        if now.scale != a.scale.partition(".")[0]:
            raise stage.UserError(f"SOURCE: missing; the active scale, {now.scale}, does not say what {a.scale} reads")
        source = Path(str(now.data_from))
    data(source, a.out, cfg)


if __name__ == "__main__":
    stage.main(_command)

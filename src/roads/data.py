"""Stage data: rows -> tokens. Source: the synthetic world, or jsonl rows of real text.

    python -m roads.data src/roads/world.py OUT --scale mini
    python -m roads.data FOLDER OUT --scale real-cpu      # train.jsonl, valid.jsonl, test.jsonl

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
"""

from pathlib import Path

import numpy as np

from roads import config, stage, tldr
from roads.world import World

SPLITS = ("sft", "preferences", "valid", "test", "more")
STREAMS = {"more": 15, "base": 10, "sft": 11, "preferences": 12, "valid": 13, "test": 14}  # of the world's draws


def from_world(cfg: config.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]]]:
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
        # References of the preference set follow salience (what readers like), those of SFT and of the
        # winrate don't: SFT alone must not already solve the task.
        response = world.summaries(query, rng, follow_salience=split in ("preferences", "valid", "more"))
        splits[split] = {"query": query, "response": response}
    # One more column than a summary needs: when to stop is the policy's to learn.
    for split in SPLITS:
        splits[split]["response"] = np.pad(splits[split]["response"], ((0, 0), (0, 1)), constant_values=tldr.PAD)
    base = splits["base"]
    karma = world.karma(world.quality(base["query"], base["response"]), rng)[:, None]
    tokens = np.hstack([base["query"], base["response"], karma])
    weights = np.ones(tokens.shape, np.float32)
    weights[:, : base["query"].shape[1]] = 0  # a post is random words: there is nothing in it to predict
    weights[:, -1] = cfg.source.karma_weight
    splits["base"] = {"tokens": tokens, "weights": weights}
    return tokenizer, splits


def from_text(folder: Path, cfg: config.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]]]:
    """The tokenizer and the splits of real posts; base, SFT and preferences share the training rows, with which more
    goes on where preferences end."""
    files = {"sft": "train", "preferences": "train", "more": "train", "valid": "valid", "test": "test"}
    read = {name: tldr.read_rows(folder / f"{name}.jsonl") for name in ("train", "valid", "test")}
    if (folder / "tokenizer.json").exists():
        tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    else:
        texts = [text for row in read["train"] for text in (row.title, row.post, row.summary)]
        tokenizer = tldr.train_bpe(texts, cfg.source.vocab_size)
    task = tldr.Task(cfg.source.max_query_tokens, cfg.source.max_response_tokens)
    encoded = {name: ([task.query_ids(row, tokenizer) for row in rows],
                      [task.response_ids(row.summary, tokenizer) for row in rows]) for name, rows in read.items()}
    splits = {}
    for split in SPLITS:
        start = cfg.data.preferences if split == "more" else 0
        queries, responses = (part[start : start + getattr(cfg.data, split)] for part in encoded[files[split]])
        splits[split] = {"query": tldr.pad(queries, cfg.source.max_query_tokens, "left"),
                         "response": tldr.pad(responses, cfg.source.max_response_tokens, "right")}
    queries, responses = encoded["train"]
    documents = [q + r for q, r in zip(queries, responses, strict=True)][: cfg.data.base]
    tokens = tldr.pad(documents, cfg.source.max_query_tokens + cfg.source.max_response_tokens, "right")
    splits["base"] = {"tokens": tokens, "weights": (tokens != tldr.PAD).astype(np.float32)}
    return tokenizer, splits


def first(n: int, preferences: dict, more: dict) -> dict[str, np.ndarray]:
    """The first n prompts of the preference set and, after it, of those beyond."""
    return {name: np.concatenate([preferences[name], more[name]])[:n] for name in ("query", "response")}


def data(source: Path, out: Path, cfg: config.Scale) -> None:
    """Write the tokenizer and every split under `out`."""
    with stage.output(out, config.used(cfg, "data", "source"), [source]) as folder:
        tokenizer, splits = from_world(cfg) if cfg.synthetic else from_text(source, cfg)
        tokenizer.save(str(folder / "tokenizer.json"))
        splits["test_human"], splits["test_rouge"] = splits.pop("test"), splits["valid"]
        splits["test_best_of_n"] = {name: part[: cfg.data.best_of_n] for name, part in splits["test_human"].items()}
        splits["online"] = first(cfg.data.online, splits["preferences"], splits["more"])
        for split, arrays in splits.items():
            np.savez(folder / f"{split}.npz", **arrays)
        counts = {split: len(next(iter(arrays.values()))) for split, arrays in splits.items()}
        stage.write_json(folder / "metrics.json", {"rows": counts, "vocab_size": tokenizer.get_vocab_size()})


def _command() -> None:
    parser = stage.arguments(__doc__, "source", "out")
    a = parser.parse_args()
    data(a.source, a.out, config.load_scale(a.scale))


if __name__ == "__main__":
    stage.main(_command)

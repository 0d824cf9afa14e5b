"""Stage data: rows -> tokens. Source: the synthetic world, or jsonl rows of real text.

    python -m roads.data OUT --scale mini

Writes tokenizer.json and one .npz per split. Queries [n, Q] are padded left, responses [n, R] right.
    base.npz         tokens [n, L], weights [n, L]: documents for pretraining and the loss weight of each token
    sft.npz          query, response
    preferences.npz  query, response: prompts of the preference set and each one's reference
    valid.npz        the same, held out
    test.npz         query, response: prompts for winrates and the references to beat
"""

import argparse
from pathlib import Path

import numpy as np

from roads import config, stage, tldr
from roads.world import World

SPLITS = ("sft", "preferences", "valid", "test")


def from_world(cfg: config.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]]]:
    """The tokenizer and the splits of the synthetic world; every split has prompts of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    world = World(cfg.world)
    vocabulary = {word: i for i, word in enumerate(world.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|padding|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    splits = {}
    for stream, split in enumerate(("base", *SPLITS), start=10):
        rng = np.random.default_rng([cfg.world.seed, stream])
        query = world.prompts(getattr(cfg.data, split), rng)
        # References of the preference set follow salience (what readers like), those of SFT and of the
        # winrate don't: SFT alone must not already solve the task.
        response = world.summaries(query, rng, follow_salience=split in ("preferences", "valid"))
        splits[split] = {"query": query, "response": response}
    # One more column than a summary needs: when to stop is the policy's to learn.
    for split in SPLITS:
        splits[split]["response"] = np.pad(splits[split]["response"], ((0, 0), (0, 1)), constant_values=tldr.PAD)
    base = splits["base"]
    karma = world.karma(world.quality(base["query"], base["response"]), rng)[:, None]
    tokens = np.hstack([base["query"], base["response"], karma])
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = cfg.world.karma_weight
    splits["base"] = {"tokens": tokens, "weights": weights}
    return tokenizer, splits


def from_text(cfg: config.Scale) -> tuple[object, dict[str, dict[str, np.ndarray]]]:
    """The tokenizer and the splits of real posts; base, SFT and preferences share the training rows."""
    folder = Path(cfg.text.path)
    files = {"sft": "train", "preferences": "train", "valid": "valid", "test": "test"}
    read = {name: tldr.read_rows(folder / f"{name}.jsonl") for name in ("train", "valid", "test")}
    if (folder / "tokenizer.json").exists():
        tokenizer = tldr.load_tokenizer(folder / "tokenizer.json")
    else:
        texts = [text for row in read["train"] for text in (row.title, row.post, row.summary)]
        tokenizer = tldr.train_bpe(texts, cfg.text.vocab_size)
    task = tldr.Task(cfg.text.max_query_tokens, cfg.text.max_response_tokens)
    encoded = {name: ([task.query_ids(row, tokenizer) for row in rows],
                      [task.response_ids(row.summary, tokenizer) for row in rows]) for name, rows in read.items()}
    splits = {}
    for split in SPLITS:
        queries, responses = encoded[files[split]]
        n = getattr(cfg.data, split)
        splits[split] = {"query": tldr.pad(queries[:n], cfg.text.max_query_tokens, "left"),
                         "response": tldr.pad(responses[:n], cfg.text.max_response_tokens, "right")}
    queries, responses = encoded["train"]
    documents = [q + r for q, r in zip(queries, responses, strict=True)][: cfg.data.base]
    tokens = tldr.pad(documents, cfg.text.max_query_tokens + cfg.text.max_response_tokens, "right")
    splits["base"] = {"tokens": tokens, "weights": (tokens != tldr.PAD).astype(np.float32)}
    return tokenizer, splits


def data(out: Path, cfg: config.Scale) -> None:
    """Write the tokenizer and every split under `out`."""
    reads = [Path(cfg.text.path)] if cfg.text else []
    source = "text" if cfg.text else "world"
    with stage.output(out, config.used(cfg, "data", source), reads) as folder:
        tokenizer, splits = from_text(cfg) if cfg.text else from_world(cfg)
        tokenizer.save(str(folder / "tokenizer.json"))
        for split, arrays in splits.items():
            np.savez(folder / f"{split}.npz", **arrays)
        counts = {split: len(next(iter(arrays.values()))) for split, arrays in splits.items()}
        stage.write_json(folder / "metrics.json", {"rows": counts, "vocab_size": tokenizer.get_vocab_size()})


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", required=True)
    args = parser.parse_args()
    data(args.out, config.load_scale(args.scale))


if __name__ == "__main__":
    stage.main(_command)

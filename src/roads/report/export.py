"""Models that other tools open: a policy as AutoModelForCausalLM, a reward model as AutoModelForSequenceClassification
with one label, both with the token ids that the model they began with had.

    python -m roads.report.export runs/mini/human/reward/s0 build/reward
    python -m roads.report.export runs/mini/sft build/sft --publish org/name      # and push it to the hub

A reward model reads a prompt, a response and EOS, as in TRL, OpenRLHF and RewardBench; its reward is that of Eq. 6.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from roads import model, stage, tldr
from roads.figures.provenance import provenance
from roads.stages.base import swap_rows
from roads.tldr import EOS, PAD

TAG = "roads-to-likelihood"  # on the card of what was written here
FILES = r"README\.md|model.*\.safetensors|((generation_|tokenizer_)?config|tokenizer|params|model.*\.index)\.json"

def data_of(run: Path) -> Path:
    """The nearest `data` beside a run or above it: its metrics.json says which ids EOS and padding had.

    Raises:
        UserError: there is none.
    """
    for folder in run.absolute().parents:
        if (folder / "data/metrics.json").exists():
            return folder / "data"
    raise stage.UserError(f"{run}: no folder `data` beside it or above it; name the one that it was trained on: --data")


def original_ids(data: Path) -> tuple[int, int]:
    """The ids that EOS and padding had; 0 and 1 of a model that was trained here from scratch."""
    told = stage.read_json(data / "metrics.json")
    return told.get("eos_id", EOS), told.get("pad_id", PAD)


def put_back(spec: dict, eos_id: int, pad_id: int) -> dict:
    """A tokenizer.json of ours, read as JSON, with EOS and padding at the ids that they had."""
    def old(i: int) -> int:
        for a, b in reversed(tldr.swaps(eos_id, pad_id)):
            i = {a: b, b: a}.get(i, i)
        return i

    words = spec["model"]["vocab"]
    if isinstance(words, dict):
        spec["model"]["vocab"] = {token: old(i) for token, i in words.items()}
    else:  # Unigram: tokens in order
        if spec["model"].get("unk_id") is not None:
            spec["model"]["unk_id"] = old(spec["model"]["unk_id"])
        at = {old(i): word for i, word in enumerate(words)}
        spec["model"]["vocab"] = [at[i] for i in range(len(words))]
    added = [token | {"id": old(token["id"])} for token in spec["added_tokens"]]
    return spec | {"added_tokens": sorted(added, key=lambda token: token["id"])}


def classifier(rm: model.RewardModel, where: Path) -> PreTrainedModel:
    """A reward model as transformers has it. Its head has no bias there: rewards are less by ours, and differences of
    rewards, all that anything is trained or ranked by, are the same.

    Raises:
        UserError: transformers has no such model of this architecture.
    """
    config = type(rm.trunk.config).from_dict(rm.trunk.config.to_dict() | {"id2label": {0: "reward"}})
    try:
        found = AutoModelForSequenceClassification.from_config(config)
        found.score.weight.data.copy_(rm.head.weight)
    except (ValueError, AttributeError):
        kind = type(rm.trunk).__name__
        raise stage.UserError(f"{where}: transformers has no sequence classifier of {kind}") from None
    getattr(found, found.base_model_prefix).load_state_dict(rm.trunk.state_dict())
    return found


def export(run: Path, out: Path, data: Path | None = None) -> None:
    """Write a policy, or a reward model, with its tokenizer and a card, as other tools open them.

    Raises:
        UserError: `run` holds no model, or nothing says which token ids it had.
    """
    if not (run / "config.json").exists():
        raise stage.UserError(f"{run}: no config.json; expected the folder of a policy or of a reward model")
    out = out.resolve()
    if out == run.resolve() or out.exists() and not _ours(out):
        raise stage.UserError(f"{out}: expected a new folder, or one that this command wrote: what is there would go")
    is_reward = (run / "head.safetensors").exists()
    eos_id, pad_id = original_ids(data or data_of(run))
    if is_reward:
        rm = model.RewardModel.load(run)
        found, bias = classifier(rm, run), rm.head.bias.item()
    else:
        found, bias = model.load_policy(run), 0.0
    swap_rows(found, tldr.swaps(eos_id, pad_id)[::-1])
    ids = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    found.config.update(ids)
    if not is_reward:
        found.generation_config.update(**ids)
    used = stage.read_json(run / "params.json") if (run / "params.json").exists() else {}
    with stage.output(out, used, [run]) as folder:
        found.save_pretrained(folder)
        spec = put_back(stage.read_json(run / "tokenizer.json"), eos_id, pad_id)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        shutil.copyfile(run / "tokenizer_config.json", folder / "tokenizer_config.json")
        (folder / "README.md").write_text(card(run, used, is_reward, bias), encoding="utf-8")


def _ours(folder: Path) -> bool:
    """Whether a folder is empty, or holds nothing but what `export` writes."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    page = folder / "README.md"
    ours = page.is_file() and TAG in page.read_text(encoding="utf-8", errors="replace")
    return not names or ours and all(re.fullmatch(FILES, name) for name in names)


def card(run: Path, used: dict, is_reward: bool, bias: float) -> str:
    """The page that the hub shows: what it is, from which numbers, code and data, and how to open it."""
    kind = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    metrics = stage.read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    made = {"run": run.as_posix()} | provenance(sorted(run.glob("*.safetensors")))
    what = ("A reward model: a prompt, a response and EOS in, one number out (Eq. 6). The bias of its head, "
            f"{bias:.3g}, is left out; differences of rewards are the same." if is_reward else "A policy.")
    blocks = [("What it was trained with", used), ("What was measured", metrics), ("Where it comes from", made)]
    return "\n".join([
        "---", "library_name: transformers",
        f"pipeline_tag: {'text-classification' if is_reward else 'text-generation'}",
        f"tags: [{'reward-model, ' * is_reward}{TAG}]", "---", "", f"# {run.as_posix()}", "",
        f'{what} From a reproduction of "All Roads Lead to Likelihood". No BOS is put before a text.', "",
        "```python", f"from transformers import {kind}, AutoTokenizer", "",
        f"model = {kind}.from_pretrained(NAME)", "tokenizer = AutoTokenizer.from_pretrained(NAME)", "```", "",
        *(f"## {title}\n\n```json\n{json.dumps(block, indent=2, ensure_ascii=False)}\n```\n"
          for title, block in blocks)])


def publish(folder: Path, repo: str, api: object | None = None) -> str:
    """Push an exported model to the hub, which HF_TOKEN opens, as ORG/NAME: private, until its owner says otherwise.

    Raises:
        UserError: the hub says no, or is not reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = api or HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A model of roads-to-likelihood"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise stage.UserError(f"{repo}: not pushed ({reason}); what would have been is in {folder}") from None


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a policy or of a reward model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="the data that it was trained on, where it is not above the run")
    parser.add_argument("--publish", metavar="ORG/NAME", help="push it to the hub")
    a = parser.parse_args()
    if a.publish and not re.fullmatch(r"[\w.-]+/[\w.-]+", a.publish):
        raise stage.UserError(f"REPO={a.publish}: expected a name on the hub, as ORG/NAME")
    export(a.run, a.out, a.data)
    if a.publish:
        print(publish(a.out, a.publish))


if __name__ == "__main__":
    stage.main(_command)

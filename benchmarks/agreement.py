"""Agreement of adapters with the fine-tune that they were extracted from, rank by rank.

    python -m benchmarks.agreement --mergekit MERGEKIT_VENV/bin/python --work /tmp/agreement

rxnfp's masked language model and its fine-tune to 50 classes of reactions (fixtures.weights). The
base gets the fine-tune's head, for mergekit needs every tensor in both models; everything else is
extracted by both tools at the same rank. PEFT loads what they wrote onto the base, and the share of
reactions whose top class is the fine-tune's is counted: on kinds that it was trained on, and on
others. mergekit's adapter says that it is for causal language models, which PEFT then builds: that
is taken out for it, once without anything else, once also with `lora_bias`, without which PEFT
drops the changed biases that mergekit stored. "calibrated" is `loratool extract --calibrate` with
128 other reactions of the kinds that the fine-tune was trained on.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fixtures.demo import COUNT, Reactions, share_agreeing, torch_logits, with_interval
from fixtures.reactions import encode, reactions
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED

CALIBRATION = 128
RANKS = (1, 2, 4, 8, 16, 32, 64)
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Writes base and fine-tune with the same tensors, as safetensors under a whole config."""
    states = [
        torch.load(source / "pytorch_model.bin", weights_only=True, map_location="cpu")
        for source in (RXNFP_BASE, RXNFP_TUNED)
    ]
    config = json.loads((RXNFP_TUNED / "config.json").read_text())
    labels = [f"LABEL_{number}" for number in range(len(states[1]["classifier.weight"]))]
    config |= {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    places = []
    for name, state in zip(("base", "tuned"), states, strict=True):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: state.get(key, value).contiguous().clone() for key, value in states[1].items()
        }
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
        shutil.copy(RXNFP_TUNED / "vocab.txt", place)
        places.append(place)
    return places[0], places[1]


def write_inputs(path: Path) -> Path:
    """Token ids of reactions that are not among those that are judged, one a line."""
    judged = {*reactions(COUNT, seed=0, kinds="known"), *reactions(COUNT, seed=0, kinds="other")}
    texts = [text for text in reactions(CALIBRATION * 2, seed=7) if text not in judged]
    ids, mask = encode(texts[:CALIBRATION], RXNFP_BASE / "vocab.txt")
    lines = [
        json.dumps({"input_ids": [token for token, real in zip(*row, strict=True) if real]})
        for row in zip(ids, mask, strict=True)
    ]
    path.write_text("\n".join(lines))
    return path


def extract(command: Sequence[str], out: Path) -> None:
    """Runs an extraction into a new folder.

    Raises:
        RuntimeError: It failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [*command, str(out)], capture_output=True, text=True, env=ENVIRONMENT | {"HOME": str(out)}
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr[-2000:]}")


def corrected(adapter: Path, changes: dict[str, Any]) -> Path:
    """A copy of an adapter whose configuration says something else."""
    out = adapter.with_name(f"{adapter.name}-{'-'.join(changes)}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


def logits(base: Path, adapter: Path | None, inputs: Sequence[Reactions]) -> list[torch.Tensor]:
    """Logits of the base with an adapter that PEFT has loaded, for each of several inputs."""
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    model: Any = BertForSequenceClassification.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return [torch_logits(model, some) for some in inputs]


def row(name: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """One line of the table."""
    known, other = (share_agreeing(*pair) for pair in zip(found, expected, strict=True))
    error = statistics.median((found[0] - expected[0]).abs().flatten().tolist())
    return f"{name:<34}  {with_interval(known):<24}  {other:7.1%}  {error:8.4f}"


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", type=Path, help="the Python of an environment that has it")
    parser.add_argument("--work", type=Path, default=Path("/tmp/agreement"))
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    args = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base, tuned = make_pair(args.work)
    calibration = write_inputs(args.work / "calibration.jsonl")
    inputs = [Reactions.make("known"), Reactions.make("other")]
    expected = logits(tuned, None, inputs)
    print(f"{'':<34}  {'top class agrees':<24}  {'other':>7}  |logit difference|, median")
    print(row("base with the head", logits(base, None, inputs), expected))
    loratool = str(Path(sys.executable).with_name("loratool"))
    for rank in args.ranks:
        out = args.work / f"loratool-{rank}"
        plain = [loratool, "extract", str(base), str(tuned), "--rank", str(rank)]
        extract([*plain, "-o"], out)
        print(row(f"rank {rank}: loratool", logits(base, out, inputs), expected), flush=True)
        out = args.work / f"calibrated-{rank}"
        extract([*plain, "--calibrate", str(calibration), "-o"], out)
        print(row(f"rank {rank}: loratool, calibrated", logits(base, out, inputs), expected))
        if args.mergekit is None:
            continue
        out = args.work / f"mergekit-{rank}"
        program = str(args.mergekit.with_name("mergekit-extract-lora"))
        models = ["--model", str(tuned), "--base-model", str(base), "--max-rank", str(rank)]
        extract([program, *models, "--out-path"], out)
        for what, changes in (
            ("task type", {"task_type": None}),
            ("and biases", {"task_type": None, "lora_bias": True}),
        ):
            found = logits(base, corrected(out, changes), inputs)
            print(row(f"rank {rank}: mergekit, {what}", found, expected), flush=True)


if __name__ == "__main__":
    main()

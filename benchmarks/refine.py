"""What refining adds to extraction, rank by rank, on reactions that it was not trained on.

    python -m benchmarks.refine --steps 300 --work /tmp/refine

rxnfp's masked language model and its fine-tune to 50 classes of reactions (fixtures.weights). Each
adapter is extracted plainly, fitted to activations, and each of the two refined on the same
reactions of known kinds. Then the merged models classify other reactions of these kinds, and of
kinds that the fine-tune was not trained on: KL divergence from the fine-tune's classes, and the
share of reactions whose top class is the fine-tune's. Energy is that of all low-rank updates.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loratool
from fixtures.reactions import encode, reactions
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.calibration import Inputs, Limits, read_inputs
from loratool.opening import open_checkpoint
from loratool.running import Model, open_model, run

RANKS = (1, 2, 4, 8)
COUNT = 200


@dataclass(frozen=True)
class Judged:
    """Reactions, and the fine-tune's logits for them, (n, classes), in the order of batches."""

    inputs: Inputs
    expected: torch.Tensor


def write_ids(texts: Sequence[str], path: Path) -> Path:
    """Writes reactions as token ids, a line each."""
    ids, mask = encode(texts, RXNFP_BASE / "vocab.txt")
    rows = [row[: sum(real)] for row, real in zip(ids, mask, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def logits(model: Model, inputs: Inputs) -> torch.Tensor:
    """Logits of all samples, in the order of batches."""
    found = {number: outputs["logits"] for number, outputs in run(model, inputs.batches)}
    return torch.cat([found[number] for number in sorted(found)])


def row(name: str, report: Any, adapter: Path, judged: Sequence[Judged], seconds: float) -> str:
    """One line of the table."""
    merged = open_model(loratool.merge(RXNFP_BASE, [(str(adapter), 1.0)]))
    cells = []
    for some in judged:
        found = logits(merged, some.inputs)
        p, q = some.expected.log_softmax(-1), found.log_softmax(-1)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        agree = float((found.argmax(-1) == some.expected.argmax(-1)).float().mean())
        cells += [f"{kl:7.4f}", f"{agree:6.1%}"]
    energy = f"{report.data['totals']['energy']:7.2%}"
    told = report.data.get("refinement", {})
    taken = f"{told['kept_step']}/{told['steps']}" if told else ""
    return "  ".join([f"{name:<28}", *cells, energy, f"{taken:>9}", f"{seconds:7.1f}"])


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("/tmp/refine"))
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.03])
    parser.add_argument("--starts", nargs="+", default=["exact", "activation"])
    parser.add_argument("--count", type=int, default=COUNT, help="reactions to judge by, a kind")
    args = parser.parse_args()
    fetch()
    args.work.mkdir(parents=True, exist_ok=True)
    seen = reactions(args.samples, seed=1, kinds="known")
    texts = {
        kind: reactions(args.count + args.samples, seed=2, kinds=kind)
        for kind in ("known", "other")
    }  # type: ignore[arg-type]
    unseen = {
        kind: [text for text in found if text not in seen][: args.count]
        for kind, found in texts.items()
    }
    ids = write_ids(seen, args.work / "seen.jsonl")
    config = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=1).model_config
    teacher = open_model(open_checkpoint(RXNFP_TUNED).with_config(config))
    judged = []
    for kind, found in unseen.items():
        path = write_ids(found, args.work / f"{kind}.jsonl")
        inputs = read_inputs(path, teacher, Limits(args.count))
        judged.append(Judged(inputs, logits(teacher, inputs)))
    print(f"{'':<28}  {'KL':>7}  {'agree':>6}  {'KL oth.':>7}  {'agree':>6}  {'energy':>7}"
          f"  {'steps':>9}  {'CPU s':>7}")  # fmt: skip
    for rank in args.ranks:
        for start in args.starts:
            given = {"calibrate": str(ids), "calibration_samples": args.samples}
            plain: dict[str, Any] = {"factorizer": start} | (given if start != "exact" else {})
            variants: list[tuple[str, dict[str, Any]]] = [(start, plain)]
            for rate in args.rate:
                refined = {**given, "refine": args.steps, "refine_rate": rate, "factorizer": start}
                variants.append((f"{start}, refined at {rate:g}", refined))
            for name, options in variants:
                out = args.work / f"{rank}-{name.replace(' ', '-').replace(',', '')}"
                began = time.process_time()
                lazy = loratool.extract(RXNFP_BASE, RXNFP_TUNED, rank=rank, **options)
                report = lazy.save(out, overwrite=True)
                seconds = time.process_time() - began
                print(row(f"rank {rank}: {name}", report, out, judged, seconds), flush=True)


if __name__ == "__main__":
    main()

"""How near adapters come to the fine-tune's outputs: plain SVD against fits to activations.

    python -m benchmarks.activation [--ranks 4 8 16] [--samples 128] [--pairs rxnfp minilm]

Two pairs: rxnfp's masked language model and its fine-tune to 50 classes of reactions, on reactions
of `fixtures.reactions`; and MiniLM with a synthesised fine-tune (a merged LoRA of rank 16 and noise
of full rank on every linear layer, both of 1% of the weights' norm by default), on this
repository's documentation. Inputs to calibrate on and to judge by are disjoint.

"outputs" is ||merged - tuned||_F / ||tuned||_F of the logits, or of the last hidden states without
padding, on held-out inputs; "layers" is what the factors miss of ||delta x||^2 of all layers for
the calibration inputs, which is what the fit makes small; each fit's in its own metric, plain SVD's
in that of "full". "merged" fits every layer to the fine-tune's outputs from what the model that is
built gives it: its "energy", that of the weights' difference, may be below 0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import loratool
from fixtures.reactions import encode, reactions
from fixtures.weights import MINILM, ROOT, RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.calibration import Inputs, Limits, read_inputs
from loratool.checkpoint import Checkpoint
from loratool.opening import open_checkpoint
from loratool.running import open_model, run

METHODS = {
    "plain SVD": {},
    "diagonal": {"moments": "diagonal", "calibrate_on": "finetuned"},
    "full": {"moments": "full", "calibrate_on": "finetuned"},
    "full, on the base": {"moments": "full", "calibrate_on": "base"},
    "merged": {"calibrate_on": "merged"},
}
_HELD_OUT = 300


@dataclass(frozen=True)
class Job:
    """A pair of models, and files of inputs to calibrate on and to judge by."""

    name: str
    base: Path
    tuned: Path
    calibration: Path
    held_out: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=_HELD_OUT)
    parser.add_argument("--pairs", nargs="+", default=["rxnfp", "minilm"])
    parser.add_argument("--change", type=float, default=0.01, help="of MiniLM's weights")
    options = parser.parse_args()
    fetch()
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.pairs:
            place = Path(folder, name)
            place.mkdir()
            job = (
                rxnfp(place, options.samples, options.held_out)
                if name == "rxnfp"
                else minilm(place, options.samples, options.held_out, options.change)
            )
            console.print(table(job, options.ranks, options.samples, place))


def rxnfp(folder: Path, samples: int, held_out: int) -> Job:
    """The real pair; its tokenizer is not among transformers', so it gets token ids."""
    texts = reactions(samples + held_out, seed=1)
    paths = []
    for name, part in (("fit", texts[:samples]), ("held-out", texts[samples:])):
        ids, masks = encode(part, RXNFP_TUNED / "vocab.txt")
        rows = [row[: sum(mask)] for row, mask in zip(ids, masks, strict=True)]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    return Job("rxnfp", RXNFP_BASE, RXNFP_TUNED, *paths)


def minilm(folder: Path, samples: int, held_out: int, change: float) -> Job:
    """A real base with a synthesised fine-tune."""
    from safetensors.torch import save_file

    base = open_checkpoint(MINILM)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in base.items():
        value = tensor.read().clone()
        if ".layer." in name and value.dim() == 2:
            low = torch.randn(value.shape[0], 16, generator=generator)
            low = low @ torch.randn(16, value.shape[1], generator=generator)
            noise = torch.randn(value.shape, generator=generator)
            for part in (low, noise):
                value += part * (change * value.norm() / part.norm())
        tensors[name] = value
    tuned = folder / "tuned"
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    (tuned / "config.json").write_text(json.dumps(base.config))
    lines = [
        line.strip()
        for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
        for line in path.read_text().splitlines()
        if len(line.split()) > 8
    ]
    chosen = lines[:: max(1, len(lines) // (samples + held_out))]
    fit, judge = folder / "fit.txt", folder / "held-out.txt"
    fit.write_text("\n".join(chosen[0::2][:samples]))
    judge.write_text("\n".join(chosen[1::2][:held_out]))
    return Job(f"MiniLM, changed by {change:.1%}", MINILM, tuned, fit, judge)


def table(job: Job, ranks: Sequence[int], samples: int, folder: Path) -> Table:
    """Every method at every rank."""
    tuned, base = open_checkpoint(job.tuned), open_checkpoint(job.base)
    inputs = read_inputs(job.held_out, open_model(tuned), Limits(10_000), (tuned, base))
    wanted = outputs(tuned, inputs)
    is_classifier = wanted.shape[0] == inputs.count
    found = Table(title=f"{job.name}: {samples} samples, {inputs.count} held out")
    headings = ["rank", "factors", "energy", "layers", "outputs"]
    headings += ["KL", "same class"] if is_classifier else []
    for heading in (*headings, "CPU s"):
        found.add_column(heading, justify="left" if heading == "factors" else "right")
    for rank in ranks:
        missed = ""
        rows = []
        for name, settings in METHODS.items():
            given = {**settings, "calibrate": str(job.calibration)} if settings else {}
            if given:
                given["calibration_samples"] = samples
            started = time.process_time()
            lazy = loratool.extract(base, tuned, rank=rank, **given)
            report = lazy.save(folder / "adapter", overwrite=True)
            seconds = time.process_time() - started
            totals = report.data["totals"]
            weighted = totals.get("weighted")
            if weighted and name == "full":
                missed = f"{1 - weighted['energy_of_svd']:.3f}"
            merged = loratool.merge(base, [(folder / "adapter", 1.0)])
            values = outputs(merged, inputs)
            row = [str(rank), name, f"{totals['energy']:.3f}"]
            row.append(f"{1 - weighted['energy']:.3f}" if weighted else "")
            row.append(f"{float((values - wanted).norm() / wanted.norm()):.4f}")
            if is_classifier:
                row += [f"{divergence(values, wanted):.4f}", f"{agreement(values, wanted):.3f}"]
            rows.append([*row, f"{seconds:.1f}"])
        rows[0][3] = missed
        for row in rows:
            found.add_row(*row)
    return found


def outputs(checkpoint: Checkpoint, inputs: Inputs) -> torch.Tensor:
    """Logits (samples, classes), or hidden states of all tokens (tokens, width), in fp64."""
    found = []
    for number, values in run(open_model(checkpoint), inputs.batches):
        if "logits" in values:
            found.append((number, values["logits"]))
        else:
            found.append((number, inputs.unpadded(number, values["last_hidden_state"])))
    return torch.cat([values for _, values in sorted(found, key=lambda pair: pair[0])]).double()


def divergence(values: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean KL divergence of the classes' probabilities, in nats."""
    one, other = values.log_softmax(-1), wanted.log_softmax(-1)
    return float((other.exp() * (other - one)).sum(-1).mean())


def agreement(values: torch.Tensor, wanted: torch.Tensor) -> float:
    """How often both have the same top class."""
    return float((values.argmax(-1) == wanted.argmax(-1)).double().mean())


if __name__ == "__main__":
    main()

"""A second merged ONNX model of a base: grafted onto the base's, or exported again.

    python graft.py PAIRS_DIR [--size 0.1b] [--genai MODELS_DIR] [--json FILE]

The base of one of growth.py's pairs (made in PAIRS_DIR if it is not there) is exported once by
torch.onnx.export. Then two rank-8 adapters, one of all linear layers and one of the query and value
projections, are brought into it: `loratool export BASE ADAPTER --graft BASE.onnx -o DIR`, both into
one folder, and the usual way for each: transformers loads the base, PEFT merges the adapter,
torch.onnx.export traces it again and saves. Each run is a process of its own; disk is what it adds.

With --genai, base and re-export are made by onnxruntime-genai's builder instead (the folder
onnxruntime_genai/models of its unpacked wheel, which need not be installed); it takes its adapters
merged, so that `loratool merge` runs first and is counted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from files import weight_files, write_json
from growth import EXCLUDED, RANK, make_pair
from measure import MIB, checked, measure, warm_cache

EXPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
base, out, *adapter = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter[0]).merge_and_unload()
model.config.use_cache = False
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model.eval()
    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
ids = torch.randint(3, 500, (2, 11))
mask = torch.ones_like(ids)
mask[0, :3] = 0
axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
torch.onnx.export(
    Logits(), (ids, mask), out, input_names=["input_ids", "attention_mask"],
    output_names=["logits"], dynamo=True, external_data=True, dynamic_shapes=(axes, axes),
    verbose=False,
)
"""
# A tokenizer of words, since the builder wants one.
TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(sys.argv[1])
"""
ADAPTERS = {"all linear": (), "q and v": ("--target", "*q_proj*", "--target", "*v_proj*")}


@dataclass(frozen=True)
class Row:
    """One measured run."""

    what: str
    adapter: str
    wall: float
    cpu: float
    private: int
    disk: int


def main() -> None:
    """Graft and export again, and print one table."""
    arguments = parse_arguments()
    folder: Path = arguments.pairs
    folder.mkdir(parents=True, exist_ok=True)
    make_pair(folder, arguments.size)
    pair = folder / f"llama-{arguments.size}"
    work = pair / "grafting"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "export.py").write_text(EXPORT)
    (work / "tokenizer.py").write_text(TOKENIZER)
    checked(measure(export_command(arguments, work, pair / "base", work / "base"), work / "log"))
    onnx = work / "base" / "model.onnx"
    print(f"{'':>24} {'adapter':>11} {'wall s':>8} {'CPU s':>8} {'private':>9} {'disk':>10}")
    rows = []
    for number, (adapter, targets) in enumerate(ADAPTERS.items()):
        place = work / f"adapter{number}"
        extract = [
            arguments.loratool,
            "extract",
            pair / "base",
            pair / "tuned",
            "--rank",
            str(RANK),
        ]
        checked(measure([*extract, *EXCLUDED, *targets, "-o", place, "--quiet"], work / "log"))
        graft = [arguments.loratool, "export", pair / "base", place, "--graft", onnx]
        graft += ["-o", work / "grafts", "--name", f"graph{number}", "--quiet"]
        rows.append(row("loratool --graft", adapter, pair, [graft], work))
        print(line(rows[-1]), flush=True)
        rows.append(row("exported again", adapter, pair, again(arguments, work, pair, place), work))
        print(line(rows[-1]), flush=True)
        print(f"{'':>24} {'':>11} {rows[-1].wall / rows[-2].wall:7.1f}x"
              f" {rows[-1].cpu / rows[-2].cpu:7.1f}x")  # fmt: skip
    shutil.rmtree(work)
    if arguments.json:
        write_json(arguments.json, [asdict(found) for found in rows])


def export_command(
    arguments: argparse.Namespace, work: Path, model: Path, out: Path
) -> list[str | Path]:
    """What exports a model without an adapter into a folder, as model.onnx."""
    out.mkdir()
    if arguments.genai is None:
        return [sys.executable, work / "export.py", model, out / "model.onnx"]
    copy = work / f"{out.name}-source"
    shutil.copytree(model, copy)
    checked(measure([sys.executable, work / "tokenizer.py", copy], work / "log"))
    builder = [sys.executable, arguments.genai / "builder.py", "-m", copy, "-o", out]
    return [*builder, "-p", "fp32", "-e", "cpu", "-c", work / "cache"]


def again(
    arguments: argparse.Namespace, work: Path, pair: Path, adapter: Path
) -> list[list[str | Path]]:
    """The commands that export a base with an adapter anew."""
    out = work / f"again-{adapter.name}"
    if arguments.genai is None:
        out.mkdir()
        return [[sys.executable, work / "export.py", pair / "base", out / "model.onnx", adapter]]
    merged = work / f"merged-{adapter.name}"
    merge: list[str | Path] = [arguments.loratool, "merge", pair / "base", adapter, "-o", merged]
    run = checked(measure([*merge, "--quiet"], work / "log"))
    print(f"{'merged first in':>24} {'':>11} {run.wall:8.1f} {run.cpu:8.1f}")
    return [export_command(arguments, work, merged, out)]


def row(what: str, adapter: str, pair: Path, commands: list[list[str | Path]], work: Path) -> Row:
    """Commands run one after the other, as one line of the table."""
    warm_cache(weight_files(pair))
    before = size_of(work)
    runs = [checked(measure(command, work / "log")) for command in commands]
    wall, cpu = sum(run.wall for run in runs), sum(run.cpu for run in runs)
    private = max(run.private for run in runs)
    return Row(what, adapter, wall, cpu, private, size_of(work) - before)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def line(found: Row) -> str:
    """A row of the table."""
    return (
        f"{found.what:>24} {found.adapter:>11} {found.wall:8.1f} {found.cpu:8.1f} "
        f"{found.private / MIB:5.0f} MiB {found.disk / MIB:6.0f} MiB"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, metavar="PAIRS_DIR")
    parser.add_argument("--size", default="0.1b", help="of growth.py's pairs")
    parser.add_argument("--genai", type=Path, help="onnxruntime_genai/models of its wheel")
    parser.add_argument("--loratool", default=str(Path(sys.executable).parent / "loratool"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

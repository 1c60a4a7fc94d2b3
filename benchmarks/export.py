"""Exporting a merged model as a whole process: time, private memory, and how they grow.

    python export.py PAIRS_DIR [--sizes 0.1b,1b,3b] [--forms standard,fused,linked] [--dtype fp16]
        [--peer 0.1b] [--json FILE]

Bases of growth.py's sizes are taken from pairs in PAIRS_DIR (made there if they are not), and a
rank-8 adapter is extracted from each. `loratool export BASE ADAPTER` then writes prefill and decode
graphs with one file of weights, verified, in every form. With --peer, the same work the usual way
beside it: transformers loads the model, PEFT merges the adapter, transformers.exporters exports
with the weights in memory and saves; nothing is verified there, and it stores the weights twice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from files import weight_files, write_json
from growth import EXCLUDED, RANK, SIZES, linear_parameters, make_pair
from measure import MIB, checked, measure, warm_cache

FORMS = {"standard": ("--no-fuse",), "fused": (), "linked": ("--link",)}
PEER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
base, adapter, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
ids = torch.randint(3, 500, (2, 11))
mask = torch.ones_like(ids)
mask[0, :3] = 0
config = OnnxConfig(dynamic=True, ort_fusions="cpu", opset_version=20)
inputs = {"input_ids": ids, "attention_mask": mask}
OnnxExporter().export_for_generation(model, inputs, config).save_pretrained(out)
"""
_TORCH = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class Row:
    """One measured export."""

    what: str
    size: str
    parameters: int
    wall: float
    cpu: float
    private: int
    disk: int


def main() -> None:
    """Measure every size in every form, and print one table."""
    arguments = parse_arguments()
    folder: Path = arguments.pairs
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print(
        f"{'export':>22} {'size':>6} {'weights':>9} {'wall s':>8} {'CPU s':>8} {'private':>9} disk"
    )
    for size in arguments.sizes.split(","):
        make_pair(folder, size)
        pair = folder / f"llama-{size}"
        adapter = adapted(arguments, pair)
        words = ["export", pair / "base", adapter, "--dtype", arguments.dtype]
        for form in arguments.forms.split(","):
            command = [arguments.loratool, *words, *FORMS[form]]
            rows.append(measured(f"loratool, {form}", size, pair, command, "-o"))
            print(line(rows[-1]), flush=True)
        if size == arguments.peer:
            program = folder / "peer_export.py"
            program.write_text(PEER)
            command = [sys.executable, program, pair / "base", adapter]
            extra = (_TORCH[arguments.dtype],)
            rows.append(measured("transformers and PEFT", size, pair, command, "", extra))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in rows])


def adapted(arguments: argparse.Namespace, pair: Path) -> Path:
    """A rank-8 adapter of the pair, extracted unless it is there."""
    adapter = pair / f"adapter-{RANK}"
    if not adapter.exists():
        models = [pair / "base", pair / "tuned"]
        command = [arguments.loratool, "extract", *models, "--rank", str(RANK), *EXCLUDED]
        checked(measure([*command, "-o", adapter, "--quiet"], pair / "export.log"))
    return adapter


def measured(
    what: str,
    size: str,
    pair: Path,
    command: list[str | Path],
    flag: str,
    extra: tuple[str, ...] = (),
) -> Row:
    """One export into a folder that is removed again."""
    out = pair / "exported"
    shutil.rmtree(out, ignore_errors=True)
    warm_cache(weight_files(pair))
    where = [flag, out] if flag else [out]
    found = checked(measure([*command, *where, *extra], pair / "export.log"))
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return Row(what, size, linear_parameters(pair), found.wall, found.cpu, found.private, disk)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.what:>22} {row.size:>6} {row.parameters / 1e6:8.0f}M {row.wall:8.1f} {row.cpu:8.1f} "
        f"{row.private / MIB:5.0f} MiB {row.disk / MIB:6.0f} MiB"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, metavar="PAIRS_DIR")
    parser.add_argument("--sizes", default="0.1b,1b,3b", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--forms", default="standard,fused", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--dtype", choices=tuple(_TORCH), default="fp16")
    parser.add_argument("--peer", default="", help="the size that the usual way is run with, too")
    parser.add_argument("--loratool", default=str(Path(sys.executable).parent / "loratool"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

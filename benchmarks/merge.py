"""Merging as a whole process beside `cp -r` and sync, and PEFT's way, of the same checkpoint.

    python merge.py PAIR_DIR --adapter ADAPTER [--runs 7] [--peft-runs 3] [--small PAIR_DIR]

Runs alternate: loratool merge, merge --reversible, unmerge of that, cp; PEFT (load, merge, save)
with the first few of them. Every output ends synced to the disk: loratool does so
itself, the others by `sync`. `--small` names a smaller pair (make_llama_pair.py --layers 6): its
base is merged with an adapter extracted for it on the spot, to show that private memory does not
grow with the model.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from files import weight_files
from measure import Measurement, checked, measure, warm_cache

MIB = 2**20
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.pair.parent) as folder:
        work = Path(folder)
        runs = alternate(arguments, work)
        copies = runs["cp -r; sync"]
        for name, found in runs.items():
            pairs = list(zip(found, copies, strict=False))
            ratio = statistics.median(run.wall / copy.wall for run, copy in pairs)
            print(f"{ratio:5.2f} x cp  {line(name, found)}")
        plain = runs["loratool merge"]
        for name in ("loratool merge --reversible", "PEFT"):
            pairs = list(zip(runs[name], plain, strict=False))
            if pairs:
                ratio = statistics.median(run.wall / merge.wall for run, merge in pairs)
                print(f"{name} / loratool merge, median of {len(pairs)} pairs: {ratio:.2f}")
        if arguments.small is not None:
            print(line(f"loratool merge, {arguments.small.name}", [small_merge(arguments, work)]))


def alternate(arguments: argparse.Namespace, work: Path) -> dict[str, list[Measurement]]:
    """Every way in turn, over a warm page cache and a disk that has nothing left to write."""
    base, adapter, log = arguments.pair / "base", arguments.adapter, work / "log"
    merged, reversible, restored, copied, peft = (work / name for name in "mruCp")
    script = work / "merge_with_peft.py"
    tool = [arguments.loratool]

    def loratool(*words: object) -> Measurement:
        return measure([*tool, *map(str, words)], log)

    def shell(command: str) -> Measurement:
        return measure(["sh", "-c", command], log)

    ways: dict[str, Callable[[], Measurement]] = {
        "loratool merge": lambda: loratool("merge", "-q", base, adapter, "-o", merged),
        "loratool merge --reversible": lambda: loratool(
            "merge", "-q", base, adapter, "--reversible", "-o", reversible
        ),
        "loratool unmerge": lambda: loratool("unmerge", "-q", reversible, "-o", restored),
        "cp -r; sync": lambda: shell(f"cp -r {base} {copied} && sync"),
        "PEFT": lambda: shell(f"{sys.executable} {script} {base} {adapter} {peft} && sync"),
    }
    script.write_text(PEFT)
    found: dict[str, list[Measurement]] = {name: [] for name in ways}
    for number in range(arguments.runs):
        for name, way in ways.items():
            if name != "PEFT" or number < arguments.peft_runs:
                warm_cache(weight_files(base))
                checked(measure(["sync"], log))
                found[name].append(checked(way()))
        for file in weight_files(base):
            if not filecmp.cmp(file, restored / file.name, shallow=False):
                raise SystemExit(f"{restored / file.name} is not the base's")
        for folder in (merged, reversible, restored, copied, peft):
            shutil.rmtree(folder, ignore_errors=True)
    return found


def small_merge(arguments: argparse.Namespace, work: Path) -> Measurement:
    base, tuned, adapter = arguments.small / "base", arguments.small / "tuned", work / "adapter"
    words = ["--rank", "16", "--lora-only", "-q", "-o", adapter]
    checked(measure([arguments.loratool, "extract", base, tuned, *words], work / "log"))
    command = [arguments.loratool, "merge", "--quiet", base, adapter, "-o", work / "small"]
    return checked(measure(command, work / "log"))


def line(name: str, runs: list[Measurement]) -> str:
    walls = sorted(run.wall for run in runs)
    private = max(run.private for run in runs) / MIB
    return (
        f"{name:<28} wall {statistics.median(walls):6.2f} s ({walls[0]:.2f} to {walls[-1]:.2f}), "
        f"CPU {statistics.median(run.cpu for run in runs):6.2f} s, private {private:4.0f} MiB"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--small", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--peft-runs", type=int, default=3)
    parser.add_argument("--loratool", default=str(Path(sys.executable).with_name("loratool")))
    return parser.parse_args()


if __name__ == "__main__":
    main()

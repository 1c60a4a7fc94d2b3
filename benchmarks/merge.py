"""Merging as a whole process beside `cp -r` and sync of the same checkpoint.

    python merge.py PAIR_DIR --adapter ADAPTER [--runs 5] [--small PAIR_DIR]

Runs alternate. `--small` names a smaller pair (make_llama_pair.py --layers 6): its base is merged
with an adapter extracted for it on the spot, to show that private memory does not grow with the
model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from files import weight_files
from measure import Measurement, measure, warm_cache

MIB = 2**20


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.pair.parent) as folder:
        work = Path(folder)
        merges, copies = alternate(arguments, work)
        ratio = statistics.median(m.wall / c.wall for m, c in zip(merges, copies, strict=True))
        print(f"merge / (cp -r; sync), median of {arguments.runs} pairs: {ratio:.2f}")
        print(line("loratool merge", merges))
        print(line("cp -r; sync", copies))
        if arguments.small is not None:
            print(line(f"loratool merge, {arguments.small.name}", [small_merge(arguments, work)]))


def alternate(
    arguments: argparse.Namespace, work: Path
) -> tuple[list[Measurement], list[Measurement]]:
    """Merge and copy in turn, over a warm page cache."""
    base, merged, copied = arguments.pair / "base", work / "merged", work / "copied"
    merges, copies = [], []
    for _ in range(arguments.runs):
        warm_cache(weight_files(base))
        merges.append(merge(arguments.loratool, base, arguments.adapter, merged))
        warm_cache(weight_files(base))
        copies.append(checked(measure(["sh", "-c", f"cp -r {base} {copied}; sync"], work / "log")))
        shutil.rmtree(merged)
        shutil.rmtree(copied)
    return merges, copies


def merge(loratool: str, base: Path, adapter: Path, out: Path) -> Measurement:
    return checked(
        measure([loratool, "merge", "--quiet", base, adapter, "-o", out], out.with_suffix(".log"))
    )


def small_merge(arguments: argparse.Namespace, work: Path) -> Measurement:
    base, tuned, adapter = arguments.small / "base", arguments.small / "tuned", work / "adapter"
    words = ["--rank", "16", "--lora-only", "-q", "-o", adapter]
    checked(measure([arguments.loratool, "extract", base, tuned, *words], work / "log"))
    return merge(arguments.loratool, base, adapter, work / "small")


def checked(run: Measurement) -> Measurement:
    if run.status:
        raise SystemExit(f"{' '.join(run.command)} failed:\n{run.output}")
    return run


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
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loratool", default=str(Path(sys.executable).with_name("loratool")))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How the cost of `loratool extract` grows with the model's parameters and with the rank.

    python growth.py PAIRS_DIR [--sizes 0.1b,0.4b,1b,3b] [--ranks 4,8,16,32,64,128,256] [--runs 1]
        [--rank-size 0.4b] [--plot FILE.svg] [--json FILE] [--delete]

Pairs of checkpoints of each size are made in PAIRS_DIR (make_llama_pair.py; what is there already
is used as it is) and extracted as whole processes: all sizes at rank 8, and one size at all ranks.
The time of a run is the least of its runs. A pair of one tiny layer tells what a run takes before
any work, which is torch's import mostly. The growth exponent is the slope of a straight line
through log(seconds - that) against log(parameters of the linear matrices), or log(rank): 1 is
linear. The pair of 3 billion parameters takes 12 GB of disk and two minutes to make; --delete
removes the pairs that this run has made.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from files import weight_files
from measure import MIB, measure, warm_cache

HERE = Path(__file__).parent
# Size -> what make_llama_pair.py is told.
SIZES = {
    "tiny": "--layers 1 --hidden 64 --intermediate 176 --vocabulary 512 --heads 4 --kv-heads 2",
    "0.1b": "--layers 12 --hidden 768 --intermediate 2048 --heads 12 --kv-heads 6",
    "0.4b": "--layers 20 --hidden 1280 --intermediate 3456 --heads 20 --kv-heads 10",
    "1b": "",
    "3b": "--layers 28 --hidden 3072 --intermediate 8192 --heads 24 --kv-heads 8",
}
RANK = 8
EXCLUDED = ("--exclude", "*embed_tokens*", "--exclude", "lm_head*")


@dataclass(frozen=True)
class Point:
    """One measured combination.

    Attributes:
        size: of the pair, as in SIZES.
        parameters: of all linear matrices.
        rank: that was asked for.
        wall: seconds, the least of all runs.
        cpu: the same.
        private: bytes, the most of all runs.
    """

    size: str
    parameters: int
    rank: int
    wall: float
    cpu: float
    private: int


def make_pair(folder: Path, size: str) -> bool:
    """Make a pair unless it is there; whether it was made."""
    pair = folder / f"llama-{size}"
    there = (pair / "recipe.json").exists()
    command = [sys.executable, str(HERE / "make_llama_pair.py"), str(pair), *SIZES[size].split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return not there


def linear_parameters(pair: Path) -> int:
    """Elements of the matrices that extract factorizes, by the headers."""
    total = 0
    for path in sorted((pair / "base").glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if ".layers." in name and len(entry["shape"]) == 2:
                total += math.prod(entry["shape"])
    return total


def measured(program: Path, folder: Path, size: str, rank: int, runs: int) -> Point:
    """Extract a pair a few times."""
    pair, out = folder / f"llama-{size}", folder / "growth-adapter"
    taken = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        warm_cache(weight_files(pair))
        models = [str(pair / "base"), str(pair / "tuned")]
        command = [str(program), "extract", *models, "--rank", str(rank), *EXCLUDED]
        found = measure([*command, "-o", str(out), "--quiet"], folder / "growth.log")
        if found.status:
            sys.exit(f"error: {size}, rank {rank}:\n{found.output}")
        taken.append(found)
    shutil.rmtree(out, ignore_errors=True)
    point = Point(
        size,
        linear_parameters(pair),
        rank,
        min(found.wall for found in taken),
        min(found.cpu for found in taken),
        max(found.private for found in taken),
    )
    print(line(point), flush=True)
    return point


def line(point: Point) -> str:
    """A point as a row of the table."""
    return (
        f"{point.size:>6} {point.parameters / 1e6:10.0f} {point.rank:6d} {point.wall:9.2f} "
        f"{point.cpu:9.2f} {point.private / MIB:9.0f}"
    )


def exponent(across: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of the line of least squares through log(seconds) against log(across)."""
    x, y = [math.log(value) for value in across], [math.log(value) for value in seconds]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle) ** 2 for a in x)


def exponents(points: Sequence[Point], key: str, start: Point) -> dict[str, float]:
    """The growth exponents of wall and CPU time, without what a run takes before any work."""
    across = [float(getattr(point, key)) for point in points]
    return {
        time: exponent(across, [max(1e-3, getattr(p, time) - getattr(start, time)) for p in points])
        for time in ("wall", "cpu")
        if len(points) > 1
    }


def plot(
    start: Point,
    found: dict[str, list[Point]],
    slopes: dict[str, dict[str, float]],
    path: Path,
) -> None:
    """Draw both kinds of growth, log against log, with what linear growth would be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "loratool"})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    labels = {
        "parameters": ("parameters of linear matrices", f"Model size, rank {RANK}"),
        "rank": ("rank", "Rank"),
    }
    for panel, (key, points) in zip(panels, found.items(), strict=True):
        if not points:
            continue
        across = [getattr(point, key) for point in points]
        for time, colour, marker in (("cpu", "#b5541c", "s"), ("wall", "#1f5a96", "o")):
            name = {"cpu": "CPU time", "wall": "wall time"}[time]
            slope = f", exponent {slopes[key][time]:.2f}" if time in slopes[key] else ""
            seconds = [getattr(point, time) for point in points]
            panel.plot(across, seconds, color=colour, marker=marker, label=name + slope)
        work = points[-1].cpu - start.cpu
        linear = [start.cpu + work * value / across[-1] for value in across]
        panel.plot(across, linear, color="0.6", linestyle="--", label="start + linear growth")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(across, [label(value) for value in across])
        panel.minorticks_off()
        low, high = (choose([p.wall for p in points]) for choose in (min, max))
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 3 <= t <= high * 6]
        panel.set_yticks(ticks, [f"{t:g}" for t in ticks])
        panel.set_ylim(low / 1.6, max(p.cpu for p in points) * 1.6)
        text, title = labels[key]
        where = f", {points[0].size} pair" if key == "rank" else ""
        panel.set_title(f"{title}{where}")
        panel.set_xlabel(text)
        panel.set_ylabel("seconds")
        panel.grid(True, color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="upper left")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, dpi=120)


def label(value: float) -> str:
    """A tick: 1.04e9 is 1.0B, 64 is 64."""
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.1f}{unit}" if unit == "B" else f"{value / factor:.0f}{unit}"
    return f"{value:g}"


def grow(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make pairs and measure everything."""
    folder: Path = arguments.pairs
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    try:
        for size in dict.fromkeys(["tiny", *arguments.sizes, arguments.rank_size]):
            if make_pair(folder, size):
                made.append(size)

        def run(size: str, rank: int) -> Point:
            return measured(arguments.loratool, folder, size, rank, arguments.runs)

        measure_head = f"{'size':>6} {'linear, M':>10} {'rank':>6} {'wall, s':>9} {'CPU, s':>9}"
        print(f"\n{measure_head} {'MiB':>9}")
        start = run("tiny", RANK)
        by_size = [run(size, RANK) for size in arguments.sizes]
        by_rank = [run(arguments.rank_size, rank) for rank in arguments.ranks]
    finally:
        if arguments.delete:
            for size in made:
                shutil.rmtree(folder / f"llama-{size}", ignore_errors=True)
    by_size.sort(key=lambda point: point.parameters)
    return {"start": start, "parameters": by_size, "rank": by_rank}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, metavar="PAIRS_DIR")
    parser.add_argument("--sizes", default="0.1b,0.4b,1b,3b")
    parser.add_argument("--ranks", default="4,8,16,32,64,128,256")
    parser.add_argument("--rank-size", default="0.4b", choices=[s for s in SIZES if s != "tiny"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--plot", type=Path, metavar="FILE", help=".svg, .png or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.add_argument("--delete", action="store_true", help="remove the pairs that it has made")
    parser.add_argument(
        "--loratool",
        type=Path,
        default=Path(sys.executable).parent / "loratool",
        metavar="PATH",
        help="the loratool command [beside this python]",
    )
    arguments = parser.parse_args()
    arguments.sizes = [size for size in arguments.sizes.split(",") if size]
    arguments.ranks = [int(rank) for rank in arguments.ranks.split(",") if rank]
    if unknown := set(arguments.sizes) - set(SIZES):
        parser.error(f"unknown size {sorted(unknown)[0]}; known are {', '.join(SIZES)}")
    return arguments


def main() -> None:
    """Measures, fits and prints."""
    arguments = parse_arguments()
    result = grow(arguments)
    start = result.pop("start")
    slopes = {key: exponents(points, key, start) for key, points in result.items()}
    print()
    for key, found in slopes.items():
        if found:
            print(f"exponent by {key:10} wall {found['wall']:.2f}, CPU {found['cpu']:.2f}")
    if arguments.plot:
        plot(start, result, slopes, arguments.plot)
    if arguments.json:
        points = {key: [asdict(point) for point in points] for key, points in result.items()}
        data = {"start": asdict(start), **points, "exponents": slopes}
        arguments.json.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times `loratool extract` against mergekit-extract-lora, and checks what both of them wrote.

    python extract.py PAIR_DIR --rank 8 --mergekit MERGEKIT_VENV/bin/python

Both run as whole processes, by turns, on files that the page cache holds; embeddings and head are
excluded from both. Afterwards the energy that each adapter keeps is recomputed in fp64 from the
files and compared with the best that any adapter of that rank could keep. PAIR_DIR comes from
make_llama_pair.py and reference_spectra.py. Without --mergekit, loratool runs alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from files import fingerprint, weight_files, write_json
from measure import Measurement, measure, warm_cache

HERE = Path(__file__).parent
EXCLUDED_GLOBS = ("*embed_tokens*", "lm_head*")
EXCLUDED_REGEXES = ("embed_tokens", "lm_head")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
WARMUP = "--layers 1 --hidden 64 --intermediate 176 --vocabulary 512 --heads 4 --kv-heads 2"
COLD = 64 * 2**20
MIB = 2**20


@dataclass
class Tool:
    """One of the programs that are compared.

    Attributes:
        name: How the table calls it.
        versions: What is installed, for the record.
        command: Makes its command line from a pair's folder and an output folder.
        runs: How often it is measured.
        measurements: What the runs took.
        digests: SHA-256 of the weights that each run wrote.
        adapter_bytes: Size of the weights that the last run wrote.
        energy: The summary of adapter_energy.py.
    """

    name: str
    versions: dict[str, str]
    command: Callable[[Path, Path], list[str]]
    runs: int
    measurements: list[Measurement] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    adapter_bytes: int = 0
    energy: dict[str, Any] = field(default_factory=dict)


def loratool_command(
    program: Path, rank: int, options: Sequence[str], pair: Path, out: Path
) -> list[str]:
    """Makes loratool's command line."""
    excluded = [word for glob in EXCLUDED_GLOBS for word in ("--exclude", glob)]
    models = [str(pair / "base"), str(pair / "tuned")]
    words = [str(program), "extract", *models, "--rank", str(rank), *excluded, *options]
    return [*words, "-o", str(out)]


def mergekit_command(program: Path, rank: int, pair: Path, out: Path) -> list[str]:
    """Makes mergekit's command line.

    Norms, which are equal in both models, would be stored whole without --skip-undecomposable. The
    paths have to be absolute: of `a/b` mergekit asks the Hub whether it is a repository there.
    """
    excluded = [word for regex in EXCLUDED_REGEXES for word in ("--exclude-regex", regex)]
    models = ["--model", str(pair / "tuned"), "--base-model", str(pair / "base")]
    target = ["--out-path", str(out), "--max-rank", str(rank)]
    return [str(program), *models, *target, *excluded, "--skip-undecomposable"]


def schedule(tools: Sequence[Tool]) -> list[Tool]:
    """Spreads every tool's runs evenly over the time, so that they alternate."""
    places = [
        ((run + 0.5) / tool.runs, order, tool)
        for order, tool in enumerate(tools)
        for run in range(tool.runs)
    ]
    return [tool for _, _, tool in sorted(places, key=lambda place: place[:2])]


def run(tool: Tool, pair: Path, work: Path) -> Measurement:
    """Runs a tool once, on warm files, into an empty folder.

    Raises:
        RuntimeError: It failed, or wrote no adapter.
    """
    out = work / tool.name
    log = work / f"{tool.name}.log"
    shutil.rmtree(out, ignore_errors=True)
    warm_cache(weight_files(pair))
    taken = measure(tool.command(pair, out), log, ENVIRONMENT)
    if taken.status != 0:
        raise RuntimeError(
            f"{tool.name}: exit status {taken.status}, output in {log}:\n{tail(log)}"
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (out / name).is_file():
            raise RuntimeError(f"{tool.name} wrote no {name} into {out}")
    return taken


def warm_up(tools: Sequence[Tool], rank: int, work: Path) -> None:
    """Runs every tool on a tiny pair: byte code, shared libraries, and does it work at all.

    Raises:
        RuntimeError: It does not; better to know before a run of minutes than after it.
    """
    tiny = work / "tiny"
    script("make_llama_pair.py", tiny, *WARMUP.split())
    script("reference_spectra.py", tiny)
    for tool in tools:
        run(tool, tiny, work)
        check_energy(tool, tiny, rank, work)


def measure_all(tools: Sequence[Tool], pair: Path, work: Path) -> None:
    """Runs all tools by turns and keeps what they took."""
    for tool in schedule(tools):
        taken = run(tool, pair, work)
        tool.measurements.append(taken)
        tool.digests.append(digest(work / tool.name / "adapter_model.safetensors"))
        tool.adapter_bytes = (work / tool.name / "adapter_model.safetensors").stat().st_size
        text = f"{tool.name}: {taken.wall:.2f} s, {taken.private / MIB:.0f} MiB private"
        cold = f"; COLD, {taken.disk / MIB:.0f} MiB came from the disk" if taken.disk > COLD else ""
        print(text + cold, flush=True)


def check_energy(tool: Tool, pair: Path, rank: int, work: Path) -> None:
    """Recomputes the energy of a tool's last adapter, in a process of its own.

    That keeps torch out of this one: a process that is started counts its parent's memory in its
    ru_maxrss.
    """
    result = work / f"{tool.name}-energy.json"
    excluded = [word for glob in EXCLUDED_GLOBS for word in ("--exclude", glob)]
    words = [pair, work / tool.name, "--rank", rank, *excluded, "--json", result]
    script("adapter_energy.py", *words)
    tool.energy = json.loads(result.read_text())["summary"]


def script(name: str, *words: object) -> None:
    """Runs another script of this folder.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, str(HERE / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")


def table(tools: Sequence[Tool]) -> str:
    """Lays out the results, the ratio mergekit / loratool in the first column."""
    rows = [["", "ratio", *(tool.name for tool in tools)]]
    for label, key, unit, digits in (
        ("wall, s", "wall", 1, 2),
        ("CPU, s", "cpu", 1, 2),
        ("private memory, MiB", "private", MIB, 0),
        ("ru_maxrss, MiB", "resident", MIB, 0),
        ("read from disk, MiB", "disk", MIB, 0),
    ):
        texts = [spread([v / unit for v in values(tool, key)], digits) for tool in tools]
        rows.append([label, "" if key == "disk" else ratio(tools, key), *texts])
    for label, key in (
        ("share of the optimum, worst", "worst"),
        ("share of the optimum, median", "median"),
        ("matrices at 99.9% of it", "reach_999"),
        ("share of the delta, median", "median_of_delta"),
    ):
        rows.append([label, "", *(f"{tool.energy[key]:.3%}" for tool in tools)])
    sizes = [f"{tool.adapter_bytes / MIB:.1f}" for tool in tools]
    same = [same_bytes(tool.digests) for tool in tools]
    rows.append(["adapter, MiB", "", *sizes])
    rows.append(["runs", "", *(str(len(tool.measurements)) for tool in tools)])
    rows.append(["every run the same bytes", "", *same])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def spread(numbers: Sequence[float], digits: int) -> str:
    """Writes a median with its smallest and largest value."""
    middle = f"{statistics.median(numbers):.{digits}f}"
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def same_bytes(digests: Sequence[str]) -> str:
    """Says whether all runs wrote the same; one run says nothing."""
    if len(digests) == 1:
        return "-"
    return "yes" if len(set(digests)) == 1 else "NO"


def values(tool: Tool, key: str) -> list[float]:
    """Gives one figure of all runs of a tool."""
    return [float(getattr(taken, key)) for taken in tool.measurements]


def ratio(tools: Sequence[Tool], key: str) -> str:
    """Divides the second tool's median by the first one's."""
    if len(tools) < 2:
        return ""
    first, second = (statistics.median(values(tool, key)) for tool in tools)
    return f"{second / first:.2f}x"


def report(tools: Sequence[Tool], pair: Path, rank: int) -> dict[str, Any]:
    """Gathers everything for --json."""
    recipe = pair / "recipe.json"
    return {
        "rank": rank,
        "pair": json.loads(recipe.read_text())["recipe"] if recipe.exists() else str(pair),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "tools": {
            tool.name: {
                "versions": tool.versions,
                "runs": [{**asdict(taken), "output": None} for taken in tool.measurements],
                "sha256": tool.digests,
                "adapter_bytes": tool.adapter_bytes,
                "energy": tool.energy,
            }
            for tool in tools
        },
    }


def processor() -> str:
    """Names the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def digest(path: Path) -> str:
    """Computes the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tail(path: Path) -> str:
    """Gives the last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Asks an interpreter for the versions of packages."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.name: d.version for d in m.distributions()}\n"
        "print(json.dumps({name: there.get(name, 'none') for name in sys.argv[1:]}))"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code, *packages], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return dict.fromkeys(packages, "unknown")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def tools_from(arguments: argparse.Namespace) -> list[Tool]:
    """Makes the tools that the command line asks for."""
    rank, program = arguments.rank, arguments.loratool.absolute()
    options = arguments.loratool_option
    tools = [
        Tool(
            "loratool",
            versions(program.parent / "python", ("loratool", "torch", "safetensors")),
            lambda pair, out: loratool_command(program, rank, options, pair, out),
            arguments.runs,
        )
    ]
    if arguments.mergekit:
        python = arguments.mergekit.absolute()  # not resolved: a venv's python is a link
        peer = python.parent / "mergekit-extract-lora"
        tools.append(
            Tool(
                "mergekit",
                versions(python, ("mergekit", "torch", "transformers", "safetensors")),
                lambda pair, out: mergekit_command(peer, rank, pair, out),
                arguments.mergekit_runs,
            )
        )
    return tools


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", type=Path, metavar="PAIR_DIR")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5, help="runs of loratool [5]")
    parser.add_argument(
        "--loratool",
        type=Path,
        default=Path(sys.executable).parent / "loratool",
        metavar="PATH",
        help="the loratool command [beside this python]",
    )
    parser.add_argument(
        "--loratool-option",
        action="append",
        default=[],
        metavar="WORD",
        help="one more word of loratool's command line, such as --loratool-option=--quiet",
    )
    parser.add_argument(
        "--mergekit", type=Path, metavar="PYTHON", help="python of a venv that has mergekit"
    )
    parser.add_argument("--mergekit-runs", type=int, default=1, help="runs of mergekit [1]")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="takes adapters and logs [PAIR_DIR/extract]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    arguments = parser.parse_args()
    if min(arguments.runs, arguments.mergekit_runs, arguments.rank) < 1:
        parser.error("--runs, --mergekit-runs and --rank must be at least 1")
    spectra = arguments.pair / "spectra.json"
    if not spectra.exists():
        parser.error(f"there is no {spectra}: run reference_spectra.py first")
    if json.loads(spectra.read_text())["files"] != fingerprint(arguments.pair):
        parser.error(f"{spectra} is of other weights: run reference_spectra.py again")
    return arguments


def main() -> None:
    """Measures, checks and prints."""
    arguments = parse_arguments()
    pair = arguments.pair.resolve()
    work = (arguments.work or pair / "extract").resolve()
    work.mkdir(parents=True, exist_ok=True)
    tools = tools_from(arguments)
    try:
        warm_up(tools, arguments.rank, work)
        measure_all(tools, pair, work)
        for tool in tools:
            check_energy(tool, pair, arguments.rank, work)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"\nrank {arguments.rank}, {tools[0].energy['matrices']} matrices of {pair}")
    print(f"{len(os.sched_getaffinity(0))} processors, {processor()}")
    for tool in tools:
        print(f"{tool.name}: {', '.join(f'{k} {v}' for k, v in tool.versions.items())}")
    print("median (least to most) of whole processes; ratio: mergekit / loratool\n")
    print(table(tools))
    if len(tools) > 1:
        worst = min(values(tools[1], "wall")) / max(values(tools[0], "wall"))
        print(f"\nfastest run of mergekit / slowest run of loratool: {worst:.1f}")
    if arguments.json:
        write_json(arguments.json, report(tools, pair, arguments.rank))


if __name__ == "__main__":
    main()

"""Ways to factorize a delta at one rank, side by side: time, memory, and the energy they keep.

    python methods.py PAIR_DIR [--rank 8] [--layers 0,11] [--threads 0] [--json FILE]

Every method gets the same deltas (tuned - base, fp32) of the linear matrices of some layers of a
pair made by make_llama_pair.py, in a process of its own:

* mergekit: torch.linalg.svd of the delta in fp32, without the full bases (mergekit-extract-lora).
* kohya: torch.linalg.svd with full bases in fp32, and then both factors clamped to the 0.99
  quantile of their values (sd-scripts' extract_lora_from_models).
* lycoris: lycoris.utils.extract_linear (needs lycoris-lora).
* svd_lowrank: torch.svd_lowrank with its two power iterations.
* krylov, krylov-fp32, exact: loratool's factorizers.

Seconds are those of the factorization alone; the peers use all cores unless --threads says
otherwise, loratool's factorizers always one (loratool runs as many matrices at a time as there are
cores). The energy is recomputed in fp64 from the factors in fp32: ||D||^2 - ||D - B A||^2 as a
share of what the best factors of that rank keep (PAIR_DIR/spectra.json). Memory is the most private
memory of the whole process, torch and checking included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import MIB, measure

METHODS = ("mergekit", "kohya", "lycoris", "svd_lowrank", "krylov", "krylov-fp32", "exact")
QUANTILE = 0.99


def factors(method: str, rank: int) -> Callable[[Any], tuple[Any, Any]]:
    """What makes B (out, r) and A (r, in) of a delta (out, in), fp32."""
    import torch

    if method == "mergekit":

        def truncated(delta: Any) -> tuple[Any, Any]:
            left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
            return left[:, :rank] * sigma[:rank], right[:rank]

        return truncated
    if method == "kohya":

        def clamped(delta: Any) -> tuple[Any, Any]:
            left, sigma, right = torch.linalg.svd(delta)
            b, a = left[:, :rank] * sigma[:rank], right[:rank]
            limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), QUANTILE)
            return b.clamp(-limit, limit), a.clamp(-limit, limit)

        return clamped
    if method == "lycoris":
        from lycoris.utils import extract_linear

        def lycoris(delta: Any) -> tuple[Any, Any]:
            (a, b, _), kind = extract_linear(delta, "fixed", rank)
            if kind != "low rank":
                raise RuntimeError(f"lycoris made {kind!r} of a matrix")
            return b, a

        return lycoris
    if method == "svd_lowrank":

        def lowrank(delta: Any) -> tuple[Any, Any]:
            torch.manual_seed(0)
            left, sigma, right = torch.svd_lowrank(delta, q=rank)
            return left * sigma, right.T

        return lowrank
    from loratool import plugins
    from loratool.linalg import RankPolicy, named_generator

    torch.set_num_threads(1)
    spec = {"krylov-fp32": "krylov:compute=fp32"}.get(method, method)
    factorizer = plugins.create("factorizers", spec)

    def loratool(delta: Any) -> tuple[Any, Any]:
        found = factorizer.factorize(delta, RankPolicy(rank), named_generator(0, "delta"))
        return found.b, found.a

    return loratool


def run_one(pair_dir: Path, method: str, rank: int, layers: list[int], out: Path) -> None:
    """Factorize the sample by one method and write what came of it."""
    from pair import delta, matrix_names, open_pair

    make = factors(method, rank)
    pair = open_pair(pair_dir)
    spectra = json.loads((pair_dir / "spectra.json").read_text())["matrices"]
    names = sample(matrix_names(pair), layers)
    make(delta(pair, names[0]).float())  # once unmeasured: imports and first allocations
    wall = cpu = 0.0
    shares = []
    for name in names:
        given = delta(pair, name)
        energy = float(given.square().sum())
        single = given.float()
        started, used = time.perf_counter(), cpu_seconds()
        b, a = make(single)
        wall, cpu = wall + time.perf_counter() - started, cpu + cpu_seconds() - used
        rest = delta(pair, name).sub_(b.double() @ a.double())
        kept = energy - float(rest.square_().sum())
        top = spectra[name]["top"]
        shares.append(kept / top[min(rank, len(top)) - 1])
    result = {
        "matrices": len(names), "wall": wall, "cpu": cpu,
        "worst": min(shares), "median": statistics.median(shares),
    }  # fmt: skip
    out.write_text(json.dumps(result))


def sample(names: list[str], layers: list[int]) -> list[str]:
    """The linear matrices of some layers."""
    wanted = tuple(f"model.layers.{layer}." for layer in layers)
    found = [name for name in names if name.startswith(wanted)]
    if not found:
        sys.exit(f"error: no matrix of the layers {layers}")
    return found


def cpu_seconds() -> float:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each method in a process of its own, one after the other."""
    results = {}
    environment = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {}
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            out = Path(folder, f"{method}.json")
            command = [
                sys.executable, __file__, str(arguments.pair), "--rank", str(arguments.rank),
                "--layers", ",".join(map(str, arguments.layers)), "--one", method, str(out),
            ]  # fmt: skip
            taken = measure(command, Path(folder, f"{method}.log"), environment)
            if taken.status:
                sys.exit(f"error: {method}:\n{taken.output}")
            results[method] = {**json.loads(out.read_text()), "private": taken.private}
            print(f"{method}: {results[method]['wall']:.2f} s", flush=True)
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures by method."""
    head = ["method", "wall, s", "CPU, s", "CPU / krylov", "private, MiB", "worst", "median"]
    rows = [head]
    reference = results.get("krylov", next(iter(results.values())))["cpu"]
    for method, found in results.items():
        rows.append(
            [
                method,
                f"{found['wall']:.2f}",
                f"{found['cpu']:.2f}",
                f"{found['cpu'] / reference:.1f}",
                f"{found['private'] / MIB:.0f}",
                f"{found['worst']:.3%}",
                f"{found['median']:.3%}",
            ]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", type=Path, metavar="PAIR_DIR")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", default="0,11", help="layers of the sample [0,11]")
    parser.add_argument("--methods", default=",".join(METHODS), help="which, by commas [all]")
    parser.add_argument("--threads", type=int, default=0, help="threads of the peers [all cores]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.layers = [int(layer) for layer in arguments.layers.split(",")]
    arguments.methods = arguments.methods.split(",")
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"unknown method {sorted(unknown)[0]}; known are {', '.join(METHODS)}")
    if not (arguments.pair / "spectra.json").exists():
        parser.error(f"there is no {arguments.pair}/spectra.json: run reference_spectra.py first")
    return arguments


def main() -> None:
    """Runs every method and prints the table."""
    arguments = parse_arguments()
    if arguments.one:
        method, out = arguments.one
        run_one(arguments.pair, method, arguments.rank, arguments.layers, Path(out))
        return
    results = run_all(arguments)
    count = next(iter(results.values()))["matrices"]
    print(f"\nrank {arguments.rank}, {count} matrices of {arguments.pair}")
    print("worst, median: share of the best energy of that rank\n")
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

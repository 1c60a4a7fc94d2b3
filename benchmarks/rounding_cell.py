"""How much closer to a merged LoRA its rounding cells are than truncated SVD, on MiniLM in bf16.

    python benchmarks/rounding_cell.py [--layers 1,4] [--rank 8] [--limit 16] [--large 4096]

Into the queries, values and both feed-forward matrices of the layers a random LoRA of --rank is
merged, with |delta|/|W| from 0.03% to 1%, in both of the ways that PEFT 0.21 has: W + BA rounded
once ("sum"), or BA rounded first ("delta, sum"). Then each matrix is factorized by krylov at the
true rank and by rounding_cell, which is only told --limit and must find the rank. Printed, over all
matrices: median error ||B'A' - BA|| / ||BA|| of both and the median of their ratio; the smallest
share of held-out weights that were predicted; how many were recovered, and how many of these at
the true rank; the share of weights that both give back to the bit when merged again, for the
recovered in fp32 and in bf16 factors; and processor time per million weights, of one thread.
--large adds a square matrix of that side from N(0, 0.02^2), 0 leaves it out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from loratool.linalg import Context, Factorization, RankPolicy, named_generator
from loratool.suspicion import RECOVERED
from loratool_plugins.factorizers.krylov import Krylov
from loratool_plugins.factorizers.rounding_cell import RoundingCell

sys.path.append(str(Path(__file__).parent.parent))
from fixtures.weights import MINILM, fetch

RATIOS = (3e-4, 1e-3, 3e-3, 1e-2)
ENDS = ("query.weight", "value.weight", "intermediate.dense.weight", "output.dense.weight")


@dataclass(frozen=True)
class Result:
    """What was found of one matrix.

    Attributes:
        plain: error of krylov at the true rank.
        found: error of rounding_cell.
        held_out: share of held-out weights predicted; 0 where it did not come to that.
        recovered: whether rounding_cell accepted.
        rank: which it found.
        equal: share of weights restored by krylov, rounding_cell, and that in bf16 factors.
        seconds: processor time of rounding_cell.
        weights: how many weights.
    """

    plain: float
    found: float
    held_out: float
    recovered: bool
    rank: int
    equal: tuple[float, float, float]
    seconds: float
    weights: int


def weights(layers: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """MiniLM's matrices, bf16."""
    fetch()
    for name, value in load_file(MINILM / "model.safetensors").items():
        in_layer = any(f"layer.{layer}." in name for layer in layers)
        if in_layer and name.endswith(ENDS) and "attention.output" not in name:
            yield name, value.bfloat16()


def merge(
    name: str, before: torch.Tensor, rank: int, ratio: float, delta_first: bool
) -> tuple[Context, torch.Tensor]:
    """The merged matrix beside the base, and the LoRA's delta in fp32."""
    generator = named_generator(0, name)
    rows, columns = before.shape
    b = torch.randn(rows, rank, generator=generator)
    delta = b @ torch.randn(rank, columns, generator=generator)
    delta *= ratio * before.float().norm() / delta.norm()
    added = delta.bfloat16().float() if delta_first else delta
    return Context(name, before, (before.float() + added).bfloat16(), False), delta


def measure(context: Context, delta: torch.Tensor, rank: int, limit: int) -> Result:
    """Factorize one merge both ways."""

    def change() -> torch.Tensor:
        return context.after.float() - context.before.float()

    def error(found: Factorization) -> float:
        return float((found.b @ found.a - delta).norm() / delta.norm())

    def equal(b: torch.Tensor, a: torch.Tensor) -> float:
        merged = (context.before.float() + b.float() @ a.float()).bfloat16()
        return float((merged == context.after).double().mean())

    plain = Krylov().factorize(change(), RankPolicy(rank), named_generator(0, context.name))
    scratch, generator = change(), named_generator(0, context.name)
    start = time.process_time()
    found = RoundingCell().factorize_in(scratch, RankPolicy(limit), generator, context)
    seconds = time.process_time() - start
    shares = equal(plain.b, plain.a), equal(found.b, found.a)
    coarse = equal(found.b.bfloat16(), found.a.bfloat16())
    return Result(
        error(plain),
        error(found),
        found.certificate.details["recovery"].get("held_out", 0.0),
        found.certificate.method == RECOVERED,
        found.certificate.rank,
        (*shares, coarse),
        seconds,
        delta.numel(),
    )


def line(ratio: float, way: str, what: str, rank: int, results: list[Result]) -> str:
    """One row of the table."""
    plain, found, gain = (
        statistics.median(values)
        for values in (
            [r.plain for r in results],
            [r.found for r in results],
            [r.plain / r.found for r in results],
        )
    )
    done = [r for r in results if r.recovered]
    restored = " / ".join(f"{statistics.mean(r.equal[n] for r in results):.2%}" for n in range(3))
    speed = sum(r.seconds for r in results) / sum(r.weights for r in results) * 1e6
    return (
        f"| {ratio:.2%} | {way} | {what} | {plain:.2%} | {found:.2%} | {gain:.1f} | "
        f"{min(r.held_out for r in results):.2f} | {len(done)} of {len(results)}, "
        f"{sum(r.rank == rank for r in done)} | {restored} | {speed:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default="1,4")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--limit", type=int, default=16, help="largest rank to look for")
    parser.add_argument("--large", type=int, default=4096, metavar="SIDE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"MiniLM": dict(weights(arguments.layers.split(",")))}
    if arguments.large:
        generator = torch.Generator().manual_seed(0)
        large = 0.02 * torch.randn(arguments.large, arguments.large, generator=generator)
        sets[str(arguments.large)] = {"large": large.bfloat16()}
    print(
        "| delta / W | rounded | weights | plain | cells | ratio | held out | recovered, true rank "
        "| restored: plain / cells / in bf16 | s per M |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for what, matrices in sets.items():
        for ratio in RATIOS:
            for first, way in ((False, "sum"), (True, "delta, sum")):
                results = [
                    measure(
                        *merge(name, before, arguments.rank, ratio, first),
                        arguments.rank,
                        arguments.limit,
                    )
                    for name, before in matrices.items()
                ]
                print(line(ratio, way, what, arguments.rank, results), flush=True)


if __name__ == "__main__":
    main()

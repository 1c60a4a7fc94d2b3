"""Recomputes from the files how much of every matrix's delta a PEFT adapter keeps.

    python adapter_energy.py PAIR_DIR ADAPTER_DIR --rank 8 [--exclude GLOB]... [--json FILE]

For every matrix of the pair that differs: captured = ||D||^2 - ||D - s B A||^2 in fp64, with D from
the two checkpoints, A and B from the adapter as stored, s = alpha / r (or alpha / sqrt(r)) from its
adapter_config.json. Its share of the optimum is captured / (best energy of that rank), from
PAIR_DIR/spectra.json (reference_spectra.py). A matrix that the adapter leaves out has a share of 0.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from files import fingerprint, write_json
from pair import Pair, delta, open_pair
from safetensors import safe_open

GOOD = 0.999
RANKS = 256
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}


def read_adapter(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Reads the factors of a PEFT adapter.

    Args:
        directory: The adapter.

    Returns:
        `{"A": (r, in), "B": (out, r)}`, fp64, by the name of the weight that they belong to.

    Raises:
        ValueError: The file holds a tensor that is no factor of a linear layer, or half a pair.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            suffix = next((end for end in SUFFIXES if key.endswith(end)), None)
            if suffix is None or not key.startswith(PREFIX):
                raise ValueError(f"{directory}: {key} is not a factor of a linear layer")
            name = key.removeprefix(PREFIX).removesuffix(suffix) + ".weight"
            factors.setdefault(name, {})[SUFFIXES[suffix]] = file.get_tensor(key).double()
    for name, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{directory}: {name} has only one factor")
    return factors


def scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Finds the rank that a configuration gives a weight, and the scale of its product B A.

    Args:
        config: What adapter_config.json holds.
        name: The weight's name.

    Returns:
        The rank and the scale.
    """
    module = name.removesuffix(".weight")
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def captured(pair: Pair, name: str, product: torch.Tensor | None) -> float:
    """Computes ||D||^2 - ||D - P||^2 of one matrix.

    Args:
        pair: The two checkpoints.
        name: The matrix.
        product: What the adapter adds to it, `(out, in)`, fp64; None for nothing.

    Returns:
        The energy that is kept, negative when P is worse than nothing.
    """
    if product is None:
        return 0.0
    matrix = delta(pair, name)
    energy = float(matrix.square().sum())
    return energy - float(matrix.sub_(product).square_().sum())


def energies(
    directory: Path, adapter: Path, rank: int, exclude: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Compares an adapter with the best one of the rank, matrix by matrix.

    Args:
        directory: The pair, with its spectra.json.
        adapter: The adapter's folder.
        rank: The rank that was asked for.
        exclude: Shell patterns of weights that the adapter was not to touch.

    Returns:
        By matrix: `of_optimum` and `of_delta`, the energy kept as a share, and `rank`.

    Raises:
        ValueError: The adapter has other targets or ranks than it may have, its configuration
            contradicts its factors, or spectra.json is not of these weights.
    """
    spectra = json.loads((directory / "spectra.json").read_text())
    if spectra["files"] != fingerprint(directory):
        raise ValueError(f"{directory / 'spectra.json'} is of other weights: compute it again")
    if rank > RANKS:
        raise ValueError(f"rank {rank}: spectra.json goes up to {RANKS}")
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = read_adapter(adapter)
    names = [n for n in spectra["matrices"] if not any(fnmatchcase(n, glob) for glob in exclude)]
    if not names:
        raise ValueError(f"{directory}: nothing differs between base and tuned")
    if strange := sorted(set(factors) - set(names)):
        raise ValueError(f"{adapter} changes {strange[0]}, which is unchanged or excluded")
    pair = open_pair(directory)
    result = {}
    for name in names:
        reference = spectra["matrices"][name]
        product, stored = None, 0
        if name in factors:
            stored = factors[name]["A"].shape[0]
            said, factor = scale(config, name)
            if said != stored or stored > rank:
                raise ValueError(f"{name}: rank {stored} in file, {said} in config, {rank} asked")
            product = (factors[name]["B"] * factor) @ factors[name]["A"]
        kept = captured(pair, name, product)
        best = reference["top"][min(rank, *reference["shape"]) - 1]
        of_delta = kept / reference["energy"]
        result[name] = {"of_optimum": kept / best, "of_delta": of_delta, "rank": stored}
    return result


def summary(result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Sums up the shares of all matrices.

    Returns:
        The worst and the median share of the optimum, the worst matrix, the share of matrices that
        reach 99.9% of it, and the median share of the whole delta.
    """
    shares = {name: entry["of_optimum"] for name, entry in result.items()}
    return {
        "matrices": len(shares),
        "worst": min(shares.values()),
        "worst_matrix": min(shares, key=lambda name: shares[name]),
        "median": statistics.median(shares.values()),
        "reach_999": sum(share >= GOOD for share in shares.values()) / len(shares),
        "median_of_delta": statistics.median(entry["of_delta"] for entry in result.values()),
    }


def main() -> None:
    """Prints the summary and writes the figures of every matrix."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pair", type=Path, metavar="PAIR_DIR")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        result = energies(arguments.pair, arguments.adapter, arguments.rank, arguments.exclude)
    except ValueError as error:
        sys.exit(f"error: {error}")
    total = summary(result)
    for key, value in total.items():
        print(f"{key:16} {value:.6f}" if isinstance(value, float) else f"{key:16} {value}")
    if arguments.json:
        write_json(arguments.json, {"summary": total, "by_matrix": result})


def _by_pattern(patterns: Mapping[str, int], module: str, default: int) -> int:
    """Looks up a module as PEFT does: a pattern matches the name or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


if __name__ == "__main__":
    main()

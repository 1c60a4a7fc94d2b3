"""Computes what the best possible adapter of every rank would keep of every matrix's delta.

    python reference_spectra.py PAIR_DIR [--threads 1]

For every matrix of PAIR_DIR/tuned - PAIR_DIR/base that is not zero: ||D||_F^2 and the energies of
its top 1, 2, ..., 256 singular values (Eckart and Young 1936: no matrix of that rank keeps more).
They come from the eigenvalues of the fp64 Gram matrix of the smaller side, so they are good to
about 1e-13 of the largest. Kept in PAIR_DIR/spectra.json, which an interrupted run goes on from and
which is made anew when a weight file has changed:

    {"files": {...}, "matrices": {NAME: {"shape": [out, in], "energy": ||D||^2,
     "base_energy": ||W||^2, "top": [best energy at rank 1, at rank 2, ...]}}, "unchanged": [NAME]}
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from files import fingerprint, write_json
from pair import delta, matrix_names, open_pair, read

RANKS = 256


def top_energies(matrix: torch.Tensor) -> list[float]:
    """Sums the largest squared singular values.

    Args:
        matrix: `(out, in)`, fp64.

    Returns:
        The energy of the best approximation of rank 1, 2, ..., 256 or the smaller side.
    """
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_(min=0).flip(0)
    energies: list[float] = eigenvalues[:RANKS].cumsum(0).tolist()
    return energies


def load(path: Path, files: dict[str, list[int]]) -> dict[str, Any]:
    """Loads what was computed for the same weight files, or starts with nothing."""
    if path.exists():
        spectra: dict[str, Any] = json.loads(path.read_text())
        if spectra["files"] == files:
            return spectra
    return {"files": files, "matrices": {}, "unchanged": []}


def spectra(directory: Path) -> dict[str, Any]:
    """Computes or loads the spectra of a pair.

    Args:
        directory: The folder that holds `base` and `tuned`.

    Returns:
        What the file spectra.json holds.
    """
    path = directory / "spectra.json"
    result = load(path, fingerprint(directory))
    pair = open_pair(directory)
    names = matrix_names(pair)
    for number, name in enumerate(names, 1):
        if name in result["matrices"] or name in result["unchanged"]:
            continue
        matrix = delta(pair, name)
        energy = float(matrix.square().sum())
        if energy == 0.0:
            result["unchanged"].append(name)
        else:
            result["matrices"][name] = {
                "shape": list(matrix.shape),
                "energy": energy,
                "base_energy": float(read(pair.base, name).double().square_().sum()),
                "top": top_energies(matrix),
            }
        write_json(path, result)
        print(f"\r{number} of {len(names)} matrices", end="", flush=True)
    print()
    return result


def main() -> None:
    """Computes the spectra and says in a few words what they are like."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="PAIR_DIR")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    result = spectra(arguments.directory)
    print(f"{len(result['matrices'])} matrices differ, {len(result['unchanged'])} do not")
    for rank in (8, 64):
        shares = sorted(
            matrix["top"][min(rank, len(matrix["top"])) - 1] / matrix["energy"]
            for matrix in result["matrices"].values()
        )
        if shares:
            median = shares[len(shares) // 2]
            spread = f"{shares[0]:.1%} to {shares[-1]:.1%}, median {median:.1%}"
            print(f"share of ||delta||^2 that rank {rank} can keep: {spread}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""A hundred switches between two adapters: what is left of the base, with PEFT and with loratool.

    python switching.py [--cycles 100] [--size 1024] [--ratio 0.01]

One linear layer of SIZE x SIZE with a random base and two adapters of rank 8 whose deltas have
RATIO times the base's norm. One cycle merges the first and takes it out again, then does the same
with the second: in PEFT merge_adapter and unmerge_adapter, in loratool `merge --reversible` and
`unmerge` of a checkpoint that holds this one matrix. Prints the share of the base's weights that
differ, and the largest difference in units in the last place, after 1, 10 and all cycles.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import loratool
from loratool.residual import distance

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Model(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight = torch.nn.Parameter(weight.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def main() -> None:
    arguments = parse_arguments()
    marks = sorted({1, 10, arguments.cycles})
    print(
        "share of weights that differ from the base (largest difference, units in the last place)"
    )
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        base = (0.02 * torch.randn(arguments.size, arguments.size, generator=generator)).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            model = peft_model(base, arguments.ratio)
            for adapter in ("one", "two"):
                model.save_pretrained(folder, selected_adapters=[adapter])
            rows = {
                "PEFT": peft_drift(model, base, marks),
                "loratool": loratool_drift(Path(folder), base, marks),
            }
        for tool, found in rows.items():
            cells = (f"{mark:4d} cycles {share:7.2%} ({far:d})" for mark, share, far in found)
            print(f"{name}  {tool:<9}", "  ".join(cells))


def peft_model(base: torch.Tensor, ratio: float):
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["proj"])
    model = get_peft_model(Model(base), config, adapter_name="one")
    model.add_adapter("two", config)
    for seed, adapter in enumerate(("one", "two"), 1):
        generator = torch.Generator().manual_seed(seed)
        layer = model.base_model.model.proj
        a, b = (side[adapter].weight for side in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(torch.randn(b.shape, generator=generator))
            b.mul_(ratio * base.float().norm() / (b.float() @ a.float()).norm())
    return model


def peft_drift(model, base: torch.Tensor, marks: list[int]) -> list[tuple[int, float, int]]:
    found = []
    for cycle in range(1, marks[-1] + 1):
        for adapter in ("one", "two"):
            model.merge_adapter([adapter])
            model.unmerge_adapter()
        if cycle in marks:
            found.append((cycle, *difference(base, model.base_model.model.proj.weight.detach())))
    return found


def loratool_drift(
    folder: Path, base: torch.Tensor, marks: list[int]
) -> list[tuple[int, float, int]]:
    found = []
    current = folder / "base.safetensors"
    save_file({"proj.weight": base}, current)
    for cycle in range(1, marks[-1] + 1):
        for adapter in ("one", "two"):
            merged, restored = folder / "merged", folder / "restored"
            model = loratool.merge(current, [(folder / adapter, 1.0)], reversible=True)
            model.save(merged, overwrite=True)
            loratool.unmerge(merged).save(restored, overwrite=True)
            current = restored
        if cycle in marks:
            (file,) = restored.glob("*.safetensors")
            found.append((cycle, *difference(base, load_file(file)["proj.weight"])))
    return found


def difference(base: torch.Tensor, found: torch.Tensor) -> tuple[float, int]:
    away = distance(base, found)
    return float((away != 0).mean()), int(away.max())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.01)
    return parser.parse_args()


if __name__ == "__main__":
    main()

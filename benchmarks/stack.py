"""Stacking three adapters of rank 8 into one of rank 8, beside PEFT's add_weighted_adapter.

    python stack.py [--runs 7] [--layers 12] [--executor serial]

A Llama of 110 million parameters with random weights and three random adapters on its 84 linear
modules. Both work in this process on the same factors in memory, PEFT with all cores, loratool with
the given executor (matrices of this size are so quick that threads wait for each other): building
the model, loading and writing are left out. PEFT runs once (combination_type="svd", svd_rank=8),
loratool several times (the best rank-8 approximation of the exact weighted sum, with certificates
and the report of interference). The ratio is PEFT's time divided by loratool's median. Both results
are compared with each other, module by module, as B @ A * scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

import loratool
from loratool import plugins
from loratool.adapter import Adapter, LazyUpdate
from loratool.engine import single_threaded_tasks
from loratool.updates import LowRank

RANK = 8
WEIGHTS = {"one": 0.5, "two": 0.3, "three": 0.2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    arguments = parse_arguments()
    model = make_model(arguments.layers)
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    adapters = [(adapter_of(modules, name), weight) for name, weight in WEIGHTS.items()]
    executor = arguments.executor
    stack(adapters, executor)  # once unmeasured: imports and first allocations
    ours, found = [], {}
    for _ in range(arguments.runs):
        seconds, found = timed(lambda: stack(adapters, executor))
        ours.append(seconds)
    theirs, _ = timed(lambda: combine_with_peft(model))
    print(f"PEFT / loratool, median of {arguments.runs}: {theirs / statistics.median(ours):.0f}")
    print(f"{'PEFT svd':<16} {theirs:8.3f} s")
    spread = f"({min(ours):.3f} to {max(ours):.3f})"
    print(f"{'loratool stack':<16} {statistics.median(ours):8.3f} s {spread}")
    print(f"largest relative difference of a module: {largest_difference(modules, found):.1e}")
    print(
        f"{parameters / 1e6:.0f} million parameters, {len(modules)} modules, "
        f"{len(adapters)} adapters of rank {RANK}, {torch.get_num_threads()} threads"
    )


def make_model(layers: int) -> Any:
    """The Llama with its adapters; B is random too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    settings = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, init_lora_weights=False
    )
    first, *others = WEIGHTS
    model = get_peft_model(LlamaForCausalLM(config), settings, adapter_name=first)
    for name in others:
        model.add_adapter(name, settings)
    return model


def adapter_of(modules: dict[str, Any], name: str) -> Adapter:
    """One of the model's adapters, as loratool sees it."""
    updates = {}
    for module, layer in modules.items():
        a, b = (side[name].weight.detach() for side in (layer.lora_A, layer.lora_B))
        update = LowRank(a, b, layer.scaling[name])
        updates[module] = LazyUpdate(
            module, "low_rank", (len(b), a.shape[1]), "F32", held(update), rank=RANK
        )
    return Adapter(updates)


def held(update: LowRank) -> Callable[[], LowRank]:
    return lambda: update


def stack(adapters: list[tuple[Adapter, float]], name: str) -> dict[str, LowRank]:
    """Everything that `loratool stack --rank 8` does but reading and writing."""
    lazy = loratool.stack(adapters, rank=RANK)
    executor = plugins.create("executors", name)
    with single_threaded_tasks():
        found = dict(executor.map(lambda update: (update.name, update.load()), lazy.values()))
    lazy.provenance.lines()
    return found


def combine_with_peft(model: Any) -> None:
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "combined", combination_type="svd", svd_rank=RANK
    )


def largest_difference(modules: dict[str, Any], found: dict[str, LowRank]) -> float:
    """Between the two results, relative to PEFT's, the worst module."""
    worst = 0.0
    for name, layer in modules.items():
        theirs = layer.get_delta_weight("combined").detach()
        ours = found[name].b @ found[name].a * found[name].scale
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--executor", default="serial")
    return parser.parse_args()


if __name__ == "__main__":
    main()

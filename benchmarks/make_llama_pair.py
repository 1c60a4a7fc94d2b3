"""Makes a base and a fine-tuned bf16 Llama checkpoint whose deltas have known kinds of spectra.

    python make_llama_pair.py OUT_DIR [--layers 22 --hidden 2048 ...]

writes OUT_DIR/base, OUT_DIR/tuned and OUT_DIR/recipe.json: 1.17 billion parameters and 154 linear
matrices at the defaults. The weights are random, W ~ N(0, 0.02^2). Every linear matrix of the tuned
model is bf16(W + D), D = c G1 diag(i^-p) G2 with Gaussian G1 and G2, p drawn for each matrix from
0.4 to 1.2, and c such that |D|_F / |W|_F lies between 0.5% and 3%. Embeddings and head are left
alone. The same recipe gives the same bytes on the same kind of CPU with the same torch; it is made
by one thread for that reason.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from files import SIDES, write_json

STANDARD_DEVIATION = 0.02
EXPONENTS = (0.4, 1.2)
RELATIVE_SIZES = (0.005, 0.03)
BYTES_PER_WEIGHT = 2
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of the pair.

    Attributes:
        layers: Number of decoder layers, seven linear matrices each.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layers.
        vocabulary: Rows of the embedding and of the head.
        heads: Attention heads.
        kv_heads: Key and value heads.
        seed: Seed of all random numbers.
        shard_size: Most bytes of tensors in one file.
        change_norms: Whether the tuned model has other norm weights.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    seed: int
    shard_size: int
    change_norms: bool


@dataclass(frozen=True)
class Entry:
    """One tensor of the model.

    Attributes:
        name: Its name in the checkpoint.
        shape: Its shape, `(out, in)` for matrices.
        kind: `linear`, `table` (embedding and head) or `norm`.
        number: Its place in the model.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    number: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * BYTES_PER_WEIGHT


def entries(recipe: Recipe) -> list[Entry]:
    """Lists the tensors of the model in the order in which they are stored."""
    hidden, inner = recipe.hidden, recipe.intermediate
    kv = hidden // recipe.heads * recipe.kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    table = (recipe.vocabulary, hidden)
    rows: list[tuple[str, tuple[int, ...], str]] = [("model.embed_tokens", table, "table")]
    for layer in range(recipe.layers):
        prefix = f"model.layers.{layer}."
        rows.append((prefix + "input_layernorm", (hidden,), "norm"))
        rows += [(prefix + name, shape, "linear") for name, shape in linears.items()]
        rows.append((prefix + "post_attention_layernorm", (hidden,), "norm"))
    rows += [("model.norm", (hidden,), "norm"), ("lm_head", table, "table")]
    return [
        Entry(f"{name}.weight", shape, kind, number)
        for number, (name, shape, kind) in enumerate(rows)
    ]


def split(tensors: list[Entry], shard_size: int) -> list[list[Entry]]:
    """Fills shards in order, none larger than `shard_size` unless one tensor is."""
    shards: list[list[Entry]] = [[]]
    room = shard_size
    for entry in tensors:
        if shards[-1] and entry.size > room:
            shards.append([])
            room = shard_size
        shards[-1].append(entry)
        room -= entry.size
    return shards


def generator(recipe: Recipe, entry: Entry, purpose: str) -> torch.Generator:
    """Gives the random numbers of one tensor: a stream of its own for every purpose."""
    # torch's CPU generator takes 32 bits of a seed, and neighbouring seeds start alike: hash first.
    hashed = random.Random(f"{recipe.seed} {entry.name} {purpose}")
    return torch.Generator().manual_seed(hashed.getrandbits(32))


def spectrum(recipe: Recipe, entry: Entry) -> dict[str, float]:
    """Draws a matrix's exponent p and its |D|_F / |W|_F, even on a logarithmic scale."""
    numbers = random.Random(f"{recipe.seed} {entry.name} spectrum")
    return {
        "exponent": numbers.uniform(*EXPONENTS),
        "relative_size": math.exp(numbers.uniform(*map(math.log, RELATIVE_SIZES))),
    }


def base_weight(recipe: Recipe, entry: Entry) -> torch.Tensor:
    """Makes one tensor of the base, bf16."""
    if entry.kind == "norm":
        return torch.ones(entry.shape, dtype=torch.bfloat16)
    noise = torch.randn(entry.shape, generator=generator(recipe, entry, "base"))
    return noise.mul_(STANDARD_DEVIATION).bfloat16()


def tuned_weight(recipe: Recipe, entry: Entry, base: torch.Tensor) -> torch.Tensor:
    """Makes the same tensor of the tuned model, bf16."""
    numbers = generator(recipe, entry, "tuned")
    if entry.kind == "norm" and recipe.change_norms:
        return (base + 0.05 * torch.randn(entry.shape, generator=numbers)).bfloat16()
    if entry.kind != "linear":
        return base
    chosen = spectrum(recipe, entry)
    rank = min(entry.shape)
    weights = torch.arange(1, rank + 1, dtype=torch.float32).pow_(-chosen["exponent"])
    left = torch.randn((entry.shape[0], rank), generator=numbers).mul_(weights)
    delta = left @ torch.randn((rank, entry.shape[1]), generator=numbers)
    weight = base.float()
    delta *= chosen["relative_size"] * _norm(weight) / _norm(delta)
    return weight.add_(delta).bfloat16()


def write_pair(recipe: Recipe, directory: Path) -> None:
    """Writes both checkpoints, holding one tensor of each at a time."""
    tensors = entries(recipe)
    shards = split(tensors, recipe.shard_size)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for side in SIDES:
        (directory / side).mkdir(parents=True)
        write_metadata(recipe, directory / side, shards, names)
    for shard, name in zip(shards, names, strict=True):
        base_path, tuned_path = (directory / side / name for side in SIDES)
        with base_path.open("wb") as base_file, tuned_path.open("wb") as tuned_file:
            for file in (base_file, tuned_file):
                file.write(header(shard))
            for entry, base, tuned in made(recipe, shard):
                write_tensor(base_file, base)
                write_tensor(tuned_file, tuned)
                print(f"\r{entry.number + 1} of {len(tensors)} tensors", end="", flush=True)
    print()


def made(recipe: Recipe, shard: list[Entry]) -> Iterator[tuple[Entry, torch.Tensor, torch.Tensor]]:
    """Makes the tensors of a shard, one after the other."""
    for entry in shard:
        base = base_weight(recipe, entry)
        yield entry, base, tuned_weight(recipe, entry, base)


def header(shard: list[Entry]) -> bytes:
    """Makes the header of a safetensors file, padded to eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        place = [offset, offset + entry.size]
        table[entry.name] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": place}
        offset += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Appends the bytes of a bf16 tensor."""
    file.write(tensor.contiguous().view(torch.uint16).numpy().data)


def write_metadata(
    recipe: Recipe, model: Path, shards: list[list[Entry]], names: list[str]
) -> None:
    """Writes config.json, generation_config.json and the index of the shards."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": recipe.hidden // recipe.heads,
        "hidden_act": "silu",
        "hidden_size": recipe.hidden,
        "initializer_range": STANDARD_DEVIATION,
        "intermediate_size": recipe.intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": recipe.heads,
        "num_hidden_layers": recipe.layers,
        "num_key_value_heads": recipe.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": recipe.vocabulary,
    }
    size = sum(entry.size for shard in shards for entry in shard)
    index = {
        "metadata": {"total_parameters": size // BYTES_PER_WEIGHT, "total_size": size},
        "weight_map": {
            entry.name: name for shard, name in zip(shards, names, strict=True) for entry in shard
        },
    }
    write_json(model / "config.json", config)
    write_json(model / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(model / "model.safetensors.index.json", index)


def make(recipe: Recipe, directory: Path) -> bool:
    """Makes the pair unless it is there.

    Args:
        recipe: What to make.
        directory: Where. It may hold nothing or another pair, which is then replaced.

    Returns:
        Whether anything was made.

    Raises:
        FileExistsError: The folder holds something that is not such a pair.
    """
    path = directory / "recipe.json"
    if path.exists() and json.loads(path.read_text())["recipe"] == asdict(recipe):
        return False
    unfinished = directory / "recipe.json.unfinished"
    occupied = directory.exists() and any(directory.iterdir())
    if occupied and not path.exists() and not unfinished.exists():
        raise FileExistsError(f"{directory} is not empty and holds no pair made by this script")
    directory.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    for old in (path, directory / "spectra.json"):
        old.unlink(missing_ok=True)
    for side in SIDES:
        shutil.rmtree(directory / side, ignore_errors=True)
    write_pair(recipe, directory)
    linears = [entry for entry in entries(recipe) if entry.kind == "linear"]
    matrices = {entry.name: spectrum(recipe, entry) for entry in linears}
    write_json(path, {"recipe": asdict(recipe), "torch": torch.__version__, "matrices": matrices})
    unfinished.unlink()
    return True


def parse_size(text: str) -> int:
    """Reads `1GB`, `500MB`, `1GiB` or a plain number of bytes."""
    for unit, factor in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def parse_arguments() -> tuple[Path, Recipe]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="OUT_DIR")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=parse_size, default=parse_size("1GB"))
    parser.add_argument("--change-norms", action="store_true", help="alter the norm weights too")
    values = vars(parser.parse_args())
    directory: Path = values.pop("directory")
    recipe = Recipe(**values)
    if recipe.hidden % recipe.heads or recipe.heads % recipe.kv_heads:
        parser.error("--heads must divide --hidden, and --kv-heads must divide --heads")
    return directory, recipe


def main() -> None:
    """Makes the pair and says what it is."""
    directory, recipe = parse_arguments()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        new = make(recipe, directory)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    parameters = sum(math.prod(entry.shape) for entry in entries(recipe))
    done = f"made in {time.perf_counter() - start:.0f} s" if new else "already there"
    print(f"{directory}: {parameters / 1e9:.2f} billion parameters a side, {done}")


def _norm(tensor: torch.Tensor) -> float:
    """Computes the Frobenius norm by rows in fp64: torch's fp32 norm is off by up to 0.2%."""
    rows = range(0, tensor.shape[0], 256)
    return math.sqrt(sum(float(tensor[i : i + 256].double().square().sum()) for i in rows))


if __name__ == "__main__":
    main()

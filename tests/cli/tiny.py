"""Tiny checkpoints made without transformers, and loratool called as from a shell."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from loratool.cli.main import main

Tensors = dict[str, torch.Tensor]

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
PREFIX = "base_model.model."
_COMMAND = "from loratool.cli.main import main; main()"


def llama(hidden: int = 16, dtype: torch.dtype = torch.float32) -> Tensors:
    """The tensors of a two-layer Llama."""
    generator = torch.Generator().manual_seed(0)

    def table(rows: int, columns: int) -> torch.Tensor:
        return (0.1 * torch.randn(rows, columns, generator=generator)).to(dtype)

    tensors = {"model.embed_tokens.weight": table(32, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        for letter in "qkvo":
            tensors[f"{prefix}self_attn.{letter}_proj.weight"] = table(hidden, hidden)
        tensors[f"{prefix}mlp.gate_proj.weight"] = table(24, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = table(24, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = table(hidden, 24)
        tensors[f"{prefix}post_attention_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
    tensors[NORM] = torch.ones(hidden, dtype=dtype)
    tensors["lm_head.weight"] = table(32, hidden)
    return tensors


def finetuned(base: Tensors, rank: int = 2) -> Tensors:
    """The base with updates of low rank on its projections, and another last norm."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, value in base.items():
        if "_proj" in name:
            left = torch.randn(value.shape[0], rank, generator=generator)
            right = torch.randn(rank, value.shape[1], generator=generator)
            value = (value + 0.05 * left @ right).to(value.dtype)
        elif name == NORM:
            value = value + 0.125
        tensors[name] = value
    return tensors


def model_folder(folder: Path, config: Mapping[str, Any] | None = CONFIG) -> Path:
    """A model's directory that lacks the weights."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def save_model(folder: Path, tensors: Tensors, files: int = 1) -> Path:
    """A model's directory with safetensors; sharded with an index for several files."""
    model_folder(folder)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        held = names[number::files]
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map)
    return folder


def write_index(
    folder: Path, weight_map: Mapping[str, Any], stem: str = "model.safetensors"
) -> None:
    """An index that says which file holds which tensor."""
    content = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / f"{stem}.index.json").write_text(json.dumps(content))


def entry(
    begin: int = 0, end: int = 8, dtype: str = "F32", shape: tuple[int, ...] = (2,)
) -> dict[str, Any]:
    """What a safetensors header says of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A safetensors file with any header, honest or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def loratool(*arguments: object) -> Result:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch("signal.signal"),  # pytest has its own
        mock.patch.object(sys, "argv", ["loratool", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            status = stop.code or 0
    return Result(status, out.getvalue(), err.getvalue())


def start(*arguments: object, **environment: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A pytest in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a started command."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def done(result: Result) -> Result:
    """The result, which must be a success."""
    assert result.status == 0, result.err
    return result


def refused(result: Result, *words: object, status: int = 1) -> None:
    """One message that holds `words`, nothing on standard output, no traceback."""
    assert result.status == status, result
    assert result.out == ""
    assert sum(line.startswith("Error: ") for line in result.err.splitlines()) == 1
    assert "Traceback" not in result.err
    if status == 1:
        assert result.err.startswith("Error: ")
    for word in words:
        assert str(word) in result.err


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, directories with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Assert that nothing below the folder changes inside the block."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before

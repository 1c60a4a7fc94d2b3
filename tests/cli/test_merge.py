"""What a merge writes: the base's files, sharding, order and metadata, with new values in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratool.safetensors_file import read_header
from tests.cli.tiny import (
    CONFIG,
    NORM,
    UP,
    Tensors,
    done,
    finetuned,
    llama,
    loratool,
    model_folder,
    names,
    save_model,
    write_index,
)


def merged(base: Path, adapter: str | Path, output: Path, *options: object) -> Path:
    done(loratool("merge", base, adapter, "-o", output, *options))
    return output


def values(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def order(file: Path) -> list[str]:
    return [entry.name for entry in read_header(file).entries]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_merge_gives_the_fine_tune(
    base: Path, tuned: Path, adapter: Path, tmp_path: Path
) -> None:
    found, wanted, before = (
        values(merged(base, adapter, tmp_path / "out")),
        values(tuned),
        values(base),
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        if bits(value) == bits(before[name]) or name == NORM:
            assert bits(found[name]) == bits(value)


def test_order_metadata_and_side_files_are_kept(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    base = save_model(tmp_path / "base", tensors)
    metadata = {"format": "pt", "note": "kept"}
    save_file(tensors, base / "model.safetensors", metadata)
    side = {"tokenizer.json": "{}", "merges.txt": "a b", "LICENSE": "free", "weird": "x" * 100_000}
    for name, content in side.items():
        (base / name).write_text(content)
    out = merged(base, adapter, tmp_path / "out")
    assert names(out) == sorted([*side, "config.json", "model.safetensors"])
    for name, content in side.items():
        assert (out / name).read_text() == content
    assert order(out / "model.safetensors") == order(base / "model.safetensors")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    assert json.loads((out / "config.json").read_text()) == CONFIG


def test_sharding_is_kept(adapter: Path, tmp_path: Path, tensors: Tensors) -> None:
    base = save_model(tmp_path / "base", tensors, files=3)
    out = merged(base, adapter, tmp_path / "out")
    assert names(out) == names(base)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in base.glob("*.safetensors"):
        assert order(out / file.name) == order(file)


def test_the_shard_size_can_be_chosen(adapter: Path, tmp_path: Path, tensors: Tensors) -> None:
    base = save_model(tmp_path / "base", tensors, files=3)
    whole = values(merged(base, adapter, tmp_path / "same"))
    out = merged(base, adapter, tmp_path / "small", "--max-shard-size", "5KB")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for file in shards:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 5000
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == whole.keys()
    for name, file in weight_map.items():
        assert bits(load_file(out / file)[name]) == bits(whole[name])
    one = merged(base, adapter, tmp_path / "one", "--max-shard-size", "1GB")
    assert names(one) == ["config.json", "model.safetensors"]
    assert {name: bits(v) for name, v in values(one).items()} == {
        name: bits(v) for name, v in whole.items()
    }


def foreign(folder: Path, tensors: Tensors) -> Iterator[Path]:
    """Bases whose headers loratool would write otherwise."""
    yield save_model(folder / "single", tensors)
    yield save_model(folder / "sharded", tensors, files=3)
    plain = model_folder(folder / "no metadata")
    save_file(tensors, plain / "model.safetensors")
    yield plain
    tight = model_folder(folder / "no padding, odd order")
    entries = {}
    data = b""
    for name in reversed(tensors):
        raw = bits(tensors[name])
        entries[name] = {
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
            "dtype": "F32",
        }
        data += raw
    header = json.dumps(entries, indent=1).encode()
    file = tight / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    yield tight


def test_weight_zero_copies_the_bytes_of_every_file(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    odd = dict(tensors)
    odd[UP] = odd[UP].clone()
    odd[UP].view(-1)[:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45])
    for base in foreign(tmp_path / "bases", odd):
        out = merged(base, f"{adapter}=0", tmp_path / base.name)
        assert names(out) == names(base)
        for name in names(base):
            if name.endswith(".safetensors"):
                assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_weight_of_zero_beside_another_changes_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done(loratool("merge", base, f"{adapter}=0", f"{adapter}=0.5", f"{adapter}=-0", "-o", out))
    alone = merged(base, f"{adapter}=0.5", tmp_path / "alone")
    assert {n: bits(v) for n, v in values(out).items()} == {
        n: bits(v) for n, v in values(alone).items()
    }


def test_files_that_no_update_touches_are_copied_whole(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    base = model_folder(tmp_path / "base")
    files = {name: "b.safetensors" if "proj" in name or name == NORM else "a.safetensors"
             for name in tensors}  # fmt: skip
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, base / file)
    write_index(base, files)
    out = merged(base, adapter, tmp_path / "out")
    assert (out / "a.safetensors").read_bytes() == (base / "a.safetensors").read_bytes()
    assert (out / "b.safetensors").read_bytes() != (base / "b.safetensors").read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_become_safetensors(
    legacy: bool, sharded: bool, adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    wanted = values(merged(save_model(tmp_path / "st", tensors), adapter, tmp_path / "wanted"))
    base = model_folder(tmp_path / "base")
    parts = {"pytorch_model.bin": list(tensors)}
    if sharded:
        parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": list(tensors)[n::2] for n in (0, 1)}
        index = {name: file for file, held in parts.items() for name in held}
        write_index(base, index, "pytorch_model.bin")
    for file, held in parts.items():
        content = {name: tensors[name] for name in held}
        torch.save(content, base / file, _use_new_zipfile_serialization=not legacy)
    out = merged(base, adapter, tmp_path / "out")
    renamed = [file.replace("pytorch_", "").replace(".bin", ".safetensors") for file in parts]
    index_file = ["model.safetensors.index.json"] * sharded
    assert names(out) == sorted(["config.json", *renamed, *index_file])
    assert {n: bits(v) for n, v in values(out).items()} == {n: bits(v) for n, v in wanted.items()}
    for file, held in zip(renamed, parts.values(), strict=True):
        assert order(out / file) == held


def test_tied_tensors_of_a_torch_file_are_both_written(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    base = model_folder(tmp_path / "base", {**CONFIG, "tie_word_embeddings": True})
    table = tensors["model.embed_tokens.weight"]
    torch.save({**tensors, "lm_head.weight": table}, base / "pytorch_model.bin")
    found = values(merged(base, adapter, tmp_path / "out"))
    assert bits(found["lm_head.weight"]) == bits(table)
    assert bits(found["model.embed_tokens.weight"]) == bits(table)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_types_are_kept_and_can_be_changed(dtype: torch.dtype, tmp_path: Path) -> None:
    start = llama(dtype=dtype)
    base = save_model(tmp_path / "base", start)
    end = finetuned(llama())
    tuned = save_model(tmp_path / "tuned", {n: v.to(dtype) for n, v in end.items()})
    done(loratool("extract", base, tuned, "-o", tmp_path / "adapter", "--dtype", "fp32"))
    found = values(merged(base, tmp_path / "adapter", tmp_path / "out"))
    assert {value.dtype for value in found.values()} == {dtype}
    wide = values(merged(base, tmp_path / "adapter", tmp_path / "wide", "--dtype", "fp32"))
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert torch.equal(wide["lm_head.weight"], start["lm_head.weight"].float())


def test_other_tensors_are_copied_byte_for_byte(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    others = {
        "rope.inv_freq": torch.rand(8, dtype=torch.float64),
        "position_ids": torch.arange(9),
        "mask": torch.tensor([[True, False]]),
        "scale": torch.tensor(3.0),
        "void": torch.empty(0, 4),
        "negative zero": torch.tensor([-0.0, torch.nan, -torch.inf]),
        "codes": torch.arange(7, dtype=torch.uint8),
    }
    out = merged(save_model(tmp_path / "base", {**tensors, **others}), adapter, tmp_path / "out")
    found = values(out)
    for name, value in others.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert bits(found[name].reshape(-1)) == bits(value.reshape(-1))

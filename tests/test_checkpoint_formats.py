"""Opening checkpoints: every layout and type as it lies, by headers, mapped rather than copied."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.checkpoint import Checkpoint
from loratool.dtypes import dtype_name
from loratool.errors import FormatError, InputError
from loratool.opening import open_checkpoint
from loratool.safetensors_file import build_header
from loratool_plugins.checkpoint_formats.directory import find_weights, side_files
from tests.cli.tiny import CONFIG, Tensors, llama, model_folder, save_model, write_index

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def samples(layout: str = "") -> Tensors:
    """Every type that a layout knows, and the shapes that are easily got wrong."""
    known = [dtype for dtype in DTYPES if layout != "legacy" or "float8" not in str(dtype)]
    tensors = {str(dtype).removeprefix("torch."): sample(dtype) for dtype in known}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["nothing"] = torch.empty(0, dtype=torch.int64)
    tensors["names with spaces/ä"] = torch.ones(1)
    return tensors


def sample(dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(12).reshape(3, 4) - 5).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: Checkpoint, wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        lazy = found[name]
        assert (lazy.name, lazy.dtype, lazy.shape) == (
            name,
            dtype_name(value.dtype),
            tuple(value.shape),
        )
        assert lazy.nbytes == value.numel() * value.itemsize
        read = lazy.read()
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert bits(read) == bits(value)
        assert b"".join(bits(block) for block in lazy.blocks()) == bits(value)


def as_safetensors(folder: Path, tensors: Tensors) -> Path:
    return save_model(folder, tensors)


def as_shards(folder: Path, tensors: Tensors) -> Path:
    return save_model(folder, tensors, files=3)


def as_torch(name: str, **options: Any) -> Callable[[Path, Tensors], Path]:
    def save(folder: Path, tensors: Tensors) -> Path:
        torch.save(tensors, model_folder(folder) / name, **options)
        return folder

    return save


def as_torch_shards(folder: Path, tensors: Tensors) -> Path:
    model_folder(folder)
    names = list(tensors)
    weight_map = {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in names[number::2]}, folder / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    write_index(folder, weight_map, "pytorch_model.bin")
    return folder


LAYOUTS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": as_safetensors,
    "shards": as_shards,
    "bin": as_torch("pytorch_model.bin"),
    "pt": as_torch("weights.pt"),
    "pth": as_torch("weights.pth"),
    "legacy": as_torch("pytorch_model.bin", _use_new_zipfile_serialization=False),
    "bin shards": as_torch_shards,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_names_types_shapes_and_bytes(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "model", samples(layout))
    found = open_checkpoint(path)
    same(found, samples(layout))
    assert found.config == CONFIG
    assert found.path == path
    assert set(found.shards) == set(found)
    assert all((path / name).is_file() for name in found.shards.values())
    assert bool(found.notes) == (layout == "legacy")


@pytest.mark.parametrize("layout", ["safetensors", "bin", "pt", "pth", "legacy"])
def test_a_single_file_is_a_checkpoint_without_config(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "model", samples(layout))
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    found = open_checkpoint(str(file))
    same(found, samples(layout))
    assert found.config is None
    assert not found.side_files


def test_shards_are_in_the_order_of_their_names_and_bytes(tmp_path: Path) -> None:
    found = open_checkpoint(save_model(tmp_path / "model", llama(), files=3))
    assert list(found.shards.values()) == sorted(found.shards.values())
    assert len(set(found.shards.values())) == 3
    places = [(t.extent.path, t.extent.offset) for t in found.values() if t.extent]
    assert places == sorted(places)
    assert len(places) == len(found)


def test_a_tensor_that_the_index_forgets_is_still_there(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", llama(), files=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    write_index(path, index["weight_map"])
    assert "lm_head.weight" in open_checkpoint(path)


def test_metadata_of_each_file_is_kept(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model")
    for name in ("a", "b"):
        metadata = {"format": "pt", "from": name}
        save_file({name: torch.ones(1)}, path / f"{name}.safetensors", metadata)
    write_index(path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert open_checkpoint(path).metadata == {
        "a.safetensors": {"format": "pt", "from": "a"},
        "b.safetensors": {"format": "pt", "from": "b"},
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_are_not_contiguous_come_in_order(legacy: bool, tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": whole.T,
        "every other": whole[:, ::2],
        "column": whole[:, 1],
        "part": whole[1:3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    file = tmp_path / "x.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    same(open_checkpoint(file), {name: value.detach() for name, value in tensors.items()})


@pytest.mark.parametrize("legacy", [False, True])
def test_names_that_share_memory_are_aliases(legacy: bool, tmp_path: Path) -> None:
    table = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "embed": table,
        "head": table,
        "again": table,
        "same values": table.clone(),
        "transposed": table.T,
        "part": table[:1],
        "nothing": torch.empty(0),
        "nothing else": torch.empty(0),
    }
    file = tmp_path / "x.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    found = open_checkpoint(file)
    same(found, tensors)
    assert found.aliases == {"head": "embed", "again": "embed"}


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)
@given(
    legacy=st.booleans(),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    keep=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_torch_file_is_a_format_error_or_tensors(
    legacy: bool, edits: list[tuple[float, int]], keep: float, tmp_path: Path
) -> None:
    file = tmp_path / "x.bin"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    damaged = bytearray(file.read_bytes())
    for place, byte in edits:
        damaged[int(place * len(damaged))] = byte
    file.write_bytes(damaged[: int(keep * len(damaged))])
    try:
        found = open_checkpoint(file)
    except FormatError as error:
        assert str(file) in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in found.values())


def test_safetensors_have_no_aliases(tmp_path: Path) -> None:
    assert open_checkpoint(save_model(tmp_path / "model", llama())).aliases == {}


def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path: Path) -> None:
    torch.save({"state_dict": samples(), "epoch": 3}, tmp_path / "x.pt")
    same(open_checkpoint(tmp_path / "x.pt"), samples())


@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin", "pt", "bin shards"])
def test_mapped_files_are_views_that_share_one_map(layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](tmp_path / "model", samples())
    found = open_checkpoint(path)
    for name, value in samples().items():
        if value.numel():
            blocks = [next(found[name].blocks()) for _ in range(2)]
            assert blocks[0].data_ptr() == blocks[1].data_ptr(), name


_MEASURE = """
import sys
from pathlib import Path

from loratool.opening import open_checkpoint

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

checkpoint = open_checkpoint(sys.argv[1])
import torch
torch.ones(1000).sum()
before = private()
for tensor in checkpoint.values():
    for block in tensor.blocks():
        total = sum(float(row.sum()) for row in block)
print(total, private() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells private memory")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_reading_takes_no_private_memory(layout: str, tmp_path: Path) -> None:
    big = {"a": torch.ones(1024, 8192), "b": torch.ones(1024, 8192)}
    path = LAYOUTS[layout](tmp_path / "model", big)
    command = [sys.executable, "-c", _MEASURE, str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    total, kibibytes = finished.stdout.split()
    assert float(total) == 1024 * 8192
    assert int(kibibytes) < 8 * 1024, "64 MiB were read"


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """20 GB that are not there: a file of holes, which no disk could hold as zeros in time."""
    path = model_folder(tmp_path / "model")
    header = build_header([("a", "F32", (50_000, 50_000)), ("b", "BF16", (5_000_000_000,))], {})
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 20_000_000_000)
    found = open_checkpoint(path)
    assert found.nbytes == 20_000_000_000
    last = found["b"].read()
    assert last.shape == (5_000_000_000,)
    assert last[-1] == 0
    code = (
        "import sys, loratool.opening as o; o.open_checkpoint(sys.argv[1]); "
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", {"new": torch.ones(1)})
    torch.save({"old": torch.ones(1)}, path / "pytorch_model.bin")
    assert list(open_checkpoint(path)) == ["new"]
    assert list(open_checkpoint(path / "pytorch_model.bin")) == ["old"]


def test_what_training_leaves_behind_is_not_taken_for_weights(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"no weights")
    (path / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FormatError, match="holds no checkpoint"):
        open_checkpoint(path)
    torch.save({"a": torch.ones(1)}, path / "other.bin")
    assert list(open_checkpoint(path)) == ["a"]


def test_side_files_are_all_but_weights(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", llama(), files=2)
    kept = ("LICENSE", "README.md", "config.json", "generation_config.json", "merges.txt",
            "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
            "tokenizer_config.json", "vocab.txt")  # fmt: skip
    left = (".gitattributes", "adapter_config.json", "flax_model.msgpack", "model.onnx",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "rust_model.ot", "tf_model.h5",
            "model.fp16.safetensors", "training_args.bin", "weights.gguf")  # fmt: skip
    for name in (*kept, *left):
        if name != "config.json":
            (path / name).write_text(name)
    (path / "onnx").mkdir()
    assert tuple(sorted(open_checkpoint(path).side_files)) == kept


def test_a_model_needs_no_config(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", config=None)
    save_file(llama(), path / "anything.safetensors")
    assert open_checkpoint(path).config is None


def test_what_cannot_be_listed_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)  # root may list everything
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


def test_devices_are_no_checkpoints() -> None:
    assert find_weights(Path("/dev/null"), "model", (".safetensors",)) is None
    with pytest.raises(FormatError, match="holds no checkpoint"):
        open_checkpoint("/dev/null")


def test_names_in_an_index_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", {"a": torch.ones(1)})
    for name in ("x" * 5000, "a\0b"):
        write_index(path, {"a": name})
        with pytest.raises(FormatError, match="missing, but model"):
            open_checkpoint(path)


def test_folders_of_settings_are_side_files_and_other_folders_are_not(tmp_path: Path) -> None:
    names = ("1_Pooling/config.json", "onnx/model.onnx", "data/big.csv", "checkpoint-5/a.json")
    for name in (*names, "tokenizer.json", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    assert set(side_files(tmp_path)) == {"1_Pooling/config.json", "tokenizer.json"}

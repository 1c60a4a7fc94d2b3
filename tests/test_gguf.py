"""GGUF files: headers, tiles, what is refused; agreement with transformers is in tests/peers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from gguf.constants import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool
from loratool.errors import FormatError, InputError, MismatchError, UnsupportedError
from loratool.opening import open_checkpoint
from loratool_plugins.checkpoint_formats import _gguf_values
from loratool_plugins.checkpoint_formats._gguf_header import read_header
from loratool_plugins.checkpoint_formats._gguf_values import Codec, Layout, can_dequantize
from tests.adapters import factors, write_adapter
from tests.gguf_files import model_of, save_gguf

READABLE = [kind for kind in Kind if can_dequantize(kind)]
NAN_FREE = np.uint8(0x3F)  # scales made of such bytes are finite
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama() -> transformers.PreTrainedModel:
    return model_of("llama")


@pytest.fixture
def file(llama: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    return save_gguf(tmp_path / "model.gguf", "llama", llama, Kind.Q8_0)


# ---- headers


def test_the_header_is_what_the_package_reads(file: Path) -> None:
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    assert [(e.name, e.kind, e.begin, e.length) for e in ours.entries] == [
        (t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert [e.shape for e in ours.entries] == [
        tuple(t.shape.tolist()[::-1]) for t in theirs.tensors
    ]
    for key, value in ours.metadata.items():
        found = theirs.fields[key].contents()
        assert value == (len(found) if key == "tokenizer.ggml.tokens" else found), key
    assert ours.raw == file.read_bytes()[: len(ours.raw)]


def test_opening_reads_the_header_only(file: Path) -> None:
    code = (
        "import sys, loratool.opening as o; assert o.open_checkpoint(sys.argv[1]).quantized;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    subprocess.run(
        [sys.executable, "-c", "import loratool.opening, loratool_plugins.checkpoint_formats.gguf,"
         "sys; assert not {'gguf', 'numpy'} & set(sys.modules)"], check=True,
    )  # fmt: skip


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 500, 1500])
def test_a_truncated_header_is_told(keep: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)
    wanted = "does not begin with GGUF" if keep < 4 else "truncated"
    assert wanted in str(caught.value)


def test_a_truncated_tensor_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(FormatError, match=r"(blk\.1\.\w+|output\w*)\.weight: its bytes end at"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("place", "bytes_", "error", "message"),
    [
        (0, b"GGML", FormatError, "does not begin with GGUF"),
        (4, b"\0\0\0\3", UnsupportedError, "big-endian"),
        (4, b"\7\0\0\0", UnsupportedError, "version 7"),
        (8, b"\xff" * 8, FormatError, "truncated"),
        (16, b"\xff" * 8, FormatError, "truncated"),
    ],
)
def test_a_wrong_beginning_is_told(
    place: int, bytes_: bytes, error: type[Exception], message: str, file: Path
) -> None:
    content = bytearray(file.read_bytes())
    content[place : place + len(bytes_)] = bytes_
    file.write_bytes(content)
    with pytest.raises(error, match=message):
        open_checkpoint(file)


def patched(file: Path, name: str, change: Callable[[bytearray, int], None]) -> None:
    """Change what the header says of a tensor, from its number of dimensions on."""
    content = bytearray(file.read_bytes())
    change(content, content.index(name.encode()) + len(name))
    file.write_bytes(content)


def test_shapes_that_contradict_the_kind_are_named(file: Path) -> None:
    def narrower(content: bytearray, place: int) -> None:
        content[place + 4 : place + 12] = (63).to_bytes(8, "little")

    patched(file, "blk.0.attn_k.weight", narrower)
    with pytest.raises(FormatError, match=r"blk\.0\.attn_k\.weight: rows of 63 .* blocks of 32"):
        open_checkpoint(file)


def test_tensors_that_overlap_are_named(file: Path) -> None:
    def earlier(content: bytearray, place: int) -> None:
        begin = place + 4 + 16 + 4
        content[begin : begin + 8] = (0).to_bytes(8, "little")

    patched(file, "blk.0.attn_k.weight", earlier)
    with pytest.raises(FormatError, match="overlaps the one before"):
        open_checkpoint(file)


def test_values_of_an_unknown_type_are_named(file: Path) -> None:
    def other(content: bytearray, place: int) -> None:
        content[place + 20 : place + 24] = (999).to_bytes(4, "little")

    patched(file, "blk.0.attn_k.weight", other)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_k\.weight: values of type 999"):
        open_checkpoint(file)


def test_rows_that_are_no_heads_are_named(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    more = {"llama.attention.head_count": (5, GGUFValueType.UINT32)}
    file = save_gguf(tmp_path / "x.gguf", "llama", llama, metadata=more)
    with pytest.raises(FormatError, match=r"attn_q\.weight: 64 rows are no 5 heads"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "embedding_length",
            32,
            r"token_embd\.weight: is \(64, 64\), but the metadata say width 32",
        ),
        ("block_count", 1, r"blk\.1\.\S+: the metadata say 1 layers"),
        ("block_count", 3, r"blk\.2\.\S+: is missing, but the first layer has it"),
        ("attention.head_count", 0, r"attention.head_count is 0"),
    ],
)
def test_metadata_that_contradict_the_tensors_are_told(
    key: str, value: int, message: str, llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    more = {f"llama.{key}": (value, GGUFValueType.UINT32)}
    file = save_gguf(tmp_path / "x.gguf", "llama", llama, metadata=more)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(file)


# ---- tiles


@pytest.mark.parametrize("change", ["", "heads", "transposed"])
@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_tiles_are_the_whole(kind: Kind, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind: decoded a few rows at a time, or at once by the gguf package."""
    monkeypatch.setattr(_gguf_values, "_TILE", 1100)
    block, length = GGML_QUANT_SIZES[kind]
    rows, columns = 12, 2 * max(block, 64)
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // block * length), np.uint8)
    raw &= NAN_FREE
    layout = Layout(change, 3 if change == "heads" else 0)  # type: ignore[arg-type]
    codec = Codec(kind, (rows, columns), layout)
    blocks = list(codec.decode(torch.from_numpy(raw.reshape(-1))))
    assert len(blocks) > 1
    if kind.name in _gguf_values.PLAIN:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
        if dtype is None:
            return
        whole = torch.from_numpy(raw).view(dtype)
    else:
        whole = torch.from_numpy(gguf.dequantize(raw, kind))
    if change == "heads":
        whole = whole.reshape(3, 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if change == "transposed":
        whole = whole.T
    assert torch.equal(torch.cat(blocks), whole)
    if not codec.obstacle and kind.name in _gguf_values.PLAIN:
        assert torch.equal(codec.encode(torch.cat(blocks)), torch.from_numpy(raw.reshape(-1)))


@pytest.mark.parametrize("change", ["", "heads", "transposed"])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.MXFP4], ids=lambda kind: kind.name)
def test_values_are_encoded_in_the_layout_that_they_are_decoded_from(
    kind: Kind, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gguf_values, "_TILE", 300)
    value = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))
    codec = Codec(kind, (12, 128), Layout(change, 3 if change == "heads" else 0))  # type: ignore[arg-type]
    plain = torch.cat(
        list(codec.decode(codec.encode(value.T if change == "transposed" else value)))
    )
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind))
    if change == "heads":  # rows of a block stay together, so that the order does not matter
        assert torch.equal(plain, expected)
    else:
        assert torch.equal(plain, expected.T if change == "transposed" else expected)


def test_biases_and_norms_come_back_to_the_bit() -> None:
    value = torch.randn(24, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    for layout in (Layout("heads", 3), Layout("shifted"), Layout()):
        codec = Codec(Kind.F32, (24,), layout)
        (plain,) = codec.decode(value.view(torch.uint8))
        assert plain.shape == (24,)
        assert torch.equal(codec.encode(plain).view(torch.float32), value)


def test_plain_kinds_that_nothing_was_done_to_are_views(tmp_path: Path) -> None:
    model = model_of("qwen2")
    found = open_checkpoint(save_gguf(tmp_path / "x.gguf", "qwen2", model, Kind.F16))
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].dtype == "F16" and found[name].extent is not None
    assert found[name].read().data_ptr() == found[name].read().data_ptr()
    assert torch.equal(found[name].read(), model.state_dict()[name].half())
    assert not found.quantized
    assert found.config is not None and found.config["dtype"] == "float16"


# ---- which files


def split(file: Path, count: int = 3) -> list[Path]:
    """The same model in several files, as llama.cpp's gguf-split makes them."""
    reader = gguf.GGUFReader(file)
    files = []
    for number in range(count):
        path = file.with_name(f"model-{number + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith(("GGUF.", "general.architecture")):
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        writer.add_key_value("split.no", number, GGUFValueType.UINT16)
        writer.add_key_value("split.count", count, GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", len(reader.tensors), GGUFValueType.INT32)
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(path)
    return files


def test_a_split_model_is_one_model(file: Path, tmp_path: Path) -> None:
    whole = {name: tensor.read() for name, tensor in open_checkpoint(file).items()}
    first, second, _ = split(file)
    file.unlink()
    for place in (first, second, tmp_path):
        found = open_checkpoint(place)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name].read(), value) for name, value in whole.items())
    names = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    assert set(open_checkpoint(tmp_path).shards.values()) == names


def test_a_missing_or_renamed_part_is_named(file: Path, tmp_path: Path) -> None:
    first, second, third = split(file)
    file.unlink()
    second.rename(tmp_path / "aside")
    for place in (first, third, tmp_path):
        with pytest.raises(FormatError, match=r"model-00002-of-00003\.gguf is missing"):
            open_checkpoint(place)
    (tmp_path / "aside").rename(second)
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(FormatError, match=r"is one of 3 files \(split.count\)"):
        open_checkpoint(alone)
    third.rename(first)
    second.rename(third)
    first.rename(second)
    alone.rename(first)
    with pytest.raises(FormatError, match="is part 3 of the model by its header and part 2 by its"):
        open_checkpoint(first)


def test_a_file_of_any_name_is_known_by_its_beginning(file: Path) -> None:
    other = file.rename(file.with_name("sha256-0123"))
    assert open_checkpoint(other).quantized


def test_a_directory_must_leave_no_doubt(file: Path, tmp_path: Path) -> None:
    assert open_checkpoint(tmp_path).keys() == open_checkpoint(file).keys()
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(FormatError, match=r"several GGUF models: model\.gguf, other\.gguf; name"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a"], "safetensors are preferred"


def test_the_models_own_config_and_tokenizer_beside_it_are_used(
    llama: transformers.PreTrainedModel, file: Path, tmp_path: Path
) -> None:
    assert any("tokenizer stays in it" in note for note in open_checkpoint(file).notes)
    config = {**llama.config.to_dict(), "marked": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert found.config is not None and found.config["marked"]
    assert "tokenizer.json" in found.side_files
    assert not any("tokenizer" in note for note in found.notes)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(FormatError, match=r"'qwen2' model, but model\.gguf holds a 'llama' one"):
        open_checkpoint(tmp_path)


def test_adapters_and_other_things_are_no_bases(tmp_path: Path) -> None:
    for kind, message in (("adapter", "is a LoRA adapter"), ("mmproj", "holds no language model")):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        writer.add_type(kind)
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(FormatError, match=message):
            open_checkpoint(tmp_path / f"{kind}.gguf")


def test_other_architectures_and_their_tensors_are_refused_by_name(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    other = save_gguf(tmp_path / "a.gguf", "llama", llama)
    content = other.read_bytes().replace(b"llama", b"mamba")
    other.write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"architecture 'mamba' are not read.*llama, qwen2"):
        open_checkpoint(other)
    mixtral = {"llama.expert_count": (8, GGUFValueType.UINT32)}
    with pytest.raises(FormatError, match="mixture of experts"):
        open_checkpoint(save_gguf(tmp_path / "b.gguf", "llama", llama, metadata=mixtral))
    strange = tmp_path / "c.gguf"
    strange.write_bytes(
        save_gguf(tmp_path / "d.gguf", "llama", llama).read_bytes().replace(b"ffn_up", b"ffn_xy")
    )
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_xy\.weight"):
        open_checkpoint(strange)


# ---- configs


def with_rope(
    tmp_path: Path, parameters: dict[str, object], metadata: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary frequencies of a model, and of what its GGUF file is read as."""
    settings = {"max_position_embeddings": 65536, "rope_parameters": parameters}
    model = model_of("llama", **settings)
    file = save_gguf(tmp_path / "x.gguf", "llama", model, metadata=metadata)  # type: ignore[arg-type]
    found = open_checkpoint(file)
    assert found.config is not None
    config = transformers.AutoConfig.for_model(**found.config)
    again = transformers.LlamaForCausalLM(config)
    return model.model.rotary_emb.inv_freq, again.model.rotary_emb.inv_freq


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequencies_are_told_by_their_factors(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip

    def add(writer: gguf.GGUFWriter, architecture: str, config: object) -> None:
        _add(writer, architecture, config)
        plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, None)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))

    from tests import gguf_files

    _add = gguf_files._add_metadata
    monkeypatch.setattr(gguf_files, "_add_metadata", add)
    expected, found = with_rope(tmp_path, parameters, {})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("parameters", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384},
            {"llama.rope.scaling.original_context_length": (16384, GGUFValueType.UINT32)},
        ),
    ],
)
def test_scaled_frequencies_are_carried(
    parameters: dict[str, object], metadata: dict[str, object], tmp_path: Path
) -> None:
    kind, factor = parameters["rope_type"], parameters["factor"]
    metadata = {
        **metadata,
        "llama.rope.scaling.type": (kind, GGUFValueType.STRING),
        "llama.rope.scaling.factor": (factor, GGUFValueType.FLOAT32),
    }
    expected, found = with_rope(tmp_path, {**parameters, "rope_theta": 10000.0}, metadata)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_what_config_json_cannot_say_is_refused(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    scaled = {"llama.rope.scaling.type": ("other", GGUFValueType.STRING),
              "llama.rope.scaling.factor": (2.0, GGUFValueType.FLOAT32)}  # fmt: skip
    file = save_gguf(tmp_path / "x.gguf", "llama", llama, metadata=scaled)
    with pytest.raises(FormatError, match="'other' is not understood; put it into a directory"):
        open_checkpoint(file)
    (tmp_path / "config.json").write_text(json.dumps(llama.config.to_dict()))
    assert open_checkpoint(tmp_path).config is not None


def test_numbers_are_the_decimals_that_were_meant(file: Path) -> None:
    config = open_checkpoint(file).config
    assert config is not None and config["rms_norm_eps"] == 1e-06
    assert config["dtype"] == "bfloat16", "what a merge writes"


# ---- merged, and put back


def adapter(folder: Path, scale: float = 1.0) -> Path:
    b, a = factors(0, 64, 64, 2)
    return write_adapter(folder, {Q.removesuffix(".weight"): (b * scale, a)})


def test_a_merge_is_the_exact_sum_rounded_once(file: Path, tmp_path: Path) -> None:
    report = loratool.merge(file, [(adapter(tmp_path / "adapter"), 1.0)]).save(tmp_path / "merged")
    base, found = open_checkpoint(file), open_checkpoint(tmp_path / "merged")
    assert not found.quantized and found.config is not None
    assert found.config["dtype"] == "bfloat16" and "quantization_config" not in found.config
    assert any("dequantized, as BF16" in note for note in report.notes)
    b, a = factors(0, 64, 64, 2)
    wanted = base[Q].read().double() + b.double() @ a.double()
    assert torch.equal(found[Q].read(), wanted.float().bfloat16())
    for name in found:
        dtype = "BF16" if name in base.quantized else "F32"
        assert found[name].dtype == dtype
        if name != Q:
            assert torch.equal(found[name].read(), base[name].read().to(found[name].read().dtype))
    assert (tmp_path / "merged" / "model.safetensors").is_file(), "where transformers looks"


def test_another_type_may_be_asked_for(file: Path, tmp_path: Path) -> None:
    loratool.merge(file, [], dtype="fp32").save(tmp_path / "merged")
    base, found = open_checkpoint(file), open_checkpoint(tmp_path / "merged")
    assert all(torch.equal(found[name].read(), base[name].read()) for name in base)
    assert found.config is not None and found.config["dtype"] == "float32"


def test_a_reversible_merge_restores_the_dequantized_base(file: Path, tmp_path: Path) -> None:
    merged, restored = tmp_path / "merged", tmp_path / "restored"
    loratool.merge(file, [(adapter(tmp_path / "adapter"), 1.0)], reversible=True).save(merged)
    loratool.unmerge(merged).save(restored)
    base, found = open_checkpoint(file), open_checkpoint(restored)
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        assert found[name].dtype == tensor.dtype == "F32"
        assert torch.equal(found[name].read(), tensor.read())
    assert not torch.equal(open_checkpoint(merged)[Q].read(), base[Q].read())


def test_the_same_file_comes_back_but_for_what_was_touched(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    step = loratool.merge(file, [(adapter(tmp_path / "adapter"), 1.0)], requantize=True)
    report = step.save(out)
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    before, after = gguf.GGUFReader(file), gguf.GGUFReader(out / "model.gguf")
    assert before.fields.keys() == after.fields.keys()
    assert file.stat().st_size == (out / "model.gguf").stat().st_size
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(one.data, other.data) == (one.name != "blk.1.attn_q.weight")
    base, found = open_checkpoint(file), open_checkpoint(out)
    b, a = factors(0, 64, 64, 2)
    wanted = (base[Q].read().double() + b.double() @ a.double()).float()
    facts = report.data["tensors"]
    assert facts.keys() == {Q}
    error = float((found[Q].read().double() - wanted.double()).norm())
    assert facts[Q]["error"] == pytest.approx(error)
    assert facts[Q]["update"] == pytest.approx(float((b.double() @ a.double()).norm()))
    assert 0 < report.data["error"] < 0.01 * report.data["update"]


def test_a_split_model_is_put_back_in_its_parts(file: Path, tmp_path: Path) -> None:
    files = split(file)
    out = tmp_path / "merged"
    update = adapter(tmp_path / "adapter")
    loratool.merge(files[0], [(update, 1.0)], requantize=True).save(out)
    assert sorted(path.name for path in out.iterdir()) == [path.name for path in files]
    loratool.merge(file, [(update, 1.0)], requantize=True).save(tmp_path / "whole")
    whole, parts = open_checkpoint(tmp_path / "whole"), open_checkpoint(out)
    assert all(torch.equal(whole[name].read(), parts[name].read()) for name in whole)


def test_norms_and_biases_are_put_back_as_they_are_stored(tmp_path: Path) -> None:
    model = model_of("gemma2")
    file = save_gguf(tmp_path / "x.gguf", "gemma2", model, Kind.Q8_0)
    norm = "model.layers.0.input_layernorm.weight"
    value = torch.linspace(0.1, 0.9, 64)
    update = write_adapter(
        tmp_path / "adapter", {}, {norm: value}, modules_to_save=["input_layernorm"]
    )
    loratool.merge(file, [(update, 1.0)], requantize=True).save(tmp_path / "out")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "x.gguf").tensors}
    assert np.array_equal(tensors["blk.0.attn_norm.weight"], (value + 1).numpy())
    found = open_checkpoint(tmp_path / "out")[norm].read()
    torch.testing.assert_close(found, value, rtol=0, atol=1e-7)


def test_kinds_that_cannot_be_written_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    file = save_gguf(tmp_path / "x.gguf", "llama", model, Kind.TQ2_0)
    content = file.read_bytes()
    header = read_header(file)
    assert GGML_QUANT_SIZES[Kind.Q2_K][0] == 256 and header.entries[1].kind is Kind.TQ2_0
    # Another kind of the same block: IQ1_S is smaller, so that its tensors still fit.
    old, new = int(Kind.TQ2_0).to_bytes(4, "little"), int(Kind.IQ1_S).to_bytes(4, "little")
    name = b"blk.1.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16
    assert content[place : place + 4] == old
    file.write_bytes(content[:place] + new + content[place + 4 :])
    b, a = factors(0, 256, 256, 2)
    update = write_adapter(tmp_path / "adapter", {Q.removesuffix(".weight"): (b, a)})
    with pytest.raises(MismatchError, match=rf"{Q}: is IQ1_S, which the gguf package reads and"):
        loratool.merge(file, [(update, 1.0)], requantize=True)
    loratool.merge(file, [(update, 1.0)]).save(tmp_path / "merged")


def test_extracting_against_the_codes_finds_the_update_again(file: Path, tmp_path: Path) -> None:
    """Norms are F32 in the file and bf16 in the other model: equal values are no change."""
    update = adapter(tmp_path / "adapter")
    loratool.merge(file, [(update, 1.0)]).save(tmp_path / "tuned")
    found = loratool.extract(file, tmp_path / "tuned", rank=2, target=[Q], lora_only=True)
    assert any("quantization error" in note for note in found.notes)
    found.save(tmp_path / "found")
    loratool.merge(file, [(tmp_path / "found", 1.0)]).save(tmp_path / "again")
    one = open_checkpoint(tmp_path / "again")[Q].read().float()
    other = open_checkpoint(tmp_path / "tuned")[Q].read().float()
    assert float((one - other).norm()) < 0.01 * float(other.norm())


def test_the_whole_difference_of_equal_models_is_nothing(
    llama: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    """An F16 file against the same values in bf16."""
    rounded = {n: v.bfloat16() for n, v in llama.state_dict().items()}
    llama = model_of("llama")
    llama.load_state_dict({n: v.float() for n, v in rounded.items()})
    file = save_gguf(tmp_path / "x.gguf", "llama", llama, Kind.F32)
    llama.bfloat16().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="nothing"):
        loratool.extract(file, tmp_path / "plain", rank=2).save(tmp_path / "adapter")


def test_report_of_an_inspection_names_the_schemes(file: Path) -> None:
    report = loratool.inspect(file)
    assert report.data["quantized"] == "GGUF Q8_0 (16 tensors)"
    assert report.data["files"].keys() == {"model.gguf"}
    assert math.isclose(sum(report.data["files"].values()), file.stat().st_size, rel_tol=0.1)
    assert any(line.startswith("quantized: GGUF Q8_0") for line in report.lines)


def test_of_a_model_that_lies_elsewhere_only_the_header_comes(file: Path, tmp_path: Path) -> None:
    from loratool import files

    folder = tmp_path / "mirror"
    folder.mkdir()
    brought = []

    def fetch(name: str) -> None:
        brought.append(name)
        (folder / name).write_bytes(file.read_bytes())

    mirror = files.Mirror(
        "org/name", folder, {"x.gguf": file.stat().st_size},
        lambda name, count: file.read_bytes()[:count], fetch,
    )  # fmt: skip
    files.add_mirror(mirror)
    try:
        found = open_checkpoint(folder)
        assert found.quantized and not brought
        assert torch.equal(found[Q].read(), open_checkpoint(file)[Q].read())
        assert brought == ["x.gguf"]
    finally:
        del files._mirrors[folder]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300,
    derandomize=True,
)  # fmt: skip
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
    keep=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_header_is_an_error_or_a_model(
    edits: list[tuple[float, int]], keep: float, llama: transformers.PreTrainedModel, file: Path
) -> None:
    whole = save_gguf(file.with_name("whole.gguf"), "llama", llama, Kind.Q8_0).read_bytes()
    damaged, header = bytearray(whole), len(read_header(file.with_name("whole.gguf")).raw)
    for place, byte in edits:
        damaged[int(place * header)] = byte
    file.write_bytes(damaged[: int(keep * len(damaged))])
    try:
        found = open_checkpoint(file)
    except InputError as error:
        assert str(file) in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in found.values())

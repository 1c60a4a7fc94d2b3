"""Quantized checkpoints are shown as the plain ones that they stand for, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError, UnsupportedError
from loratool.opening import open_any, open_checkpoint
from loratool.quantized import four_bit, fp8
from tests.cli.tiny import CONFIG, UP, llama, save_model
from tests.quantized_files import (
    COMPRESSED,
    FBGEMM,
    PER_TENSOR,
    block_scaled,
    fp8_model,
    is_linear,
    rewritten,
    save,
    unscaled,
)

BLOCK = (16, 16)


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in checkpoint.items()}


# ---- fp8


def test_blocks_are_scaled_and_the_last_of_a_row_and_column_may_be_cut(tmp_path: Path) -> None:
    path = fp8_model(tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    found = open_checkpoint(path)
    assert found.keys() == llama().keys()
    for name, tensor in found.items():
        if is_linear(name):
            scales = stored[f"{name}_scale_inv"]
            assert torch.equal(tensor.read(), unscaled(stored[name], scales, BLOCK))
            assert tensor.dtype == "F32"
        else:
            assert torch.equal(tensor.read(), stored[name]) and tensor.dtype == "BF16"
    assert found.quantized[UP] == "fp8 (e4m3), blocks of 16x16"
    assert stored[UP].shape == (24, 16), "24 rows are one block and a half"
    assert found.config is not None and "quantization_config" not in found.config
    assert "quantization_config" not in json.loads(bytes(found.side_files["config.json"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (PER_TENSOR, "fp8 (e4m3), one scale"),
        (FBGEMM, "fp8 (e4m3), one scale a row"),
        (COMPRESSED, "fp8 (e4m3), one scale a row"),
    ],
)
def test_scales_may_be_a_tensors_or_a_rows(quantization: Any, words: str, tmp_path: Path) -> None:
    path = fp8_model(tmp_path / "model", quantization)
    stored = load_file(path / "model.safetensors")
    found = open_checkpoint(path)
    assert set(found.quantized.values()) == {words}
    end = "_scale_inv" if quantization is PER_TENSOR else "_scale"
    for name in found.quantized:
        assert torch.equal(found[name].read(), stored[name].float() * stored[name + end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_have_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    codes, scales = block_scaled(llama()[UP], BLOCK, dtype)
    path = rewritten(fp8_model(tmp_path / "model"), {UP: codes, f"{UP}_scale_inv": scales})
    assert torch.equal(open_checkpoint(path)[UP].read(), unscaled(codes, scales, BLOCK))


def test_powers_of_two_as_bytes_and_as_their_own_type_are_the_same(tmp_path: Path) -> None:
    codes, scales = block_scaled(llama()[UP], BLOCK)
    powers = torch.exp2(scales.log2().ceil())
    exponents = (powers.log2() + 127).to(torch.uint8)
    for number, stored in enumerate((exponents, exponents.view(torch.float8_e8m0fnu))):
        path = rewritten(fp8_model(tmp_path / str(number)), {UP: codes, f"{UP}_scale_inv": stored})
        assert torch.equal(open_checkpoint(path)[UP].read(), unscaled(codes, powers, BLOCK))


def test_a_file_without_config_is_read_where_its_shapes_leave_no_doubt(tmp_path: Path) -> None:
    codes, scales = block_scaled(llama()[UP], (8, 8))
    save_file({UP: codes, f"{UP}_scale_inv": scales}, tmp_path / "x.safetensors")
    found = open_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(found[UP].read(), unscaled(codes, scales, (8, 8)))
    save_file({UP: codes, f"{UP}_scale_inv": torch.ones(7, 5)}, tmp_path / "y.safetensors")
    with pytest.raises(FormatError, match="weight_block_size, is needed"):
        open_checkpoint(tmp_path / "y.safetensors")


def test_scales_of_activations_are_no_tensors_of_the_plain_model(tmp_path: Path) -> None:
    name = UP.replace("weight", "input_scale")
    path = rewritten(fp8_model(tmp_path / "model"), {name: torch.tensor(2.0)})
    assert name not in open_checkpoint(path)


def test_fp8_without_scales_is_a_plain_type(tmp_path: Path) -> None:
    plain = {name: value.to(torch.float8_e4m3fn) for name, value in llama().items()}
    found = open_checkpoint(save_model(tmp_path / "model", plain))
    assert not found.quantized and found.stored is None
    assert found[UP].dtype == "F8_E4M3"


def test_each_expert_has_its_own_scales(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 20, 24, generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    pairs = [block_scaled(matrix, BLOCK) for matrix in value]
    codes, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    path = rewritten(fp8_model(tmp_path / "a"), {name: codes, f"{name}_scale_inv": scales})
    wanted = torch.stack([unscaled(*pair, BLOCK) for pair in pairs])
    assert torch.equal(open_checkpoint(path)[name].read(), wanted)
    whole = torch.rand(3, generator=generator)
    path = rewritten(fp8_model(tmp_path / "b"), {name: codes, f"{name}_scale_inv": whole})
    found = open_checkpoint(path)
    assert torch.equal(found[name].read(), codes.float() * whole[:, None, None])
    assert found.stored is not None
    again = found.stored.forms[name].encode(wanted)
    assert again["scales"].shape == (3,)
    blocks = torch.cat(list(found.stored.forms[name].decode(again))).view(3, 20, 24)
    assert float((blocks - wanted).norm()) < 0.05 * float(wanted.norm())


def test_large_matrices_come_in_tiles_that_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(50, 70, generator=generator)
    codes, scales = block_scaled(value, BLOCK)
    grid = fp8.Grid(1, 50, 70, *BLOCK)
    monkeypatch.setattr(fp8, "TILE", 500)
    blocks = list(fp8.decoded(codes, scales, grid))
    assert len(blocks) == 4
    assert torch.equal(torch.cat(blocks), unscaled(codes, scales, BLOCK))
    again = fp8.encoded(torch.cat(blocks), torch.float8_e4m3fn, torch.float32, grid)
    assert torch.equal(again[0].view(torch.uint8), codes.view(torch.uint8))
    torch.testing.assert_close(again[1][0], scales)


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = fp8_model(tmp_path / "model")
    code = (
        "import sys, loratool.opening as o; assert o.open_checkpoint(sys.argv[1]).quantized;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_an_index_that_names_companions_is_written_anew(tmp_path: Path) -> None:
    path = fp8_model(tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(stored)[::2], list(stored)[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({n: stored[n] for n in names}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loratool.merge(path, []).save(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / index.name).read_text())["weight_map"]
    assert written.keys() == llama().keys()
    same = open_checkpoint(tmp_path / "merged")
    assert torch.equal(same[UP].read(), open_checkpoint(path)[UP].read().bfloat16())


# ---- bitsandbytes, whose own files are read in tests/peers


def test_every_4_bit_value_is_a_level_times_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin in the middle of a row, tiles of a few rows, and an odd end."""
    monkeypatch.setattr("loratool.quantized.scheme.TILE", 200)
    generator = torch.Generator().manual_seed(0)
    table = torch.linspace(-1, 1, 16)
    rows, columns = 65, 45
    state = {"shape": [rows, columns], "quant_type": "nf4", "blocksize": 64}
    blocks = four_bit.Blocks("nf4", rows, columns, 64, 0, 0.0, state)
    nibbles = torch.randint(0, 16, (rows * columns,), generator=generator)
    maxima = torch.rand(blocks.count, generator=generator)
    padded = torch.cat([nibbles, torch.zeros(1, dtype=nibbles.dtype)]).to(torch.uint8)
    parts = {"codes": padded[::2] << 4 | padded[1::2], "table": table, "absmax": maxima}
    found = list(four_bit.decoded(parts, blocks))
    assert [block.shape for block in found] == [(64, columns), (1, columns)]
    expected = table[nibbles] * maxima.repeat_interleave(64)[: rows * columns]
    assert torch.equal(torch.cat(found), expected.view(rows, columns))


# ---- what cannot be read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}_scale_inv": None}, f"{UP}: is fp8 but {UP}_scale_inv or {UP}_scale is missing"),
        ({UP: None}, f"{UP}_scale_inv: {UP}, which it scales, is missing"),
        ({f"{UP}_scale_inv": torch.ones(3, 1)}, r"scales \(3, 1\) do not fit .* in blocks of 16x"),
        ({f"{UP}_scale": torch.ones(2, 1)}, "has both"),
        ({f"{UP}_scale_inv": torch.ones(2, 1, dtype=torch.int32)}, "scales of type I32"),
    ],
)
def test_missing_and_contradicting_companions_are_named(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    path = rewritten(fp8_model(tmp_path / "model"), change)
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    names = [n for n in llama() if is_linear(n)]
    path = rewritten(fp8_model(tmp_path / "model"), {f"{n}_scale_inv": None for n in names})
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    assert str(caught.value).count("is missing") == 12
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "something new"}, "quant_method 'something new'"),
        ({**COMPRESSED, "format": "pack-quantized"}, "'pack-quantized'"),
        (
            {
                **COMPRESSED,
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "4 bits of int",
        ),
    ],
)
def test_other_schemes_are_refused_with_advice(
    quantization: dict[str, Any], name: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "model", llama(), quantization)
    with pytest.raises(UnsupportedError, match="merge into the checkpoint that it was quantized"):
        open_checkpoint(path)
    with pytest.raises(UnsupportedError, match=name):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, "GPTQ or AWQ"),
        ({"a.weight_packed": torch.ones(2, 2, dtype=torch.int32)}, "packed integers"),
        (
            {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},
            "ComfyUI",
        ),
        (
            {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.scale": torch.ones(1, 1)},
            "scales of an unknown kind",
        ),
        (
            {"a.weight": torch.ones(2, 2), "a.weight_scale_inv": torch.ones(1, 1)},
            "as if it were quantized",
        ),
    ],
)
def test_names_give_a_scheme_away_where_there_is_no_config(
    tensors: dict[str, torch.Tensor], name: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match=name):
        open_checkpoint(tmp_path / "x.safetensors")


def test_weights_that_may_be_transposed_are_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path = save(tmp_path / "model", llama(), settings, model_type="imagegpt")
    with pytest.raises(UnsupportedError, match="imagegpt model, some of whose weights"):
        open_checkpoint(path)


def test_names_that_only_look_like_scales_are_none(tmp_path: Path) -> None:
    scales = {"logit_scale": torch.tensor(2.6), "a.layer_scale": torch.ones(3)}
    tensors = {**scales, "a.scale": torch.ones(3), "a.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert open_checkpoint(tmp_path / "x.safetensors").keys() == tensors.keys()


def test_what_cannot_be_read_can_be_looked_at(tmp_path: Path) -> None:
    path = save(tmp_path / "model", llama(), {"quant_method": "gptq"})
    found = open_any(path)
    assert isinstance(found, Checkpoint) and len(found) == len(llama())
    assert any("GPTQ" in note for note in found.notes)


def test_a_config_of_a_plain_model_may_speak_of_quantization(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = open_checkpoint(save(tmp_path / "model", llama(), settings))
    assert not found.quantized
    assert found.config == {**CONFIG, "quantization_config": settings}


def test_the_error_is_an_input_error() -> None:
    assert issubclass(UnsupportedError, InputError)


def test_files_of_torch_are_read_the_same_way(tmp_path: Path) -> None:
    path = fp8_model(tmp_path / "model")
    wanted = values(open_checkpoint(path))
    stored = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(stored, path / "pytorch_model.bin")
    found = open_checkpoint(path)
    assert found.quantized[UP] == "fp8 (e4m3), blocks of 16x16"
    assert all(torch.equal(value, wanted[name]) for name, value in values(found).items())
    loratool.merge(path, [], requantize=True).save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(
        torch.equal(again[name].view(torch.uint8), value.contiguous().view(torch.uint8))
        for name, value in stored.items()
    )

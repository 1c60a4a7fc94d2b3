"""llama.cpp's adapters against the gguf package and the rules of llama.cpp's own converter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, MismatchError, UnsupportedError
from loratool.opening import open_adapter, open_checkpoint
from loratool_plugins.adapter_formats.gguf_layout import KNOWN, Names
from tests.adapter_forms import assert_same_bits, convert, merged
from tests.gguf_files import model_of, permuted, save_gguf
from tests.models import Pair
from tests.peft_files import random_factors, write_adapter

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.1.self_attn.v_proj": (16, 32),
    "model.layers.1.self_attn.q_proj": (32, 32),
    "model.layers.1.mlp.down_proj": (32, 48),
    "lm_head": (64, 32),
}
HEADS = {"q_proj": 4, "k_proj": 2}
GGUF_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "gguf")


def gguf_name(module: str) -> str:
    if module == "lm_head":
        return "output.weight"
    parts = module.split(".")
    return f"blk.{parts[2]}.{GGUF_NAMES[parts[-1]]}.weight"


def by_hand(
    file: Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float | None,
    kind: Kind = Kind.F32,
    **keys: Any,
) -> Path:
    """An adapter as llama.cpp's converter makes it of a Llama's."""
    writer = gguf.GGUFWriter(file, keys.pop("architecture", "llama"))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, keys.pop("type", "lora"))
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in keys.items():
        writer.add_array(key.replace("__", "."), value)
    for module, (a, b) in factors.items():
        heads = HEADS.get(module.rpartition(".")[2])
        b = permuted(b, heads) if heads else b
        for side, values in (("a", a), ("b", b)):
            data = gguf.quantize(values.float().numpy(), kind)
            writer.add_tensor(f"{gguf_name(module)}.lora_{side}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def base_of(pair_of: Callable[[str], Pair]) -> tuple[Path, Checkpoint]:
    path = pair_of("llama").base
    return path, open_checkpoint(path)


def test_names_are_those_of_the_gguf_package() -> None:
    for architecture, known in KNOWN.items():
        arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
        theirs = gguf.get_tensor_name_map(arch, 2)
        names = Names(architecture)
        for ours, module in known.names.items():
            tensor = f"{ours.replace('blk.', 'blk.1.')}.weight"
            parameter = names.parameter(tensor)
            assert parameter is not None
            assert parameter.endswith(f"{module}.weight")
            found = theirs.get_name(parameter, try_suffixes=(".weight",))
            assert found == tensor or (found is None and ours == "output")
            assert names.tensor(parameter) == found
    assert Names("llama").tensor("layers.1.mlp.up_proj.weight") == "blk.1.ffn_up.weight"
    assert Names("llama").tensor("score.weight") is None


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_what_the_converter_makes_merges_as_the_original(
    kind: Kind, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    base, _ = base_of(pair_of)
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    factors = {
        name: (a.to(dtype), b.to(dtype)) for name, (a, b) in random_factors(SHAPES, 4, 0).items()
    }
    peft = write_adapter(tmp_path / "peft", factors, alpha=6)
    file = by_hand(tmp_path / "x.gguf", factors, 6.0, kind)
    wanted = merged(base, peft, tmp_path / "wanted")
    assert_same_bits(merged(base, file, tmp_path / "found"), wanted)
    assert [p.severity for p in open_adapter(file).problems] == ["error"]


def test_quantized_factors_are_dequantized(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    base, _ = base_of(pair_of)
    factors = random_factors(SHAPES, 32, 0)
    coarse = {
        name: tuple(
            torch.from_numpy(gguf.dequantize(gguf.quantize(v.numpy(), Kind.Q8_0), Kind.Q8_0))
            for v in pair
        )
        for name, pair in factors.items()
        if "down" not in name
    }
    peft = write_adapter(tmp_path / "peft", coarse, alpha=6)  # type: ignore[arg-type]
    file = by_hand(tmp_path / "x.gguf", coarse, 6.0, Kind.Q8_0)  # type: ignore[arg-type]
    wanted = merged(base, peft, tmp_path / "wanted")
    assert_same_bits(merged(base, file, tmp_path / "found"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gguf_package_reads_what_is_written(
    dtype: torch.dtype, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    path, base = base_of(pair_of)
    shapes = {**SHAPES, "model.layers.0.mlp.up_proj": (48, 32)}
    factors = {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in random_factors(shapes, 4, 0).items()}
    peft = write_adapter(
        tmp_path / "peft", factors, alpha=8, alpha_pattern={"v_proj": 32, "up_proj": 0.5}
    )
    folder = convert(peft, "gguf", tmp_path / "gguf", base=base)
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.lora.alpha"] == 8.0
    found = {t.name: t for t in reader.tensors}
    assert len(found) == 2 * len(shapes)
    for module, (a, b) in factors.items():
        name = "blk.0.ffn_up.weight" if "up_proj" in module else gguf_name(module)
        ours = [_values(found[f"{name}.lora_{side}"]) for side in "ab"]
        heads = HEADS.get(module.rpartition(".")[2])
        alpha = 32 if "v_proj" in module else 0.5 if "up_proj" in module else 8
        delta = (b.double() @ a.double()) * alpha / 4
        got = ours[1] @ ours[0] * fields["adapter.lora.alpha"] / ours[1].shape[-1]
        assert torch.equal(got, permuted(delta, heads) if heads else delta)
    wanted = merged(path, peft, tmp_path / "wanted")
    assert_same_bits(merged(path, folder, tmp_path / "found"), wanted)
    again = convert(folder, "peft", tmp_path / "again")  # it remembers the heads
    assert_same_bits(merged(path, again, tmp_path / "twice"), wanted)


def _values(tensor: Any) -> torch.Tensor:
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float64).reshape(tensor.shape[::-1]))


def test_embeddings_are_transposed(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    path, base = base_of(pair_of)
    a, b = random_factors({"x": (32, 64)}, 4, 3)["x"]  # lora_embedding_A (r, V), _B (D, r)
    folder = write_adapter(
        tmp_path / "peft",
        {"model.layers.0.mlp.up_proj": (*random_factors({"u": (48, 32)}, 4, 4)["u"],)},
        target_modules=["embed_tokens", "up_proj"],
    )
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({**state, f"{prefix}A": a, f"{prefix}B": b}, folder / "adapter_model.safetensors")
    written = convert(folder, "gguf", tmp_path / "gguf", base=base)
    found = {t.name: t for t in gguf.GGUFReader(written / "adapter.gguf").tensors}
    # ggml's ne is the other way round: llama.cpp wants lora_a.ne = (r, V) and lora_b.ne = (r, D).
    assert found["token_embd.weight.lora_a"].shape.tolist() == [4, 64]
    assert found["token_embd.weight.lora_b"].shape.tolist() == [4, 32]
    one, other = (_values(found[f"token_embd.weight.lora_{side}"]) for side in "ab")
    torch.testing.assert_close(one @ other.T, (b.double() @ a.double()).T, rtol=0, atol=1e-12)
    wanted = merged(path, folder, tmp_path / "wanted")
    assert_same_bits(merged(path, written, tmp_path / "found"), wanted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "phi3"])
def test_gguf_adapters_are_merged_into_gguf_bases(architecture: str, tmp_path: Path) -> None:
    model = model_of(architecture)
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    save_gguf(tmp_path / "base.gguf", architecture, model)
    shapes = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in model.state_dict().items()
        if "layers.1." in name or ".h.1." in name
        if value.ndim == 2
    }
    turned = architecture == "gpt2"
    shapes = {name: shape[::-1] if turned else shape for name, shape in shapes.items()}
    factors = random_factors(shapes, 3, 0)  # type: ignore[arg-type]
    peft = write_adapter(tmp_path / "peft", factors, alpha=9, fan_in_fan_out=turned)
    adapter = convert(peft, "gguf", tmp_path / "gguf", base=base)
    for one, other in ((tmp_path / "base", "a"), (tmp_path / "base.gguf", "b")):
        wanted = merged(one, peft, tmp_path / f"wanted-{other}")
        assert_same_bits(merged(one, adapter, tmp_path / f"found-{other}"), wanted)
    found = {t.name: t for t in gguf.GGUFReader(adapter / "adapter.gguf").tensors}
    weights = {t.name: t for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    for name, tensor in found.items():  # as llama.cpp checks them
        weight = weights[name[:-7]]
        other = 0 if name.endswith("lora_a") else 1
        assert tensor.shape[other] == weight.shape[other]


def test_without_alpha_the_scale_is_one(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    base, _ = base_of(pair_of)
    factors = random_factors(SHAPES, 4, 0)
    peft = write_adapter(tmp_path / "peft", factors)
    wanted = merged(base, peft, tmp_path / "wanted")
    for number, alpha in enumerate((None, 0.0)):
        file = by_hand(tmp_path / f"{number}.gguf", factors, alpha)
        assert "the scale is 1" in open_adapter(file).notes[0]
        assert_same_bits(merged(base, file, tmp_path / f"found{number}"), wanted)


def test_heads_and_architecture_come_from_the_base(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    factors = random_factors(SHAPES, 4, 0)
    file = by_hand(tmp_path / "x.gguf", factors, 8.0)
    (problem,) = open_adapter(file).problems
    assert "give the base" in problem.message
    assert problem.message.startswith("and 2 more")
    with pytest.raises(MismatchError, match=r"another architecture.*'qwen2' model.*llama"):
        merged(pair_of("qwen2").base, file, tmp_path / "merged")
    peft = write_adapter(tmp_path / "peft", factors)
    with pytest.raises(MismatchError, match="give the base"):
        convert(peft, "gguf", tmp_path / "gguf")
    query = {"bert.encoder.layer.0.attention.self.query": (32, 32)}
    peft = write_adapter(tmp_path / "bert", random_factors(query, 4, 0))
    bert = open_checkpoint(pair_of("bert-mlm").base)
    with pytest.raises(MismatchError, match="names of a 'bert' model are not known"):
        convert(peft, "gguf", tmp_path / "gguf", base=bert)
    assert not (tmp_path / "gguf").exists()


def test_what_is_no_plain_adapter_is_refused(tmp_path: Path) -> None:
    factors = random_factors(SHAPES, 4, 0)
    activated = by_hand(tmp_path / "a.gguf", factors, 8.0, adapter__alora__invocation_tokens=[1, 2])
    with pytest.raises(FormatError, match="activated LoRA"):
        open_adapter(activated)
    with pytest.raises(FormatError, match=r"adapter\.type is 'control'"):
        open_adapter(by_hand(tmp_path / "b.gguf", factors, 8.0, type="control"))
    with pytest.raises(UnsupportedError, match="architecture 'mamba' are not read"):
        open_adapter(by_hand(tmp_path / "c.gguf", factors, 8.0, architecture="mamba"))
    content = by_hand(tmp_path / "d.gguf", factors, 8.0).read_bytes()
    for end in (3, 40, 400, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:end])
        with pytest.raises(
            FormatError, match=r"(?s)cut\.gguf.*gguf: (ends inside|.*truncated|does not)"
        ):
            open_adapter(tmp_path / "cut.gguf")


@pytest.mark.parametrize("shared", [True, False])
def test_experts_come_back(shared: bool, tmp_path: Path) -> None:
    from loratool.adapter import Adapter, LazyUpdate
    from loratool.updates import Experts
    from tests.adapter_forms import save_base

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    a, b = random(3, 4, 8), random(3, 12, 4)
    if not shared:  # the first columns for the gate, the others for the up projection
        b[:, 6:, :2] = 0
        b[:, :6, 2:] = 0
    found = {
        "model.layers.0.mlp.experts.gate_up_proj": Experts(a, b, 2.0),
        "model.layers.0.mlp.experts.down_proj": Experts(random(3, 2, 6), random(3, 8, 2), 2.0),
    }
    updates = {
        name: LazyUpdate(
            name, "experts", (3, u.b.shape[1], u.a.shape[2]), "F32", lambda u=u: u, rank=u.rank
        )
        for name, u in found.items()
    }
    adapter = Adapter(updates, base_config={"model_type": "qwen3_moe", "num_attention_heads": 2})
    base = save_base(tmp_path / "base", {n: random(*u.shape) for n, u in updates.items()})
    wanted = merged(base, adapter, tmp_path / "wanted")
    for form in ("gguf", "mlx"):
        path = convert(adapter, form, tmp_path / form)
        assert_same_bits(merged(base, path, tmp_path / f"found-{form}"), wanted)
    tensors = gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors
    ranks = {t.name.split(".")[2]: int(t.shape[0]) for t in tensors if t.name.endswith("lora_b")}
    half = 4 if shared else 2
    assert ranks == {"ffn_gate_exps": half, "ffn_up_exps": half, "ffn_down_exps": 2}

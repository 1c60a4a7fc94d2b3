"""extract on fine-tunes that are merged LoRA, and on some that are not: real weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import loratool
from fixtures.weights import MINILM, RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.checkpoint import LazyTensor
from loratool.delta import DeltaReader
from loratool.dtypes import dtype_name
from loratool.errors import InputError
from loratool.linalg import RankPolicy
from loratool.updates import Experts
from loratool_plugins.factorizers.auto import Auto
from loratool_plugins.factorizers.rounding_cell import RoundingCell
from tests.merged_lora import merged, tuned

RANK, RATIO = 8, 3e-3
Updates = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the library does
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Updates]:
    """MiniLM in bf16, a LoRA on queries and values merged by PEFT both ways, and that LoRA."""
    fetch()
    folder = tmp_path_factory.mktemp("minilm")
    AutoModel.from_pretrained(MINILM, dtype=torch.bfloat16).save_pretrained(folder / "base")
    updates: Updates = {}
    for name, safe in (("sum", False), ("delta-first", True)):
        base = AutoModel.from_pretrained(folder / "base", dtype=torch.bfloat16)
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["query", "value"],
            layers_to_transform=[1, 4],
        )
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(0)
        for path, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                a, b = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
                a.normal_(generator=generator)
                b.normal_(generator=generator)
                weight = module.base_layer.weight.float()
                b.mul_(RATIO / 2 * weight.norm() / (b @ a).norm())
                updates[path] = 2 * b.double() @ a.double()
        model.merge_and_unload(safe_merge=safe).save_pretrained(folder / name)
    assert len(updates) == 4
    return folder, updates


def errors(adapter: Path, updates: Updates) -> list[float]:
    """||B A - update|| / ||update|| of every module, from the files."""
    factors = load_file(adapter / "adapter_model.safetensors")
    return [
        float(
            (
                factors[f"{path}.lora_B.weight"].double()
                @ factors[f"{path}.lora_A.weight"].double()
                - update
            ).norm()
            / update.norm()
        )
        for path, update in updates.items()
    ]


def restored(base: Path, adapter: Path, tuned: Path, updates: Updates, place: Path) -> float:
    """The share of the fine-tune's adapted weights that a merge gives back to the bit."""
    loratool.merge(base, [(adapter, 1.0)]).save(place)
    one, other = (load_file(folder / "model.safetensors") for folder in (place, tuned))
    names = [f"{path.removeprefix('base_model.model.')}.weight" for path in updates]
    same = sum(int((one[name] == other[name]).sum()) for name in names)
    return same / sum(other[name].numel() for name in names)


@pytest.mark.parametrize("way", ["sum", "delta-first"])
def test_the_error_against_the_true_adapter_falls_seven_times(tmp_path, minilm, way) -> None:
    folder, updates = minilm
    shares = {}
    for name, rank, options in (
        ("plain", RANK, {}),
        ("recovered", 2 * RANK, {"factorizer": "rounding_cell"}),
        ("coarse", 2 * RANK, {"factorizer": "rounding_cell", "dtype": "bf16"}),
    ):
        lazy = loratool.extract(folder / "base", folder / way, rank=rank, **options)
        lazy.save(tmp_path / name)
        shares[name] = restored(
            folder / "base", tmp_path / name, folder / way, updates, tmp_path / f"{name}-merged"
        )
    plain, found = (errors(tmp_path / name, updates) for name in ("plain", "recovered"))
    assert all(7 * one < other for one, other in zip(found, plain, strict=True))
    assert shares["recovered"] > 0.98 > 0.85 > shares["plain"]
    assert shares["recovered"] > shares["coarse"]
    factors = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    manifest = json.loads((tmp_path / "recovered" / "loratool.json").read_text())
    for told in manifest["tensors"].values():
        assert told["method"] == "rounding-cell" and told["rank"] == RANK
        assert told["recovery"]["held_out"] > 0.9 and told["recovery"]["rank"] == RANK


def test_a_plain_extraction_says_what_it_suspects(tmp_path, minilm) -> None:
    folder, _ = minilm
    report = loratool.extract(folder / "base", folder / "sum").save(tmp_path / "adapter")
    (line,) = [line for line in report.lines if "merged LoRA" in line]
    assert line.startswith("looks like a merged LoRA of about rank 8, rounded to bf16")
    told = report.data["looks_like"]
    assert len(told["left_over_in_units_of_rounding"]) == 3
    assert told["merged_lora_of_about_rank"] == RANK


def test_auto_recovers_and_is_the_same_with_any_executor(tmp_path, minilm) -> None:
    folder, updates = minilm

    def files(executor: str) -> list[bytes]:
        place = tmp_path / executor.partition(":")[0]
        report = loratool.extract(folder / "base", folder / "sum", factorizer="auto").save(
            place, executor=executor
        )
        assert report.data["chosen_factorizer"] == "rounding_cell"
        assert any("recovered as a merged, rounded LoRA: 4 of 4" in x for x in report.lines)
        assert any("factorizer: rounding_cell, for " in line for line in report.lines)
        assert not any("looks like" in line for line in report.lines)
        kept = json.loads((place / "loratool.json").read_text())
        kept.pop("run")
        weights = place / "adapter_model.safetensors"
        return [weights.read_bytes(), json.dumps(kept).encode()]

    assert files("serial") == files("threads:workers=3")
    assert max(errors(tmp_path / "serial", updates)) < 0.02


@pytest.fixture(scope="module")
def rxnfp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rxnfp's pair in bf16, whole and with its change scaled down."""
    fetch()
    folder = tmp_path_factory.mktemp("rxnfp")
    base, tuned = (
        torch.load(place / "pytorch_model.bin", weights_only=True, map_location="cpu")
        for place in (RXNFP_BASE, RXNFP_TUNED)
    )
    common = {
        name: value
        for name, value in tuned.items()
        if name in base and any(f".layer.{layer}." in name for layer in (0, 5, 9))
    }
    states = {"base": {name: base[name] for name in common}}
    for scale in (1.0, 0.1, 0.01):
        states[str(scale)] = {n: base[n] + scale * (v - base[n]) for n, v in common.items()}
    for name, state in states.items():
        (folder / name).mkdir()
        shutil.copy(RXNFP_TUNED / "config.json", folder / name)
        rounded = {
            n: (v.bfloat16() if v.is_floating_point() else v).contiguous() for n, v in state.items()
        }
        save_file(rounded, folder / name / "model.safetensors", {"format": "pt"})
    return folder


LAYERS = ("*.layer.[059].*",)


@pytest.mark.parametrize("scale", ["1.0", "0.1", "0.01"])
def test_full_fine_tunes_are_refused(tmp_path, rxnfp, scale) -> None:
    def run(factorizer: str) -> loratool.Report:
        lazy = loratool.extract(
            rxnfp / "base", rxnfp / scale, factorizer=factorizer, target=LAYERS, lora_only=True
        )
        return lazy.save(tmp_path / factorizer)

    plain, asked, auto = run("krylov"), run("rounding_cell"), run("auto")
    blind = scale == "0.01"
    assert ("looks_like" in plain.data) == blind
    assert not blind or plain.data["looks_like"]["too_small_to_tell"]
    assert "looks_like" not in asked.data and "looks_like" not in auto.data
    assert auto.data["chosen_factorizer"] == "krylov"
    tensors = asked.data["tensors"]
    assert len(tensors) == 18
    for told in tensors.values():
        assert told["method"].endswith("(not a rounded LoRA)")
        assert told["recovery"].get("held_out", 0) < 0.5
        assert "held_out" in told["recovery"] or not blind
    assert any(line.startswith("not recovered, plain truncated SVD:") for line in asked.lines)
    weights = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("krylov", "rounding_cell", "auto")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_fp32_models_are_refused_with_a_clear_statement(tmp_path) -> None:
    lazy = loratool.extract(
        RXNFP_BASE, RXNFP_TUNED, factorizer="rounding_cell", target=("*.layer.3.*",), lora_only=True
    )
    report = lazy.save(tmp_path / "adapter")
    assert (
        "not recovered, plain truncated SVD: 6 of 6 (float32 weights: only what was rounded to "
        "bf16 or fp16 has such cells)"
    ) in report.lines


def lazy(name: str, value: torch.Tensor) -> LazyTensor:
    def blocks() -> Iterator[torch.Tensor]:
        yield value

    return LazyTensor(name, dtype_name(value.dtype), tuple(value.shape), blocks, "file")


def test_experts_are_recovered_one_by_one() -> None:
    (one, update), (other, _), full = merged(rank=2), merged(rank=3, seed=1), tuned()
    base = lazy("experts", torch.stack([one.before, other.before, full.before]))
    after = lazy("experts", torch.stack([one.after, other.after, full.after]))
    reader = DeltaReader(RoundingCell(), RankPolicy(4), seed=0, precise="F32")
    found = reader.factorize_experts(base, after, False, "BF16")
    assert isinstance(found, Experts) and found.certificate is not None
    assert found.a.dtype == torch.float32 and found.rank == 4
    first = found.expert(0)
    assert float((first.b @ first.a - update).norm() / update.norm()) < 0.03
    told = found.certificate.details["recovery"]
    assert told["matrices"] == [2, 3] and told["rank"] == 3


def test_a_transposed_weight_gives_the_transposed_update() -> None:
    context, update = merged()
    reader = DeltaReader(RoundingCell(), RankPolicy(16), seed=0)
    before, after = lazy("w", context.before), lazy("w", context.after)
    found = reader.factorize(before, after, True, "BF16")
    assert found is not None
    assert (found.b.shape[0], found.a.shape[1]) == (update.shape[1], update.shape[0])
    assert float(((found.b @ found.a).T - update).norm() / update.norm()) < 0.02


def test_nan_in_a_sample_of_autos_is_named() -> None:
    context, _ = merged()
    context.after[0, 0] = torch.nan
    pair = lazy("layer.w", context.before), lazy("layer.w", context.after)
    reader = DeltaReader(Auto(), RankPolicy(4), seed=0, samples=[(*pair, False)])
    with pytest.raises(InputError, match=r"file: layer\.w: holds NaN or Inf"):
        reader.factorize(*pair, False, "BF16")

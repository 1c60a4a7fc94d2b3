"""Merges that are undone: to the bit with a record, and how far off without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, MismatchError
from tests.cli.tiny import NORM, Tensors, llama, names, save_model, snapshot, unchanged
from tests.peft_files import random_factors, write_adapter

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in (("self_attn.q_proj", (16, 16)), ("mlp.up_proj", (24, 16)))
}


def adapter(folder: Path, name: str, seed: int, rank: int = 3, **settings) -> Path:
    return write_adapter(folder / name, random_factors(SHAPES, rank, seed), **settings)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def base(tmp_path: Path, dtype: torch.dtype) -> Path:
    return save_model(tmp_path / "base", llama(dtype=dtype), files=2)


def merge(base: Path, out: Path, *parts: tuple[Path, float], **options) -> Path:
    loratool.merge(base, list(parts), **{"reversible": True, **options}).save(out)
    return out


def values(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


def weights(folder: Path) -> dict[str, bytes | None]:
    """The files of a model, without its record's."""
    found = snapshot(folder)
    return {name: data for name, data in found.items() if not name.startswith("loratool-record")}


def test_the_base_comes_back_file_by_file(base: Path, tmp_path: Path) -> None:
    merged = merge(base, tmp_path / "merged", (adapter(tmp_path, "a", 1), 0.7))
    assert bits(values(merged)) != bits(values(base))
    report = loratool.unmerge(merged).save(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(base)
    assert report.data["files_exact"] and not report.notes


def test_no_base_is_needed_and_the_record_may_move(base: Path, tmp_path: Path) -> None:
    before = snapshot(base)
    merged = merge(base, tmp_path / "merged", (adapter(tmp_path, "a", 1), 0.7))
    for folder in (base, tmp_path / "a"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    merged = merged.rename(tmp_path / "elsewhere")
    loratool.unmerge(merged).save(tmp_path / "out", executor="serial")
    assert snapshot(tmp_path / "out") == before


def test_one_of_several_is_taken_out(base: Path, tmp_path: Path) -> None:
    parts = [(adapter(tmp_path, name, seed), 0.5 + seed) for seed, name in enumerate("abc")]
    merged = merge(base, tmp_path / "merged", *parts)
    rest = merge(base, tmp_path / "rest", parts[0], parts[2])
    loratool.unmerge(merged, [parts[1]]).save(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(rest)
    loratool.unmerge(merged, only=["b"]).save(tmp_path / "named")
    assert snapshot(tmp_path / "named") == snapshot(tmp_path / "out")
    loratool.unmerge(tmp_path / "out").save(tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(base)


def test_records_nest(base: Path, tmp_path: Path) -> None:
    a, b = ((adapter(tmp_path, name, seed), 1.0) for seed, name in enumerate("ab"))
    first = merge(base, tmp_path / "first", a)
    second = merge(first, tmp_path / "second", b)
    report = loratool.unmerge(second).save(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(first)
    assert any("earlier merge" in line for line in report.lines)
    loratool.unmerge(tmp_path / "out").save(tmp_path / "bottom")
    assert snapshot(tmp_path / "bottom") == snapshot(base)
    merges = loratool.inspect(second).data["merged"]
    assert [m["adapters"] for m in merges] == [[{"name": n, "weight": 1.0}] for n in "ba"]


def test_an_adapter_of_an_earlier_merge_is_taken_out(base: Path, tmp_path: Path) -> None:
    a, b, c = ((adapter(tmp_path, name, seed), 0.8) for seed, name in enumerate("abc"))
    first = merge(base, tmp_path / "first", a, c)
    second = merge(first, tmp_path / "second", b)
    loratool.unmerge(second, only=["a"]).save(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(merge(base, tmp_path / "direct", c, b))
    loratool.unmerge(second, only=["a", "b", "c"]).save(tmp_path / "bottom")
    assert snapshot(tmp_path / "bottom") == snapshot(base)


def test_replaced_and_added_tensors_and_config_come_back(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama())
    tuned = llama()
    tuned[NORM] = tuned[NORM] + 1
    tuned["lm_head.weight"] = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    save_model(tmp_path / "tuned", tuned)
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    (tmp_path / "tuned/config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    (tmp_path / "tuned/tokenizer.json").write_text("{}")
    loratool.extract(base, tmp_path / "tuned", rank=2).save(tmp_path / "adapter")
    merged = merge(base, tmp_path / "merged", (tmp_path / "adapter", 1.0))
    assert values(merged)["lm_head.weight"].shape == (40, 16)
    assert "tokenizer.json" in names(merged)
    loratool.unmerge(merged).save(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(base)


@pytest.mark.parametrize("how", ["digests", "stochastic", "one file"])
def test_options_of_the_merge(how: str, base: Path, tmp_path: Path) -> None:
    part = (adapter(tmp_path, "a", 1), 0.7)
    options = {
        "digests": {"embed_adapter": False},
        "stochastic": {"rounding": "stochastic", "seed": 5},
        "one file": {"max_shard_size": "1GB"},
    }[how]
    merged = merge(base, tmp_path / "merged", part, **options)
    given = [part] if how == "digests" else []
    loratool.unmerge(merged, given).save(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(base)
    assert (merged / "loratool-record" / "adapters").exists() == (how != "digests")


def test_a_torch_base_comes_back_as_safetensors(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama())
    torch.save(llama(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merged = merge(base, tmp_path / "merged", (adapter(tmp_path, "a", 1), 0.7))
    report = loratool.unmerge(merged).save(tmp_path / "out")
    assert bits(values(tmp_path / "out")) == bits(llama())
    assert not report.data["files_exact"]
    assert any("pytorch_model.bin" in note for note in report.notes)


def test_nan_and_inf_and_overflow_come_back(tmp_path: Path) -> None:
    tensors = llama(dtype=torch.float16)
    touched = tensors["model.layers.0.self_attn.q_proj.weight"]
    touched[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0])
    touched[1] = 65504.0
    base = save_model(tmp_path / "base", tensors)
    big = write_adapter(tmp_path / "big", random_factors(SHAPES, 3, 1, size=100.0))
    report = loratool.merge(base, [(big, 1.0)], reversible=True).save(tmp_path / "merged")
    assert any("NaN or Inf" in note for note in report.notes)
    loratool.unmerge(tmp_path / "merged").save(tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(base)
    with pytest.raises(InputError, match="holds NaN or Inf"):
        loratool.merge(base, [(big, 1.0)]).save(tmp_path / "plain")


def test_a_hundred_cycles_leave_no_trace(base: Path, tmp_path: Path) -> None:
    parts = [(adapter(tmp_path, name, seed), 1.0) for seed, name in enumerate("ab")]
    before = snapshot(base)
    current = base
    for cycle in range(100):
        merged = merge(current, tmp_path / f"merged{cycle}", parts[cycle % 2])
        current = tmp_path / f"base{cycle}"
        loratool.unmerge(merged).save(current, executor="serial")
    assert snapshot(current) == before


def test_threads_and_tiles_change_no_byte_of_model_or_record(base: Path, tmp_path: Path) -> None:
    part = (adapter(tmp_path, "a", 1), 0.7)
    for executor in ("serial", "threads:workers=3"):
        model = loratool.merge(base, [part], reversible=True)
        model.save(tmp_path / executor.partition(":")[0], executor=executor)
    assert snapshot(tmp_path / "serial") == snapshot(tmp_path / "threads")


class TestWithoutARecord:
    def test_subtraction_is_close_and_says_how_close(self, base: Path, tmp_path: Path) -> None:
        part = (adapter(tmp_path, "a", 1), 0.7)
        merged = merge(base, tmp_path / "merged", part, reversible=False)
        report = loratool.unmerge(merged, [part], base).save(tmp_path / "out")
        data = report.data
        assert not data["exact"] and "APPROXIMATE" in "".join(report.lines)
        bound = data["may_be_off_by_one_unit"] + data["may_be_off_by_more"]
        assert 0 < data["differing"] <= bound < 0.9
        found, wanted = values(tmp_path / "out"), values(base)
        differing = sum(int((found[n] != wanted[n]).sum()) for n in wanted)
        assert differing == round(data["differing"] * data["weights"])
        for name, value in values(merged).items():
            unit = torch.finfo(value.dtype).eps * value.double().abs().clamp(min=1e-4)
            assert ((found[name].double() - wanted[name].double()).abs() <= unit).all()

    def test_it_needs_an_adapter(self, base: Path) -> None:
        with pytest.raises(InputError, match="has no record"):
            loratool.unmerge(base)


class TestWhatDoesNotBelongTogether:
    @pytest.fixture
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @pytest.fixture
    def merged(self, base: Path, tmp_path: Path) -> Path:
        parts = [(adapter(tmp_path, name, seed), 0.5 + seed) for seed, name in enumerate("ab")]
        return merge(base, tmp_path / "merged", *parts)

    def fails(self, merged: Path, out: Path, *words: str, **options) -> None:
        with (
            unchanged(out.parent),
            pytest.raises((InputError, MismatchError)) as caught,
        ):
            loratool.unmerge(merged, **options).save(out)
        for word in words:
            assert word in str(caught.value), caught.value

    @pytest.mark.parametrize("name", ["lm_head.weight", next(iter(SHAPES)) + ".weight"])
    def test_edited_tensors_are_named(self, name: str, merged: Path, tmp_path: Path) -> None:
        for file in merged.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                tensors[name][0, 0] += 1
                save_file(tensors, file, metadata={"format": "pt"})
        self.fails(merged, tmp_path / "out", "changed after the merge: " + name)
        self.fails(merged, tmp_path / "out", name, only=["a"])

    def test_an_adapter_that_was_not_merged(self, merged: Path, tmp_path: Path) -> None:
        other = adapter(tmp_path, "other", 9)
        self.fails(merged, tmp_path / "out", "other", "a=0.5, b=1.5", adapters=[(other, 1.0)])
        self.fails(merged, tmp_path / "out", "c: was not merged", only=["c"])

    def test_another_weight(self, merged: Path, tmp_path: Path) -> None:
        self.fails(merged, tmp_path / "out", "0.5, not 0.4", adapters=[(tmp_path / "a", 0.4)])

    @pytest.mark.parametrize("file", ["record.json", "blobs.bin", "adapter_model.safetensors"])
    def test_a_record_that_was_tampered_with(self, file: str, merged: Path, tmp_path: Path) -> None:
        (path,) = list((merged / "loratool-record").rglob(file))[:1] or [None]
        data = bytearray(path.read_bytes())
        if file == "record.json":
            path.write_text(path.read_text().replace('"weight": 0.5', '"weight": 0.75'))
        else:
            data[len(data) // 3] ^= 0xFF
            path.write_bytes(data)
        self.fails(merged, tmp_path / "out", "record")

    def test_the_record_of_another_adapter(self, merged: Path, tmp_path: Path) -> None:
        other = adapter(tmp_path, "other", 9)
        inside = merged / "loratool-record/adapters/1-a"
        for file in other.iterdir():
            (inside / file.name).write_bytes(file.read_bytes())
        self.fails(merged, tmp_path / "out", "not the adapter that was merged")

    def test_digests_alone_need_the_adapters(self, base: Path, tmp_path: Path) -> None:
        part = (adapter(tmp_path, "a", 1), 0.7)
        merged = merge(base, tmp_path / "merged", part, embed_adapter=False)
        self.fails(merged, tmp_path / "out", "digests of the adapter a")

    def test_a_path_that_leaves_the_record(self, merged: Path, tmp_path: Path) -> None:
        path = merged / "loratool-record/record.json"
        path.write_text(path.read_text().replace('"adapters/1-a"', '"../../a"'))
        self.fails(merged, tmp_path / "out", "record")

    def test_an_unsaved_adapter_has_no_files_to_keep(self, base: Path, tmp_path: Path) -> None:
        save_model(tmp_path / "tuned", {n: t + 1 for n, t in llama(dtype=torch.bfloat16).items()})
        unsaved = loratool.extract(base, tmp_path / "tuned", rank=2)
        with pytest.raises(Exception, match="save it first"):
            loratool.merge(base, [(unsaved, 1.0)], reversible=True)

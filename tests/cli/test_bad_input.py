"""Whatever is wrong with an input: one message that names it, status 1, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import (
    CONFIG,
    NORM,
    PREFIX,
    UP,
    Result,
    Tensors,
    done,
    entry,
    finetuned,
    llama,
    loratool,
    model_folder,
    raw_safetensors,
    refused,
    save_model,
    unchanged,
    write_index,
)

# How each verb is given a checkpoint: its arguments, and which of them stands for it.
PLACES: dict[str, Callable[[Path, Path], Sequence[object]]] = {
    "extract, base": lambda bad, good: ("extract", bad, good / "tuned"),
    "extract, fine-tune": lambda bad, good: ("extract", good / "base", bad),
    "validate": lambda bad, good: ("validate", good / "adapter", "--base", bad),
    "merge": lambda bad, good: ("merge", bad, good / "adapter"),
    "export": lambda bad, good: ("export", bad, good / "adapter"),
}


def arguments(place: str, bad: Path, good: Path, output: Path) -> list[object]:
    given = list(PLACES[place](bad, good))
    return given if place == "validate" else [*given, "-o", output]


class Evil:
    """A pickle that creates a file when it is loaded without weights_only."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


def missing(folder: Path) -> tuple[Path, Sequence[object]]:
    return folder / "nowhere", (folder / "nowhere", "no such file or directory")


def empty_folder(folder: Path) -> tuple[Path, Sequence[object]]:
    return model_folder(folder / "bad"), (folder / "bad", "holds no checkpoint")


def unknown_file(folder: Path) -> tuple[Path, Sequence[object]]:
    file = folder / "weights.txt"
    file.write_text("1 2 3")
    return file, (file, "holds no checkpoint")


def several_files(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    for name in ("one", "two"):
        save_file(llama(), bad / f"{name}.safetensors")
    return bad, (bad, "one.safetensors, two.safetensors", "name the file")


def an_adapter(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = folder / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    return bad, (bad, "holds no checkpoint", "it is an adapter")


def absent_shard(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = save_model(folder / "bad", llama(), files=3)
    shard = bad / "model-00002-of-00003.safetensors"
    shard.unlink()
    return bad, (shard, "missing", "model.safetensors.index.json", "download")


def absent_torch_shard(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    write_index(bad, dict.fromkeys(llama(), "part.bin"), "pytorch_model.bin")
    return bad, (bad / "part.bin", "missing", "pytorch_model.bin.index.json")


def outside(name: Any) -> Callable[[Path], tuple[Path, Sequence[object]]]:
    def make(folder: Path) -> tuple[Path, Sequence[object]]:
        save_file(llama(), folder / "x.safetensors")
        bad = save_model(folder / "bad", llama())
        weight_map = dict.fromkeys(llama(), "model.safetensors")
        write_index(bad, {**weight_map, UP: name})
        return bad, (bad / "model.safetensors.index.json", UP, repr(name), "download")

    return make


def wrong_index(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = save_model(folder / "bad", llama())
    write_index(bad, {**dict.fromkeys(llama(), "model.safetensors"), "ghost": "model.safetensors"})
    return bad, (bad / "model.safetensors", "ghost", "index")


def broken_json(name: str, content: str) -> Callable[[Path], tuple[Path, Sequence[object]]]:
    def make(folder: Path) -> tuple[Path, Sequence[object]]:
        bad = save_model(folder / "bad", llama())
        (bad / name).write_text(content)
        return bad, (bad / name,)

    return make


def truncated(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = save_model(folder / "bad", llama())
    file = bad / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    return bad, (file, "truncated", "download it again")


def no_tensors(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    (bad / "model.safetensors").write_bytes(raw_safetensors({}, b""))
    return bad, (bad, "holds no tensors")


def empty_file(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    (bad / "model.safetensors").touch()
    return bad, (bad / "model.safetensors", "too short", "download it again")


def lying(
    header: Any, *words: str, data: bytes = bytes(8), length: int | None = None
) -> Callable[[Path], tuple[Path, Sequence[object]]]:
    def make(folder: Path) -> tuple[Path, Sequence[object]]:
        bad = model_folder(folder / "bad")
        file = bad / "model.safetensors"
        file.write_bytes(raw_safetensors(header, data, length))
        return bad, (file, *words)

    return make


def torch_file(
    content: Any, *words: str, legacy: bool = False, keep: float = 1.0
) -> Callable[[Path], tuple[Path, Sequence[object]]]:
    def make(folder: Path) -> tuple[Path, Sequence[object]]:
        bad = model_folder(folder / "bad")
        file = bad / "pytorch_model.bin"
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with file.open("r+b") as opened:
            opened.truncate(int(file.stat().st_size * keep))
        return bad, (file, *words)

    return make


def one_tensor_twice(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    for name in ("a", "b"):
        save_file(llama(), bad / f"{name}.safetensors")
    write_index(bad, {**dict.fromkeys(llama(), "a.safetensors"), UP: "b.safetensors"})
    return bad, (bad / "b.safetensors", "already in a.safetensors")


def one_torch_tensor_twice(folder: Path) -> tuple[Path, Sequence[object]]:
    bad = model_folder(folder / "bad")
    for name in ("a", "b"):
        torch.save(llama(), bad / f"{name}.bin")
    write_index(bad, {**dict.fromkeys(llama(), "a.bin"), UP: "b.bin"}, "pytorch_model.bin")
    return bad, (bad / "b.bin", "already in a.bin")


BAD: dict[str, Callable[[Path], tuple[Path, Sequence[object]]]] = {
    "missing": missing,
    "empty folder": empty_folder,
    "unknown file": unknown_file,
    "several files": several_files,
    "an adapter": an_adapter,
    "absent shard": absent_shard,
    "absent torch shard": absent_torch_shard,
    "index to the parent": outside("../x.safetensors"),
    "index to the root": outside("/etc/passwd"),
    "index to a folder": outside("sub/x.safetensors"),
    "index to dots": outside(".."),
    "index to nothing": outside(""),
    "index to a number": outside(7),
    "index that is wrong": wrong_index,
    "index without a map": broken_json("model.safetensors.index.json", "{}"),
    "index that is no JSON": broken_json("model.safetensors.index.json", "{'a': 1}"),
    "config that is no JSON": broken_json("config.json", "model_type: llama"),
    "config of a list": broken_json("config.json", "[1]"),
    "config of a long number": broken_json("config.json", f'{{"a": {"9" * 5000}}}'),
    "tensor in two files": one_tensor_twice,
    "tensor in two torch files": one_torch_tensor_twice,
    "truncated": truncated,
    "empty file": empty_file,
    "length of the header": lying({"a": entry()}, "claims 1000000", length=1_000_000),
    "length beyond everything": lying({"a": entry()}, "claims", length=2**64 - 1),
    "offsets that overlap": lying({"a": entry(), "b": entry()}, "b", "overlaps"),
    "offsets with a gap": lying({"a": entry(8, 16)}, "a", "gap", data=bytes(16)),
    "offsets out of the file": lying({"a": entry(0, 800, shape=(200,))}, "a", "truncated"),
    "offsets backwards": lying({"a": entry(8, 0)}, "a", "takes 8 bytes"),
    "bytes of no tensor": lying({"a": entry()}, "24 bytes", data=bytes(32)),
    "unknown dtype": lying({"a": entry(dtype="F33")}, "a", "unknown dtype 'F33'", "BF16"),
    "shape against bytes": lying({"a": entry(shape=(3,))}, "a", "takes 12 bytes", "reserves 8"),
    "negative shape": lying({"a": entry(shape=(-2,))}, "a", "needs a dtype, a shape"),
    "shape that is no list": lying({"a": {**entry(), "shape": {}}}, "a", "needs a dtype"),
    "huge shape": lying({"a": {**entry(), "shape": [2**62] * 60}}, "a", "reserves 8"),
    "huge dimension": lying({"a": {**entry(), "shape": [10**4000]}}, "a", "needs a dtype"),
    "number of 5000 digits": lying(
        json.dumps({"a": entry()}).replace("[2]", f"[{'9' * 5000}]").encode(), "not valid JSON"
    ),
    "too many dimensions": lying({"a": {**entry(), "shape": [2] * 1000}}, "a"),
    "fraction in the shape": lying({"a": {**entry(), "shape": [2.0]}}, "a"),
    "truth in the offsets": lying({"a": {**entry(), "data_offsets": [False, 8]}}, "a"),
    "three offsets": lying({"a": {**entry(), "data_offsets": [0, 4, 8]}}, "a"),
    "text for a tensor": lying({"a": "F32"}, "a", "needs a dtype"),
    "no shape": lying({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "a", "needs a dtype"),
    "a name twice": lying(
        b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), "a: ", "twice"
    ),
    "a name that is no text": lying(b'{"\\ud800": %b}' % json.dumps(entry()).encode()),
    "no JSON": lying(b"hello world", "not valid JSON"),
    "no UTF-8": lying(b'{"\xff": 1}', "not valid JSON"),
    "a JSON list": lying([1], "not a JSON object"),
    "nested deeply": lying(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not valid JSON"),
    "nested values": lying(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "a", "needs a dtype"),
    "metadata of numbers": lying({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "no tensors": no_tensors,
    "torch zip truncated": torch_file(llama(), "not a readable torch file", keep=0.5),
    "torch zip without its end": torch_file(llama(), "not a readable torch file", keep=0.99),
    "torch legacy truncated": torch_file(
        llama(), "not a readable torch file", legacy=True, keep=0.5
    ),
    "torch empty": torch_file(llama(), "not a readable torch file", keep=0),
    "torch list": torch_file([torch.ones(2)], "no state dict"),
    "torch tensor": torch_file(torch.ones(2), "no state dict"),
    "torch nothing": torch_file({}, "no state dict"),
    "torch numbers": torch_file({"epoch": 3}, "epoch", "is no tensor but int"),
    "torch numbered": torch_file({1: torch.ones(2)}, "1", "is no tensor"),
    "torch sparse": torch_file({"a": torch.eye(2).to_sparse()}, "a", "dense"),
    "torch complex": torch_file({"a": torch.ones(2, dtype=torch.complex128)}, "a", "complex128"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["missing", "absent shard", "truncated", "torch empty"])
def test_every_verb_refuses_a_bad_checkpoint(
    place: str, kind: str, inputs: Path, tmp_path: Path
) -> None:
    bad, words = BAD[kind](tmp_path)
    with unchanged(tmp_path):
        refused(loratool(*arguments(place, bad, inputs, tmp_path / "out")), *words)


# An adapter in the base's place is one more adapter, whose base merge looks for.
@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "an adapter"])
def test_a_bad_checkpoint_is_refused(kind: str, adapter: Path, tmp_path: Path) -> None:
    bad, words = BAD[kind](tmp_path)
    with unchanged(tmp_path):
        refused(loratool("merge", bad, adapter, "-o", tmp_path / "new" / "out"), *words)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_no_code_of_a_pickle_runs(place: str, legacy: bool, inputs: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = {**llama(), UP: Evil(str(trap))}
    bad, _ = torch_file(content, legacy=legacy)(tmp_path)
    with unchanged(tmp_path):
        result = loratool(*arguments(place, bad, inputs, tmp_path / "out"))
        refused(result, bad / "pytorch_model.bin", "is refused", "mkdir", "safetensors")
    assert not trap.exists()


def test_warnings_of_torch_about_a_pickle_are_not_shown(tmp_path: Path, adapter: Path) -> None:
    bad = model_folder(tmp_path / "bad")
    torch.save({"a": Evil("trap")}, bad / "pytorch_model.bin", pickle_protocol=4)
    result = loratool("merge", bad, adapter, "-o", tmp_path / "out")
    refused(result, "not a readable torch file", "get it as safetensors")
    assert len(result.err.splitlines()) == 1


def broken_adapter(folder: Path, adapter: Path) -> tuple[Path, Path]:
    """A copy of the adapter, and its weight file."""
    copy = shutil.copytree(adapter, folder / "adapter")
    return copy, copy / "adapter_model.safetensors"


ADAPTER_VERBS = {
    "validate": lambda base, adapter, output: ("validate", adapter, "--base", base),
    "merge": lambda base, adapter, output: ("merge", base, adapter, "-o", output),
    "export": lambda base, adapter, output: ("export", base, adapter, "-o", output),
    "unmerge": lambda base, adapter, output: ("unmerge", base, adapter, "-o", output),
    "stack": lambda base, adapter, output: ("stack", adapter, "-o", output),
    "rescale": lambda base, adapter, output: ("rescale", adapter, "--by", "2", "-o", output),
    "convert": lambda base, adapter, output: ("convert", adapter, "--to-lora", "-o", output),
}


@pytest.mark.parametrize("verb", ADAPTER_VERBS)
def test_every_verb_refuses_a_bad_adapter(
    verb: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    bad, file = broken_adapter(tmp_path, adapter)

    def run(path: Path) -> Result:
        return loratool(*ADAPTER_VERBS[verb](base, path, tmp_path / "out"))

    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with unchanged(tmp_path):
        refused(run(bad), file, "truncated")
        refused(run(file), file, f"name its directory, {bad}")
        refused(run(tmp_path / "nowhere"), tmp_path / "nowhere", "no such file")
        refused(run(base), base, "holds no adapter", "it is a whole model")
    file.unlink()
    with unchanged(tmp_path):
        refused(run(bad), file, "missing")
    file.write_bytes(whole)
    (bad / "adapter_config.json").write_text("{")
    with unchanged(tmp_path):
        refused(run(bad), bad / "adapter_config.json", "not valid JSON")


def test_an_adapter_in_a_pickle_runs_no_code(base: Path, adapter: Path, tmp_path: Path) -> None:
    bad, file = broken_adapter(tmp_path, adapter)
    content = {**load_file(file), "x": Evil(str(tmp_path / "trap"))}
    file.unlink()
    torch.save(content, bad / "adapter_model.bin")
    with unchanged(tmp_path):
        result = loratool("merge", base, bad, "-o", tmp_path / "out")
        refused(result, bad / "adapter_model.bin", "is refused")


def test_an_adapter_that_does_not_fit_is_refused_with_all_complaints(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    bad, file = broken_adapter(tmp_path, adapter)
    stored = load_file(file)
    module = PREFIX + UP.removesuffix(".weight")
    stored[f"{module}.lora_B.weight"] = torch.zeros(99, 2)
    del stored[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(stored, file)
    for verb in ("merge", "export"):
        with unchanged(tmp_path):
            result = loratool(verb, base, bad, "-o", tmp_path / "out")
            refused(result, bad, UP, "(24, 16)", "(99, 16)", "layers.0.mlp.up_proj.lora_A")
    report = loratool("validate", bad, "--base", base)
    assert report.status == 1
    assert "does not fit" in report.out
    assert UP in report.out
    assert "Traceback" not in report.err


def test_models_of_different_architectures_are_refused_with_the_first_shapes(
    base: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", llama(hidden=8))
    with unchanged(tmp_path):
        result = loratool("extract", base, other, "-o", tmp_path / "out")
        refused(result, base, other, "21 tensors differ in shape", "(32, 8)", "(32, 16)")
    assert 5 <= len(result.err.splitlines()) <= 8


def test_models_without_a_common_name_are_refused(base: Path, tmp_path: Path) -> None:
    renamed = {f"x.{name[::-1]}": value for name, value in llama().items()}
    other = save_model(tmp_path / "other", renamed)
    with unchanged(tmp_path):
        refused(loratool("extract", base, other, "-o", tmp_path / "out"), base, other, "--map")


def test_identical_models_are_refused(base: Path, tmp_path: Path, tensors: Tensors) -> None:
    same = save_model(tmp_path / "same", tensors)
    with unchanged(tmp_path):
        for tuned in (same, base):
            result = loratool("extract", base, tuned, "-o", tmp_path / "new" / "out")
            refused(result, "identical", "nothing to extract")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nan_and_inf_in_a_model_are_named(
    side: str, name: str, value: float, inputs: Path, tmp_path: Path, tensors: Tensors
) -> None:
    content = finetuned(tensors) if side == "tuned" else dict(tensors)
    content[name] = content[name].clone()
    content[name].view(-1)[3] = value
    bad = save_model(tmp_path / "bad", content)
    pair = (inputs / "base", bad) if side == "tuned" else (bad, inputs / "tuned")
    with unchanged(tmp_path):
        result = loratool("extract", *pair, "-o", tmp_path / "out")
        refused(result, bad / "model.safetensors", name, "NaN or Inf")


def test_nan_in_the_base_stops_a_merge_where_it_is_touched(
    adapter: Path, tmp_path: Path, tensors: Tensors
) -> None:
    content = {**tensors, UP: tensors[UP].clone()}
    content[UP][2, 3] = torch.nan
    bad = save_model(tmp_path / "bad", content)
    with unchanged(tmp_path):
        result = loratool("merge", bad, adapter, "-o", tmp_path / "out")
        refused(result, bad / "model.safetensors", UP, "NaN or Inf")


@pytest.mark.parametrize("key", ["factor", "replacement"])
def test_nan_in_an_adapter_is_named(key: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    bad, file = broken_adapter(tmp_path, adapter)
    stored = load_file(file)
    names = [name for name in stored if (".lora_A." in name) == (key == "factor")]
    names = [name for name in names if ".lora_B." not in name]
    stored[names[0]].view(-1)[1] = torch.nan
    save_file(stored, file)
    with unchanged(tmp_path):
        result = loratool("merge", base, bad, "-o", tmp_path / "out")
        refused(result, file, names[0].removeprefix(PREFIX).split(".lora_")[0], "NaN or Inf")
    done(loratool("validate", bad, "--base", base))
    report = loratool("validate", bad, "--base", base, "--deep", "--json")
    assert report.status == 1
    assert [problem["tensor"] for problem in report.data["problems"]] == names[:1]


def test_a_rank_above_the_matrices_is_clamped_and_said(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    result = done(loratool("extract", base, tuned, "--rank", 99, "-o", tmp_path / "out"))
    assert result.err.startswith("Note: rank 99 is more than ")
    assert "full rank" in result.err
    done(loratool("validate", tmp_path / "out", "--base", base))


USAGE: dict[str, tuple[Sequence[object], str]] = {
    "rank 0": (("extract", "BASE", "TUNED", "--rank", 0), "rank must be at least 1"),
    "rank -1": (("extract", "BASE", "TUNED", "--rank", -1), "rank must be at least 1"),
    "rank x": (("extract", "BASE", "TUNED", "--rank", "x"), "not a valid int"),
    "energy 0": (("extract", "BASE", "TUNED", "--energy", 0), "energy"),
    "energy 1.5": (("extract", "BASE", "TUNED", "--energy", 1.5), "energy"),
    "energy nan": (("extract", "BASE", "TUNED", "--energy", "nan"), "energy"),
    "dtype": (("extract", "BASE", "TUNED", "--dtype", "fp13"), "'fp13' is not one of"),
    "map": (("extract", "BASE", "TUNED", "--map", "x"), "OLD=NEW"),
    "merged dtype": (("merge", "BASE", "ADAPTER", "--dtype", "int8"), "'int8' is not one of"),
    "weight": (("merge", "BASE", "ADAPTER=heavy"), "'heavy' after the equals sign"),
    "no weight": (("merge", "BASE", "ADAPTER="), "'' after the equals sign"),
    "weight nan": (("merge", "BASE", "ADAPTER=nan"), "finite"),
    "weight inf": (("export", "BASE", "ADAPTER=-inf"), "finite"),
    "weight alone": (("merge", "BASE", "=2"), "name an adapter"),
    "shard size": (("merge", "BASE", "ADAPTER", "--max-shard-size", "big"), "not a size"),
    "shard size 0": (("merge", "BASE", "ADAPTER", "--max-shard-size", "0"), "not a size"),
    "no adapter": (("merge", "BASE"), "Missing argument"),
    "no input": (("extract",), "Missing argument"),
    "unknown option": (("merge", "BASE", "ADAPTER", "--rnak", 3), "--rnak"),
    "unknown verb": (("melt", "BASE"), "melt"),
    "executor option": (
        ("merge", "BASE", "ADAPTER", "--executor", "threads:workers=-1"), "workers must be"
    ),
    "executor text": (
        ("merge", "BASE", "ADAPTER", "--executor", "threads:workers=two"), "is a number"
    ),
    "factorizer option": (
        ("extract", "BASE", "TUNED", "--factorizer", "exact:speed=9"), "no option 'speed'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_have_status_2(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, word = USAGE[case]
    for name in ("BASE", "TUNED", "ADAPTER"):
        place = str(inputs / name.lower())
        given = [text.replace(name, place) if isinstance(text, str) else text for text in given]
    with unchanged(tmp_path):
        refused(loratool(*given), word, status=2)


def test_unknown_plugins_are_named_with_the_known_ones(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    with unchanged(tmp_path):
        for option, known in (("factorizer", "exact, krylov"), ("executor", "serial, threads")):
            result = loratool("extract", base, tuned, f"--{option}", "magic", "-o", tmp_path / "o")
            refused(result, f"unknown {option} 'magic'", known)


def test_names_that_a_terminal_would_obey_are_escaped(
    base: Path, tmp_path: Path, tensors: Tensors
) -> None:
    evil = {**finetuned(tensors), "\x1b[31mred\x07": torch.tensor([torch.nan])}
    bad = save_model(tmp_path / "bad", evil)
    result = loratool("extract", base, bad, "-o", tmp_path / "out")
    refused(result, r"\x1b[31mred\x07", "NaN or Inf")


def test_a_bad_config_of_the_fine_tune_is_refused(base: Path, tmp_path: Path) -> None:
    tuned = save_model(tmp_path / "tuned", finetuned(llama()))
    (tuned / "config.json").write_text(json.dumps(dict(CONFIG))[:-5])
    with unchanged(tmp_path):
        refused(loratool("extract", base, tuned, "-o", tmp_path / "out"), tuned / "config.json")

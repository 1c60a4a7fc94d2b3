"""What holds for every format: round trips, what is refused, and how formats are told apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool import plugins
from loratool.adapter import Adapter, FormatOptions, LazyUpdate
from loratool.engine import Drain, save_adapter
from loratool.errors import FormatError, InputError, MismatchError
from loratool.opening import format_of, open_adapter, open_any, open_checkpoint
from loratool.updates import Kind, LowRank, Update
from tests.adapter_forms import assert_same_bits, convert, merged
from tests.cli.tiny import llama, save_model
from tests.peft_files import PREFIX, random_factors, write_adapter

FORMS = ("loralib", "mlx", "gguf")
SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.k_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (16, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
    "model.layers.1.mlp.up_proj": (24, 16),
    "lm_head": (32, 16),
}
WEIGHTS = {"loralib": "lora.pt", "mlx": "adapters.safetensors", "gguf": "adapter.gguf"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", llama())


def typed(dtype: torch.dtype, rank: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = random_factors(SHAPES, rank, 0)
    return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in found.items()}


SETTINGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 7},
    "rslora": {"alpha": 6, "use_rslora": True},
    "patterns": {"alpha": 8, "alpha_pattern": {"up_proj": 2, r"0\.self_attn.q_proj": 64}},
    "odd": {"alpha": 8, "alpha_pattern": {"up_proj": 0.7, "lm_head": 3}},
    "nothing": {"alpha": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_merges_to_the_same_bits(
    form: str, case: str, dtype: torch.dtype, base: Path, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "peft", typed(dtype), **SETTINGS[case])
    there = convert(source, form, tmp_path / form, open_checkpoint(base))
    assert format_of("adapter_formats", there) == form
    back = convert(there, "peft", tmp_path / "back")
    wanted = merged(base, source, tmp_path / "wanted")
    found = merged(base, back, tmp_path / "found")
    if form != "loralib" and case == "odd" and dtype == torch.float32:
        # What fp32 cannot hold is rounded, and said.
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=2e-6, atol=2e-7)
        return
    assert_same_bits(merged(base, there, tmp_path / "merged"), wanted)
    assert_same_bits(found, wanted)
    factors, again = (load_file(p / "adapter_model.safetensors") for p in (source, back))
    assert all(value.dtype == dtype for value in again.values())
    if case not in ("rslora", "nothing"):
        assert_same_bits(again, factors)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_may_differ(form: str, base: Path, tmp_path: Path) -> None:
    factors = typed(torch.float32, 4)
    factors |= random_factors({"model.layers.0.mlp.up_proj": (24, 16)}, 2, 1)
    source = write_adapter(tmp_path / "peft", factors, alpha=4, rank_pattern={"0.mlp.up_proj": 2})
    there = convert(source, form, tmp_path / form, open_checkpoint(base))
    wanted = merged(base, source, tmp_path / "wanted")
    assert_same_bits(merged(base, there, tmp_path / "found"), wanted)
    back = convert(there, "peft", tmp_path / "back")
    assert_same_bits(merged(base, back, tmp_path / "again"), wanted)
    once_more = convert(back, form, tmp_path / "once more")  # what it takes of the base came along
    assert_same_bits(merged(base, once_more, tmp_path / "third"), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_format_cannot_say_comes_back(form: str, base: Path, tmp_path: Path) -> None:
    source = write_adapter(
        tmp_path / "peft", typed(torch.float32), task_type="CAUSAL_LM", revision="abc",
        base_model_name_or_path="org/base", use_rslora=True, target_modules=["q_proj", "lm_head"],
        lora_dropout=0.25,
    )  # fmt: skip
    file = source / "adapter_model.safetensors"
    ours = {"dropped": ["x.weight"], "tied": {"a": "b"}, "moves": [["old.", "new."]]}
    save_file(load_file(file), file, metadata={"format": "pt", "loratool": json.dumps(ours)})
    there = convert(source, form, tmp_path / form, open_checkpoint(base))
    for adapter in (open_adapter(source), open_adapter(there)):
        assert adapter.task_type == "CAUSAL_LM"
        assert (adapter.base_name, adapter.base_revision) == ("org/base", "abc")
        assert adapter.rslora
        assert adapter.dropped == ("x.weight",)
        assert adapter.tied == {"a": "b"}
        assert adapter.moves == (("old.", "new."),)
        assert adapter.settings["lora_dropout"] == 0.25
        assert adapter.short_targets["q_proj"] == {"model.layers.0.self_attn.q_proj"}
    card = (there / "README.md").read_text()
    assert "PeftModel" not in card
    assert "base_model: org/base" in card
    manifest = json.loads((there / "loratool.json").read_text())
    assert list(manifest["files"]) == [WEIGHTS[form]]
    report = loratool.validate(there, base)
    assert report.data["problems"] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_file_alone_is_an_adapter(form: str, base: Path, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "peft", typed(torch.float32), alpha=8)
    there = convert(source, form, tmp_path / form, open_checkpoint(base))
    file = there / WEIGHTS[form]
    if form != "mlx":  # whose config lies beside it
        file = file.rename(tmp_path / file.name)
        (tmp_path / "loratool.json").write_text("not read")
    adapter = open_any(file)
    assert isinstance(adapter, Adapter)
    assert adapter.path == file
    assert adapter.files[file.name] == file
    out = tmp_path / "merged"
    loratool.merge(base, [(file, 1.0)], reversible=True).save(out, executor="serial")
    wanted = merged(base, source, tmp_path / "wanted")
    assert_same_bits(load_file(out / "model.safetensors"), wanted)
    loratool.unmerge(out).save(tmp_path / "back", executor="serial")
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), llama())


def computed(
    kind: Kind, shape: tuple[int, ...], name: str = "model.layers.0.mlp.up_proj.weight"
) -> LazyUpdate:
    def load() -> Update:
        raise AssertionError("nothing may be computed")

    return LazyUpdate(name, kind, shape, "F32", load, rank=2)


REFUSED: Mapping[str, tuple[LazyUpdate, str]] = {
    "loralib conv": (computed("low_rank", (4, 4, 3, 3)), "convolutions"),
    "loralib bare": (computed("low_rank", (4, 4), "gate"), "weights of modules"),
    "loralib dora": (computed("dora", (4, 4)), "DoRA"),
    "mlx conv": (computed("low_rank", (4, 4, 3, 3)), "convolutions"),
    "mlx bare": (computed("low_rank", (4, 4), "gate"), "weights"),
    "mlx expert": (computed("low_rank", (4, 4), "l.0.mlp.experts.1.up_proj.weight"), "single ones"),
    "mlx experts": (computed("experts", (2, 4, 4), "l.0.mlp.experts.inner"), "gate_up_proj"),
    "mlx lokr": (computed("lokr", (4, 4)), "LoKr"),
    "gguf conv": (computed("low_rank", (4, 4, 3, 3)), "no such matrix"),
    "gguf head": (computed("low_rank", (4, 4), "score.weight"), "no such matrix"),
    "gguf experts": (
        computed("experts", (2, 4, 4), "model.layers.0.mlp.experts.inner"), "no such experts",
    ),
    "gguf rows": (computed("rows", (4, 4)), "rows"),
    "gguf heads": (
        computed("low_rank", (6, 4), "model.layers.0.self_attn.q_proj.weight"), "2 heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_first(case: str, base: Path, tmp_path: Path) -> None:
    update, word = REFUSED[case]
    config = open_checkpoint(base).config
    adapter = Adapter({update.name: update}, base_config=config)
    with pytest.raises(MismatchError, match=rf"(?s){update.name}.*{word}"):
        save_adapter(adapter, tmp_path / "out", Drain("serial"), case.split()[0])
    assert not (tmp_path / "out").exists()


def test_mlx_has_one_kind_of_layer(tmp_path: Path) -> None:
    one, other = computed("low_rank", (4, 4), "a.weight"), computed("dora", (4, 4), "b.weight")
    whole = computed("replacement", (4,), "c.weight")
    with pytest.raises(MismatchError, match=r"a.weight: MLX has either DoRA or LoRA"):
        adapter = Adapter({u.name: u for u in (one, other)})
        save_adapter(adapter, tmp_path / "out", Drain("serial"), "mlx")
    with pytest.raises(MismatchError, match=r"c.weight: MLX takes either updates or whole"):
        adapter = Adapter({u.name: u for u in (one, whole)})
        save_adapter(adapter, tmp_path / "out", Drain("serial"), "mlx")


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_written(form: str, base: Path, tmp_path: Path) -> None:
    factors = typed(torch.float32)
    factors["model.layers.1.mlp.up_proj"][0][1, 2] = torch.nan
    source = write_adapter(tmp_path / "peft", factors)
    with pytest.raises(InputError, match=r"up_proj.weight: its factors hold NaN or Inf"):
        convert(source, form, tmp_path / form, open_checkpoint(base))
    assert not (tmp_path / form).exists()


def test_what_was_tried_is_listed_with_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"weight": torch.ones(2)}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError) as caught:
        open_adapter(folder)
    lines = str(caught.value).splitlines()
    assert "holds no adapter that loratool can read" in lines[0]
    assert lines[0].endswith("tried:")
    reasons = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert reasons.keys() >= {"peft", "loralib", "mlx", "gguf"}
    assert reasons["peft"] == "peft_type is missing in adapter_config.json"
    assert reasons["mlx"] == "keys are not *.lora_a / *.lora_b"
    assert reasons["gguf"] == "not one .gguf file"


@pytest.mark.parametrize("file", ["x.safetensors", "x.pt"])
def test_keys_of_two_formats_are_named(file: str, tmp_path: Path) -> None:
    state = {
        "a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2),
        "b.lora_down.weight": torch.ones(2, 3), "b.lora_up.weight": torch.ones(3, 2),
    }  # fmt: skip
    if file.endswith("pt"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    pattern = r"keys of two formats, a\.lora_A \(loralib\) and b\.lora_down\.weight \(kohya\)"
    with pytest.raises(FormatError, match=pattern):
        open_adapter(tmp_path / file)


def test_two_formats_that_claim_a_path_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2)}, tmp_path / "x.pt")
    other = plugins.load("adapter_formats", "mlx")
    monkeypatch.setattr(other, "objection", lambda self, path: "")
    with pytest.raises(FormatError, match="could be of the formats loralib and mlx"):
        open_adapter(tmp_path / "x.pt")
    monkeypatch.setattr(
        plugins.load("adapter_formats", "loralib"), "refines", frozenset({"mlx"}), raising=False
    )
    assert list(open_adapter(tmp_path / "x.pt")) == ["a.weight"]


def test_a_peft_folder_is_peft_alone(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "peft", typed(torch.float32))
    assert format_of("adapter_formats", folder) == "peft"
    # Weights of another trainer beside it change nothing.
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(1)}, folder / "adapter_model.pt")
    assert format_of("adapter_formats", folder) == "peft"


def test_facts_that_files_tell_already_are_not_taken(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "peft", typed(torch.float32))
    adapter = open_adapter(folder)
    assert adapter.reread(FormatOptions()) is adapter
    with pytest.raises(InputError, match="says itself what --enable-lora would say"):
        adapter.reread(FormatOptions(enable_lora=(True,)))


def test_changed_updates_are_not_read_again(tmp_path: Path) -> None:
    torch.save({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2)}, tmp_path / "x.pt")
    adapter = open_adapter(tmp_path / "x.pt")
    told = adapter.reread(FormatOptions(alpha=8.0))
    update = told["a.weight"].load()
    assert isinstance(update, LowRank)
    assert update.scale == 4.0
    assert not any("alpha" in note for note in told.notes)
    changed = replace(adapter, updates=dict(adapter.updates))
    with pytest.raises(InputError, match="leave that out"):
        changed.reread(FormatOptions(alpha=8.0))


# Hostile input, format by format


def loralib_file(tmp_path: Path, **changes: Any) -> Path:
    state: dict[str, Any] = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2)}
    state |= changes
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    ("changes", "tensor", "word"),
    [
        ({"a.lora_B": None}, "a.lora_B", "missing, but lora_A is there"),
        ({"a.lora_A": None}, "a.lora_A", "missing, but lora_B is there"),
        ({"a.lora_B": torch.ones(3, 4)}, "a", "different ranks"),
        ({"a.lora_B": torch.ones(3)}, "a.lora_B", "is no factor"),
        ({"a.lora_B": torch.ones(3, 0)}, "a.lora_B", "is no factor"),
        ({"a.lora_A": torch.ones(2, 3).int()}, "a.lora_A", "is no factor"),
        ({"a.lora_A": torch.ones(4, 3)}, "a", "updates 2 slots"),
    ],
)
def test_loralib_complains(changes: dict[str, Any], tensor: str, word: str, tmp_path: Path) -> None:
    (problem,) = open_adapter(loralib_file(tmp_path, **changes)).problems
    assert (problem.severity, problem.tensor) == ("error", tensor)
    assert word in problem.message


def test_loralib_unpickles_tensors_alone(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("run",))

    torch.save({"a.lora_A": torch.ones(2, 3), "x": Trap()}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="is refused, because loading it may run code"):
        open_adapter(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "ours",
    ["[", "[]", {"folds": 3}, {"folds": {"a": [0.0, "F32"]}}, {"folds": {"a": [1, "I8"]}},
     {"dropped": [1]}, {"tied": 3}, {"moves": [["a"]]}],
)  # fmt: skip
def test_damaged_metadata_is_an_error(ours: Any, tmp_path: Path) -> None:
    state = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2)}
    text = ours if isinstance(ours, str) else json.dumps(ours)
    save_file(state, tmp_path / "x.safetensors", metadata={"loratool": text})
    with pytest.raises(FormatError, match=r"x\.safetensors: its .*metadata"):
        open_adapter(tmp_path / "x.safetensors")


def mlx_folder(
    folder: Path, settings: Mapping[str, Any] | str | None = None, **changes: Any
) -> Path:
    folder.mkdir()
    state: dict[str, Any] = {"a.lora_a": torch.ones(3, 2), "a.lora_b": torch.ones(2, 5)}
    state |= changes
    kept = {k: v for k, v in state.items() if v is not None}
    save_file(kept, folder / "adapters.safetensors")
    if settings is None:
        settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "adapter_config.json").write_text(text)
    return folder


DORA = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 2.0}}


@pytest.mark.parametrize(
    ("settings", "changes", "word"),
    [
        (None, {"a.lora_b": None}, "missing, but lora_a is there"),
        (None, {"a.lora_b": torch.ones(3, 5)}, "no factors of one rank"),
        (None, {"a.lora_a": torch.ones(3)}, "no factors of one rank"),
        (None, {"a.lora_a": torch.ones(3, 2).int()}, "is no factor"),
        (None, {"a.m": torch.ones(5)}, "has an m, but the config says lora"),
        (DORA, {}, "the config says dora, but there is no m"),
        (DORA, {"a.m": torch.ones(4)}, "does not fit"),
        ({"lora_parameters": {"rank": 4, "scale": 1}}, {}, "gives it another rank"),
        (None, {"a.lora_b": torch.ones(4, 5, 2)}, "no factors of the experts"),
        (None, {"a.lora_a": torch.ones(4, 2, 3), "a.lora_b": torch.ones(4, 5, 2)}, "switch_mlp"),
    ],
)
def test_mlx_complains(settings: Any, changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    (problem,) = open_adapter(mlx_folder(tmp_path / "x", settings, **changes)).problems
    assert problem.severity == "error"
    assert word in problem.message


def test_mlx_assumes_its_own_scale_and_says_so(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "x", {"lora_parameters": {"rank": 2, "alpha": 16}})
    adapter = open_adapter(folder)
    assert "does not say scale: taken as MLX's default 20" in adapter.notes[0]
    update = adapter["a.weight"].load()
    assert isinstance(update, LowRank)
    assert update.scale == 20.0
    (folder / "adapter_config.json").unlink()
    assert "there is no adapter_config.json" in open_adapter(folder).notes[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ("{", "not valid JSON"),
        ({"lora_parameters": {"scale": "much"}}, "scale must be a finite number"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "rank must be a whole number"),
        ({"lora_parameters": [1]}, "lora_parameters is no object"),
        ({"fine_tune_type": "lokr"}, "fine_tune_type is 'lokr'"),
    ],
)
def test_mlx_refuses_a_wrong_config(settings: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"adapter_config\.json: .*{word}"):
        open_adapter(mlx_folder(tmp_path / "x", settings))


def gguf_file(tmp_path: Path, tensors: Mapping[str, torch.Tensor], alpha: Any = 4.0) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if isinstance(alpha, str):
        writer.add_string("adapter.lora.alpha", alpha)
    else:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


UP = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("tensors", "tensor", "word"),
    [
        ({f"{UP}.lora_a": (2, 4)}, f"{UP}.lora_b", "missing, but lora_a is there"),
        ({f"{UP}.lora_a": (2, 4), f"{UP}.lora_b": (4, 3)}, UP, "no factors of one rank"),
        ({f"{UP}.lora_a": (2, 4), f"{UP}.lora_b": (4,)}, UP, "no factors of one rank"),
        ({"blk.0.foo.weight.lora_a": (2, 4), "blk.0.foo.weight.lora_b": (4, 2)},
         "blk.0.foo.weight", "no qwen2 model has such a tensor"),
        ({"token_embd.weight": (4, 4)}, "token_embd.weight", "unexpected tensor"),
    ],
)  # fmt: skip
def test_gguf_complains(
    tensors: Mapping[str, tuple[int, ...]], tensor: str, word: str, tmp_path: Path
) -> None:
    file = gguf_file(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()})
    (problem,) = open_adapter(file).problems
    assert (problem.severity, problem.tensor) == ("error", tensor)
    assert word in problem.message


def test_gguf_refuses_an_alpha_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"adapter\.lora\.alpha must be a finite number"):
        open_adapter(gguf_file(tmp_path, {}, "much"))
    with pytest.raises(FormatError, match=r"adapter\.lora\.alpha must be a finite number"):
        open_adapter(gguf_file(tmp_path, {}, float("nan")))


def test_mergekits_norms_are_replaced(tmp_path: Path) -> None:
    file = gguf_file(tmp_path, {"blk.1.attn_norm.weight": torch.full((4,), 3.0)})
    (update,) = open_adapter(file).values()
    assert update.name == "model.layers.1.input_layernorm.weight"
    assert update.kind == "replacement"


def test_peft_names_stay(tmp_path: Path) -> None:
    """The prefix is PEFT's own; no other format writes it."""
    source = write_adapter(tmp_path / "peft", typed(torch.float32))
    there = convert(source, "mlx", tmp_path / "mlx")
    assert not any(name.startswith(PREFIX) for name in load_file(there / "adapters.safetensors"))

"""Diffusers folders: opened as one checkpoint, written back so that diffusers loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.checkpoint import Checkpoint
from loratool.errors import FormatError, InputError, MismatchError, UsageError
from loratool.files import Mirror, add_mirror
from loratool.opening import open_checkpoint
from tests.cli.tiny import done, names, refused, snapshot, write_index
from tests.cli.tiny import loratool as command
from tests.diffusion import pipelines
from tests.diffusion.pipelines import KINDS
from tests.peft_files import random_factors, write_adapter

UNET = "unet/diffusion_pytorch_model.safetensors"
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.encoder.layers.0.mlp.fc1"
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Kind -> a saved pipeline with a tokenizer's folder and a README."""

    @cache
    def save(kind: str) -> Path:
        folder = pipelines.save(kind, tmp_path_factory.mktemp(kind) / kind)
        (folder / "README.md").write_text("A pipeline.")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "merges.txt").write_text("a b")
        (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
        return folder

    return save


@pytest.fixture
def sd(saved: Saved, tmp_path: Path) -> Path:
    """A copy of a Stable Diffusion 1 folder, to be changed."""
    return shutil.copytree(saved("sd1"), tmp_path / "sd")


def linears(base: Checkpoint, *starts: str) -> dict[str, tuple[int, int]]:
    """The linear modules of some components."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in base.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and name.startswith(starts)
        if not any(table in name for table in ("embeddings", "shared", "relative_attention"))
    }


def adapter(folder: Path, base: Path, *starts: str, seed: int = 0) -> Path:
    """An adapter of rank 2 for every linear module of some components."""
    shapes = linears(open_checkpoint(base), *(starts or ("unet", "transformer", "text_encoder")))
    return write_adapter(folder, random_factors(shapes, 2, seed))


def small_adapter(folder: Path) -> Path:
    return write_adapter(folder, random_factors({QUERY: (8, 8), TEXT: (24, 16)}, 2, 0))


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Module -> B @ A of an adapter that was written here."""
    stored = load_file(path / "adapter_model.safetensors")
    start = "base_model.model."
    modules = {key.removeprefix(start).rpartition(".lora_")[0] for key in stored}
    return {
        module: stored[f"{start}{module}.lora_B.weight"].double()
        @ stored[f"{start}{module}.lora_A.weight"].double()
        for module in modules
    }


def values(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_checkpoint(path).items()}


def parameters(kind: str, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """What diffusers loads, by component and parameter."""
    loaded = pipelines.load(kind, folder, **settings)
    return {
        f"{component}.{name}": value
        for component, model in loaded.components.items()
        if isinstance(model, torch.nn.Module)
        for name, value in model.state_dict().items()
    }


def as_torch(folder: Path) -> Path:
    """The same weights in .bin files."""
    for file in [*folder.glob("*/*.safetensors")]:
        name = file.name.replace("model.safetensors", "model.bin")
        if not name.startswith("diffusion_"):
            name = f"pytorch_{name}"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    return folder


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def same_names(path: Path, other: Path) -> None:
    """Both hold the same files, records aside."""
    found, wanted = (
        {name for name in files(folder) if not name.startswith("loratool-record")}
        for folder in (path, other)
    )
    assert found == wanted


def same(path: Path, other: Path) -> None:
    """Both hold the same files, records aside, with the same tensors in them."""
    same_names(path, other)
    found, wanted = values(path), values(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_parts_of_one_checkpoint(kind: str, saved: Saved) -> None:
    folder = saved(kind)
    found = open_checkpoint(folder)
    models = pipelines.components(kind)
    assert found.components.keys() == models.keys()
    assert found.config is not None
    assert found.config["_class_name"] == type(pipelines.pipeline(kind)).__name__
    for component, model in models.items():
        inside = load_files(folder / component)
        start = f"{component}."
        own = {n.removeprefix(start): t for n, t in found.items() if n.startswith(start)}
        assert own.keys() == inside.keys()
        assert all(torch.equal(own[name].read(), value) for name, value in inside.items())
        assert all(tensor.name == f"{component}.{name}" for name, tensor in own.items())
        config = found.components[component]
        assert config is not None
        name = config.get("_class_name") or config["architectures"][0]
        assert name == type(model).__name__
        assert {found.shards[f"{component}.{n}"].partition("/")[0] for n in own} == {component}
    kept = {name for name in files(folder) if not name.endswith(".safetensors")}
    assert set(found.side_files) == kept
    assert not found.notes


def load_files(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def test_opening_reads_headers_only(saved: Saved) -> None:
    code = (
        "import sys, loratool.opening as o; o.open_checkpoint(sys.argv[1]); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved("sd1"))], check=True)


def test_headers_of_a_folder_elsewhere_bring_no_weights(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.files._mirrors", {})
    source, folder = saved("sd1"), tmp_path / "mirror"
    sizes = {name: (source / name).stat().st_size for name in files(source)}
    brought: list[str] = []
    folder.mkdir()

    def start(name: str, count: int) -> bytes:
        return (source / name).read_bytes()[:count]

    def fetch(name: str) -> None:
        brought.append(name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)

    add_mirror(Mirror("me/sd", folder, sizes, start, fetch))
    found = open_checkpoint(folder)
    assert found.keys() == open_checkpoint(source).keys()
    assert not [name for name in brought if not name.endswith(".json")]
    assert torch.equal(found[f"{QUERY}.weight"].read(), values(source)[f"{QUERY}.weight"])
    assert [name for name in brought if not name.endswith(".json")] == [UNET]


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_component_alone_has_its_own_names(component: str, saved: Saved) -> None:
    found = open_checkpoint(saved("sd1") / component)
    assert found.keys() == load_files(saved("sd1") / component).keys()
    assert not found.components


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_is_loaded_by_diffusers(kind: str, saved: Saved, tmp_path: Path) -> None:
    base = saved(kind)
    lora = adapter(tmp_path / "lora", base)
    report = loratool.validate(lora, base)
    assert report.data["ok"]
    loratool.merge(base, [(lora, 0.5)]).save(tmp_path / "merged")
    same_names(tmp_path / "merged", base)
    before, after = parameters(kind, base), parameters(kind, tmp_path / "merged")
    changes = {f"{module}.weight": delta for module, delta in deltas(lora).items()}
    assert changes.keys() <= before.keys()
    for name, value in before.items():
        wanted = (value.double() + 0.5 * changes[name]).float() if name in changes else value
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-7)
    assert loratool.validate(lora, base, tmp_path / "merged", weight=0.5).data["ok"]


def test_it_is_what_diffusers_fuses(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    lora = adapter(tmp_path / "lora", base)
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "merged")
    stored = load_file(lora / "adapter_model.safetensors")
    fused = pipelines.load("sd1", base)
    fused.load_lora_weights({n.removeprefix("base_model.model."): t for n, t in stored.items()})
    fused.fuse_lora()
    fused.unload_lora_weights()
    merged = pipelines.load("sd1", tmp_path / "merged")
    for component in ("unet", "text_encoder"):
        wanted = getattr(fused, component).state_dict()
        found = getattr(merged, component).state_dict()
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_untouched_components_are_copied_as_they_are(saved: Saved, tmp_path: Path) -> None:
    base = saved("sdxl")
    lora = adapter(tmp_path / "lora", base, "text_encoder_2")
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "merged")
    before, after = snapshot(base), snapshot(tmp_path / "merged")
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {"text_encoder_2/model.safetensors"}


def test_shards_and_their_indexes_stay(tmp_path: Path) -> None:
    base = pipelines.save("sd1", tmp_path / "base", max_shard_size="20KB")
    opened = open_checkpoint(base)
    assert {name.partition("/")[0] for name in opened.index_files} == set(opened.components)
    lora = adapter(tmp_path / "lora", base)
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "merged")
    same_names(tmp_path / "merged", base)
    for name in opened.index_files:
        one, other = (json.loads((f / name).read_text()) for f in (base, tmp_path / "merged"))
        assert one["weight_map"] == other["weight_map"]
        assert one["metadata"]["total_size"] == other["metadata"]["total_size"]
    assert parameters("sd1", tmp_path / "merged").keys() == parameters("sd1", base).keys()


def test_new_shards_are_those_of_each_component(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    lora = adapter(tmp_path / "lora", base)
    loratool.merge(base, [(lora, 1.0)], max_shard_size="20KB").save(tmp_path / "merged")
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "whole")
    assert names(tmp_path / "merged" / "unet") == [
        "config.json",
        *(f"diffusion_pytorch_model-0000{n}-of-00008.safetensors" for n in range(1, 9)),
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert names(tmp_path / "merged" / "text_encoder") == [
        "config.json",
        *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2)),
        "model.safetensors.index.json",
    ]
    scheduler = names(tmp_path / "merged" / "scheduler")
    assert scheduler == names(base / "scheduler")
    found = parameters("sd1", tmp_path / "merged")
    wanted = parameters("sd1", tmp_path / "whole")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_torch_files_become_safetensors(sd: Path, tmp_path: Path) -> None:
    wanted = values(sd)
    base = as_torch(sd)
    assert (base / "text_encoder" / "pytorch_model.bin").is_file()
    assert values(base).keys() == wanted.keys()
    lora = small_adapter(tmp_path / "lora")
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "merged")
    assert (tmp_path / "merged" / UNET).is_file()
    assert (tmp_path / "merged" / "text_encoder" / "model.safetensors").is_file()
    assert not list((tmp_path / "merged").rglob("*.bin"))
    found = parameters("sd1", tmp_path / "merged")
    rest = {f"{module}.weight" for module in (QUERY, TEXT)}
    assert all(torch.equal(found[n], value) for n, value in wanted.items() if n not in rest)


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_a_variant_alone_is_the_model(shards: str | None, tmp_path: Path) -> None:
    settings = {"max_shard_size": shards} if shards else {}
    base = pipelines.save("sd1", tmp_path / "base", variant="fp16", **settings)
    assert all(".fp16" in name for name in files(base) if "safetensors" in name)
    lora = adapter(tmp_path / "lora", base)
    merged = tmp_path / "merged"
    loratool.merge(base, [(lora, 1.0)]).save(merged)
    same_names(merged, base)
    assert parameters("sd1", merged, variant="fp16").keys() == values(base).keys()
    loratool.merge(base, [(lora, 1.0)], max_shard_size="20KB").save(tmp_path / "smaller")
    found = parameters("sd1", tmp_path / "smaller", variant="fp16")
    wanted = parameters("sd1", merged, variant="fp16")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_older_names_of_sharded_variants_are_read(tmp_path: Path) -> None:
    base = pipelines.save("sd1", tmp_path / "base", max_shard_size="20KB")
    wanted = values(base)
    folder = base / "unet"
    for file in [*folder.glob("*.safetensors")]:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = index.read_text().replace(".safetensors", ".fp16.safetensors")
    index.unlink()
    (folder / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(content)
    assert values(base).keys() == wanted.keys()


def test_main_weights_win_over_variants(sd: Path, tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        file = sd / "unet" / f"diffusion_pytorch_model.{variant}.safetensors"
        save_file({"x": torch.ones(1)}, file)
    torch.save({"x": torch.ones(1)}, sd / "unet" / "diffusion_pytorch_model.bin")
    found = open_checkpoint(sd)
    assert "unet.x" not in found
    assert found.notes == ("variants beside the main weights are left out: unet (fp16, non_ema)",)
    loratool.merge(sd, [(small_adapter(tmp_path / "lora"), 1.0)]).save(tmp_path / "merged")
    assert names(tmp_path / "merged" / "unet") == ["config.json", Path(UNET).name]
    assert open_checkpoint(sd / "unet").notes == found.notes


def test_a_single_file_beside_the_folders_is_not_the_model(sd: Path) -> None:
    save_file({"x": torch.ones(1)}, sd / "v1-5-pruned.safetensors")
    found = open_checkpoint(sd)
    assert found.components
    assert "v1-5-pruned.safetensors" not in found.side_files


def test_the_dtype_is_told_where_configs_tell_it(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    lora = small_adapter(tmp_path / "lora")
    loratool.merge(base, [(lora, 1.0)], dtype="fp16").save(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "merged").values()} == {"F16"}
    for name in ("model_index.json", "unet/config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_unmerge_restores_every_file(shards: str | None, tmp_path: Path) -> None:
    settings = {"max_shard_size": shards} if shards else {}
    base = pipelines.save("sd1", tmp_path / "base", **settings)
    lora = adapter(tmp_path / "lora", base)
    merged = tmp_path / "merged"
    loratool.merge(base, [(lora, 1.0)], reversible=True).save(merged)
    loaded = parameters("sd1", merged)
    assert not torch.equal(loaded[f"{QUERY}.weight"], values(base)[f"{QUERY}.weight"])
    loratool.unmerge(merged).save(tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == snapshot(base)


def test_one_of_two_adapters_is_taken_out(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    one = adapter(tmp_path / "one", base, seed=1)
    two = adapter(tmp_path / "two", base, "text_encoder", seed=2)
    merged = tmp_path / "merged"
    loratool.merge(base, [(one, 1.0), (two, 0.5)], reversible=True).save(merged)
    loratool.unmerge(merged, only=["one"]).save(tmp_path / "left")
    loratool.merge(base, [(two, 0.5)], reversible=True).save(tmp_path / "wanted")
    same(tmp_path / "left", tmp_path / "wanted")


def test_without_a_record_the_adapter_is_subtracted(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    lora = adapter(tmp_path / "lora", base)
    loratool.merge(base, [(lora, 1.0)]).save(tmp_path / "merged")
    loratool.unmerge(tmp_path / "merged", [(lora, 1.0)], base).save(tmp_path / "restored")
    same_names(tmp_path / "restored", base)
    found = values(tmp_path / "restored")
    for name, value in values(base).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_adapters_are_switched_in_place(saved: Saved, tmp_path: Path) -> None:
    base = saved("sd1")
    one, two = adapter(tmp_path / "one", base, seed=1), adapter(tmp_path / "two", base, "unet")
    merged = tmp_path / "merged"
    loratool.merge(base, [(one, 1.0)], reversible=True).save(merged)
    untouched = (merged / "vae" / "diffusion_pytorch_model.safetensors").stat().st_ino
    loratool.switch(merged, [(two, 1.0)])
    loratool.merge(base, [(two, 1.0)]).save(tmp_path / "wanted")
    same(merged, tmp_path / "wanted")
    assert (merged / "vae" / "diffusion_pytorch_model.safetensors").stat().st_ino == untouched
    loratool.unmerge(merged).save(tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == snapshot(base)


def test_an_interrupted_switch_is_no_model(saved: Saved, sd: Path) -> None:
    (sd / ".loratool-switch").mkdir()
    (sd / ".loratool-switch" / "commit.json").write_text("{}")
    for folder in (sd, sd / "unet"):
        if folder != sd:
            shutil.copytree(sd / ".loratool-switch", folder / ".loratool-switch")
        with pytest.raises(FormatError, match="interrupted"):
            open_checkpoint(folder)


def tuned_copy(base: Path, folder: Path, *starts: str) -> Path:
    """A pipeline whose linear modules of some components differ by rank 2."""
    lora = adapter(folder.with_name(f"{folder.name}-lora"), base, *starts, seed=5)
    loratool.merge(base, [(lora, 1.0)]).save(folder)
    return folder


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_extract_and_merge_go_over_components(kind: str, saved: Saved, tmp_path: Path) -> None:
    base = saved(kind)
    tuned = tuned_copy(base, tmp_path / "tuned")
    lora = tmp_path / "lora"
    report = loratool.extract(base, tuned, rank=2).save(lora)
    extracted = loratool.merge(base, [(lora, 1.0)])
    extracted.save(tmp_path / "merged")
    wanted, found = values(tuned), values(tmp_path / "merged")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert {facts["kind"] for facts in report.data["tensors"].values()} == {"low_rank"}
    modules = {name.removesuffix(".weight") for name in report.data["tensors"]}
    assert modules == set(linears(open_checkpoint(base), "transformer", "unet", "text_encoder"))
    assert report.data["dropped"] == []
    assert not (lora / "model").exists()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "merged" / vae).read_bytes() == (base / vae).read_bytes()


def test_a_fine_tune_may_hold_some_of_the_components(saved: Saved, tmp_path: Path) -> None:
    """What it does not hold is not changed; a single component counts, too."""
    base = saved("sd1")
    tuned = tuned_copy(base, tmp_path / "tuned", "unet")
    index = json.loads((tuned / "model_index.json").read_text())
    (tuned / "model_index.json").write_text(
        json.dumps({k: v for k, v in index.items() if k not in ("vae", "text_encoder")})
    )
    for number, source in enumerate((tuned, tuned / "unet")):
        lora = tmp_path / f"lora-{number}"
        loratool.extract(base, source, rank=2).save(lora)
        loratool.merge(base, [(lora, 1.0)]).save(tmp_path / f"merged-{number}")
        same_names(tmp_path / f"merged-{number}", base)
        found = values(tmp_path / f"merged-{number}")
        wanted = values(base) | values(tuned)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_norms_and_tables_are_kept_whole_and_convolutions_get_factors(
    saved: Saved, tmp_path: Path
) -> None:
    base = saved("sd1")
    changed = ("unet.conv_in.weight", "unet.conv_norm_out.bias", "vae.post_quant_conv.weight",
               "text_encoder.embeddings.token_embedding.weight")  # fmt: skip
    tuned = shutil.copytree(base, tmp_path / "tuned")
    for name in changed:
        component, _, inside = name.partition(".")
        (file,) = (tuned / component).glob("*.safetensors")
        state = load_file(file)
        state[inside] += 0.25
        save_file(state, file, metadata={"format": "pt"})
    report = loratool.extract(base, tuned, rank=2).save(tmp_path / "lora")
    kinds = {n: f["kind"] for n, f in report.data["tensors"].items()}
    assert kinds.keys() == set(changed)
    convolutions = {"unet.conv_in.weight", "vae.post_quant_conv.weight"}
    assert {n for n, kind in kinds.items() if kind == "low_rank"} == convolutions
    loratool.merge(base, [(tmp_path / "lora", 1.0)]).save(tmp_path / "merged")
    wanted, found = values(tuned), values(tmp_path / "merged")
    for name, value in wanted.items():
        if name in convolutions:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], value)


def test_settings_that_no_adapter_carries_are_told(saved: Saved, sd: Path) -> None:
    tuned = sd
    scheduler = tuned / "scheduler" / "scheduler_config.json"
    content = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**content, "prediction_type": "v_prediction"}))
    index = tuned / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "_name_or_path": "elsewhere"}))
    notes = loratool.extract(saved("sd1"), tuned).notes
    told = [note for note in notes if "settings" in note]
    assert told == [
        "the adapter does not carry settings in which the fine-tune differs: "
        "scheduler/scheduler_config.json"
    ]


def test_inspect_shows_the_components(saved: Saved) -> None:
    result = done(command("inspect", saved("sdxl")))
    text = result.out + result.err
    assert "architecture: StableDiffusionXLPipeline" in text
    assert "diffusion model of the kind sdxl" in text
    assert "component text_encoder_2: CLIPTextModelWithProjection, 37 tensors" in text
    data = done(command("inspect", "--json", saved("sdxl"))).data
    found = open_checkpoint(saved("sdxl"))
    assert data["format"] == "diffusers"
    assert set(data["components"]) == set(found.components)
    assert data["components"]["unet"]["architecture"] == "UNet2DConditionModel"
    assert sum(facts["parameters"] for facts in data["components"].values()) == data["parameters"]
    unet = done(command("inspect", "--json", saved("sdxl") / "unet")).data
    assert unet["architecture"] == "UNet2DConditionModel"
    assert unet["components"] == {}


def remove(folder: Path, *parts: str) -> None:
    for part in parts:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def two_variants(folder: Path) -> None:
    for variant in ("fp16", "bf16"):
        file = folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors"
        shutil.copyfile(folder / UNET, file)
    remove(folder, UNET)


def lying_index(folder: Path) -> None:
    write_index(folder / "vae", {"x": "diffusion_pytorch_model.safetensors"},
                "diffusion_pytorch_model.safetensors")  # fmt: skip


def index_of_nothing(folder: Path) -> None:
    write_index(folder / "vae", {"x": "x-00001.safetensors"}, "diffusion_pytorch_model.safetensors")


def edit_index(folder: Path, **changes: Any) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def nothing_named(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def damaged(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:100])


BAD: Mapping[str, tuple[Callable[[Path], object], Iterable[str]]] = {
    "a component is missing": (
        lambda folder: remove(folder, "unet"),
        ["/unet: missing, but model_index.json names it (diffusers, UNet2DConditionModel)"],
    ),
    "a scheduler is missing": (
        lambda folder: remove(folder, "scheduler"),
        ["/scheduler: missing, but model_index.json names it (diffusers, DDIMScheduler)"],
    ),
    "two components are missing": (
        lambda folder: remove(folder, "unet", "vae"),
        ["2 components cannot be opened", "/unet: missing", "/vae: missing"],
    ),
    "a component has no weights": (
        lambda folder: remove(folder, UNET),
        ["/unet: holds no weights (diffusion_pytorch_model.safetensors or model.safetensors"],
    ),
    "a component has two variants": (
        two_variants,
        ["/unet: holds the variants bf16, fp16 and no main weights", "move all but one"],
    ),
    "an index contradicts its file": (
        lying_index,
        ["/vae/diffusion_pytorch_model.safetensors: x: the index says that this file holds it"],
    ),
    "an index names a missing file": (
        index_of_nothing,
        ["/vae/x-00001.safetensors: missing, but diffusion_pytorch_model.safetensors.index.json"],
    ),
    "a file is cut short": (damaged, [f"/{UNET}: "]),
    "a component is outside": (
        lambda folder: edit_index(folder, **{"../unet": ["diffusers", "UNet2DConditionModel"]}),
        ["'../unet' is not the name of a component"],
    ),
    "no component is named": (nothing_named, ["names no component that holds weights"]),
    "the index is no JSON": (
        lambda folder: (folder / "model_index.json").write_text("{"),
        ["model_index.json: is not valid JSON"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, sd: Path) -> None:
    spoil, words = BAD[case]
    spoil(sd)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(sd)
    for word in words:
        assert word in str(caught.value)
    refused(command("inspect", sd), *words)


def test_parts_without_weights_need_none(sd: Path) -> None:
    """Absent parts are [null, null]; a custom pipeline names itself."""
    edit_index(
        sd,
        safety_checker=[None, None],
        requires_safety_checker=False,
        tokenizer=["transformers", "CLIPTokenizer"],
        _class_name=["pipeline", "Mine"],
    )
    found = open_checkpoint(sd)
    assert set(found.components) == {"text_encoder", "unet", "vae"}


def test_what_belongs_to_no_component_cannot_be_added(saved: Saved, tmp_path: Path) -> None:
    extra = {"image_encoder.proj.weight": torch.ones(2, 2)}
    lora = write_adapter(tmp_path / "lora", random_factors({QUERY: (8, 8)}, 1, 0), whole=extra)
    with pytest.raises(MismatchError, match=r"image_encoder\.proj\.weight: belongs to none of its"):
        loratool.merge(saved("sd1"), [(lora, 1.0)])


def test_files_of_another_model_are_left_out(saved: Saved, tmp_path: Path) -> None:
    lora = small_adapter(tmp_path / "lora")
    (lora / "model").mkdir()
    (lora / "model" / "config.json").write_text('{"model_type": "clip_text_model"}')
    merged = loratool.merge(saved("sd1"), [(lora, 1.0)])
    assert any("its files under model/ are left out" in note for note in merged.notes)
    merged.save(tmp_path / "merged")
    same_names(tmp_path / "merged", saved("sd1"))


def test_what_only_models_of_transformers_can_is_refused(saved: Saved) -> None:
    with pytest.raises(InputError, match="only models of transformers can be exported"):
        loratool.export(saved("sd1"))
    with pytest.raises(UsageError, match="a diffusers model tells its class"):
        loratool.merge(saved("sd1"), [], architecture="BertModel")
    refused(command("push", saved("sd1"), "me/sd", "--dry-run"), "cannot be published yet")

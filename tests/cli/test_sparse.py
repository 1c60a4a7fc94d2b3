"""Single entries beside factors at the terminal: what extract, merge and others make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.tiny import Tensors, done, llama, loratool, refused, save_model, snapshot

QUERY = "model.layers.0.self_attn.q_proj.weight"


def changed(tensors: Tensors, share: float) -> Tensors:
    """The projections with a share of the weights changed, at full rank."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, value in tensors.items():
        if "_proj" in name:
            change = 0.02 * torch.randn(value.shape, generator=generator)
            change *= torch.rand(value.shape, generator=generator) < share
            value = (value.float() + change).to(value.dtype)
        found[name] = value
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `tuned`, its adapter of rank 4 with `entries` and one of factors alone, `plain`."""
    root = tmp_path_factory.mktemp("sparse")
    base = llama(64, torch.bfloat16)
    save_model(root / "base", base)
    save_model(root / "tuned", changed(base, 0.1))
    for name, options in {"entries": ("--sparse", 0.1), "plain": ()}.items():
        given = (root / "base", root / "tuned", "--rank", 4, *options)
        done(loratool("extract", *given, "-o", root / name))
    return root


def model(path: Path) -> Tensors:
    found: Tensors = load_file(path / "model.safetensors")
    return found


def error(one: Tensors, other: Tensors, base: Tensors) -> float:
    """||one - other|| as a share of what `one` is from the base."""
    left = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    whole = sum(float((one[n].double() - base[n].double()).square().sum()) for n in one)
    return float((left / whole) ** 0.5)


def test_what_is_told_is_what_a_merge_gives(folder: Path, tmp_path: Path) -> None:
    """Bits of the merged weights are rounded, so that energies agree to that."""
    base, tuned = model(folder / "base"), model(folder / "tuned")
    for name in ("entries", "plain"):
        out = tmp_path / name
        done(loratool("merge", folder / "base", folder / name, "--dtype", "fp32", "-o", out))
        energy = json.loads((folder / name / "loratool.json").read_text())["totals"]["energy"]
        assert 1 - error(tuned, model(out), base) ** 2 == pytest.approx(energy, abs=1e-4)
    totals = json.loads((folder / "entries/loratool.json").read_text())["totals"]
    assert totals["energy"] > 0.95
    assert totals["energy_of_factors"] == pytest.approx(energy, abs=1e-6)
    held = sum(t.numel() for n, t in entries_of(folder).items() if n.endswith("values"))
    assert totals["entries"] == held
    size = sum(t.nbytes for t in entries_of(folder).values())
    assert totals["entry_bytes"] == size


def entries_of(folder: Path) -> Tensors:
    found: Tensors = load_file(folder / "entries/sparse.safetensors")
    return found


def test_a_number_of_entries(folder: Path, tmp_path: Path) -> None:
    given = (folder / "base", folder / "tuned", "--sparse", 7, "-o", tmp_path / "o", "--json")
    data = done(loratool("extract", *given)).data
    assert {facts["entries"] for facts in data["tensors"].values()} == {7}
    assert data["options"]["sparse"] == 7


def test_merge_reversibly_switch_and_unmerge(folder: Path, tmp_path: Path) -> None:
    given = (folder / "base", folder / "entries=0.7", folder / "plain=-0.2", "--reversible")
    done(loratool("merge", *given, "-o", tmp_path / "merged"))
    done(loratool("unmerge", tmp_path / "merged", "-o", tmp_path / "back"))
    assert model_bytes(tmp_path / "back") == model_bytes(folder / "base")
    alone = ("merge", folder / "base", folder / "plain", "--reversible", "-o", tmp_path / "alone")
    done(loratool(*alone))
    done(loratool("switch", tmp_path / "merged", "--to", folder / "plain"))
    assert model_bytes(tmp_path / "merged") == model_bytes(tmp_path / "alone")
    done(loratool("switch", tmp_path / "merged", "--to", folder / "entries"))
    done(loratool("merge", folder / "base", folder / "entries", "-o", tmp_path / "once"))
    assert model_bytes(tmp_path / "merged") == model_bytes(tmp_path / "once")


def model_bytes(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_subtracting_without_a_record(folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done(loratool("merge", folder / "base", folder / "entries", "--dtype", "fp32", "-o", merged))
    done(loratool("unmerge", merged, folder / "entries", "-o", tmp_path / "back"))
    base, back = model(folder / "base"), model(tmp_path / "back")
    assert all(torch.allclose(back[n].float(), base[n].float(), atol=1e-6) for n in base)


def test_validate_proves_the_merge(folder: Path, tmp_path: Path) -> None:
    for name, status in (("entries", 0), ("plain", 1)):
        out = tmp_path / name
        done(loratool("merge", folder / "base", folder / name, "-o", out))
        given = (folder / "entries", "--base", folder / "base", "--merged", out)
        assert loratool("validate", *given).status == status
    assert (
        "14 low-rank and sparse updates"
        in done(loratool("validate", folder / "entries", "--base", folder / "base", "--deep")).out
    )


def test_inspect_tells_of_them(folder: Path) -> None:
    result = done(loratool("inspect", folder / "entries"))
    assert "14 low-rank and sparse updates" in result.out and "low-rank + entries" in result.out
    data = done(loratool("inspect", folder / "entries", "--json")).data
    facts = data["updates"][QUERY]
    assert facts["entries"] == 410 and facts["rank"] == 4 and len(facts["sigma"]) == 4
    assert "sparse.safetensors" in data["files"]


def test_a_sum_has_all_entries(folder: Path, tmp_path: Path) -> None:
    given = (folder / "entries=0.5", folder / "plain=2", "-o", tmp_path / "sum")
    done(loratool("stack", *given))
    one, other = tmp_path / "one", tmp_path / "other"
    options = ("--dtype", "fp32")
    given = (folder / "base", folder / "entries=0.5", folder / "plain=2")
    done(loratool("merge", *given, *options, "-o", one))
    done(loratool("merge", folder / "base", tmp_path / "sum", *options, "-o", other))
    assert error(model(one), model(other), model(folder / "base")) < 1e-6
    given = (folder / "entries", folder / "plain", "--combiner", "ties", "-o", tmp_path / "no")
    refused(loratool("stack", *given), "single entries", "--combiner total", "--to-lora")


@pytest.mark.parametrize(("options", "factor"), [(("--by", -1.5), -1.5), (("--alpha", 2), 0.5)])
def test_rescale_scales_both(
    folder: Path, tmp_path: Path, options: tuple[object, ...], factor: float
) -> None:
    done(loratool("rescale", folder / "entries", *options, "-o", tmp_path / "r"))
    fp32 = ("--dtype", "fp32")
    given = (folder / "base", f"{folder}/entries={factor}", *fp32, "-o", tmp_path / "wanted")
    done(loratool("merge", *given))
    given = (folder / "base", tmp_path / "r", *fp32, "-o", tmp_path / "found")
    done(loratool("merge", *given))
    assert model_bytes(tmp_path / "wanted") == model_bytes(tmp_path / "found")


def test_rescale_cuts_the_rank_and_keeps_the_entries(folder: Path, tmp_path: Path) -> None:
    given = (folder / "entries", "--rank", 2, "-o", tmp_path / "r", "--json")
    data = done(loratool("rescale", *given)).data
    assert {facts["rank"] for facts in data["tensors"].values()} == {2}
    found: Tensors = load_file(tmp_path / "r/sparse.safetensors")
    assert all(torch.equal(t, found[n]) for n, t in entries_of(folder).items())
    given = (folder / "entries", "--budget", "16KiB", "-o", tmp_path / "b", "--json")
    data = done(loratool("rescale", *given)).data
    assert data["totals"]["entries"] == sum(len(t) for n, t in found.items() if "values" in n)


def test_convert_makes_plain_lora_of_both(folder: Path, tmp_path: Path) -> None:
    done(loratool("convert", folder / "entries", "--to-lora", "-o", tmp_path / "plain"))
    fp32 = ("--dtype", "fp32")
    for adapter, out in ((folder / "entries", "one"), (tmp_path / "plain", "other")):
        done(loratool("merge", folder / "base", adapter, *fp32, "-o", tmp_path / out))
    models = (model(tmp_path / "one"), model(tmp_path / "other"), model(folder / "base"))
    assert error(*models) < 1e-4
    assert not (tmp_path / "plain/sparse.safetensors").exists()


def test_formats_that_hold_no_entries(folder: Path, tmp_path: Path) -> None:
    given = (folder / "entries", "--format", "mlx", "-o", tmp_path / "o")
    words = ("no low-rank and sparse update", "--to-lora", "leaves its entries out (--drop)")
    refused(loratool("convert", *given), *words)
    result = done(loratool("convert", *given, "--drop"))
    assert "left out: the single entries of" in result.err
    result = done(loratool("convert", folder / "entries", "--lora-only", "-o", tmp_path / "l"))
    assert not (tmp_path / "l/sparse.safetensors").exists()
    given = (folder / "base", folder / "tuned", "--sparse", 3, "--format", "kohya")
    refused(loratool("extract", *given, "-o", tmp_path / "k"), "kohya has no place", status=2)


@pytest.mark.parametrize("wanted", ["0", "-1", "3.5", "nan", "inf"])
def test_what_is_no_number_of_entries(folder: Path, tmp_path: Path, wanted: str) -> None:
    given = (folder / "base", folder / "tuned", "--sparse", wanted, "-o", tmp_path / "o")
    refused(loratool("extract", *given), "--sparse", "a number of entries", status=2)


def test_cards_and_servers_tell_who_uses_them(folder: Path) -> None:
    card = (folder / "entries/README.md").read_text()
    assert "in sparse.safetensors, which only loratool uses" in card
    result = loratool("validate", folder / "entries", "--for", "vllm")
    assert result.status == 1
    assert "updates with single entries" in result.out and "convert" in result.out


def test_what_is_published_has_its_entries(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    done(loratool("push", folder / "entries", target.as_uri(), "--base-name", "org/base"))
    assert (target / "sparse.safetensors").read_bytes() == (
        folder / "entries/sparse.safetensors"
    ).read_bytes()
    done(loratool("merge", folder / "base", target, "-o", tmp_path / "m"))
    assert "single entries" in (target / "README.md").read_text()


def test_low_rank_is_told_to_be_the_wrong_form(folder: Path, tmp_path: Path) -> None:
    base = model(folder / "base")
    given = ("extract", folder / "base", folder / "tuned", "--rank", 4, "-o", tmp_path / "a")
    result = done(loratool(*given))
    assert "LoRA is the wrong tool here: the difference is sparse" in result.out
    assert "--rank 1 --sparse 0.0" in result.out
    save_model(tmp_path / "dense", changed(base, 1.0))
    given = ("extract", folder / "base", tmp_path / "dense", "--rank", 4, "-o", tmp_path / "b")
    result = done(loratool(*given))
    assert "neither of low rank nor sparse" in result.out and "keep the fine-tune" in result.out
    generator = torch.Generator().manual_seed(3)
    low = dict(base)
    for name in (n for n in base if "_proj" in n):
        left, right = (torch.randn(size, 3, generator=generator) for size in base[name].shape)
        low[name] = (base[name].float() + 0.02 * left @ right.T).bfloat16()
    save_model(tmp_path / "low", low)
    given = ("extract", folder / "base", tmp_path / "low", "--rank", 4, "-o", tmp_path / "c")
    assert "wrong tool" not in done(loratool(*given)).out


# Files that are not what they should be


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "entries", tmp_path / "copy"))


def spoiled(copy: Path, **tensors: torch.Tensor | None) -> None:
    """Replace parts of the entries of one weight, or take them out."""
    path = copy / "sparse.safetensors"
    found = load_file(path)
    for part, value in tensors.items():
        found.pop(f"{QUERY}.{part}", None)
        if value is not None:
            found[f"{QUERY}.{part}"] = value
    save_file(found, path, metadata={"format": "pt"})


NAN = torch.full((410,), float("nan"), dtype=torch.bfloat16)
FAULTS = {
    "missing gaps": ({"gaps": None}, "gaps: missing"),
    "missing values": ({"values": None}, "values: missing"),
    "fewer values": ({"values": torch.zeros(3)}, "values"),
    "more values": ({"values": torch.zeros(4097)}, "not as many as there are places"),
    "no values": ({"values": torch.zeros(0)}, "not as many as there are places"),
    "wide gaps": ({"gaps": torch.zeros(410, dtype=torch.int64)}, "holds no gaps"),
    "gaps of two dimensions": ({"gaps": torch.zeros(41, 10, dtype=torch.uint8)}, "holds no gaps"),
    "values that are integers": ({"values": torch.zeros(410, dtype=torch.int32)}, "no values"),
    "a place outside": ({"gaps": torch.full((410,), 250, dtype=torch.uint8)}, "tells place"),
    "skips alone": ({"gaps": torch.full((410,), 255, dtype=torch.uint8)}, "tells 0 places"),
    "a scale that is infinite": ({"scale": torch.tensor([1e999]).double()}, "scale: is inf"),
    "a narrow scale": ({"scale": torch.ones(1)}, "is no scale"),
    "another part": ({"places": torch.ones(1)}, "unexpected key"),
    "NaN": ({"values": NAN}, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_entries(folder: Path, copy: Path, tmp_path: Path, fault: str) -> None:
    change, words = FAULTS[fault]
    spoiled(copy, **change)
    out = tmp_path / "o"
    result = loratool("merge", folder / "base", copy, "-o", out)
    refused(result, QUERY, words)
    assert not out.exists()
    checked = loratool("validate", copy, "--base", folder / "base", "--deep")
    assert checked.status == 1 and QUERY in checked.out + checked.err


def test_a_file_that_is_missing_truncated_or_of_nobody(
    folder: Path, copy: Path, tmp_path: Path
) -> None:
    path = copy / "sparse.safetensors"
    given = ("merge", folder / "base", copy, "-o", tmp_path / "o")
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    refused(loratool(*given), "sparse.safetensors", "truncated")
    path.unlink()
    refused(loratool(*given), path, "missing", "14 updates")
    refused(loratool("inspect", copy), path, "missing")
    alone = Path(shutil.copytree(folder / "plain", tmp_path / "alone"))
    (alone / "sparse.safetensors").write_bytes(content)
    refused(loratool("merge", folder / "base", alone, "-o", tmp_path / "o"), "say nothing of it")


def test_entries_without_factors(folder: Path, copy: Path, tmp_path: Path) -> None:
    path = copy / "adapter_model.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    module = f"base_model.model.{QUERY.removesuffix('.weight')}"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith(module)}
    save_file(kept, path, metadata=metadata)
    given = ("merge", folder / "base", copy, "-o", tmp_path / "o")
    refused(loratool(*given), QUERY, "no factors of LoRA beside it")


def test_the_inputs_stay_as_they_are(folder: Path) -> None:
    before = snapshot(folder)
    done(loratool("inspect", folder / "entries"))
    assert snapshot(folder) == before

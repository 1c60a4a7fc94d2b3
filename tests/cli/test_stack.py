"""loratool stack: what it prints, where it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import config, factors, stored, write_adapter
from tests.cli.tiny import (
    NORM,
    PREFIX,
    UP,
    Tensors,
    done,
    finetuned,
    loratool,
    names,
    refused,
    save_model,
    unchanged,
)

MODULE = UP.removesuffix(".weight")
COMBINERS = (
    "total", "linear", "linear:on=factors", "ties", "ties:density=0.5,on=factors", "dare_linear",
    "dare_ties:density=0.3", "magnitude_prune:density=0.4", "tsv", "iso",
)  # fmt: skip


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, tensors: Tensors) -> Iterator[Path]:
    """A directory with `base` and the adapters `math` (rank 2) and `code` (rank 2), as fp32."""
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "base", tensors)
    for seed, name in enumerate(("math", "code")):
        modules = {
            tensor.removesuffix(".weight"): factors(10 * seed + number, *value.shape, 2)
            for number, (tensor, value) in enumerate(tensors.items())
            if "_proj" in tensor
        }
        write_adapter(folder / name, modules, lora_alpha=3)
    with unchanged(folder):
        yield folder


def delta(adapter: Path, module: str = MODULE) -> torch.Tensor:
    """scale * B @ A as the files have it."""
    tensors, settings = stored(adapter), config(adapter)
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
    alpha = settings.get("alpha_pattern", {}).get(module, settings["lora_alpha"])
    product: torch.Tensor = alpha / a.shape[0] * b @ a
    return product


def test_the_output_is_the_weighted_sum(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(loratool("stack", f"{pair}/math=0.7", f"{pair}/code=-0.3"))
    assert names(tmp_path) == ["stacked"]
    wanted = 0.7 * delta(pair / "math") - 0.3 * delta(pair / "code")
    assert torch.allclose(delta(tmp_path / "stacked"), wanted, rtol=1e-6, atol=1e-6)
    for line in (
        "Stacked stacked", "14 low-rank updates", "math and code: ", "strongest in:",
        "energy and errors are those against the exact weighted sum",
    ):  # fmt: skip
        assert line in result.out
    card = (tmp_path / "stacked" / "README.md").read_text()
    assert "2 adapters (0.7 math, -0.3 code) combined by loratool: `total`." in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("combiner", COMBINERS)
def test_every_combiner_writes_an_adapter_that_fits(
    combiner: str, pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [f"{pair}/math=0.5", f"{pair}/code=2"]
    result = done(loratool("stack", *given, "--combiner", combiner, "-o", out, "--json"))
    assert result.data["options"]["combiner"] == combiner
    assert [part["name"] for part in result.data["parts"]] == ["math", "code"]
    done(loratool("validate", out, "--base", pair / "base", "--deep"))
    again = tmp_path / "again"
    done(loratool("stack", *given, "--combiner", combiner, "-o", again, "-q"))
    assert (again / "adapter_model.safetensors").read_bytes() == (
        out / "adapter_model.safetensors"
    ).read_bytes()


def test_a_stack_merges_as_its_parts_do(pair: Path, tmp_path: Path) -> None:
    given = [f"{pair}/math=0.5", f"{pair}/code=-2"]
    done(loratool("stack", *given, "-o", tmp_path / "stacked"))
    done(loratool("merge", pair / "base", tmp_path / "stacked", "-o", tmp_path / "one"))
    done(loratool("merge", pair / "base", *given, "-o", tmp_path / "other"))
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_weights_by_layer_and_a_rank(pair: Path, tmp_path: Path) -> None:
    result = done(
        loratool(
            "stack", pair / "math", f"{pair}/code=0.5", "--weights", "*.layers.1.*=2",
            "--weights", "code:*.mlp.*=0", "--rank", 1, "-o", tmp_path / "out", "--json",
        )
    )  # fmt: skip
    tensor = result.data["tensors"][UP]
    wanted = 2 * delta(pair / "math")
    sigma = torch.linalg.svdvals(wanted)
    assert tensor["rank"] == 1
    assert tensor["relative_error"] == pytest.approx(float(sigma[1] / sigma.norm()), rel=1e-5)
    found = delta(tmp_path / "out")
    assert float((found - wanted).norm() / wanted.norm()) == pytest.approx(
        tensor["relative_error"], rel=1e-4
    )


def test_interference_for_machines(pair: Path, tmp_path: Path) -> None:
    given = [pair / "math", f"{pair}/code=-1"]
    result = done(loratool("stack", *given, "-o", tmp_path / "out", "--json"))
    (found,) = result.data["interference"]
    one, other = delta(pair / "math"), -delta(pair / "code")
    assert found["parts"] == ["math", "code"] and len(found["tensors"]) == 14
    cosine = float((one * other).sum() / one.norm() / other.norm())
    assert found["tensors"][UP]["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert -1 <= found["cosine"] <= 1
    assert json.loads((tmp_path / "out" / "loratool.json").read_text())["interference"] == [found]


def test_extracted_adapters_stack_and_keep_what_they_know(
    adapter: Path, base: Path, tensors: Tensors, tmp_path: Path
) -> None:
    other = {
        name: value + 0.05 * torch.outer(torch.ones(len(value)), value[0])
        if "_proj" in name
        else value
        for name, value in tensors.items()
    }
    save_model(tmp_path / "other", other)
    done(loratool("extract", base, tmp_path / "other", "--rank", 3, "-o", tmp_path / "second"))
    result = done(loratool("stack", f"{adapter}=0.5", tmp_path / "second", "-o", tmp_path / "out"))
    assert "weights do not scale these" in result.err and NORM in result.err
    tuned = finetuned(tensors)
    done(loratool("merge", base, tmp_path / "out", "-o", tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[NORM], tuned[NORM])
    wanted = tensors[UP] + 0.5 * (tuned[UP] - tensors[UP]) + (other[UP] - tensors[UP])
    assert torch.allclose(merged[UP], wanted, atol=1e-5)
    manifests = [
        json.loads((folder / "loratool.json").read_text())["base"]["tensors"]
        for folder in (adapter, tmp_path / "second", tmp_path / "out")
    ]
    assert manifests[2] == {**manifests[0], **manifests[1]}
    assert (tmp_path / "out" / "model" / "config.json").is_file()


# What is refused


@pytest.mark.parametrize(
    ("weight", "word"),
    [("=", "''"), ("=x", "'x'"), ("=0.7.1", "'0.7.1'"), ("=nan", "finite"), ("=inf", "finite")],
)
def test_weights_that_are_none(weight: str, word: str, pair: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        result = loratool("stack", f"{pair}/math{weight}", pair / "code", "-o", tmp_path / "out")
        refused(result, f"{pair}/math{weight}", word, status=2)


def test_no_adapter_at_all(tmp_path: Path) -> None:
    result = loratool("stack", "-o", tmp_path / "out")
    assert result.status == 2 and "ADAPTER" in result.err and names(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rank", 0, ["rank must be at least 1, not 0"]),
        ("--rank", -3, ["rank must be at least 1"]),
        ("--energy", 1.5, ["energy must lie in (0, 1]"]),
        ("--ratio", 0.5, ["ratio must be at least 1"]),
        ("--weights", "up", ["--weights up", "GLOB=W"]),
        ("--weights", "up=", ["--weights up=", "not a number"]),
        ("--combiner", "ties:density=0", ["density must lie in (0, 1], not 0"]),
        ("--combiner", "ties:density=1.5", ["density must lie in (0, 1], not 1.5"]),
        ("--combiner", "dare_linear:density=some", ["density is a number, not 'some'"]),
        ("--combiner", "ties:on=rows", ["on is one of deltas, factors, not 'rows'"]),
        ("--combiner", "ties:depth=3", ["no option 'depth'", "density"]),
        ("--dtype", "fp12", ["fp12"]),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(
    option: str, value: object, words: list[str], pair: Path, tmp_path: Path
) -> None:
    with unchanged(tmp_path):
        result = loratool(
            "stack", pair / "math", pair / "code", option, value, "-o", tmp_path / "out"
        )
        assert result.status == 2 and result.out == "" and "Traceback" not in result.err
        assert all(word in result.err for word in words), result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--combiner", "average"], ["unknown combiner 'average'", "known are", "total"]),
        (["--factorizer", "magic"], ["unknown factorizer 'magic'"]),
        (["--weights", "nothing.*=2"], ["--weights nothing.*=2", "matches no tensor"]),
        (["--weights", "prose:*=2"], ["no adapter is called 'prose'", "math, code"]),
        (["--weights", "*=0"], ["every tensor has the weight 0"]),
    ],
)
def test_what_these_adapters_do_not_allow(
    options: list[str], words: list[str], pair: Path, tmp_path: Path
) -> None:
    with unchanged(tmp_path):
        result = loratool("stack", pair / "math", pair / "code", *options, "-o", tmp_path / "out")
        refused(result, *words)


def test_all_weights_zero(pair: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        given = [f"{pair}/math=0", f"{pair}/code=0"]
        refused(loratool("stack", *given, "-o", tmp_path / "out"), "every weight is 0", status=2)


def test_the_same_adapter_twice(pair: Path, tmp_path: Path) -> None:
    write_copy = tmp_path / "copy"
    write_copy.mkdir()
    for file in (pair / "math").iterdir():
        (write_copy / file.name).write_bytes(file.read_bytes())
    with unchanged(tmp_path):
        twice = loratool(
            "stack", pair / "math", f"{pair}/../{pair.name}/math=0.3", "-o", tmp_path / "out"
        )
        refused(twice, pair / "math", "given twice", "sum of the weights")
        refused(
            loratool("stack", pair / "math", write_copy, "-o", tmp_path / "out"),
            pair / "math", write_copy, "the same tensors",
        )  # fmt: skip


def test_different_bases_by_shape(pair: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", {MODULE: factors(1, 30, 16, 2)})
    with unchanged(tmp_path):
        result = loratool("stack", pair / "math", other, "-o", tmp_path / "out")
        refused(result, pair / "math", other, UP, "(24, 16)", "(30, 16)", "different bases")
        result = loratool(
            "stack", pair / "math", other, "--base", pair / "base", "-o", tmp_path / "out"
        )
        refused(result, other, "does not fit", UP)


def test_different_bases_by_digest(adapter: Path, tensors: Tensors, tmp_path: Path) -> None:
    base = {name: value + 1e-3 for name, value in tensors.items()}
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", finetuned(base))
    done(
        loratool("extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "second", "-q")
    )
    with unchanged(tmp_path):
        result = loratool("stack", adapter, tmp_path / "second", "-o", tmp_path / "out")
        refused(result, adapter, tmp_path / "second", "different bases", "digest")


def test_heads_that_differ(pair: Path, tmp_path: Path) -> None:
    heads = [
        write_adapter(
            tmp_path / str(seed), {MODULE: factors(seed, 24, 16, 2)},
            {"lm_head.weight": torch.full((32, 16), float(seed))}, modules_to_save=["lm_head"],
        )
        for seed in (1, 2)
    ]  # fmt: skip
    with unchanged(tmp_path):
        result = loratool("stack", *heads, "-o", tmp_path / "out")
        refused(
            result, *heads, "lm_head.weight", "both replace it whole", "--weights '2:lm_head=0'"
        )
    done(loratool("stack", *heads, "--weights", "2:lm_head=0", "-o", tmp_path / "out"))


def test_ranks_that_differ_for_factors(pair: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", {MODULE: factors(1, 24, 16, 3)})
    with unchanged(tmp_path):
        result = loratool(
            "stack", pair / "math", other, "--combiner", "linear:on=factors", "-o", tmp_path / "o"
        )
        refused(result, UP, pair / "math", other, "rank 2", "rank 3", "on=deltas")


def test_a_model_or_nothing_in_place_of_an_adapter(pair: Path, tmp_path: Path) -> None:
    with unchanged(tmp_path):
        result = loratool("stack", pair / "math", pair / "base", "-o", tmp_path / "out")
        refused(result, pair / "base", "holds no adapter", "it is a whole model")
        result = loratool("stack", pair / "math", pair / "prose", "-o", tmp_path / "out")
        refused(result, pair / "prose", "no such file")


def test_the_output_may_not_be_an_input(pair: Path) -> None:
    result = loratool("stack", pair / "math", pair / "code", "-o", pair / "code", "--overwrite")
    refused(result, pair / "code", "is or holds the input")

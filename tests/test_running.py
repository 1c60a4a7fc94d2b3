"""Running models whose weights stay on disk, beside the same models loaded by transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import loratool
from fixtures.weights import RXNFP_BASE, RXNFP_TUNED, fetch
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.errors import InputError
from loratool.opening import open_checkpoint
from loratool.running import Model, Watch, open_model, run, whole_model
from loratool.shell import Shell
from loratool.sources import Sources
from tests.adapters import factors, write_adapter
from tests.memory_models import TINY
from tests.models import CONFIGS, build, perturb, tiny_config

Batches = list[dict[str, torch.Tensor]]


def text_batches(count: int = 3, decoder: bool = False) -> Batches:
    """Padded batches of different shapes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(3, 60, (2, 5 + number), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        made.append({**batch, "decoder_input_ids": ids} if decoder else batch)
    return made


def tensors(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in outputs.items() if torch.is_tensor(value)}
    assert found
    return found


def assert_answers_as(reference: Any, model: Model, batches: Batches, **options: Any) -> None:
    found = dict(run(model, batches, **options))
    assert sorted(found) == list(range(len(batches)))
    for number, batch in enumerate(batches):
        with torch.no_grad():
            expected = reference(**batch)
        for name, value in tensors(found[number]).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaModel"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("phi3", "Phi3ForCausalLM"),
        ("opt", "OPTForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_a_model_answers_as_in_transformers(
    tmp_path: Path, model_type: str, architecture: str
) -> None:
    reference = build(architecture, tiny_config(model_type))
    perturb(reference)
    reference.save_pretrained(tmp_path / "model")
    model = open_model(open_checkpoint(tmp_path / "model"))
    assert_answers_as(reference, model, text_batches(decoder=model_type == "t5"))


@pytest.mark.parametrize("kind", ["vit", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_a_model_whose_names_differ_on_disk_does_too(tmp_path: Path, kind: str) -> None:
    reference = TINY[kind].build()
    reference.save_pretrained(tmp_path / "model")
    model = open_model(open_checkpoint(tmp_path / "model"))
    if hasattr(reference.config, "image_size"):
        generator = torch.Generator().manual_seed(0)
        batches = [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}] * 2
    else:
        batches = text_batches()
    assert_answers_as(reference, model, batches)


def test_weights_that_are_used_without_a_call_are_loaded(tmp_path: Path) -> None:
    """SigLIP pools with torch's attention, which takes its output weights by itself."""
    sizes = {**CONFIGS["bert"], "image_size": 16, "patch_size": 4}
    config = transformers.SiglipVisionConfig(**sizes)
    reference = build("SiglipVisionModel", config)
    perturb(reference)
    reference.save_pretrained(tmp_path / "model")
    model = open_model(open_checkpoint(tmp_path / "model"))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_answers_as(reference, model, [{"pixel_values": images}, {"pixel_values": images[:1]}])


class Experts(torch.nn.Module):
    """Layers of experts, each batch choosing its own; a common layer before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, way: list[int]) -> dict[str, torch.Tensor]:
        x = self.first(x)
        for number in way:
            x = self.experts[number](x).relu()
        return {"logits": self.last(x)}


def test_batches_may_take_different_ways() -> None:
    reference = Experts().eval()
    state = {name: value.detach() for name, value in reference.state_dict().items()}
    lazies = {
        n: LazyTensor(n, "F32", tuple(v.shape), lambda v=v: iter([v]))  # type: ignore[misc]
        for n, v in state.items()
    }
    sources = Sources({name: name for name in state}, {}, (), ())
    model = Model(Shell("Experts", copy.deepcopy(reference), {}), Checkpoint(lazies), sources, "it")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ways = ([0, 3], [1, 2, 3], [3], [0, 1, 2, 3])
    batches: Any = [{"x": x + number, "way": way} for number, way in enumerate(ways)]
    loaded: list[str] = []
    assert_answers_as(reference, model, batches, progress=lambda name, size: loaded.append(name))
    assert loaded == ["first", *(f"experts.{number}" for number in range(4)), "last"]


def test_rxnfp_with_its_incomplete_configs() -> None:
    fetch()
    for path in (RXNFP_BASE, RXNFP_TUNED):
        model = open_model(open_checkpoint(path))
        batches = text_batches()
        found = dict(run(model, batches))
        with torch.no_grad():
            expected = whole_model(model)(**batches[1])
        for name, value in tensors(found[1]).items():
            assert torch.equal(value, expected[name])
    assert model.notes


def test_a_merge_is_run_before_it_is_written(tmp_path: Path) -> None:
    reference = build("LlamaForCausalLM", tiny_config("llama"))
    reference.save_pretrained(tmp_path / "base")
    module = "model.layers.1.mlp.down_proj"
    adapter = write_adapter(tmp_path / "adapter", {module: factors(0, 32, 48, 2)})
    merged = loratool.merge(tmp_path / "base", [(adapter, 1.0)])
    merged.save(tmp_path / "merged")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_answers_as(expected, open_model(merged), text_batches())


def test_hidden_states_and_half_precision(tmp_path: Path) -> None:
    reference = build("LlamaForCausalLM", tiny_config("llama"))
    reference.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    batch = text_batches(1)[0]
    _, found = next(run(open_model(checkpoint), [batch], hidden_states=True))
    with torch.no_grad():
        expected = reference(**batch, output_hidden_states=True).hidden_states
    assert len(found["hidden_states"]) == len(expected) == 3
    for one, other in zip(found["hidden_states"], expected, strict=True):
        torch.testing.assert_close(one, other)
    _, half = next(run(open_model(checkpoint, torch.bfloat16, attention="eager"), [batch]))
    assert half["logits"].dtype == torch.bfloat16
    assert (half["logits"].float() - found["logits"]).abs().max() < 0.1


class Recorder(Watch):
    """Notes what happens, and how many bytes of weights are held."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None]] = []

    def called(self, batch: int, module: str, inputs: tuple[Any, ...]) -> None:
        self.events.append((module, batch))

    def passed(self, module: str) -> None:
        self.events.append((module, None))


def test_all_batches_pass_a_module_before_it_is_dropped(tmp_path: Path) -> None:
    build("GPT2LMHeadModel", tiny_config("gpt2")).save_pretrained(tmp_path / "model")
    seen = Recorder()
    model = open_model(open_checkpoint(tmp_path / "model"))
    list(run(model, text_batches(4), seen))
    for module in ("transformer.h.1.attn.c_attn", "transformer.wte", "lm_head"):
        at = [(place, event[1]) for place, event in enumerate(seen.events) if event[0] == module]
        assert [batch for _, batch in at] == [0, 1, 2, 3, None]
    again = Recorder()
    list(run(model, text_batches(4), again))
    assert again.events == seen.events


def test_memory_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    held: list[int] = []

    def watched(tensor: LazyTensor) -> LazyTensor:
        def blocks() -> Iterator[torch.Tensor]:
            loaded = (p for p in model.shell.model.parameters() if type(p) is torch.nn.Parameter)
            held.append(sum(p.nbytes for p in loaded))
            yield from tensor.blocks()

        return replace(tensor, blocks=blocks, extent=None)

    config = tiny_config("llama", num_hidden_layers=6)
    build("LlamaForCausalLM", config).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    lazy = Checkpoint({n: watched(t) for n, t in checkpoint.items()}, checkpoint.config)
    model = open_model(lazy)
    told: list[int] = []
    list(run(model, text_batches(), progress=lambda name, size: told.append(size)))
    assert len(held) == len(checkpoint) and sum(told) == checkpoint.nbytes
    assert max(held) <= max(told) < sum(told) / 10


def test_a_pass_can_be_left_early_and_the_model_run_again(tmp_path: Path) -> None:
    reference = build("LlamaForCausalLM", tiny_config("llama"))
    reference.save_pretrained(tmp_path / "model")
    model = open_model(open_checkpoint(tmp_path / "model"))
    for _ in run(model, text_batches()):
        break
    assert_answers_as(reference, model, text_batches())


def test_what_cannot_be_run_is_told(tmp_path: Path) -> None:
    build("LlamaForCausalLM", tiny_config("llama")).save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    fewer = {name: t for name, t in checkpoint.items() if "layers.1" not in name}
    with pytest.raises(InputError, match=r"has no model\.layers\.1"):
        open_model(replace(checkpoint, tensors=fewer))
    unknown = {**(checkpoint.config or {}), "architectures": ["OursForCausalLM"]}
    with pytest.raises(InputError, match="no model class 'OursForCausalLM'"):
        open_model(checkpoint.with_config(unknown))
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_model(replace(checkpoint, config=None))
    with pytest.raises(InputError, match="diffusers"):
        open_model(checkpoint.with_config({"_class_name": "UNet2DConditionModel"}))
    model = open_model(checkpoint)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be run on batch 1: index out"):
        list(run(model, [{"input_ids": torch.tensor([[99]])}] * 2))

"""The model card of what is published: metadata for the Hub, facts, and how to load it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from loratool import plugins
from loratool.adapter import Adapter
from loratool.card import module_kind, of_rank, signed
from loratool.front_matter import dump
from loratool.publication import Kind
from loratool.reports import format_share
from loratool.updates import FACTORED, KIND_NAMES, LORA, WHOLE, counted_kind

# The end of a class name -> the Hub's name of the task.
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "Model": "feature-extraction",
}
# PEFT's name of a task -> the Hub's, and the class that loads a model for it.
_TASK_TYPES = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "SEQ_2_SEQ_LM": ("", "AutoModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_LIBRARIES: Mapping[Kind, str] = {"adapter": "peft", "model": "transformers", "onnx": "onnx"}
# The largest ranks of adapters that vLLM can be started for (vllm/config/lora.py).
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        kind: what is published.
        target: the name under which others find it: "org/name".
        base: the base's name on the Hub, or "".
        license: license, license_name and license_link, those that are known.
        architecture: the model's class, or "".
        adapter: for an adapter.
        manifest: loratool's own record of how it was made, or {}.
        reversible: whether a merged model holds the record to take the adapters out again.
        graph: the name of an ONNX model's graph.
    """

    kind: Kind
    target: str
    base: str = ""
    license: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""
    adapter: Adapter | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    reversible: bool = False
    graph: str = "model.onnx"


def metadata(subject: Subject) -> dict[str, Any]:
    """What the Hub wants to know, in the order in which cards say it."""
    found: dict[str, Any] = dict(subject.license)
    found["library_name"] = _library(subject)
    if subject.base:
        found["base_model"] = subject.base
        # The Hub knows adapter, merge (of several models), quantized and finetune. What an ONNX
        # graph is, it tells by itself.
        if subject.kind != "onnx":
            found["base_model_relation"] = "adapter" if subject.kind == "adapter" else "finetune"
    if tag := _pipeline_tag(subject):
        found["pipeline_tag"] = tag
    own = [] if subject.kind == "model" else [found["library_name"]]
    found["tags"] = ["lora"] * _is_lora(subject) + [*own, "loratool"]
    return found


def _is_lora(subject: Subject) -> bool:
    """Whether LoRA is in it, or was merged into it."""
    updates = subject.adapter.values() if subject.adapter else ()
    return subject.reversible or any(update.kind in LORA for update in updates)


def _library(subject: Subject) -> str:
    """The Hub's name of the library that loads it."""
    if subject.adapter is None:
        return _LIBRARIES[subject.kind]
    return str(getattr(_format(subject.adapter), "library", _LIBRARIES["adapter"]))


def _format(adapter: Adapter) -> plugins.AdapterFormat:
    found: plugins.AdapterFormat = plugins.create("adapter_formats", adapter.format)
    return found


def publication_card(subject: Subject) -> str:
    """README.md for what is published; nothing in it is of this machine."""
    body = {"adapter": _adapter_body, "model": _model_body, "onnx": _onnx_body}[subject.kind]
    name = subject.target.rpartition("/")[2]
    lines = [f"---\n{dump(metadata(subject))}---\n", f"# {name}\n", *body(subject)]
    return signed("\n".join(lines) + "\n")


def _pipeline_tag(subject: Subject) -> str:
    task = _TASK_TYPES.get((subject.adapter.task_type or "") if subject.adapter else "", ("", ""))
    by_class = (tag for end, tag in _TASKS.items() if subject.architecture.endswith(end))
    return task[0] or next(by_class, "")


def _adapter_body(subject: Subject) -> Iterator[str]:
    adapter = subject.adapter
    assert adapter is not None
    kind = f"`{subject.architecture}`" if subject.architecture else "a model"
    if "finetuned" in subject.manifest:
        made = f"The difference between a fine-tuned {kind} and {_linked(subject.base)}, "
        yield f"{made}as a LoRA adapter extracted by loratool.\n"
    else:
        called = "A LoRA adapter" if _is_lora(subject) else "An adapter"
        yield f"{called} for {_linked(subject.base)}, which makes {kind} of it.\n"
    numbers = Counter(update.kind for update in adapter.values() if not update.optional)
    for update_kind in KIND_NAMES:
        if number := numbers[update_kind]:
            ranks = [u.rank for u in adapter.values() if u.kind == update_kind and u.rank]
            yield f"- {counted_kind(update_kind, number)}{of_rank(ranks)}"
    if numbers["sparse"]:
        yield (
            "- the single entries lie in sparse.safetensors, which only loratool uses: PEFT loads "
            "the factors alone"
        )
    ranks = [update.rank for update in adapter.values() if update.rank]
    energy = _part(subject.manifest, "totals").get("energy")
    if isinstance(energy, float | int):
        yield f"- {format_share(energy)} of the squared norm of the low-rank deltas captured"
    yield ""
    if any(update.kind in LORA for update in adapter.values()):
        yield from _table(adapter, _part(subject.manifest, "tensors"))
    if made := made_by(subject.manifest, subject.base):
        yield f"Made by\n\n```sh\n{made}\n```\n"
    usage = getattr(_format(adapter), "usage", "")
    if usage:
        yield f"## {_library(subject)}\n\n{usage.replace('ADAPTER', subject.target)}\n"
    else:
        yield from _peft(subject, adapter)
        yield from _vllm(subject, adapter, max(ranks, default=0))
    yield "## loratool\n"
    yield "```sh\n" + f"loratool merge {subject.base or 'BASE'} {subject.target} -o merged\n```"


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _linked(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else "its base"


def _part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def _table(adapter: Adapter, tensors: Mapping[str, Any]) -> Iterator[str]:
    """Ranks, and energies where the manifest knows them, by kind of module."""
    ranks: dict[str, list[int]] = defaultdict(list)
    energies: dict[str, list[float]] = defaultdict(list)
    for name, update in adapter.items():
        if update.kind not in LORA:
            continue
        ranks[module_kind(name)].append(update.rank or 0)
        energy = _part(tensors, name).get("energy")
        if isinstance(energy, float | int):
            energies[module_kind(name)].append(energy)
    known = bool(energies)
    yield "| module | updates | rank |" + " energy, lowest | energy, mean |" * known
    yield "|---|---|---|" + "---|---|" * known
    for module, found in ranks.items():
        row = f"| {module} | {len(found)} | {_span(found)} |"
        if known:
            shares = energies.get(module)
            lowest = format_share(min(shares)) if shares else "-"
            mean = format_share(sum(shares) / len(shares)) if shares else "-"
            row += f" {lowest} | {mean} |"
        yield row
    yield ""


def made_by(manifest: Mapping[str, Any], base: str) -> str:
    """The command that made an adapter, with placeholders for paths; "" if that is not known."""
    options = _part(manifest, "options")
    parts = manifest.get("parts")
    if isinstance(parts, Sequence) and not isinstance(parts, str):
        weights = (_part({"": part}, "").get("weight", 1.0) for part in parts)
        numbered = (f"ADAPTER{n}={w:g}" for n, w in enumerate(weights, 1) if _is_number(w))
        return _command("stack", options, *numbered)
    if "rescaled" in manifest:
        return _command("rescale", options, "ADAPTER")
    if "finetuned" in manifest:
        return _command("extract", options, base or "BASE", "FINETUNED")
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _command(verb: str, options: Mapping[str, Any], *operands: str) -> str:
    """A command line with the options that are not the step's defaults."""
    words = ["loratool", verb, *operands]
    for option in fields(plugins.load("steps", verb)):
        value = options.get(option.name)
        if value is None or value is False or value == option.default or value == []:
            continue
        flag = "--" + option.metadata.get("flag", option.name.replace("_", "-"))
        for item in value if isinstance(value, list) else [value]:
            text = str(item)
            plain = re.fullmatch(r"[\w.:=,%+*-]+", text)
            words += [flag] if item is True else [flag, text if plain else f"'{text}'"]
    return " ".join(words)


def _peft(subject: Subject, adapter: Adapter) -> Iterator[str]:
    yield "## PEFT\n\n```python\nfrom peft import PeftModel"
    base, target = json.dumps(subject.base or "BASE"), json.dumps(subject.target)
    if subject.architecture:
        yield f"from transformers import AutoConfig, {subject.architecture}\n"
        yield f'config = AutoConfig.from_pretrained({target}, subfolder="model")'
        yield f"base = {subject.architecture}.from_pretrained({base}, config=config)"
    else:
        _, cls = _TASK_TYPES.get(adapter.task_type or "", ("", "AutoModel"))
        yield f"from transformers import {cls}\n"
        yield f"base = {cls}.from_pretrained({base})"
    yield f"model = PeftModel.from_pretrained(base, {target})\n```\n"


def _vllm(subject: Subject, adapter: Adapter, rank: int) -> Iterator[str]:
    yield "## vLLM\n"
    obstacles = _vllm_obstacles(subject, adapter, rank)
    if obstacles:
        yield f"vLLM does not serve this adapter beside its base: {', and '.join(obstacles)}."
        yield "Merge it (below), and serve the merged model.\n"
        return
    limit = next(size for size in _VLLM_RANKS if size >= rank)
    more = f" --max-lora-rank {limit}" if limit > _VLLM_DEFAULT else ""
    name = subject.target.rpartition("/")[2]
    yield (
        f"```sh\nvllm serve {subject.base or 'BASE'} --enable-lora{more} "
        f"--lora-modules {name}={subject.target}\n```\n"
    )


def _vllm_obstacles(subject: Subject, adapter: Adapter, rank: int) -> list[str]:
    """What vLLM's own checks refuse (vllm/lora/peft_helper.py), or get wrong silently."""
    settings, found = adapter.settings, []
    if _pipeline_tag(subject) != "text-generation":
        found.append("the model does not generate text")
    kinds = {update.kind for update in adapter.values()}
    if kinds & WHOLE or settings.get("modules_to_save"):
        found.append("it replaces whole tensors")
    if any(len(update.shape) == 1 and not update.is_whole for update in adapter.values()):
        found.append("it changes biases")
    if alien := kinds - WHOLE - (FACTORED - {"sparse"}) - {"dense"}:
        names = " and ".join(KIND_NAMES[kind] for kind in KIND_NAMES if kind in alien)
        found.append(f"it is no plain LoRA but {names} (`loratool convert --to-lora` makes it one)")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        found.append("its ranks or scales differ (`loratool rescale --normalize` makes them one)")
    if rank > _VLLM_RANKS[-1]:
        found.append(f"its rank is above {_VLLM_RANKS[-1]}")
    return found


def _model_body(subject: Subject) -> Iterator[str]:
    kind = f"`{subject.architecture}`" if subject.architecture else "model"
    origin = f", made of {_linked(subject.base)}" if subject.base else ""
    merged = " with LoRA adapters merged into its weights" if subject.reversible else ""
    yield f"A {kind}{origin}{merged}.\n"
    cls = subject.architecture or "AutoModel"
    yield f"```python\nfrom transformers import {cls}\n"
    yield f"model = {cls}.from_pretrained({json.dumps(subject.target)})\n```\n"
    if subject.reversible:
        yield "It holds the record of the merge, so that the base can be had back, bit for bit:\n"
        yield f"```sh\nloratool unmerge {subject.target}\n```"


def _onnx_body(subject: Subject) -> Iterator[str]:
    kind = f"`{subject.architecture}`" if subject.architecture else "A model"
    manifest = subject.manifest
    words = [f"opset {manifest['opset']}"] if isinstance(manifest.get("opset"), int) else []
    words += [manifest["dtype"]] if isinstance(manifest.get("dtype"), str) else []
    detail = f" ({', '.join(words)})" if words else ""
    yield f"{kind} as an ONNX graph{detail}.\n"
    yield "```python\nfrom huggingface_hub import snapshot_download"
    yield "from onnxruntime import InferenceSession\n"
    yield f"folder = snapshot_download({json.dumps(subject.target)})"
    yield f'session = InferenceSession(f"{{folder}}/{subject.graph}")\n```'

"""Adapters that are PEFT's but for the names of their keys or the order of their values.

* Saved as they were in memory (torch.save of a model, some trainers): keys carry the adapter's name
  (`lora_A.default.weight`), the names of wrappers (`module.`, `_orig_mod.`), or lack PEFT's prefix.
* torchtune: in its own files modules have other names, and the rows of q and k are interleaved for
  its rotary embedding; in its PEFT export lora_B is put in order, DoRA's magnitudes are not.
* unsloth: until September 2026 lora_B of experts had each expert's columns side by side; since then
  it has PEFT's order, and `lora_B_layout` in the config says so
  (https://github.com/unslothai/unsloth-zoo/pull/1232, .../1269).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loratool.checkpoint import LazyTensor
from loratool.errors import Problem

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."

# Parts of a key after which PEFT puts the adapter's name in memory, and takes it away in files.
_NAMED = re.compile(
    r"\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l|trainable_tokens_delta)"
    r"\.(?P<adapter>(?!weight$|bias$)[^.]+)(?P<rest>\.weight|\.bias)?"
)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_SUFFIX_OF_MAGNITUDE = re.compile(r"(\.lora_magnitude_vector)\.weight$")
_UNWRAPPED = re.compile(r"\.original_module(?=\.)")


@dataclass(frozen=True)
class Renamed:
    """A file's keys as PEFT would have called them.

    Attributes:
        keys: PEFT's key -> the file's, in file order.
        left_out: the file's keys that hold copies of the base's tensors.
        changes: what was done, in words.
        problems: keys of several adapters in one file.
    """

    keys: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def renamed(keys: Iterable[str]) -> Renamed:
    """The keys as PEFT saves them; those that it saved itself stay as they are."""
    found: dict[str, str] = {}
    left_out: list[str] = []
    changes: dict[str, None] = {}
    problems: list[Problem] = []
    for key in keys:
        if _UNWRAPPED.search(key):
            left_out.append(key)
            continue
        name = _WRAPPERS.sub("", key)
        changes |= {"names of wrappers were left out": None} if name != key else {}
        if not name.startswith(PREFIX):
            name = PREFIX + name
            changes |= {f"keys lack the prefix {PREFIX!r}, without which PEFT loads none": None}
        named = _NAMED.search(name)
        if named is not None:
            name = _without_adapter(name, named)
            changes |= {f"keys carry the adapter's name {named['adapter']!r}": None}
        name = _SUFFIX_OF_MAGNITUDE.sub(r"\1", name)
        if name in found:
            message = f"is a second adapter's, beside {found[name]}: save one adapter a file"
            problems.append(Problem("error", key, message))
        else:
            found[name] = key
    return Renamed(found, tuple(left_out), tuple(changes), tuple(problems))


def _without_adapter(name: str, found: re.Match[str]) -> str:
    """A key in memory as PEFT saves it: without the adapter's name."""
    before, after = name[: found.start()], name[found.end("adapter") :]
    part = "" if found["part"] == "modules_to_save" else f".{found['part']}"
    return f"{before}{part}{after}"


# torchtune

_TORCHTUNE = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<module>attn\.\w+|mlp\.w[123])|(?P<root>output|tok_embeddings))"
    r"\.(?P<part>lora_[ab]|magnitude)(?:\.weight)?"
)
_MODULES = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj",
    "output": "lm_head", "tok_embeddings": "model.embed_tokens",
}  # fmt: skip
_PARTS = {
    "lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector",
}  # fmt: skip
# Model types for whose rotary embedding torchtune interleaves rows, and for which it does not.
_INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
_IN_ORDER = ("qwen2", "phi3")


def is_torchtune(keys: Iterable[str]) -> bool:
    """Whether keys are those of torchtune's own adapter files (adapter_0.pt, adapter_model.pt)."""
    return any(_TORCHTUNE.fullmatch(key) for key in keys)


def torchtune_key(key: str) -> str | None:
    """PEFT's key for one of torchtune's; None if it is no factor of a module that is known."""
    match = _TORCHTUNE.fullmatch(key)
    module = match and _MODULES.get(match["root"] or match["module"])
    if match is None or module is None:
        return None
    place = "" if match["root"] else f"model.layers.{match['layer']}."
    return f"{PREFIX}{place}{module}.{_PARTS[match['part']]}"


def torchtune_as_peft(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, LazyTensor], list[Problem]]:
    """The tensors of torchtune's own file under PEFT's names, in transformers' order of rows.

    Args:
        tensors: the file's.
        config: the base's config.json, for its type and its numbers of heads; None if not known.

    Returns:
        The tensors, and what is wrong.
    """
    found: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    for key, tensor in tensors.items():
        name = torchtune_key(key)
        if name is None:
            problems.append(Problem("error", key, "is no factor of a module that is known"))
            continue
        turned = name.endswith(("lora_B.weight", "_vector"))
        ordered = _ordered(key, tensor, _heads(name, config) if turned else 1)
        if isinstance(ordered, Problem):
            problems.append(ordered)
        else:
            found[name] = ordered
    return found, problems


def magnitude_in_order(
    key: str, tensor: LazyTensor, config: Mapping[str, Any] | None
) -> LazyTensor | Problem:
    """One of `magnitudes_out_of_order` in transformers' order of rows, or what is wrong.

    Args:
        key: the file's.
        tensor: (out,).
        config: the base's config.json; None if not known.
    """
    return _ordered(key, tensor, _heads(key.removesuffix(".weight"), config))


def _ordered(key: str, tensor: LazyTensor, heads: int | None) -> LazyTensor | Problem:
    if heads is None:
        message = (
            "torchtune interleaves its rows by the base's heads: give the base, with its "
            "config.json (--base)"
        )
        return Problem("error", key, message)
    if heads > 1 and tensor.shape[0] % (2 * heads):
        message = "its rows are no such number of heads: is this its base?"
        return Problem("error", key, message, f"{heads} heads", f"{tensor.shape[0]} rows")
    return in_order(tensor, heads) if heads > 1 else tensor


def _heads(name: str, config: Mapping[str, Any] | None) -> int | None:
    """By how many heads the rows are interleaved; 1 if they are in order, None if not known."""
    keys = {
        "q_proj": ("num_attention_heads",),
        "k_proj": ("num_key_value_heads", "num_attention_heads"),
    }.get(name.split(".")[-3 if name.endswith(".weight") else -2])
    if keys is None:
        return 1
    model_type = (config or {}).get("model_type")
    if model_type in _IN_ORDER:
        return 1
    counts = [count for key in keys if type(count := (config or {}).get(key)) is int]
    return counts[0] if counts and counts[0] > 0 and model_type in _INTERLEAVED else None


def in_order(tensor: LazyTensor, heads: int) -> LazyTensor:
    """A tensor whose rows were interleaved, the two halves of each head's one after the other.

    Args:
        tensor: (heads * size, ...), size being even.
        heads: the number of heads.
    """

    def blocks() -> Iterator[torch.Tensor]:
        values = tensor.read()
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        yield pairs.transpose(1, 2).reshape(values.shape).contiguous()

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks, tensor.origin)


def magnitudes_out_of_order(keys: Iterable[str], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """DoRA magnitudes of q and k in torchtune's PEFT export, whose rows are still interleaved.

    It names them `lora_magnitude_vector.weight`, which PEFT itself never does, and its config says
    nothing of a version of PEFT.
    """
    if "peft_version" in settings:
        return ()
    ends = tuple(f"{q_or_k}_proj.lora_magnitude_vector.weight" for q_or_k in "qk")
    return tuple(key for key in keys if key.endswith(ends))


# unsloth

Order = Literal["rank_major", "grouped_by_expert"]


@dataclass(frozen=True)
class ExpertOrder:
    """How lora_B's columns (out, E * r) belong to experts.

    Attributes:
        order: "rank_major": column i is expert i % E's, as PEFT has it; "grouped_by_expert":
            column i is expert i // r's.
        told: whether the config says so; else it was concluded from who wrote it.
        fault: what is wrong with what the config says, or "".
    """

    order: Order
    told: bool
    fault: str = ""


def is_unsloth(settings: Mapping[str, Any]) -> bool:
    """Whether unsloth wrote an adapter's config."""
    mapping = settings.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and mapping.get("unsloth_fixed") is True
    return marked or any(str(key).startswith("unsloth_") for key in settings)


def expert_order(settings: Mapping[str, Any]) -> ExpertOrder:
    """The order of lora_B's columns for weights of experts.

    What unsloth wrote without saying which is of before it began to say so: grouped by expert.
    """
    said = settings.get("lora_B_layout")
    if said == "rank_major" or said == "grouped_by_expert":
        return ExpertOrder("grouped_by_expert" if said != "rank_major" else "rank_major", True)
    if said is not None:
        fault = f"lora_B_layout is {said!r}: neither rank_major nor grouped_by_expert"
        return ExpertOrder("rank_major", False, fault)
    return ExpertOrder("grouped_by_expert" if is_unsloth(settings) else "rank_major", False)


def by_expert(b: torch.Tensor, experts: int, order: Order) -> torch.Tensor:
    """lora_B of experts, one matrix for each.

    Args:
        b: (out, E * r).
        experts: E.
        order: of the columns.

    Returns:
        (E, out, r).
    """
    rows = b.shape[0]
    if order == "rank_major":
        return b.reshape(rows, -1, experts).permute(2, 0, 1)
    return b.reshape(rows, experts, -1).permute(1, 0, 2)

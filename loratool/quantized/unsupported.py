"""Ways of quantization that loratool does not read, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.checkpoint import Checkpoint
from loratool.dtypes import is_float

# quant_method of config.json -> what people call it. Everything that is not here or in
# _SUPPORTED is refused, too, under the name that it has there.
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "torchao": "torchao",
    "modelopt": "NVIDIA ModelOpt",
}
_SUPPORTED = ("fp8", "fbgemm_fp8", "bitsandbytes", "compressed-tensors")
# Ends of tensor names that only one way of storing has -> what people call it.
_SIGNS = (
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors in packed integers"),
    ("_proj_blocks", "MXFP4"),
    (".W_q", "HQQ"),
    (".scale_weight", "scaled fp8 of ComfyUI"),
)
# Model types with Conv1D layers that `loratool.families` does not tell by their names.
_TURNED = ("clvp", "decision_transformer", "imagegpt", "openai-gpt")
# Scales of activations and of the cache of keys and values: of no use for plain weights.
OF_ACTIVATIONS = (
    "input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale",
    "q_scale",
)  # fmt: skip
_ADVICE = (
    "an update cannot be added to its codes: merge into the checkpoint that it was quantized from "
    "(its model card names it), which the same adapter fits, and quantize the merged model anew"
)
_OWN_ADVICE = {
    "mxfp4": (
        "load it with transformers and Mxfp4Config(dequantize=True), save it, and use that as the "
        "base"
    ),
}


def refusal(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str:
    """Why a checkpoint cannot be read, and what to do; "" if nothing speaks against it.

    Args:
        checkpoint: as it is stored.
        settings: what its config.json says of its quantization, or {}.
    """
    method = method_of(settings)
    if method not in ("", *_SUPPORTED):
        name = _NAMES.get(method, f"quant_method {method!r} of its config.json")
        return f"is quantized with {name}: {_OWN_ADVICE.get(method, _ADVICE)}"
    if method == "compressed-tensors" and (wrong := _not_fp8(settings)):
        return f"is quantized with compressed-tensors as {wrong}: {_ADVICE}"
    for end, name in _SIGNS:
        found = next((tensor for tensor in checkpoint if tensor.endswith(end)), None)
        if found is not None:
            return f"{found}: is quantized with {name}: {_ADVICE}"
    if found := _unknown_scales(checkpoint):
        return f"{found}: {_ADVICE}"
    model_type = str((checkpoint.config or {}).get("model_type"))
    if method == "bitsandbytes" and model_type in _TURNED:
        return (
            f"is a {model_type} model, some of whose weights bitsandbytes stores transposed, and "
            f"loratool does not know which: {_ADVICE}"
        )
    return ""


def _unknown_scales(checkpoint: Checkpoint) -> str:
    """A weight with scales that no scheme knows, and these; "" if there is none."""
    scales: dict[str, list[str]] = {}  # of each module
    for name in checkpoint:
        module, _, leaf = name.rpartition(".")
        if "scale" in leaf:
            scales.setdefault(module, []).append(leaf)
    for name, tensor in checkpoint.items():
        module, _, leaf = name.rpartition(".")
        known = (f"{leaf}_scale_inv", f"{leaf}_scale")
        own = [scale for scale in scales.get(module, ()) if scale in known]
        is_fp8 = tensor.dtype.startswith("F8_") and "scale" not in leaf
        if own and not is_fp8 and is_float(tensor.dtype) and leaf == "weight":
            return f"{name}: is {tensor.dtype}, but has {own[0]} as if it were quantized"
        others = [s for s in scales.get(module, ()) if s not in (*known, *OF_ACTIVATIONS)]
        if is_fp8 and others and not own:
            return f"{name}: is {tensor.dtype} with scales of an unknown kind ({others[0]})"
    return ""


def method_of(settings: Mapping[str, Any]) -> str:
    """The quant_method, "" if there is none; configs of 2023 name bitsandbytes by its options."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method).lower() if method else ""


def _not_fp8(settings: Mapping[str, Any]) -> str:
    """What the weights of a compressed-tensors checkpoint are, if not plain fp8."""
    stated = settings.get("format")
    if stated not in (None, "float-quantized", "naive-quantized", "dense"):
        return f"{stated!r}"
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        kind, bits = weights.get("type"), weights.get("num_bits")
        if kind != "float" or bits != 8 or not weights.get("symmetric", True):
            return f"{bits} bits of {kind}"
    return ""

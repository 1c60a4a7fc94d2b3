"""The file that lets onnxruntime-genai run a decoder's two graphs.

genai runs a pipeline of graphs, each on the prompt, on the tokens after it, or on both. Its type
"decoder-pipeline" knows no architecture: what it has to know is the names of the inputs and outputs
and the shape of the cache. (Its types that are called after architectures run a single graph.)

A pipeline generates one sequence at a time, from one prompt: genai takes any step of several tokens
for a prompt, those of a batch and those of a second turn of a chat too, and ONNX Runtime refuses
what comes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratool_plugins.exporters.onnx.stages import Stage

GENAI_FILE = "genai_config.json"

# What genai feeds to a graph, by the name of its role.
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
             "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
             "num_beams": 1, "num_return_sequences": 1, "diversity_penalty": 0.0}  # fmt: skip
_PROVIDERS = {"cuda": "cuda", "dml": "dml", "webgpu": "WebGPU"}


def objection(stages: Sequence[Stage]) -> str:
    """Why onnxruntime-genai cannot run a model's graphs; "" if it can."""
    names = tuple(stage.name for stage in stages)
    if names != ("prefill", "decode"):
        return f"it runs decoders with a cache, not {', '.join(names)}"
    decode = stages[1]
    if len(set(decode.layers)) != 1 or decode.layers[0].key != decode.layers[0].value:
        return "it wants a cache whose layers, keys and values are all of one shape"
    foreign = [
        name
        for name in decode.input_names
        if name not in _INPUTS and not name.startswith("past_key_values.")
    ]
    return f"it has nothing to feed {', '.join(foreign)} with" if foreign else ""


def genai_config(
    content: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    stages: Sequence[Stage],
    device: str = "cpu",
) -> dict[str, Any]:
    """What genai_config.json says of a decoder's two graphs.

    Args:
        content: the parsed config.json.
        generation: the parsed generation_config.json; what it does not say is taken from `content`.
        stages: of the model; `objection` has none.
        device: "cpu", "cuda", "dml" or "webgpu": where genai runs them.
    """
    assert not objection(stages)
    prefill, decode = stages
    config: Any = decode.module.config
    text = config.get_text_config()
    said = {**content, **(generation or {})}
    heads, size = decode.layers[0].key
    limit = getattr(text, "max_position_embeddings", None) or 2048
    cache = [f"{index}.{what}" for index in range(len(decode.layers)) for what in ("key", "value")]
    outputs = ["logits", *(f"present.{name}" for name in cache)]
    roles = {name: name for name in decode.input_names if name in _INPUTS}
    eos = _token(said, "eos_token_id", text)
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = _token(said, "pad_token_id", text)
    bos = _token(said, "bos_token_id", text)
    return {
        "model": {
            "type": "decoder-pipeline",
            "bos_token_id": first_eos if bos is None else bos,
            "eos_token_id": eos,
            "pad_token_id": first_eos if pad is None else pad,
            "vocab_size": text.vocab_size,
            "context_length": limit,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{_PROVIDERS[device]: {}}] if device != "cpu" else [],
                },
                "hidden_size": text.hidden_size,
                "head_size": size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(decode.layers),
                "inputs": {
                    **roles,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "pipeline": [
                    {
                        stage.name: {
                            "filename": f"{stage.name}.onnx",
                            "inputs": list(stage.input_names),
                            "outputs": outputs,
                            "run_on_prompt": stage is prefill,
                            "run_on_token_gen": stage is decode,
                        }
                    }
                    for stage in stages
                ],
            },
        },
        "search": {
            **{
                name: default if said.get(name) is None else said[name]
                for name, default in _SAMPLING.items()
            },
            "early_stopping": True,
            "min_length": 0,
            "max_length": limit,
            "past_present_share_buffer": False,
        },
    }


def _token(said: Mapping[str, Any], name: str, text: Any) -> Any:
    """A special token's number (or numbers), or None."""
    value = said.get(name)
    return getattr(text, name, None) if value is None else value

"""What servers take of an adapter: facts read in their sources, as data.

A server loads an adapter's files without the model that they were trained in, and what it has no
place for it refuses, drops, or takes for something else. Each `Server` says which, with the file
where it was read and the date; `loratool.readiness` looks for it in an adapter. Nothing here was
measured: the servers need accelerators and are not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Conduct = Literal["refuses", "ignores", "misreads", "takes"]


@dataclass(frozen=True)
class Limit:
    """What a server does with something that an adapter may have.

    Attributes:
        trait: the something, one of `loratool.readiness.TRAITS`.
        does: "refuses" loads nothing; "ignores" drops it without an error; "misreads" computes
            something else; "takes" is for exceptions from a later limit of the same trait.
        why: what exactly it does, in a few words.
        source: the file that it was read in.
        names: a regular expression that is searched for in the names of parameters; "" for all.
        formats: the adapter formats that it is about; () for all.
        unless: what makes the server take it all the same: then it is a warning.
    """

    trait: str
    does: Conduct
    why: str
    source: str
    names: str = ""
    formats: tuple[str, ...] = ()
    unless: str = ""


@dataclass(frozen=True)
class Ranks:
    """The ranks that a server takes.

    Attributes:
        source: the file that it was read in.
        flag: how the largest rank is set when it is started, RANK standing for it.
        default: the largest rank if it is not set; None if it is found from the adapters.
        choices: what it can be set to; () for any number.
        block: ranks above `least` have to be multiples of this.
        least: the smallest rank.
        why: what becomes of other ranks than `block` and `least` allow.
    """

    source: str
    flag: str = ""
    default: int | None = None
    choices: tuple[int, ...] = ()
    block: int = 1
    least: int = 1
    why: str = ""

    def allowed(self, rank: int) -> int:
        """The smallest rank from this one up that the server does not pad."""
        if rank <= self.least:
            return self.least
        return -(-rank // self.block) * self.block

    def setting(self, rank: int) -> int | None:
        """What the largest rank has to be set to for this one; None if nothing is enough."""
        if not self.choices:
            return rank
        return min((choice for choice in self.choices if choice >= rank), default=None)


@dataclass(frozen=True)
class Server:
    """A server and its limits.

    Attributes:
        name: what users call it.
        title: what it calls itself.
        project: its repository.
        version: what was read: a release, or a commit.
        read: when, as YYYY-MM-DD.
        formats: the adapter formats that it loads.
        write_as: the one to convert others to.
        limits: what it does not take, the first that applies counting.
        ranks: the ranks that it takes; None for all.
        settings: what adapter_config.json must say.
        modules: the last parts of the names of modules that it adapts; () where the model decides.
        partners: the last part of a module's name -> another one that must have an update, too.
    """

    name: str
    title: str
    project: str
    version: str
    read: str
    formats: tuple[str, ...]
    write_as: str
    limits: tuple[Limit, ...]
    ranks: Ranks | None = None
    settings: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    partners: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The files that its limits were read in."""
        found = [limit.source for limit in self.limits]
        return tuple(dict.fromkeys([*found, *([self.ranks.source] if self.ranks else [])]))


_HELPER = "vllm/lora/peft_helper.py"
_VLLM_NAMES = "vllm/lora/utils.py"
_VLLM_MODEL = "vllm/lora/lora_model.py"
_VLLM_MANAGER = "vllm/lora/model_manager.py"

VLLM = Server(
    name="vllm",
    title="vLLM",
    project="vllm-project/vllm",
    version="0.33.0",
    read="2026-11-21",
    formats=("peft",),
    write_as="peft",
    settings=("r", "lora_alpha", "target_modules"),
    ranks=Ranks(
        "vllm/config/lora.py",
        flag="--max-lora-rank RANK",
        default=16,
        choices=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    limits=(
        Limit("format", "refuses", "it opens PEFT's directory", _VLLM_MODEL),
        Limit("settings", "refuses", "it needs them", _HELPER),
        Limit("method", "refuses", "it knows LoRA's factors only", _VLLM_NAMES),
        Limit("dora", "refuses", "use_dora is an error", _HELPER),
        Limit("bias", "refuses", "lora_bias is an error", _HELPER),
        Limit(
            "whole", "takes", "it is the head of a classifier", _HELPER,
            names=r"^(score|classifier)\.(weight|bias)$",
            unless="serve the base as a classifier, with vLLM 0.31 or newer",
        ),
        Limit("whole", "refuses", "of modules_to_save it takes a classifier's head only", _HELPER),
        Limit("whole_bias", "refuses", "bias must be none", _HELPER),
        Limit("bias_setting", "refuses", "bias must be none", _HELPER),
        Limit("rows", "refuses", "it knows LoRA's factors only", _VLLM_NAMES),
        Limit("convolution", "refuses", "it adapts linear layers and embeddings", _VLLM_NAMES),
        Limit(
            "embedding", "refuses", "it adapts the tables that the model lists", _VLLM_NAMES,
            names=r"^(?!(.*\.)?(embed_tokens|wte)\.weight$)",
        ),
        Limit(
            "lone_experts", "refuses", "it wants factors of both gate_up_proj and down_proj",
            _VLLM_MANAGER,
        ),
        Limit(
            "experts", "takes", "it has classes of its own for experts in one tensor",
            "docs/features/lora.md",
            unless="where it holds this model's experts one by one (Qwen3-MoE), start it with "
            "--enable-mixed-moe-lora-format and set is_3d_lora_weight on the adapter",
        ),
        Limit(
            "ranks", "takes", "it looks rank_pattern up", _HELPER,
            unless="use vLLM 0.32 or newer: older ones scale all by alpha / r of the config",
        ),
        Limit(
            "alphas", "takes", "it looks alpha_pattern up", _HELPER,
            unless="use vLLM 0.32 or newer: older ones scale all by alpha / r of the config",
        ),
    ),
)  # fmt: skip

_TRT = "tensorrt_llm/_torch/peft/lora/"
_TRT_TABLES = r"(lm_head|embed_tokens)"
_TRT_NO_KEYS = "keys that are no factors of a numbered layer are errors"
_TRT_TABLES_WHY = "keys with lm_head or embed_tokens in them are passed over"

TENSORRT_LLM = Server(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    project="NVIDIA/TensorRT-LLM",
    version="main at 1630fc37 (1.3.0rc)",
    read="2026-11-21",
    formats=("peft",),
    write_as="peft",
    settings=("r", "lora_alpha"),
    ranks=Ranks(f"{_TRT}config.py", flag="LoraConfig(max_lora_rank=RANK)", default=64),
    modules=(
        "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "gate_up_proj", "w1", "w2", "w3", "gate", "in_proj", "out_proj", "fc1_latent_proj",
        "fc2_latent_proj",
    ),
    limits=(
        Limit("format", "refuses", "it opens PEFT's directory", f"{_TRT}loaders.py"),
        Limit("settings", "refuses", "it needs them", f"{_TRT}manager.py"),
        Limit("method", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit(
            "dora", "misreads",
            "it takes the magnitudes for already divided by the norms, and uses them only in "
            "engines that were built with its DoRA plugin",
            "examples/dora/README.md",
        ),
        Limit("bias", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit("whole", "ignores", _TRT_TABLES_WHY, f"{_TRT}loaders.py", names=_TRT_TABLES),
        Limit("whole", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit("whole_bias", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit("rows", "ignores", _TRT_TABLES_WHY, f"{_TRT}loaders.py", names=_TRT_TABLES),
        Limit("rows", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit("embedding", "ignores", _TRT_TABLES_WHY, f"{_TRT}loaders.py", names=_TRT_TABLES),
        Limit("embedding", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py"),
        Limit("experts", "ignores", "it reads experts one by one only", f"{_TRT}loaders.py"),
        Limit("update", "ignores", _TRT_TABLES_WHY, f"{_TRT}loaders.py", names=r"(^|\.)lm_head\."),
        Limit(
            "update", "refuses", _TRT_NO_KEYS, f"{_TRT}loaders.py",
            names=r"^(?!.*\.\d+\.\w+\.\w+(\.\w+)*\.weight$)",
        ),
        Limit(
            "module", "ignores", "it has no module of this name, and says so in its log only",
            f"{_TRT}loaders.py",
        ),
        Limit(
            "ranks", "misreads", "with CUDA graphs it takes the first rank for that of all",
            f"{_TRT}cuda_graph_lora_params.py",
        ),
        Limit(
            "alphas", "misreads", "it divides lora_alpha by each tensor's rank, whatever "
            "alpha_pattern says", f"{_TRT}manager.py",
        ),
    ),
)  # fmt: skip

_SGL = "python/sglang/srt/lora/"

SGLANG = Server(
    name="sglang",
    title="SGLang",
    project="sgl-project/sglang",
    version="0.5.23",
    read="2026-11-21",
    formats=("peft",),
    write_as="peft",
    settings=("r", "lora_alpha", "target_modules"),
    ranks=Ranks(f"{_SGL}lora_manager.py", flag="--max-lora-rank RANK"),
    modules=(
        "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "gate_up_proj", "w1", "w2", "w3", "embed_tokens", "lm_head", "in_proj", "out_proj",
        "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "in_proj_qkvz", "q_a_proj", "q_b_proj",
        "kv_a_proj_with_mqa", "kv_b_proj", "wq_b", "wk", "weights_proj", "fc1_latent_proj",
        "fc2_latent_proj", "wq_du", "wk_dv", "wv_dv", "wr_du", "wo_ud",
    ),
    partners={"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj"},
    limits=(
        Limit("format", "refuses", "it opens PEFT's directory", f"{_SGL}lora_config.py"),
        Limit("settings", "refuses", "it needs them", f"{_SGL}lora.py"),
        Limit(
            "target_pattern", "refuses", "target_modules must be a list, all or all-linear",
            f"{_SGL}utils.py",
        ),
        Limit("method", "refuses", "peft_type must be LORA", f"{_SGL}lora.py"),
        Limit("dora", "refuses", "use_dora is an error", f"{_SGL}lora_manager.py"),
        Limit(
            "bias", "ignores", "the bias of lora_B gives way to its weight in one buffer",
            f"{_SGL}mem_pool.py",
        ),
        Limit(
            "whole", "refuses", "inside a layer it finds no target module for it",
            f"{_SGL}mem_pool.py", names=r"\.layers\.\d+\.",
        ),
        Limit("whole", "ignores", "outside the layers it keeps factors only", f"{_SGL}lora.py"),
        Limit("whole_bias", "ignores", "it keeps factors only", f"{_SGL}mem_pool.py"),
        Limit("rows", "ignores", "it keeps factors only", f"{_SGL}lora.py"),
        Limit("tokens", "refuses", "it serves no added tokens", f"{_SGL}lora_manager.py"),
        Limit(
            "experts", "refuses", "it reads experts one by one, or its own form of several",
            f"{_SGL}mem_pool.py",
        ),
        Limit(
            "update", "ignores", "beside embed_tokens and lm_head it keeps only what lies in "
            "layers.N", f"{_SGL}lora.py",
            names=r"^(?!.*(layers\.\d+\.|embed_tokens|lm_head))",
        ),
        Limit("module", "refuses", "it has no buffer for such a module", f"{_SGL}utils.py"),
        Limit(
            "lone", "refuses", "it packs q_proj, k_proj and v_proj, and fills in k_proj only",
            f"{_SGL}lora.py",
        ),
        Limit("ranks", "refuses", "its buffers take one rank, that of r", f"{_SGL}mem_pool.py"),
        Limit("alphas", "ignores", "all are scaled by lora_alpha / r", f"{_SGL}lora.py"),
        Limit("rslora", "misreads", "all are scaled by lora_alpha / r", f"{_SGL}lora.py"),
    ),
)  # fmt: skip

_LORAX = "server/lorax_server/adapters/lora.py"

LORAX = Server(
    name="lorax",
    title="LoRAX",
    project="predibase/lorax",
    version="main at 1e223be1",
    read="2026-11-21",
    formats=("peft",),
    write_as="peft",
    ranks=Ranks(
        "server/lorax_server/utils/punica.py",
        least=8,
        block=16,
        why="it pads other ranks, and from the second kind of layer on divides alpha by the padded "
        "rank (with N GPUs, ranks below 8 N are padded as well)",
    ),
    modules=(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
        "qkv_proj", "gate_up_proj", "dense", "fc1", "fc2", "c_attn", "c_proj", "c_fc", "w1", "w2",
        "Wqkv", "out_proj", "query_key_value", "dense_h_to_4h", "dense_4h_to_h",
    ),
    limits=(
        Limit("format", "refuses", "it opens PEFT's directory", _LORAX),
        Limit("method", "refuses", "it reads LoRA's settings", _LORAX),
        Limit("dora", "ignores", "it takes the factors and leaves the magnitudes", _LORAX),
        Limit("bias", "ignores", "it takes lora_A.weight and lora_B.weight only", _LORAX),
        Limit("whole", "ignores", "it takes lora_A.weight and lora_B.weight only", _LORAX),
        Limit("whole_bias", "ignores", "it takes lora_A.weight and lora_B.weight only", _LORAX),
        Limit("rows", "ignores", "it takes lora_A.weight and lora_B.weight only", _LORAX),
        Limit("embedding", "ignores", "it takes lora_A.weight and lora_B.weight only", _LORAX),
        Limit("experts", "ignores", "it has no layers of experts", "docs/models/adapters/lora.md"),
        Limit(
            "module", "ignores", "it has no module of this name", "docs/models/adapters/lora.md"
        ),
        Limit(
            "layers", "ignores", "it drops a kind of module unless every layer has an update of it",
            _LORAX,
        ),
        Limit(
            "ranks", "misreads", "it scales all by lora_alpha / r, and stacks the layers of a kind",
            _LORAX,
        ),
        Limit("alphas", "ignores", "all are scaled by lora_alpha / r", _LORAX),
    ),
)  # fmt: skip

_CONVERTER = "convert_lora_to_gguf.py"
_NO_FACTORS = "its adapter files hold pairs of factors only"

LLAMA_CPP = Server(
    name="llama.cpp",
    title="llama.cpp",
    project="ggml-org/llama.cpp",
    version="0c1e5709 (in llama-cpp-python 0.3.36)",
    read="2026-11-21",
    formats=("gguf",),
    write_as="gguf",
    limits=(
        Limit("format", "refuses", "it loads GGUF files", "src/llama-adapter.cpp"),
        Limit("method", "refuses", _NO_FACTORS, _CONVERTER),
        Limit("dora", "refuses", _NO_FACTORS, _CONVERTER),
        Limit("bias", "refuses", _NO_FACTORS, _CONVERTER),
        Limit(
            "whole", "ignores", "it loads norms, and does not use them", "src/llama-adapter.cpp",
            names=r"norm\.weight$",
        ),
        Limit("whole", "refuses", _NO_FACTORS, _CONVERTER),
        Limit("whole_bias", "refuses", _NO_FACTORS, _CONVERTER),
        Limit("rows", "refuses", _NO_FACTORS, _CONVERTER),
    ),
)  # fmt: skip

_PIPELINES = "src/diffusers/loaders/lora_pipeline.py"
_IN_PEFT = "src/diffusers/utils/peft_utils.py"

DIFFUSERS = Server(
    name="diffusers",
    title="diffusers",
    project="huggingface/diffusers",
    version="0.42.1",
    read="2026-11-21",
    formats=("diffusers", "kohya"),
    write_as="diffusers",
    limits=(
        Limit(
            "format", "ignores", "load_lora_weights finds no key of a component, and only warns",
            "src/diffusers/loaders/peft.py", formats=("peft",),
        ),
        Limit("format", "refuses", "it wants keys of its components, or kohya's", _PIPELINES),
        Limit(
            "dora", "ignores", "it filters dora_scale out, and loads the factors", _PIPELINES,
            formats=("kohya", "lycoris"),
        ),
        Limit("method", "refuses", "it makes LoRA's settings from the keys", _IN_PEFT),
        Limit(
            "whole", "takes", "it loads them into the pipeline's own weights",
            "src/diffusers/loaders/peft.py",
            unless="mind that they stay there when the adapter is unloaded",
        ),
        Limit(
            "whole_bias", "takes", "it loads them into the pipeline's own weights",
            "src/diffusers/loaders/peft.py",
            unless="mind that they stay there when the adapter is unloaded",
        ),
        Limit("rows", "refuses", "it has no trained rows", _IN_PEFT),
    ),
)  # fmt: skip

SERVERS: Mapping[str, Server] = {
    server.name: server for server in (VLLM, TENSORRT_LLM, SGLANG, LORAX, LLAMA_CPP, DIFFUSERS)
}

"""What an adapter costs at inference: merged, grafted, swappable, and Houlsby adapters.

    python latency.py FOLDER [--scale small|paper] [--model bert gpt2] [--provider cpu]

Makes a BERT (base size) and a GPT-2 (medium size) with random weights and a LoRA adapter for each,
and exports them to ONNX: `loratool export` of the base, of the merge, of the merge grafted onto the
base's graph, and swappable; then, by transformers' exporter alone, the base once more (plain) and
with Houlsby adapters. `loratool bench` runs all of them interleaved in one process. The shapes are
those of Table 1 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685): 32 x 512, 16 x 256, 1 x 128;
`--scale small`, the default, takes fewer layers, words and tokens, and says which.

A Houlsby adapter (Houlsby et al. 2019, arXiv:1902.00751, section 2) maps x to x + up(GELU(down(x)))
through a bottleneck (64 here), and stands after each sublayer, attention and MLP, before what that
adds to is added and normalised. As loratool does not export it, it is compared with `plain`, which
came the same way; everything else with `base`. All decoders run without a cache.

What is made stays in FOLDER and is made once; `--contenders` leaves some out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from loratool.quiet import quiet
from loratool_plugins.steps.bench.statistics import ratio_of_medians

LORATOOL = Path(sys.executable).with_name("loratool")
CONTENDERS = ("merged", "grafted", "swappable", "houlsby")
POSITIONS = 512
OPSET = 20


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        shapes: batch x sequence of the inputs.
        layers: at most so many.
        vocabulary: at most so many words.
        warmups: rounds that do not count.
        repeats: rounds that do.
    """

    shapes: tuple[str, ...]
    layers: int
    vocabulary: int
    warmups: int
    repeats: int


SCALES = {
    "small": Scale(("4x256", "2x128", "1x128"), 4, 8000, 3, 20),
    "paper": Scale(("32x512", "16x256", "1x128"), 1000, 1 << 30, 10, 20),
}


@dataclass(frozen=True)
class Kind:
    """A model to make.

    Attributes:
        config: at full size.
        cls: its class.
        layers: the name of the config's number of layers.
        targets: modules that LoRA adapts.
        sublayers: ends of the names of the modules that a Houlsby adapter follows.
        options: of `loratool export`.
    """

    config: Any
    cls: type[PreTrainedModel]
    layers: str
    targets: tuple[str, ...]
    sublayers: tuple[str, ...]
    options: tuple[str, ...] = ()


KINDS = {
    "bert": Kind(
        BertConfig(),
        BertForSequenceClassification,
        "num_hidden_layers",
        ("query", "value"),
        ("output.dense",),  # of attention and of the MLP
    ),
    "gpt2": Kind(
        GPT2Config(n_layer=24, n_embd=1024, n_head=16, use_cache=False),
        GPT2LMHeadModel,
        "n_layer",
        ("c_attn",),
        ("attn.c_proj", "mlp.c_proj"),
        ("--no-cache",),
    ),
}


class Houlsby(torch.nn.Module):
    """A sublayer's last module, and an adapter on what it gives.

    Args:
        before: the module; it gives (..., width).
        width: of what it gives.
        bottleneck: of the adapter.
    """

    def __init__(self, before: torch.nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        self.before = before
        self.down = torch.nn.Linear(width, bottleneck)
        self.up = torch.nn.Linear(bottleneck, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return x + self.up(torch.nn.functional.gelu(self.down(x)))


def main() -> None:
    arguments = parse_arguments()
    scale = SCALES[arguments.scale]
    found = {}
    for name in arguments.model:
        started = time.perf_counter()
        kind = KINDS[name]
        full = getattr(kind.config, kind.layers), kind.config.vocab_size
        layers = min(full[0], arguments.layers or scale.layers)
        words = min(full[1], scale.vocabulary)
        folder = arguments.folder / f"{name}-{layers}-{words}-{arguments.provider}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {layers} of {full[0]} layers, {words} of {full[1]} words", flush=True)
        places = make(kind, folder, layers, words, arguments)
        print(f"made in {time.perf_counter() - started:.0f} s", flush=True)
        found[name] = bench(places, folder, scale, arguments)
        print(table(found[name]))
        print(f"{name}: {time.perf_counter() - started:.0f} s in all\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


def make(
    kind: Kind, folder: Path, layers: int, words: int, arguments: argparse.Namespace
) -> dict[str, Path]:
    """All ONNX folders of a model that are asked for, by name."""
    torch.manual_seed(arguments.seed)
    config = type(kind.config).from_dict(
        {
            **kind.config.to_dict(),
            kind.layers: layers,
            "vocab_size": words,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )
    base, lora, places = folder / "model", folder / "lora", {"base": folder / "base"}
    if not lora.exists():
        model = kind.cls(config).eval()
        with quiet():
            model.save_pretrained(base)
            save_lora(model, kind, lora, arguments.rank)
    wanted = arguments.contenders
    options = ("--device", arguments.provider, "--dtype", "fp32", *kind.options)
    export(places["base"], base, *options)
    if "merged" in wanted:
        places["merged"] = export(folder / "merged", base, lora, *options)
    if "grafted" in wanted:
        graph = places["base"] / "model.onnx"
        places["grafted"] = export(folder / "grafted", base, lora, "--graft", graph)
    if "swappable" in wanted:
        places["swappable"] = export(folder / "swappable", base, lora, "--swappable", *options)
    if "houlsby" in wanted:
        for name, bottleneck in (("plain", 0), ("houlsby", arguments.bottleneck)):
            places[name] = folder / name
            if not places[name].exists():
                with quiet():
                    model = kind.cls.from_pretrained(base).eval()
                if bottleneck:
                    insert(model, kind.sublayers, config.hidden_size, bottleneck)
                export_module(model, places[name], arguments.provider)
    return places


def save_lora(model: PreTrainedModel, kind: Kind, place: Path, rank: int) -> None:
    """A LoRA adapter with random factors, in PEFT's format."""
    settings = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(kind.targets),
        fan_in_fan_out="c_attn" in kind.targets,
        init_lora_weights=False,
    )
    get_peft_model(model, settings).save_pretrained(str(place))


def insert(model: PreTrainedModel, sublayers: Sequence[str], width: int, bottleneck: int) -> None:
    """Put a Houlsby adapter after every sublayer.

    Raises:
        SystemExit: there are not two of them in each layer.
    """
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(sublayers))]
    if len(names) != 2 * model.config.num_hidden_layers:
        sys.exit(f"{len(names)} sublayers in {model.config.num_hidden_layers} layers")
    for name in names:
        model.set_submodule(name, Houlsby(model.get_submodule(name), width, bottleneck))


def export_module(model: PreTrainedModel, place: Path, device: str) -> None:
    """Export a model by transformers, fused for a device, with weights beside the graph."""
    ids = torch.randint(10, 100, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0  # all ones would make it no input
    feeds = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model.config, BertConfig):
        feeds["token_type_ids"] = torch.zeros_like(ids)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=POSITIONS)}
    settings = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dict.fromkeys(feeds, axes),
        optimize=True,
        ort_fusions=device,
        opset_version=OPSET,
    )
    with quiet():
        program = OnnxExporter().export(model, feeds, settings).program
    traced = program.model if hasattr(program, "model") else program
    place.mkdir()
    ir.save(traced, place / "model.onnx", external_data="model.onnx.data")


def export(place: Path, *words: str | Path) -> Path:
    """`loratool export`, unless it is there already.

    Raises:
        SystemExit: it fails, or does not know an option.
    """
    if place.exists():
        return place
    command = [str(word) for word in (LORATOOL, "export", *words, "-o", place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        hint = ""
        if "No such option" in done.stderr:
            hint = f"\nthis loratool cannot do that: leave {place.name} out by --contenders"
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}{hint}")
    return place


def bench(
    places: dict[str, Path], folder: Path, scale: Scale, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`loratool bench` of all folders; its report, with the ratio of houlsby to plain added."""
    command: list[Any] = [LORATOOL, "bench", *places.values(), "--json"]
    for shape in arguments.shape or scale.shapes:
        command += ["--shape", shape]
    if "swappable" in places:
        for adapter in sorted(places["swappable"].rglob("*.onnx_adapter")):
            command += ["--adapter", adapter]
    for option, value in (
        ("--warmups", arguments.warmups or scale.warmups),
        ("--repeats", arguments.repeats or scale.repeats),
        ("--threads", arguments.threads), ("--provider", arguments.provider),
        ("--limit", arguments.limit), ("--seed", arguments.seed),
        ("--plot", folder / "latency.png"),
    ):  # fmt: skip
        command += [option, value]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"loratool bench failed with {done.returncode}")
    data: dict[str, Any] = json.loads(done.stdout)
    for result in data["results"]:
        models = {model["name"]: model for model in result["models"]}
        for facts in models.values():
            facts["against"] = data["reference"]
        if "houlsby" in models:
            facts = models["houlsby"]
            times = (np.array(models[name]["seconds"]) for name in ("houlsby", "plain"))
            ratio = ratio_of_medians(*times, arguments.seed)
            facts["against"] = "plain"
            facts["ratio"], facts["ratio_interval"] = ratio.value, [ratio.low, ratio.high]
    return data


def table(data: dict[str, Any]) -> str:
    """A row for each model, a column for each shape, and whether nodes are equal."""
    results = data["results"]
    heads = [f"{r['batch']} x {r['sequence']}, ms and ratio (95%)" for r in results]
    rows = [f"{'model':<22}" + "".join(f"{head:<34}" for head in heads) + "nodes"]
    graphs = {m["name"]: m["graphs"]["model"] for m in data["models"]}
    for place, first in enumerate(results[0]["models"]):
        cells = []
        for result in results:
            facts = result["models"][place]
            low, high = facts["ratio_interval"]
            time_ = f"{1000 * facts['median']:8.1f}"
            cells.append(f"{time_} {facts['ratio']:.3f} ({low:.3f} to {high:.3f})".ljust(34))
        graph = graphs.get(first["name"])
        equal = "" if graph is None else f"{graph['nodes']}{' =' * graph['equal_nodes']}"
        against = "" if first["against"] == data["reference"] else f" / {first['against']}"
        rows.append(f"{first['name'] + against:<22}{''.join(cells)}{equal}")
    floors = ", ".join(f"{100 * result['noise_floor']:.1f}%" for result in results)
    rounds = ", ".join(str(result["rounds"]) for result in results)
    rows.append(f"noise floor ±{floors}; {rounds} rounds; {', '.join(data['providers'])}")
    for facts in data["models"]:
        load = "" if facts["load_seconds"] is None else f"load {facts['load_seconds']:.2f} s, "
        memory = facts["private_bytes"]
        private = "" if memory is None else f"private {memory / 2**20:.0f} MiB, "
        disk = f"disk {facts['disk_bytes'] / 2**20:.0f} MiB"
        own = f"of it alone {facts['own_bytes'] / 2**20:.1f} MiB"
        rows.append(f"{facts['name']:<22}{load}{private}{disk}, {own}")
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--model", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--layers", type=int, help="instead of the scale's")
    parser.add_argument("--shape", nargs="+", help="instead of the scale's, as 8x128")
    parser.add_argument("--warmups", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a model and shape")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA adapter")
    parser.add_argument("--bottleneck", type=int, default=64, help="of the Houlsby adapters")
    parser.add_argument("--provider", choices=("cpu", "cuda", "webgpu", "dml"), default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

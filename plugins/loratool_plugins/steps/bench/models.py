"""Which models there are in folders of ONNX graphs, and which graphs each is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.errors import InputError, MismatchError, UsageError
from loratool.reports import listed

# Graphs that one model is made of are called so, alone or after "NAME-" or "NAME."; in the order
# in which reports list them.
STAGES = (
    *("encoder", "decoder", "prefill", "decode"),
    *("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged"),
    *("text_encoder", "vision_encoder", "audio_encoder", "embedding", "vision", "audio"),
)
ONLY = "model"  # the stage of a model that is one graph


@dataclass(frozen=True)
class Model:
    """One of the models that are measured.

    Attributes:
        name: what reports call it.
        place: the folder or file that was given.
        graphs: stage -> the file of its graph.
    """

    name: str
    place: Path
    graphs: Mapping[str, Path]


def find_models(places: Sequence[Path]) -> list[Model]:
    """The models in folders, or of single .onnx files, each with a name of its own.

    A folder's graphs are the stages of one model where they are called so (`prefill.onnx`), and
    models of their own otherwise (`math.onnx`, `code.onnx`).

    Raises:
        InputError: there is no such place, or no graph in it; all of them at once.
        UsageError: a place is given twice.
    """
    complaints = [text for place in places if (text := _objection(place))]
    if complaints:
        raise InputError("\n".join(complaints))
    real = [place.resolve() for place in places]
    if twice := [p for p, r in zip(places, real, strict=True) if real.count(r) > 1]:
        raise UsageError(
            f"{twice[0]} is given twice: the reference is measured against itself in any case"
        )
    models = []
    for place, name in zip(places, _names(places), strict=True):
        models += _models_in(place, name)
    named = [model.name for model in models]
    return [
        model if named.count(model.name) == 1 else replace(model, name=f"{model.place}: {name}")
        for model, name in zip(models, named, strict=True)
    ]


def only_model(place: Path) -> Model:
    """The one model in a place.

    Raises:
        InputError: there is none, or more than one.
    """
    found = find_models([place])
    if len(found) > 1:
        files = sorted(path.name for model in found for path in model.graphs.values())
        raise InputError(f"{place}: holds several models ({listed(files, 6)}): give one file")
    return found[0]


def same_graphs(one: Model, other: Model) -> bool:
    """Whether two models are the same files."""
    return {path.resolve() for path in one.graphs.values()} == {
        path.resolve() for path in other.graphs.values()
    }


def in_stages_of(reference: Model, model: Model) -> tuple[Model, tuple[str, ...]]:
    """A model with those stages alone that the reference has, too, and what was left out.

    A model of one graph is compared with a reference of one graph whatever these are called.

    Raises:
        MismatchError: they have no stage in common.
    """
    if len(model.graphs) == len(reference.graphs) == 1:
        (stage,) = reference.graphs
        return replace(model, graphs={stage: next(iter(model.graphs.values()))}), ()
    common = {stage: path for stage, path in model.graphs.items() if stage in reference.graphs}
    if not common:
        raise MismatchError(
            f"{model.place}: has the graphs {_stages(model)}, and {reference.place} has "
            f"{_stages(reference)}: nothing can be compared; give the .onnx files themselves"
        )
    surplus = sorted(set(model.graphs) ^ set(reference.graphs))
    return replace(model, graphs=common), tuple(surplus)


def _objection(place: Path) -> str:
    if not place.exists():
        return f"{place}: no such file or directory"
    if place.is_dir():
        if any(place.glob("*.onnx")):
            return ""
        inside = sorted(path.name for path in place.iterdir())
        held = f"it holds {listed(inside, 6)}" if inside else "it is empty"
        return f"{place}: holds no .onnx file; {held}"
    if place.suffix != ".onnx":
        return f"{place}: is no .onnx file: give the graph, or the folder that it lies in"
    return ""


def _models_in(place: Path, name: str) -> list[Model]:
    if place.is_file():
        _, stage = _split(place.stem)
        return [Model(name, place, {stage: place})]
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(place.glob("*.onnx")):
        variant, stage = _split(path.stem)
        found.setdefault(variant, {})[stage] = path
    return [
        Model(
            f"{name}/{variant}" if variant and len(found) > 1 else name,
            place,
            {stage: graphs[stage] for stage in (*STAGES, ONLY) if stage in graphs},
        )
        for variant, graphs in sorted(found.items())
    ]


def _split(stem: str) -> tuple[str, str]:
    """The name of a graph's model within its folder ("" for the only one), and the stage."""
    if stem == ONLY:
        return "", ONLY
    for stage in sorted(STAGES, key=len, reverse=True):
        if stem == stage:
            return "", stage
        if stem.endswith((f"-{stage}", f".{stage}")):
            return stem[: -len(stage) - 1], stage
    return stem, ONLY


def _names(places: Sequence[Path]) -> list[str]:
    """As many last parts of the places' paths as tell them apart."""
    paths = [Path(os.path.normpath(place.absolute())) for place in places]
    named = [path.parent if path.name == f"{ONLY}.onnx" else path for path in paths]
    if len(set(named)) < len(named):
        named = paths
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in named) + 1):
        names = ["/".join(path.parts[-depth:]).removesuffix(".onnx") for path in named]
        if len(set(names)) == len(names):
            break
    return names


def _stages(model: Model) -> str:
    return listed(sorted(path.name for path in model.graphs.values()), 6)

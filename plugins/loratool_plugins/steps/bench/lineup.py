"""The models that are measured, with their graphs read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import MismatchError
from loratool_plugins.steps.bench.feeds import require_same_inputs
from loratool_plugins.steps.bench.graphs import Graph, read_graph
from loratool_plugins.steps.bench.models import (
    Model,
    find_models,
    in_stages_of,
    only_model,
    same_graphs,
)
from loratool_plugins.steps.bench.runs import Values, read_adapter, takes_adapter


@dataclass(frozen=True)
class Contender:
    """One of the models that are measured.

    Attributes:
        name: what reports call it.
        place: the folder or file that was given.
        graphs: stage -> its graph.
        adapter: values of optional inputs; None for the graph's own.
        adapter_file: where they come from.
    """

    name: str
    place: Path
    graphs: Mapping[str, Graph]
    adapter: Values | None = None
    adapter_file: Path | None = None

    @property
    def files(self) -> dict[tuple[int, int], int]:
        """The files that it needs: device and number of each, and its bytes.

        A file that has several names counts once.
        """
        paths = [path for g in self.graphs.values() for path in (g.path, *g.data)]
        if self.adapter_file is not None:
            paths.append(self.adapter_file)
        found = [path.stat() for path in paths]
        return {(stat.st_dev, stat.st_ino): stat.st_size for stat in found}

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.place if self.place.is_dir() else self.place.parent


@dataclass(frozen=True)
class Lineup:
    """What is compared with what.

    Attributes:
        contenders: the reference first.
        notes: what the user should hear.
    """

    contenders: Sequence[Contender]
    notes: tuple[str, ...]

    @property
    def reference(self) -> Contender:
        """What all others are compared with."""
        return self.contenders[0]

    def own_bytes(self, contender: Contender) -> int:
        """Bytes of files that no other model needs; with an adapter, of what it adds."""
        others = {
            key
            for other in self.contenders
            if other is not contender
            and (contender.adapter or other.graphs is not contender.graphs)
            for key in other.files
        }
        return sum(size for key, size in contender.files.items() if key not in others)


def line_up(places: Sequence[Path], against: Path | None, adapters: Sequence[Path]) -> Lineup:
    """Find all models and read their graphs, without weights.

    Args:
        places: folders and files.
        against: where the reference is; None for the first model.
        adapters: .onnx_adapter files, each for the models that take it.

    Raises:
        InputError: nothing is there, or weights are missing.
        FormatError: a file is not what its name says.
        MismatchError: models have other graphs or inputs than the reference, or none takes an
            adapter.
    """
    values = {path: read_adapter(path) for path in adapters}
    models = find_models(places)
    reference = models[0] if against is None else only_model(against)
    others = [model for model in models if not same_graphs(model, reference)]
    if len(others) < len(models):  # it has a name that tells it from the others
        reference = next(model for model in models if same_graphs(model, reference))
    names = {model.name for model in others}
    if reference.name in names:
        reference = Model(os.path.normpath(reference.place), reference.place, reference.graphs)
    first = Contender(reference.name, reference.place, _read(reference))
    notes: list[str] = []
    plain = [first]
    for model in others:
        common, left = in_stages_of(reference, model)
        notes += [f"{model.name}: only one of the two has {stage}: left out" for stage in left]
        graphs = _read(common)
        for stage, graph in graphs.items():
            require_same_inputs(graph, first.graphs[stage])
        plain.append(Contender(model.name, model.place, graphs))
    contenders = [found for one in plain for found in _with_adapters(one, values, plain)]
    return Lineup(contenders, tuple(notes))


def _read(model: Model) -> dict[str, Graph]:
    return {stage: read_graph(path) for stage, path in model.graphs.items()}


def _with_adapters(
    contender: Contender, adapters: Mapping[Path, Values], everyone: Sequence[Contender]
) -> list[Contender]:
    """A contender without an adapter, and with each that it takes."""
    found = [contender]
    for path, values in adapters.items():
        if _takes(contender, values, path):
            name = f"{contender.name} + {path.stem}"
            found.append(Contender(name, contender.place, contender.graphs, values, path))
        elif not any(_takes(one, values, path) for one in everyone):
            some = next(iter(values))
            raise MismatchError(
                f"{path}: no model here takes it: none has an optional input {some}; export one "
                "with --swappable"
            )
    return found


def _takes(contender: Contender, values: Values, path: Path) -> bool:
    return all(takes_adapter(graph, values, path) for graph in contender.graphs.values())

"""Measures models side by side: loads, then rounds of runs for every shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratool.errors import InputError
from loratool.quiet import shorten
from loratool.reports import Report
from loratool_plugins.steps.bench.feeds import Feeds, Making, make_feeds, vocabulary_of
from loratool_plugins.steps.bench.lineup import Contender, Lineup
from loratool_plugins.steps.bench.loading import Load, measure_load
from loratool_plugins.steps.bench.report import Measured, bench_report
from loratool_plugins.steps.bench.rounds import Plan, run_rounds
from loratool_plugins.steps.bench.runs import timed_run
from loratool_plugins.steps.bench.sessions import PROVIDERS, Options, open_session
from loratool_plugins.steps.bench.shapes import Extent, Shape, extent

if TYPE_CHECKING:
    from loratool.engine import Drain

_LOADS = 3
_SLOW_LOAD = 20.0  # seconds; what takes longer is loaded once


@dataclass(frozen=True)
class Trial:
    """Models that are ready to be measured; no weights are read yet.

    Attributes:
        lineup: the models.
        shapes: of the inputs.
        making: how inputs are made up.
        plan: how often everything runs.
        options: of all sessions.
        strict: whether it is an error if the provider cannot be had.
        plot: the picture to draw, or None.
    """

    lineup: Lineup
    shapes: tuple[Shape, ...]
    making: Making
    plan: Plan
    options: Options
    strict: bool = False
    plot: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear before it begins."""
        return self.lineup.notes

    def check(self) -> None:
        """Make every input up once.

        Raises:
            InputError: one cannot be made up.
            MismatchError: an array that was given does not fit.
        """
        graphs = self.lineup.reference.graphs
        for shape in self.shapes:
            if shape.past and not any(graph.has_cache for graph in graphs.values()):
                raise InputError(
                    f"{self.lineup.reference.place}: has no cache (inputs past_key_values.*) for "
                    f"--shape {shape.text}: leave +{shape.past} out"
                )
        for stage, shape in self._pairs():
            for contender in self.lineup.contenders:
                self._feeds(contender, stage, shape)

    def measure(self, drain: Drain) -> Report:
        """Load and run everything, tell what it took, and draw it if that was asked for.

        Raises:
            InputError: ONNX Runtime refuses a graph or an input, or, if `strict`, lacks the
                provider.
            OutputError: the picture cannot be written.
        """
        stages = self.lineup.reference.graphs
        rounds = (self.plan.warmups + self.plan.repeats) * len(self._pairs())
        loads = _LOADS * len(stages) * len(self._loaded())
        told = drain.count("Measuring", rounds + loads)
        loads_of = self._loads(told)
        measured = [found for stage in stages for found in self._stage(stage, told)]
        report = bench_report(self.lineup, measured, loads_of, self.plan, self.options)
        if self.plot:
            from loratool.plotting.latency import draw_latency

            draw_latency(report.data, Path(self.plot))
        return report

    def _pairs(self) -> list[tuple[str, Shape]]:
        """The stages with the shapes that they are run on: a past is for those with a cache."""
        graphs = self.lineup.reference.graphs
        return [
            (stage, shape)
            for stage, graph in graphs.items()
            for shape in self.shapes
            if graph.has_cache or not shape.past
        ]

    def _loaded(self) -> list[Contender]:
        """Those that are loaded: an adapter's values are no part of a session."""
        return [found for found in self.lineup.contenders if found.adapter is None]

    def _loads(self, told: Callable[[str], None]) -> Mapping[str, Sequence[Load]]:
        """What it takes to load each model, all its graphs together, a few times in random order.

        Raises:
            InputError: a graph cannot be loaded, or the provider is missing and that is an error.
        """
        generator = np.random.default_rng(self.plan.seed)
        contenders = self._loaded()
        found: dict[str, list[Load]] = {contender.name: [] for contender in contenders}
        for _ in range(_LOADS):
            for place in generator.permutation(len(contenders)):
                contender = contenders[place]
                earlier = found[contender.name]
                if earlier and earlier[0].seconds > _SLOW_LOAD:
                    continue
                parts = []
                for graph in contender.graphs.values():
                    parts.append(measure_load(graph.path, self.options))
                    self._require_provider(parts[-1].providers)
                    told(f"loading {contender.name}")
                earlier.append(_together(parts))
        return found

    def _require_provider(self, providers: Sequence[str]) -> None:
        wanted = PROVIDERS[self.options.provider]
        if self.strict and wanted not in providers:
            raise InputError(
                f"--provider {self.options.provider}: ONNX Runtime has no {wanted} here, and would "
                f"use {', '.join(providers)}: install what it needs, or leave --strict out"
            )

    def _feeds(self, contender: Contender, stage: str, shape: Shape) -> tuple[Extent, Feeds]:
        """The inputs of one graph, and how large they are."""
        graph = contender.graphs[stage]
        found = extent(shape, graph.has_cache, stage)
        vocabulary = self.making.vocabulary or vocabulary_of(
            [one.graphs[stage] for one in self.lineup.contenders]
        )
        return found, make_feeds(graph, found, replace(self.making, vocabulary=vocabulary))

    def _stage(self, stage: str, told: Callable[[str], None]) -> Iterator[Measured]:
        """Measure the graphs of one stage on every shape."""
        contenders = [*self.lineup.contenders, self.lineup.reference]  # itself once more
        sessions = [open_session(one.graphs[stage].path, self.options) for one in contenders]
        for shape in (found for name, found in self._pairs() if name == stage):
            size, _ = self._feeds(self.lineup.reference, stage, shape)
            runs = []
            for one, session in zip(contenders, sessions, strict=True):
                _, feeds = self._feeds(one, stage, shape)
                runs.append(timed_run(session, feeds, one.adapter))
                _try(runs[-1], one, stage, shape)
            rounds = run_rounds(runs, self.plan, partial(told, f"{stage} {shape.text}"))
            yield Measured(stage, size, rounds, tuple(sessions[0].get_providers()))


def _try(run: Callable[[], float], contender: Contender, stage: str, shape: Shape) -> None:
    """Run once, so that what cannot be run is told by name."""
    try:
        run()
    except Exception as error:
        raise InputError(
            f"{contender.graphs[stage].path}: ONNX Runtime cannot run --shape {shape.text}: "
            f"{shorten(error)}; try a smaller one, ids below another --vocab, or your own --inputs"
        ) from error


def _together(parts: Sequence[Load]) -> Load:
    """The load of several graphs, one after the other, each staying."""
    private, peak = 0, 0
    for part in parts:
        if part.private is None or part.peak is None:
            seconds = sum(one.seconds for one in parts)
            return Load(seconds, None, None, part.providers)
        peak = max(peak, private + part.peak)
        private += part.private
    return Load(sum(part.seconds for part in parts), private, peak, parts[0].providers)

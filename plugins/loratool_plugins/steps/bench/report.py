"""What a measurement tells: for people and for machines."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort

from loratool.reports import Report, Table, counted, format_bytes, format_count
from loratool_plugins.steps.bench.graphs import Graph, node_difference
from loratool_plugins.steps.bench.lineup import Contender, Lineup
from loratool_plugins.steps.bench.loading import Load
from loratool_plugins.steps.bench.models import ONLY
from loratool_plugins.steps.bench.rounds import Plan, Rounds
from loratool_plugins.steps.bench.sessions import PROVIDERS, Options
from loratool_plugins.steps.bench.shapes import Extent
from loratool_plugins.steps.bench.statistics import (
    LEVEL,
    RESAMPLES,
    judge,
    noise_floor,
    ratio_of_medians,
)

AGAIN = "again"  # what the reference is called in its second session: "base again"
_FEW_ROUNDS = 10
_LOUD = 0.1  # a noise floor that hides what matters
_OPERATORS = 4

Facts = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The rounds of one stage and shape.

    Attributes:
        stage: of all models' graphs.
        extent: how large the inputs were.
        rounds: a column for each contender, and one for the reference once more.
        providers: that the sessions really had.
    """

    stage: str
    extent: Extent
    rounds: Rounds
    providers: tuple[str, ...]


def bench_report(
    lineup: Lineup,
    measured: Sequence[Measured],
    loads: Mapping[str, Sequence[Load]],
    plan: Plan,
    options: Options,
) -> Report:
    """Tell what was measured.

    Args:
        lineup: the models, the reference first.
        measured: the times.
        loads: name of a model -> what its loads took.
        plan: how often everything ran.
        options: of the sessions.
    """
    data: Facts = {
        "kind": "bench",
        "reference": lineup.reference.name,
        "provider": PROVIDERS[options.provider],
        "providers": list(measured[0].providers),
        "threads": options.threads,
        "warmups": plan.warmups,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "method": "paired bootstrap"},
        "onnxruntime": ort.__version__,
        "machine": {"platform": platform.platform(), "processor": _processor()},
        "models": [_model(one, lineup, loads.get(one.name, ())) for one in lineup.contenders],
        "results": [_result(found, lineup, plan.seed) for found in measured],
    }
    others = [one.name for one in lineup.contenders[1:]]
    title = f"{', '.join(others)} against {data['reference']}" if others else data["reference"]
    return Report(title, data, tuple(_lines(data)), _table(data), tuple(_notes(data)))


def _model(contender: Contender, lineup: Lineup, loads: Sequence[Load]) -> Facts:
    folder = contender.folder
    private = [load.private for load in loads if load.private is not None]
    peak = [load.peak for load in loads if load.peak is not None]
    return {
        "name": contender.name,
        "place": str(contender.place),
        "adapter": None if contender.adapter_file is None else str(contender.adapter_file),
        "load_seconds": median(load.seconds for load in loads) if loads else None,
        "loads": [load.seconds for load in loads],
        "private_bytes": int(median(private)) if private else None,
        "peak_bytes": int(median(peak)) if peak else None,
        "disk_bytes": sum(contender.files.values()),
        "own_bytes": lineup.own_bytes(contender),
        "folder_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "graphs": {
            stage: _graph(graph, lineup.reference.graphs[stage])
            for stage, graph in contender.graphs.items()
        },
    }


def _graph(graph: Graph, reference: Graph) -> Facts:
    return {
        "file": graph.path.name,
        "nodes": len(graph.nodes),
        "operators": dict(graph.counts),
        "equal_nodes": graph.nodes == reference.nodes,
        "equal_operators": graph.operators == reference.operators,
        "more_operators": node_difference(reference, graph),
    }


def _result(measured: Measured, lineup: Lineup, seed: int) -> Facts:
    times, size = measured.rounds.times, measured.extent
    graph = lineup.reference.graphs[measured.stage]
    names = {found.name for found in graph.needed}
    is_text = not names & {"pixel_values", "input_features"}
    work = size.batch * (size.sequence if is_text else 1)
    reference = times[:, 0]
    again = ratio_of_medians(times[:, -1], reference, seed)
    floor = noise_floor(again)
    models = []
    for place, name in enumerate(_columns(lineup)):
        own = times[:, place]
        ratio = ratio_of_medians(own, reference, seed)
        low, middle, high = (float(value) for value in np.quantile(own, (0.1, 0.5, 0.9)))
        is_other = 0 < place < times.shape[1] - 1
        models.append(
            {
                "name": name,
                "median": middle,
                "p10": low,
                "p90": high,
                "throughput": work / middle,
                "ratio": ratio.value,
                "ratio_interval": [ratio.low, ratio.high],
                "verdict": judge(ratio, floor) if is_other else None,
                "seconds": own.tolist(),
            }
        )
    return {
        "stage": measured.stage,
        "batch": size.batch,
        "sequence": size.sequence,
        "past": size.past if graph.has_cache else None,
        "unit": "tokens/s" if is_text else "samples/s",
        "warmups": measured.rounds.warmups,
        "rounds": times.shape[0],
        "noise_floor": floor,
        "models": models,
    }


def _columns(lineup: Lineup) -> list[str]:
    """The names of the columns of times."""
    names = [contender.name for contender in lineup.contenders]
    return [*names, f"{lineup.reference.name} {AGAIN}"]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def shape_text(result: Mapping[str, Any]) -> str:
    """Stage and shape of a result: "decode 1x1+512"."""
    past = "" if result["past"] is None else f"+{result['past']}"
    stage = "" if result["stage"] == ONLY else f"{result['stage']} "
    return f"{stage}{result['batch']}x{result['sequence']}{past}"


def _table(data: Facts) -> Table:
    units = list(dict.fromkeys(result["unit"] for result in data["results"]))
    columns = ("model", "shape", "median, ms", "p10 to p90", units[0], "ratio (95%)", "")
    rows = []
    for result in data["results"]:
        for facts in result["models"]:
            low, high = facts["ratio_interval"]
            is_reference = facts is result["models"][0]
            rows.append(
                (
                    facts["name"],
                    shape_text(result),
                    _milliseconds(facts["median"]),
                    f"{_milliseconds(facts['p10'])} to {_milliseconds(facts['p90'])}",
                    format_count(round(facts["throughput"]))
                    if facts["throughput"] >= 100
                    else f"{facts['throughput']:.3g}",
                    "1" if is_reference else f"{facts['ratio']:.3f} ({low:.3f} to {high:.3f})",
                    _words(facts, result),
                )
            )
    return Table(columns, tuple(rows), ("p10 to p90",))


def _words(facts: Facts, result: Facts) -> str:
    """What may be said of a model on one shape."""
    ratio, verdict = facts["ratio"], facts["verdict"]
    if verdict is None:
        is_reference = facts is result["models"][0]
        return "reference" if is_reference else f"noise floor: {_percent(result['noise_floor'])}"
    if verdict == "same":
        return "no difference beyond the noise"
    factor = f"{ratio:.2f}x slower" if ratio > 1 else f"{1 / ratio:.2f}x faster"
    return factor if verdict in ("slower", "faster") else f"{factor}, not clear of the noise"


def _lines(data: Facts) -> Iterator[str]:
    threads = counted(data["threads"], "thread") if data["threads"] else "threads by its own choice"
    yield f"ONNX Runtime {data['onnxruntime']} on {', '.join(data['providers'])}, {threads}"
    rounds = sorted({result["rounds"] for result in data["results"]})
    warmups = sorted({result["warmups"] for result in data["results"]})
    yield (
        f"{_span(rounds)} rounds after {_span(warmups)} to warm up, each model once a round in "
        "random order"
    )
    yield (
        "ratio of medians, with the 95% interval of a paired bootstrap; the noise floor is the "
        "reference's ratio to itself"
    )
    for facts in data["models"]:
        yield f"{facts['name']}: {'; '.join(_model_words(facts, data))}"


def _model_words(facts: Facts, data: Facts) -> Iterator[str]:
    if facts["load_seconds"] is not None:
        yield f"loaded in {facts['load_seconds']:.2f} s"
    if facts["private_bytes"] is not None:
        yield (
            f"{format_bytes(facts['private_bytes'])} of private memory, at most "
            f"{format_bytes(facts['peak_bytes'])} while loading"
        )
    own = facts["own_bytes"]
    only = f", {format_bytes(own)} for it alone" if own != facts["disk_bytes"] else ""
    yield f"{format_bytes(facts['disk_bytes'])} of disk{only}"
    for stage, graph in facts["graphs"].items():
        name = "" if stage == ONLY else f"{stage}: "
        yield name + _node_words(graph, facts["name"] == data["reference"])


def _node_words(graph: Facts, is_reference: bool) -> str:
    nodes = counted(graph["nodes"], "node")
    if is_reference:
        return nodes
    if graph["equal_nodes"]:
        return f"{nodes}, equal to the reference's"
    if graph["equal_operators"]:
        return f"{nodes}, the same operators as the reference's in the same order"
    more = sorted(graph["more_operators"].items(), key=lambda item: -abs(item[1]))
    if not more:
        return f"{nodes}, as many of each operator as in the reference, in another order"
    shown = ", ".join(f"{count:+d} {name}" for name, count in more[:_OPERATORS])
    rest = f" and {len(more) - _OPERATORS} more kinds" if len(more) > _OPERATORS else ""
    return f"{nodes}: {shown}{rest}"


def _notes(data: Facts) -> Iterator[str]:
    if data["provider"] not in data["providers"]:
        yield (
            f"{data['provider']} was asked for and is not here: everything ran on "
            f"{', '.join(data['providers'])}"
        )
    for result in data["results"]:
        if result["rounds"] < min(_FEW_ROUNDS, data["repeats"]):
            yield (
                f"{shape_text(result)}: only {result['rounds']} rounds fitted into --limit: the "
                "intervals are rough"
            )
        if result["noise_floor"] > _LOUD:
            yield (
                f"{shape_text(result)}: the noise floor is {_percent(result['noise_floor'])}, and "
                "smaller differences cannot be seen: let nothing else run, or raise --repeats"
            )


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _percent(share: float) -> str:
    return f"±{100 * share:.1f}%"


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

"""Sessions of ONNX Runtime whose adapters are switched from call to call.

For models that `loratool export --swappable` made: LoRA factors are optional inputs of the graph,
and an `.onnx_adapter` file holds one adapter's. ONNX Runtime's own `LoraAdapter` for such files has
no effect under I/O binding; here the factors are inputs like any others, so that both ways work.

    session = Session("model-onnx")  # a folder; its adapters are loaded
    session.run(feeds, adapter="math")
    session.set("code")
    session.run(feeds)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, InputError, MismatchError
from loratool.json_files import MANIFEST, read_json
from loratool.quiet import quiet, shorten

LORA_A = ".lora_A"
LORA_B = ".lora_B"
ADAPTER_SUFFIX = ".onnx_adapter"

# Severities; at warnings ONNX Runtime complains of every optional input.
_WARNING, _ERROR, _FATAL = 2, 3, 4
# Providers of GPUs -> what ONNX Runtime calls their memory.
_GPUS = {"CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_ARRAY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_BFLOAT16, _BFLOAT16_NUMBER = "tensor(bfloat16)", 16
# How many complaints about one adapter are shown.
_SHOWN = 8


class _Active:
    """Stands for whatever adapter is set."""

    def __repr__(self) -> str:
        return "the one that is set"


ACTIVE = _Active()


class Session:
    """A model with adapters, any one of which, or none, is used in a call.

    A folder may hold several graphs of one model (`prefill.onnx` and `decode.onnx`): each takes of
    an adapter what it has inputs for. Calls with `adapter=` change nothing in the session, so that
    threads may share it.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Sequence[Any] | None = None,
        options: Any = None,
    ) -> None:
        """Open a model.

        Args:
            path: a folder that `loratool export --swappable` made, whose adapters are loaded too,
                or one `.onnx` file.
            providers: of ONNX Runtime, in order of preference; by default a GPU's, if there is
                one, and the CPU's.
            options: `onnxruntime.SessionOptions`.

        Raises:
            InputError: there is no graph, ONNX Runtime refuses one, or an adapter does not fit.
        """
        path = Path(path)
        self._graphs = {file.stem: _open(file, providers, options) for file in _graph_files(path)}
        if not any(graph.inputs for graph in self._graphs.values()):
            raise InputError(
                f"{path}: takes no adapters: no input ends in {LORA_A} (export it with --swappable)"
            )
        self._adapters: dict[str, dict[str, dict[str, Any]]] = {}  # name -> graph -> factors
        self._active: str | None = None
        if path.is_dir():
            for file in sorted(path.glob(f"*{ADAPTER_SUFFIX}")):
                self.load(file.name.removesuffix(ADAPTER_SUFFIX), file)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter that calls use where they name none; None for the base model."""
        return self._active

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of the graphs: their files without `.onnx`."""
        return tuple(self._graphs)

    @property
    def targets(self) -> tuple[str, ...]:
        """What adapters may change: the names of the factors' inputs without their endings."""
        names = (name for graph in self._graphs.values() for name in graph.inputs)
        return tuple(
            dict.fromkeys(name.removesuffix(LORA_A).removesuffix(LORA_B) for name in names)
        )

    def session(self, graph: str | None = None) -> Any:
        """The `onnxruntime.InferenceSession` of a graph; which one may be left out if it is alone.

        Raises:
            InputError: there is no such graph, or there are several.
        """
        return self._graph(graph).session

    def load(self, name: str, path: str | Path) -> None:
        """Load an adapter from an `.onnx_adapter` file, in the place of one of this name.

        Raises:
            InputError: it cannot be read, or does not fit the model; every factor that does not is
                named.
        """
        path = Path(path)
        values = _read(path)
        if problems := list(self._problems(values)):
            shown, more = problems[:_SHOWN], len(problems) - _SHOWN
            lines = [*shown, f"and {more} more"] if more > 0 else shown
            label = " and ".join(graph.path.name for graph in self._graphs.values())
            raise MismatchError("\n  ".join([f"{path}: does not fit {label}:", *lines]))
        devices = {graph.device for graph in self._graphs.values()}
        placed = {device: {n: _place(v, *device) for n, v in values.items()} for device in devices}
        self._adapters[name] = {
            key: {n: v for n, v in placed[graph.device].items() if n in graph.inputs}
            for key, graph in self._graphs.items()
        }

    def unload(self, name: str) -> None:
        """Forget an adapter; if it is set, none is afterwards.

        Raises:
            InputError: none of this name is loaded.
        """
        self._require(name)
        del self._adapters[name]
        if self._active == name:
            self._active = None

    def set(self, name: str | None) -> None:
        """Have the following calls use an adapter, or the base model alone.

        Bindings keep the factors that they have; `bind` gives them others.

        Raises:
            InputError: none of this name is loaded.
        """
        if name is not None:
            self._require(name)
        self._active = name

    def run(
        self,
        feeds: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        adapter: str | _Active | None = ACTIVE,
        graph: str | None = None,
    ) -> dict[str, Any]:
        """Run the model.

        Args:
            feeds: numpy arrays or `onnxruntime.OrtValue` by the names of the model's other inputs.
            outputs: names of those wanted; all by default.
            adapter: its name, None for the base model, by default the one that is set.
            graph: which one, where there are several.

        Returns:
            Output name -> numpy array.

        Raises:
            InputError: no adapter or graph has this name.
        """
        session = self.session(graph)
        names = list(outputs or (output.name for output in session.get_outputs()))
        found = session.run(names, {**feeds, **self._factors(adapter, graph)})
        return dict(zip(names, found, strict=True))

    def bind(
        self,
        binding: Any = None,
        *,
        adapter: str | _Active | None = ACTIVE,
        graph: str | None = None,
    ) -> Any:
        """Bind an adapter's factors as inputs, on the session's device.

        Every target that the adapter leaves alone is bound to empty factors, so that nothing stays
        of an adapter that was bound before.

        Args:
            binding: an `onnxruntime.IOBinding` of that graph's session; a new one by default.
            adapter: its name, None for the base model, by default the one that is set.
            graph: which one, where there are several.

        Returns:
            The binding, for the model's other inputs and outputs to be bound, and for
            `session(graph).run_with_iobinding(binding)`.

        Raises:
            InputError: no adapter or graph has this name.
        """
        chosen = self._graph(graph)
        binding = chosen.session.io_binding() if binding is None else binding
        for name, value in {**chosen.empty, **self._factors(adapter, graph)}.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _factors(self, adapter: str | _Active | None, graph: str | None) -> Mapping[str, Any]:
        """The adapter's part for one graph, by the names of its inputs."""
        name = self._active if isinstance(adapter, _Active) else adapter
        if name is None:
            return {}
        self._require(name)
        return self._adapters[name][graph or next(iter(self._graphs))]

    def _require(self, name: str) -> None:
        if name not in self._adapters:
            raise InputError(
                f"no adapter {name!r} is loaded; there are {', '.join(self._adapters) or 'none'}"
            )

    def _graph(self, name: str | None) -> _Graph:
        if name is None and len(self._graphs) == 1:
            return next(iter(self._graphs.values()))
        if name is None or name not in self._graphs:
            wanted = "name one of the graphs" if name is None else f"there is no graph {name!r}"
            raise InputError(f"{wanted}: {', '.join(self._graphs)}")
        return self._graphs[name]

    def _problems(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Why an adapter's factors are not for these graphs."""
        known: dict[str, _Input] = {}
        for graph in self._graphs.values():
            known |= graph.inputs
        ranks: dict[str, dict[str, int]] = {}
        for name, value in sorted(values.items()):
            if (wanted := known.get(name)) is None:
                yield f"{name}: the model has no such input"
                continue
            shape = tuple(value.shape())
            if len(shape) != 2 or shape[wanted.axis] != wanted.size:
                yield f"{name}: has the shape {shape}, the model takes {wanted.shape}"
            elif value.data_type() != wanted.type:
                yield f"{name}: is a {value.data_type()}, the model takes a {wanted.type}"
            else:
                ranks.setdefault(wanted.target, {})[name] = shape[1 - wanted.axis]
        for target, found in ranks.items():
            if {target + LORA_A, target + LORA_B} - values.keys():
                yield f"{target}: has only one of {LORA_A} and {LORA_B}"
            elif len(set(found.values())) > 1:
                yield f"{target}: {LORA_A} and {LORA_B} differ in rank: {sorted(found.values())}"


@dataclass(frozen=True)
class _Input:
    """An optional input for a factor.

    Attributes:
        target: its name without the ending.
        type: in ONNX Runtime's words.
        axis: the dimension that is not the rank.
        size: of that dimension.
    """

    target: str
    type: str
    axis: int
    size: int

    @property
    def shape(self) -> str:
        """What it takes, for messages."""
        return f"(r, {self.size})" if self.axis else f"({self.size}, r)"


@dataclass(frozen=True)
class _Graph:
    """An open graph.

    Attributes:
        path: its file.
        session: of ONNX Runtime.
        device: where its inputs are best: "cpu" or a kind of GPU, and its number.
        inputs: for factors.
        empty: factors of rank 0 for all of these.
    """

    path: Path
    session: Any
    device: tuple[str, int]
    inputs: Mapping[str, _Input]
    empty: Mapping[str, Any]


def _graph_files(path: Path) -> list[Path]:
    """The graphs of a folder, or the one that is named.

    Raises:
        InputError: there are none.
    """
    if path.is_file():
        return [path]
    if (path / MANIFEST).is_file() and (kind := read_json(path / MANIFEST).get("kind")) != "onnx":
        raise InputError(f"{path}: is no ONNX export: its {MANIFEST} says {kind!r}")
    files = sorted(path.glob("*.onnx"))
    if not files:
        raise InputError(f"{path}: there is no .onnx file")
    return files


def start_session(
    model: str | bytes, options: Any, providers: Sequence[Any], told: bool = False, **extra: Any
) -> Any:
    """An `onnxruntime.InferenceSession`, with CUDA's libraries found where pip has put them.

    Args:
        model: the file, or its content.
        options: an `onnxruntime.SessionOptions`.
        providers: names of execution providers, or pairs of a name and options.
        told: whether ONNX Runtime may say on the terminal that it cannot use one of them.
        extra: further arguments of the session.

    Raises:
        Exception: ONNX Runtime refuses the model; what it raises has no common class but this.
    """
    import onnxruntime as ort

    names = [name if isinstance(name, str) else name[0] for name in providers]
    # That CUDA cannot be loaded goes to the default logger, whatever the session's level.
    if not told:
        ort.set_default_logger_severity(_FATAL)
    try:
        with quiet():
            if "CUDAExecutionProvider" in names and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # prints if they are not there
            return ort.InferenceSession(model, options, providers=list(providers), **extra)
    finally:
        ort.set_default_logger_severity(_WARNING)


def _open(path: Path, providers: Sequence[Any] | None, options: Any) -> _Graph:
    import onnxruntime as ort

    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = _ERROR
    fallback = providers is None
    if providers is None:
        available = ort.get_available_providers()
        providers = [name for name in _GPUS if name in available] + ["CPUExecutionProvider"]
    try:
        session = start_session(str(path), options, providers, told=not fallback)
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime refuses it: {shorten(error)}") from error
    inputs, empty = {}, {}
    device = _device(session)
    for value in session.get_overridable_initializers():
        if (found := _factor_input(value)) is not None:
            inputs[value.name] = found
            shape = (0, found.size) if found.axis else (found.size, 0)
            empty[value.name] = _empty(shape, found.type)
    return _Graph(path, session, device, inputs, empty)


def _factor_input(value: Any) -> _Input | None:
    """What an optional input is for, if it is for a factor."""
    for axis, ending in enumerate((LORA_A, LORA_B)):
        known = value.type in _ARRAY_TYPES or value.type == _BFLOAT16
        if known and value.name.endswith(ending) and len(value.shape) == 2:
            size = value.shape[axis]
            if isinstance(size, int):
                return _Input(value.name.removesuffix(ending), value.type, axis, size)
    return None


def _device(session: Any) -> tuple[str, int]:
    provider = session.get_providers()[0]
    number = session.get_provider_options().get(provider, {}).get("device_id", 0)
    return _GPUS.get(provider, "cpu"), int(number)


def _empty(shape: tuple[int, int], type: str) -> Any:
    import numpy as np
    import onnxruntime as ort

    if type == _BFLOAT16:
        bits = np.zeros(shape, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16_NUMBER)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _ARRAY_TYPES[type]))


def _place(value: Any, device: str, number: int) -> Any:
    """A factor on a device; numpy has no bf16, so that ONNX Runtime moves these at each call."""
    import onnxruntime as ort

    if device == "cpu" or value.data_type() == _BFLOAT16:
        return value
    return ort.OrtValue.ortvalue_from_numpy(value.numpy(), device, number)


def _read(path: Path) -> dict[str, Any]:
    import onnxruntime as ort

    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:
        raise FormatError(f"{path}: is no adapter file of ONNX Runtime's") from error
    return dict(values)

"""How far one model's outputs are from another's, on the same inputs.

    with Reference.take(teacher, inputs, "kl") as reference:
        loss = reference.loss(number, student(**inputs.batches[number]))

Two measures, both means over all vectors of outputs that are not padding:

* "kl": KL(p || q) in nats, p the softmax of the reference's logits and q that of the others;
* "mse": the squared error of the logits, or of the last hidden states where there are none, as a
  share of the reference's mean square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from loratool.calibration import Inputs
from loratool.errors import InputError, OutputError, UsageError
from loratool.running import Model, run

# Outputs of more bytes than this, all batches together, lie in a temporary file.
_IN_MEMORY = 256 << 20
_HIDDEN = "the last hidden states"
_NOT_ONE_CLASS = ("multi_label_classification", "regression")


def compared(outputs: Mapping[str, Any], hidden: bool) -> dict[str, torch.Tensor]:
    """What of a model's outputs is compared.

    Args:
        outputs: as transformers calls them, with hidden states where `hidden` is true.
        hidden: whether to take the last hidden states instead of logits.

    Returns:
        Logits by name (there are several where a task has several heads), each (..., classes); or
        the last hidden states. Empty if there is nothing of the kind.
    """
    if not hidden:
        return {
            name: value
            for name, value in outputs.items()
            if name.endswith("logits") and torch.is_tensor(value)
        }
    last = outputs.get("last_hidden_state")
    if last is None:
        every = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
        last = every[-1] if every else None
    return {} if last is None else {_HIDDEN: last}


@dataclass
class Reference:
    """A model's outputs on some inputs, exactly as it gave them.

    Attributes:
        inputs: what it was run on.
        measure: how others are compared with it.
        hidden: whether the last hidden states are compared.
        outputs: for each batch, by name, the vectors that are not padding: (vectors, n), fp32; in
            a temporary file where they are many.
    """

    inputs: Inputs
    measure: str
    hidden: bool
    outputs: list[dict[str, torch.Tensor]] = field(repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    _mean_squares: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def take(
        cls,
        model: Model,
        inputs: Inputs,
        measure: str | None,
        hidden: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> Reference:
        """Run a model, in one pass over its weights, and keep what others are compared with.

        Args:
            model: the one to be matched.
            inputs: in batches.
            measure: None for "kl" where there are logits of classes to choose from, else "mse".
            hidden: whether last hidden states are to be compared although there are logits.
            progress: as of `loratool.running.run`.

        Raises:
            InputError: the model cannot be run, or gives nothing that can be compared, or NaN.
            OutputError: the temporary file does not fit on its disk.
            UsageError: "kl", and there are no logits of several classes.
        """
        kept: list[dict[str, torch.Tensor]] = [{} for _ in inputs.batches]
        folder = tempfile.TemporaryDirectory(prefix="loratool-")
        size, in_file = 0, False
        try:
            for number, outputs in run(
                model, inputs.batches, hidden_states=True, progress=progress
            ):
                found = compared(outputs, hidden)
                if not found:
                    hidden, found = True, compared(outputs, True)
                if not found:
                    raise InputError(
                        f"{model.label}: {model.shell.architecture} gives neither logits nor "
                        "hidden states that could be matched"
                    )
                for name, value in found.items():
                    vectors = inputs.unpadded(number, value).float()
                    if not bool(vectors.isfinite().all()):
                        raise InputError(f"{model.label}: gives NaN or Inf on batch {number + 1}")
                    size += vectors.nbytes
                    if size > _IN_MEMORY:
                        in_file, vectors = True, _spooled(vectors, Path(folder.name), number, name)
                    kept[number][name] = vectors.clone() if not in_file else vectors
        except BaseException:
            folder.cleanup()
            raise
        classes = not hidden and all(value.shape[-1] > 1 for value in kept[0].values())
        one_class = getattr(model.config, "problem_type", None) not in _NOT_ONE_CLASS
        chosen = measure or ("kl" if classes and one_class else "mse")
        if chosen == "kl" and not classes:
            folder.cleanup()
            raise UsageError(
                f"kl: {model.label} ({model.shell.architecture}) gives no logits of several "
                "classes that could be compared: use mse"
            )
        return cls(inputs, chosen, hidden, kept, folder, _mean_squares(kept))

    @property
    def what(self) -> str:
        """What is compared, in words."""
        if self.measure == "kl":
            return "KL divergence of the logits"
        return f"mean squared error of {_HIDDEN if self.hidden else 'the logits'}"

    def loss(self, batch: int, outputs: Mapping[str, Any]) -> torch.Tensor:
        """How far a model's outputs on one batch are from these.

        Args:
            batch: its number.
            outputs: the other model's, with hidden states where `hidden` is true.

        Returns:
            (), fp32, the mean over the batch's vectors; of several logits, their sum.

        Raises:
            InputError: the other model does not give the same outputs.
        """
        found = compared(outputs, self.hidden)
        total: torch.Tensor | float = 0.0
        for name, expected in self.outputs[batch].items():
            vectors = self.inputs.unpadded(batch, found[name]).float() if name in found else None
            if vectors is None or vectors.shape != expected.shape:
                raise InputError(
                    f"the base with the adapter and the fine-tune do not give the same {name}: "
                    f"{None if vectors is None else tuple(vectors.shape)} against "
                    f"{tuple(expected.shape)}"
                )
            if self.measure == "kl":
                p, q = expected.log_softmax(-1), vectors.log_softmax(-1)
                total = total + (p.exp() * (p - q)).sum(-1).mean()
            else:
                total = total + (vectors - expected).square().mean() / self._mean_squares[name]
        assert isinstance(total, torch.Tensor)
        return total

    def vectors(self, batch: int) -> int:
        """How many vectors of a batch are compared: its weight among others."""
        return max(len(value) for value in self.outputs[batch].values())

    def close(self) -> None:
        """Remove the temporary file."""
        self.outputs = []
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _mean_squares(outputs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The mean square of each output over all batches; 1 where all is zero."""
    found = {}
    for name in outputs[0]:
        values = [kept[name] for kept in outputs]
        total = sum(float(value.double().square().sum()) for value in values)
        found[name] = total / sum(value.numel() for value in values) or 1.0
    return found


def _spooled(values: torch.Tensor, folder: Path, batch: int, name: str) -> torch.Tensor:
    """The same values, mapped from a file."""
    path = folder / f"{batch}-{len(list(folder.iterdir()))}"
    try:
        values.contiguous().numpy().tofile(path)
    except OSError as error:
        raise OutputError(
            f"{folder}: has no room for the fine-tune's {name} ({error.strerror or error}); use "
            "fewer or shorter samples (--calibration-samples, --calibration-length), or another "
            "TMPDIR"
        ) from error
    mapped = torch.from_file(str(path), shared=False, size=values.numel(), dtype=values.dtype)
    return mapped.view(values.shape)

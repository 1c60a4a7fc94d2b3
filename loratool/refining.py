"""Low-rank updates trained until a base with them answers as its fine-tune does.

    h = W0 x + (alpha / r) B A x        (Hu et al., 2021, "LoRA", section 4.1)

A and B start from given factors and are changed by Adam (Kingma and Ba, 2015); W0 is frozen. The
loss is how far the outputs are from the fine-tune's (`loratool.matching`), plus, if asked for,

    penalty * sum ||s B A - s B0 A0||_F^2 / sum ||s B0 A0||_F^2,      s = alpha / r,

which holds the products near their start. What is returned are the factors, as they are rounded in
the end, whose outputs were nearest on inputs held out from training; if none were nearer than the
start's, the start itself.

The base is in memory in fp32, once; A, B and Adam's two moments are small beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from loratool.dtypes import torch_dtype
from loratool.linalg import named_generator
from loratool.lowrank import balanced
from loratool.matching import Reference
from loratool.quiet import without_warnings
from loratool.training import Training
from loratool.updates import LowRank

_EVALUATIONS = 20  # over all steps
_PATIENCE = 5  # evaluations without a better one before it stops
_WARM_UP = 0.1  # share of the steps
# Above this many bytes of weights, layers are computed again for their gradients: activations of
# one layer are then in memory instead of all layers', for a third more time.
_RECOMPUTE = 1 << 30


@dataclass(frozen=True)
class Refined:
    """What came of it.

    Attributes:
        updates: name -> its update; those that were not trained are as they were given.
        trained: names of those that were.
        losses: (steps taken, loss on the held-out inputs), from the start on.
        best: how many steps the returned updates had; 0 for the start.
        steps: how many were taken.
        stopped: why no more were.
    """

    updates: Mapping[str, LowRank]
    trained: tuple[str, ...]
    losses: tuple[tuple[int, float], ...]
    best: int
    steps: int
    stopped: str

    @property
    def before(self) -> float:
        """Loss of the start on the held-out inputs."""
        return self.losses[0][1]

    @property
    def after(self) -> float:
        """Loss of the returned updates on the held-out inputs."""
        return dict(self.losses)[self.best]


@dataclass
class Branch:
    """The low-rank way beside a linear module.

    Attributes:
        start: where it comes from.
        dtype: safetensors name of the type that its factors get in the end.
        a: (r, in) fp32.
        b: (out, r) fp32.
        called: whether the module was, at least once.
        detach: takes the branch away.
    """

    start: LowRank
    dtype: str
    a: torch.Tensor = field(repr=False)
    b: torch.Tensor = field(repr=False)
    called: bool = False
    detach: Callable[[], None] = field(default=lambda: None, repr=False)

    @classmethod
    def beside(cls, module: torch.nn.Module, start: LowRank, dtype: str) -> Branch:
        """A branch that computes what an update does."""
        a, b = (factor.detach().float().clone() for factor in (start.a, start.b))
        branch = cls(start, dtype, a.requires_grad_(), b.requires_grad_())
        branch.detach = module.register_forward_hook(branch, with_kwargs=True).remove
        return branch

    def __call__(self, module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        """h + s B A x; a forward hook."""
        self.called = True
        x = args[0] if args else next(iter(kwargs.values()))
        added = functional.linear(functional.linear(x, self.a), self.b)
        return output + self.start.scale * added

    def rounded(self) -> LowRank:
        """The present factors, balanced and rounded as they will be written."""
        a, b = balanced(self.a.detach(), self.b.detach())
        kind = torch_dtype(self.dtype)
        return replace(self.start, a=a.to(kind).contiguous(), b=b.to(kind).contiguous())

    @contextmanager
    def using(self, update: LowRank) -> Iterator[None]:
        """Other factors inside the block."""
        before = self.a, self.b
        self.a, self.b = update.a.float(), update.b.float()
        try:
            yield
        finally:
            self.a, self.b = before

    def moved(self) -> torch.Tensor:
        """||s B A - s B0 A0||_F^2, through the Gram matrices of B and A beside their start."""
        b = torch.cat([self.b, -self.start.b.float()], dim=1)
        a = torch.cat([self.a, self.start.a.float()], dim=0)
        return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0) * self.start.scale**2


def refine(
    model: torch.nn.Module,
    starts: Mapping[str, tuple[LowRank, str]],
    fitted: Reference,
    held_out: Reference,
    training: Training,
    told: Callable[[str], None] = lambda text: None,
) -> Refined:
    """Train low-rank updates.

    Args:
        model: the base, everything else that the adapter changes worked in; in evaluation mode,
            all parameters frozen. It is changed: updates that are not trained are added to it.
        starts: name of a parameter -> its update, as the module computes with it, and the
            safetensors name of the type that its factors get in the end.
        fitted: the fine-tune's outputs on the inputs to train on.
        held_out: its outputs on the inputs to judge by.
        training: how.
        told: is told of each step.

    Raises:
        InputError: the models do not give the same outputs.
    """
    branches = _attach(model, starts)
    if sum(p.nbytes for p in model.parameters()) > _RECOMPUTE:
        _recompute_layers(model)
    with without_warnings(), _deterministic():
        _held_out_loss(model, held_out)
        for name, branch in list(branches.items()):
            if not branch.called:  # weights used without a call, or not used: added, they are right
                branches.pop(name).detach()
                _add(model, name, branch.start)
        return _trained(model, starts, branches, fitted, held_out, training, told)


def _trained(
    model: torch.nn.Module,
    starts: Mapping[str, tuple[LowRank, str]],
    branches: Mapping[str, Branch],
    fitted: Reference,
    held_out: Reference,
    training: Training,
    told: Callable[[str], None],
) -> Refined:
    best = {name: update for name, (update, _) in starts.items()}
    losses = [(0, _held_out_loss(model, held_out))]
    if not branches:
        return Refined(best, (), tuple(losses), 0, 0, "none of the updates can be trained")
    chosen, stopped = 0, ""
    optimizer = torch.optim.Adam(
        [
            {"params": [factor], "size": float(factor.detach().square().mean().sqrt())}
            for branch in branches.values()
            for factor in (branch.a, branch.b)
        ],
        lr=0.0,
    )
    norm = sum(float(_squared_norm(branch.start)) for branch in branches.values())
    weight = training.penalty / norm if norm else 0.0
    every = max(1, training.steps // _EVALUATIONS)
    order = _order(len(fitted.outputs), training.seed)
    step = 0
    while step < training.steps and not stopped:
        batch = next(order)
        for group in optimizer.param_groups:
            group["lr"] = group["size"] * training.rate * _schedule(step, training.steps)
        optimizer.zero_grad()
        loss = fitted.loss(batch, _outputs(model, fitted, batch))
        if weight:
            moved = torch.stack([branch.moved() for branch in branches.values()])
            loss = torch.add(loss, moved.sum(), alpha=weight)
        if not bool(loss.isfinite()):
            stopped = "the loss became NaN or Inf: a smaller learning rate may help"
            break
        torch.autograd.backward(loss)
        optimizer.step()
        step += 1
        if step % every == 0 or step == training.steps:
            rounded = {name: branch.rounded() for name, branch in branches.items()}
            losses.append((step, _loss_of(model, held_out, branches, rounded)))
            if losses[-1][1] < dict(losses)[chosen]:
                chosen, best = step, {**best, **rounded}
            elif sum(1 for at, _ in losses if at > chosen) >= _PATIENCE:
                stopped = "the held-out loss fell no further"
        told(f"held-out loss {losses[-1][1]:.4g}, {losses[0][1]:.4g} at the start")
    return Refined(
        best, tuple(branches), tuple(losses), chosen, step, stopped or "all steps were taken"
    )


def _attach(model: torch.nn.Module, starts: Mapping[str, tuple[LowRank, str]]) -> dict[str, Branch]:
    """Branches beside all modules that are plainly linear; other updates are added to weights."""
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    branches = {}
    for name, (update, dtype) in starts.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        alone = shared[id(module.get_parameter(leaf))] == 1
        if _is_linear(module) and leaf == "weight" and alone:
            branches[name] = Branch.beside(module, update, dtype)
        else:
            _add(model, name, update)
    return branches


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) in (torch.nn.Linear, Conv1D)  # subclasses may use weights in other ways


def _add(model: torch.nn.Module, name: str, update: LowRank) -> None:
    """Work an update into a frozen weight."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    delta = update.scale * (update.b.float() @ update.a.float())
    weight = module.get_parameter(leaf)
    with torch.no_grad():
        weight.add_(delta.T if _is_stored_transposed(module) else delta)


def _is_stored_transposed(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _recompute_layers(model: torch.nn.Module) -> None:
    """Keep no activations inside layers: they are computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return call

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = recomputed(module.forward)


def _squared_norm(update: LowRank) -> torch.Tensor:
    a, b = update.a.double(), update.b.double()
    return ((b.T @ b) * (a @ a.T)).sum() * update.scale**2


def _outputs(model: torch.nn.Module, reference: Reference, batch: int) -> Mapping[str, Any]:
    extra = {"output_hidden_states": True} if reference.hidden else {}
    found: Mapping[str, Any] = model(**reference.inputs.batches[batch], **extra)
    return found


def _held_out_loss(model: torch.nn.Module, reference: Reference) -> float:
    """The mean over all vectors; inf if it is not finite."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in range(len(reference.outputs)):
            vectors = reference.vectors(batch)
            total += float(reference.loss(batch, _outputs(model, reference, batch))) * vectors
            count += vectors
    return total / count if math.isfinite(total) else math.inf


def _loss_of(
    model: torch.nn.Module,
    reference: Reference,
    branches: Mapping[str, Branch],
    updates: Mapping[str, LowRank],
) -> float:
    """The loss with other factors in the branches."""
    with ExitStack() as stack:
        for name, update in updates.items():
            stack.enter_context(branches[name].using(update))
        return _held_out_loss(model, reference)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: rises over the first steps, then falls linearly to 0."""
    rising = (step + 1) / max(1.0, _WARM_UP * steps)
    return min(1.0, rising, (steps - step) / steps)


def _order(batches: int, seed: int) -> Iterator[int]:
    """Numbers of batches, all of them in each round."""
    generator = named_generator(seed, "refine")
    while True:
        yield from torch.randperm(batches, generator=generator).tolist()


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same bits each time, as far as torch has such algorithms; random numbers untouched."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)

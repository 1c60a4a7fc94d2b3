"""What the factorizers share: a delta made ready, orthonormal rows, and the way back to factors.

Everything here works on *rows*: a block of k vectors is a tensor (k, length), because such blocks
are multiplied by a large row-major matrix fastest, whether it lies as it is or transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratool.errors import InputError
from loratool.linalg import Certificate, Factorization, FormedDelta, RankPolicy, squared_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

# Singular values below this share of the largest are rounding of the fp32 delta: not kept.
_NEGLIGIBLE = 1e-6
# Norms in this range need no rescaling: neither squares nor products of blocks leave fp32.
_SAFE_NORM = (2.0**-30, 2.0**30)
# Elements a tile: of products that are made twice (and its least number of columns, with which
# products are not slower yet), and of fp64 copies.
_PRODUCT_ELEMENTS, _PRODUCT_COLUMNS, _TILE_ELEMENTS = 2**20, 256, 2**20
# What fp64 rounding may do to an energy, as a share of the total.
_FP64_SLACK = 1e-12
# A row that projection shrinks below this share of its length was inside the subspace.
_INSIDE = 1e-4
# Inner products below this are as good as 0 for a basis that is only searched.
_CLEAN = 1e-5
# Eigenvalues of a Gram matrix of unit rows below this mean dependent rows.
_DEPENDENT = 1e-8


@dataclass(frozen=True)
class Target:
    """The matrix to factorize: delta = 2^exponent * unit, where 1 <= ||unit||_F < 2.

    The unit matrix U is never formed: it is `gain * matrix`, and the powers of two go into the
    small blocks that are multiplied. So results scale with the delta, bit by bit.

    Attributes:
        matrix: (rows, columns), fp32, a view of the delta or of its transpose.
        gain: the power of two that makes `matrix` the unit matrix.
        exponent: of the power of two that makes the unit matrix the delta.
        total: ||U||_F^2 in fp64, in [1, 4); 0 for a zero delta.
        transposed: whether `matrix` is the delta's transpose.
        rounded: a copy of `matrix` in bf16 for products that need not be exact, or None.
    """

    matrix: torch.Tensor
    gain: float
    exponent: int
    total: float
    transposed: bool
    rounded: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return self.matrix.device

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of `matrix`."""
        rows, columns = self.matrix.shape
        return rows, columns

    @property
    def shape_of_delta(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def flipped(self) -> Target:
        """The same target seen from its other side."""
        rounded = None if self.rounded is None else self.rounded.t()
        turned = not self.transposed
        return replace(self, matrix=self.matrix.t(), rounded=rounded, transposed=turned)

    def image(self, left: torch.Tensor) -> torch.Tensor:
        """`left` (k, rows) times U, in fp32: (k, columns)."""
        return _product(left, self.matrix).mul_(self.gain)

    def start(self, right: torch.Tensor) -> torch.Tensor:
        """`right` (k, columns) times U^T: (k, rows), fp32; good to three digits if rounded."""
        import torch

        tiles = self._quick_tiles()
        parts = torch.split(right.to(tiles[0].dtype), tiles[0].shape[1], dim=1)
        back = right.new_zeros(len(right), self.shape[0])
        for part, tile in zip(parts, tiles, strict=True):
            back += part @ tile.t()
        return back.mul_(self.gain)

    def round_trip(self, left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`left` (k, rows) times U, and that times U^T: (k, columns) and (k, rows), fp32.

        Good to three digits if there is a rounded copy.
        """
        import torch

        tiles = self._quick_tiles()
        left = left.to(tiles[0].dtype)
        back = torch.zeros_like(left, dtype=torch.float32)
        images = []
        for tile in tiles:
            image = _product(left, tile)
            images.append(image)
            back += image @ tile.t()
        return torch.cat(images, dim=1).float().mul_(self.gain), back.mul_(self.gain**2)

    def _quick_tiles(self) -> tuple[torch.Tensor, ...]:
        """The matrix to search with, in column tiles where these are contiguous in memory.

        Such a tile is still in the cache for its second product.
        """
        import torch

        matrix = self.matrix if self.rounded is None else self.rounded
        if not self.transposed:
            return (matrix,)
        return torch.split(matrix, max(_PRODUCT_COLUMNS, _PRODUCT_ELEMENTS // len(matrix)), dim=1)

    def tiles(self) -> Iterator[torch.Tensor]:
        """U in fp64, a few columns at a time: (rows, some)."""
        import torch

        width = max(1, _TILE_ELEMENTS // self.shape[0])
        for tile in torch.split(self.matrix, width, dim=1):
            yield tile.double().mul_(self.gain)


def _product(left: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """`left` (k, rows) @ `matrix` (rows, columns), both fp32 or bf16.

    In fp32 oneDNN takes half the time of MKL for so few rows, but torch asks it only for linear
    layers between tensors of oneDNN's own layout.
    """
    import torch

    wide = matrix.dtype == torch.float32 and matrix.t().is_contiguous()
    if wide and matrix.is_cpu and torch._C._has_mkldnn:
        linear = torch._C._nn.mkldnn_linear
        found: torch.Tensor = linear(left.contiguous().to_mkldnn(), matrix.t(), None).to_dense()
        return found
    return left @ matrix


def measured(delta: torch.Tensor) -> FormedDelta:
    """A delta of any float type with its energy.

    Raises:
        InputError: it is not a matrix, or is empty.
    """
    if delta.dim() != 2 or delta.numel() == 0:
        raise InputError(f"only matrices can be factorized, not shape {tuple(delta.shape)}")
    delta = delta.float()
    return FormedDelta(delta, squared_norm(delta))


def prepare(formed: FormedDelta) -> Target:
    """Check a delta (out, in), and lay it on its long side.

    Norms so small or large that fp32 products would leave its range are scaled to about 1 first, in
    place.

    Raises:
        InputError: it holds NaN or Inf.
    """
    delta, total, rounded = formed.values, formed.energy, formed.rounded
    moved = 0
    if not _SAFE_NORM[0] <= math.sqrt(abs(total)) <= _SAFE_NORM[1]:
        moved = _scale_to_one(delta)
        total = squared_norm(delta)
        if rounded is not None:
            rounded.copy_(delta)
    fitted = math.frexp(math.sqrt(total))[1] - 1
    transposed = delta.shape[0] > delta.shape[1]
    return Target(
        matrix=delta.t() if transposed else delta,
        gain=math.ldexp(1.0, -fitted),
        exponent=moved + fitted,
        total=math.ldexp(total, -2 * fitted),
        transposed=transposed,
        rounded=rounded.t() if rounded is not None and transposed else rounded,
    )


def _scale_to_one(delta: torch.Tensor) -> int:
    """Scale `delta` in place by 2^-e so that its largest element is about 1; return e."""
    low, high = (float(extreme) for extreme in delta.aminmax())
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise InputError("the delta holds NaN or Inf")
    if largest == 0:
        return 0
    exponent = math.frexp(largest)[1]
    half = exponent // 2  # in two steps: 2^149 is no fp32 number
    delta.mul_(2.0**-half).mul_(2.0 ** (half - exponent))
    return exponent


class NoConvergenceError(InputError):
    """LAPACK found no eigenvectors."""


def eigenvectors(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n), as columns, of a symmetric matrix.

    Raises:
        NoConvergenceError: they are not found.
    """
    import torch

    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NoConvergenceError(
            f"its singular vectors are not found, not even in fp64 ({str(error).splitlines()[0]}); "
            "leave it out with --exclude"
        ) from error
    return values, vectors


def random_rows(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`count` Gaussian rows (count, length) in fp32, each about 1 long."""
    import torch

    rows = torch.empty(count, length, dtype=torch.float32)
    return rows.normal_(std=length**-0.5, generator=generator)


def whitened(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows that span the same space, and the Gram matrix of the rows given, on the CPU.

    Through the eigenvectors of the Gram matrix of the rows made equally long. Dependent rows are
    left out, so there may be fewer; zero, dependent and tiny rows, on which a Cholesky
    factorization breaks, need no special case. Do it twice where the rows are far from orthogonal.

    Args:
        rows: (k, length), fp64.

    Returns:
        (k' <= k, length) and (k, k), fp64.
    """
    import torch

    gram = (rows @ rows.t()).cpu()
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    values, vectors = eigenvectors(inverse[:, None] * gram * inverse)
    kept = values > _DEPENDENT
    mixture = inverse[:, None] * vectors[:, kept] * values[kept].rsqrt()
    return mixture.t().to(rows.device) @ rows, gram


def extension(
    block: torch.Tensor, basis: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """New orthonormal rows, orthogonal to `basis`, that cover what `block` adds to it.

    Projected and orthonormalised twice, the second time only where it changes anything ("twice is
    enough"). Rows that add nothing are replaced by random ones, so a block never runs dry.

    Args:
        block: (k, length), fp32.
        basis: (c, length), fp32, orthonormal.
        generator: source of the replacements.

    Returns:
        (k, length) fp32 (fewer rows only if the space is full), and the Gram matrix (k, k) of
        the block's part outside the basis, fp64.
    """
    import torch

    rows, outside = whitened(_projected(block, basis).double())
    missing = len(block) - len(rows)
    if missing == 0 and _overlap(rows.float(), basis) < _CLEAN:
        return rows.float(), outside
    fresh = random_rows(missing, block.shape[1], generator).to(rows.device)
    rows = torch.cat([rows.float(), fresh])
    rows, _ = whitened(_projected(rows, basis).double())
    return rows.float(), outside


def _overlap(rows: torch.Tensor, basis: torch.Tensor) -> float:
    """Largest inner product of unit `rows` with vectors of `basis`."""
    return float((rows @ basis.t()).abs().max()) if len(basis) else 0.0


def _projected(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of `rows` (k, length) outside `basis` (c, length); 0 where that is only rounding."""
    import torch

    outside = torch.addmm(rows, rows @ basis.t(), basis, alpha=-1)
    before, after = (torch.linalg.vector_norm(x, dim=1) for x in (rows, outside))
    return outside.mul_((after > _INSIDE * before)[:, None])


def gram_factorization(target: Target, policy: RankPolicy, steps: int = 0) -> Factorization:
    """Factorize through all eigenvectors of the fp64 Gram matrix of the shorter side.

    Costs rows^2 * columns multiplications and an eigenproblem of size rows. The absolute error of a
    squared singular value is about 1e-16 of the largest: singular values down to 1e-6 of the
    largest come out to four digits, and fp32 factors can use none below.

    Raises:
        NoConvergenceError: the eigenvectors are not found.
    """
    import torch

    rows = target.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=target.device)
    for tile in target.tiles():
        gram.addmm_(tile, tile.t())
    values, vectors = eigenvectors(gram)
    energies = values.flip(0).clamp_(min=0.0)
    target = replace(target, total=float(gram.trace()))
    rank = policy.choose(energies, target.total, target.shape) or len(energies)
    left = vectors[:, -rank:].t()
    right = torch.cat([left @ tile for tile in target.tiles()], dim=1)
    return composed(target, left, right, policy, method="gram", steps=steps, slack=_FP64_SLACK)


def composed(
    target: Target,
    left: torch.Tensor,
    right: torch.Tensor,
    policy: RankPolicy,
    *,
    method: str,
    steps: int,
    slack: float,
    missed: float = 0.0,
) -> Factorization:
    """Balanced fp32 factors of the delta from U ~ left^T right, cut to the policy's rank.

    Args:
        target: what was factorized.
        left: (k, rows), fp64, orthonormal.
        right: (k, columns), fp64, `left` times U.
        policy: how many singular values to keep.
        method: numeric path.
        steps: block steps taken.
        slack: share of the total by which rounding may have falsified energies.
        missed: energy outside the subspace Q that was searched, in units of target.total. No
            matrix of rank r captures more than the best r directions in Q do and all that is
            outside: ||U_r||_F^2 <= captured + ||U - Q Q^T U||_F^2 (Ky Fan).
    """
    values, vectors = eigenvectors((right @ right.t()).cpu())
    energies, vectors = values.flip(0).clamp_(min=0.0), vectors.flip(1)
    usable = max(1, int((energies > _NEGLIGIBLE**2 * energies[0]).sum()))
    rank = policy.choose(energies[:usable], target.total, target.shape) or usable
    energies, vectors = energies[:rank], vectors[:, :rank]
    captured = float(energies.sum())
    bound = min(target.total, captured + missed) + slack * target.total

    root = energies.sqrt()
    sigma = root * 2.0**target.exponent
    left = (sigma.sqrt()[:, None] * vectors.t()).to(left.device) @ left
    right = ((sigma.sqrt() / root)[:, None] * vectors.t()).to(right.device) @ right
    out, into = (right, left) if target.transposed else (left, right)
    return Factorization(
        a=into.float().contiguous(),
        b=out.t().float().contiguous(),
        sigma=sigma,
        certificate=Certificate(
            rank=rank,
            total=math.ldexp(target.total, 2 * target.exponent),
            captured=math.ldexp(captured, 2 * target.exponent),
            optimum_bound=math.ldexp(bound, 2 * target.exponent),
            method=method,
            steps=steps,
        ),
    )


def zero_factorization(shape: tuple[int, int]) -> Factorization:
    """Rank 1 and all zero: the factors (1, in) and (out, 1) of a zero delta of `shape`."""
    import torch

    return Factorization(
        a=torch.zeros(1, shape[1], dtype=torch.float32),
        b=torch.zeros(shape[0], 1, dtype=torch.float32),
        sigma=torch.zeros(1, dtype=torch.float64),
        certificate=Certificate(rank=1, total=0.0, captured=0.0, method="zero"),
    )

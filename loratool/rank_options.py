"""What the options of an extraction that are about ranks mean together: by themselves only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratool.errors import UsageError
from loratool.linalg import RankPolicy
from loratool.shards import parse_size

_DEFAULT_RANK = 16
# With a budget this many singular values are computed of a matrix, unless --max-rank says.
_DEFAULT_CAP = 256


@dataclass(frozen=True)
class RankOptions:
    """How many singular values of each matrix are asked for.

    Attributes:
        rank: of every update; with another criterion, at most.
        energy: share of ||delta||^2 to capture.
        ratio: keep sigma >= sigma_1 / ratio.
        noise_floor: keep what lies above the rounding noise of the fine-tune's type.
        budget: bytes of all weights of the adapter, as given ("64MiB").
        weigh: what the budget is spent for: "energy" or "relative".
        max_rank: the largest rank that another criterion may choose.
        ranks: one adapter for each of these, as given ("4,8,16").
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    noise_floor: bool = False
    budget: str | None = None
    weigh: str | None = None
    max_rank: int | None = None
    ranks: str | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and (others := self._given()):
            raise UsageError(
                f"--ranks writes one adapter for each rank: leave {' and '.join(others)} out"
            )
        if self.max_rank is not None and self.rank is not None:
            raise UsageError("--rank and --max-rank both limit the rank: leave one of them out")
        if self.max_rank is not None and not self._chooses:
            raise UsageError(
                "--max-rank limits what --energy, --ratio, --noise-floor or --budget choose: give "
                "one of these, or --rank instead"
            )
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"--max-rank must be at least 1, not {self.max_rank}")
        if self.weigh is not None and self.budget is None:
            raise UsageError("--weigh says what --budget is spent for: give --budget, too")
        if self.weigh not in (None, "energy", "relative"):
            raise UsageError(f"--weigh must be energy or relative, not {self.weigh}")
        if self.budget is not None:
            parse_size(self.budget)
        _ = self.ladder, self.policy  # a wrong value is told before anything is opened

    def _given(self) -> list[str]:
        """The flags of the options that were given, but for --ranks."""
        values = {
            "--rank": self.rank, "--energy": self.energy, "--ratio": self.ratio,
            "--noise-floor": self.noise_floor or None, "--budget": self.budget,
            "--weigh": self.weigh, "--max-rank": self.max_rank,
        }  # fmt: skip
        return [flag for flag, value in values.items() if value is not None]

    @property
    def _chooses(self) -> bool:
        """Whether the values of the weights decide on ranks."""
        found = (self.energy, self.ratio, self.budget)
        return self.noise_floor or any(value is not None for value in found)

    @property
    def ladder(self) -> tuple[int, ...]:
        """The ranks of several adapters, ascending; () for one adapter.

        Raises:
            UsageError: they are no ranks.
        """
        if self.ranks is None:
            return ()
        try:
            found = sorted({int(text) for text in self.ranks.split(",")})
        except ValueError:
            found = [0]
        if found[0] < 1:
            raise UsageError(f"--ranks takes ranks from 1 up, as in 4,8,16, not {self.ranks!r}")
        return tuple(found)

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.budget is None else parse_size(self.budget)

    @property
    def policy(self) -> RankPolicy:
        """How many singular values of a matrix are computed at most, before a budget is spent.

        The floor of the noise floor is that of each matrix, and takes the place of the 0 here.
        """
        floor = 0.0 if self.noise_floor else None
        return RankPolicy(self._cap(), self.energy, self.ratio, floor)

    def _cap(self) -> int | None:
        if self.ladder:
            return self.ladder[-1]
        given = self.max_rank if self.rank is None else self.rank
        if given is None and self.budget is not None:
            return _DEFAULT_CAP
        return given if given is not None or self._chooses else _DEFAULT_RANK

    def facts(self) -> dict[str, Any]:
        """What was asked for, for the manifest; the rank that it means where none was given."""
        return {
            "rank": self.rank if self._chooses or self.ladder else self.policy.rank,
            "energy": self.energy,
            "ratio": self.ratio,
            "noise_floor": self.noise_floor,
            "budget": self.budget,
            "weigh": self.weigh or (None if self.budget is None else "energy"),
            "max_rank": self.max_rank,
            "ranks": list(self.ladder) or None,
        }

"""The default factorizer against exact spectra, on every kind of matrix that once broke one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.checkpoint import LazyTensor
from loratool.delta import DeltaReader
from loratool.errors import InputError
from loratool.linalg import Factorization, RankPolicy, Workspace, squared_norm
from loratool_plugins.factorizers.krylov import Krylov, expected_gain, residual_bound

COMPUTE = ["fp32", "bf16"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the library does
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factorize(
    delta: torch.Tensor,
    rank: int | None = 8,
    energy: float | None = None,
    compute: str = "fp32",
    seed: int = 0,
) -> Factorization:
    return Krylov(compute=compute).factorize(delta.clone(), RankPolicy(rank, energy), seeded(seed))


def matrix_of(spectrum: torch.Tensor, out: int, into: int, seed: int = 1) -> torch.Tensor:
    """A random matrix (out, into) with these singular values."""
    count, generator = len(spectrum), seeded(seed)
    left, _ = torch.linalg.qr(torch.randn(out, count, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(into, count, generator=generator))
    return (left * spectrum.float()) @ right.t()


def exact_energies(delta: torch.Tensor) -> torch.Tensor:
    """Squared singular values of `delta`, descending, from its fp64 Gram matrix."""
    wide = (delta if delta.shape[0] <= delta.shape[1] else delta.t()).double()
    return torch.linalg.eigvalsh(wide @ wide.t()).flip(0).clamp(min=0)


def recomputed(delta: torch.Tensor, result: Factorization) -> float:
    """||D||^2 - ||D - B A||^2 in fp64, from the factors that were returned."""
    rest = delta.double() - result.b.double() @ result.a.double()
    return float(delta.double().square().sum() - rest.square().sum())


def check(delta: torch.Tensor, result: Factorization, rank: int, honest: float = 1e-6) -> None:
    """The contract: near-optimal energy, a certificate true to `honest`, balanced factors."""
    energies = exact_energies(delta)
    total, optimal = float(energies.sum()), float(energies[:rank].sum())
    captured, certificate = recomputed(delta, result), result.certificate
    assert captured >= 0.999 * optimal
    assert abs(certificate.captured - captured) <= honest * total
    assert certificate.total == pytest.approx(total, rel=1e-6)
    best_of_kept_rank = float(energies[: certificate.rank].sum())
    assert certificate.optimum_bound >= best_of_kept_rank * (1 - 1e-9)

    assert certificate.rank == len(result.sigma) <= rank
    assert result.b.shape == (delta.shape[0], certificate.rank)
    assert result.a.shape == (certificate.rank, delta.shape[1])
    assert result.a.dtype == result.b.dtype == torch.float32
    assert result.a.is_contiguous() and result.b.is_contiguous()
    assert (result.sigma.diff() <= 0).all()
    for lengths in (result.a.double().norm(dim=1), result.b.double().norm(dim=0)):
        assert torch.allclose(lengths.square(), result.sigma, rtol=1e-4)


def steps_then(count: int, level: float, floor: float, size: int) -> torch.Tensor:
    return torch.cat([torch.full((count,), level), torch.full((size - count,), floor)])


def index(size: int) -> torch.Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64)


def rounded_merge(out: int, into: int) -> torch.Tensor:
    """What is left of a rank-8 LoRA that was merged into bf16 weights."""
    weights = (0.02 * torch.randn(out, into, generator=seeded(2))).bfloat16().float()
    lora = torch.randn(out, 8, generator=seeded(3)) @ torch.randn(8, into, generator=seeded(4))
    return (weights + 5e-4 * lora).bfloat16().float() - weights


def biased(out: int, into: int) -> torch.Tensor:
    """Equal numbers that bf16 rounds all the same way, over something much smaller."""
    return 1.0039 + 0.05 * matrix_of(index(200) ** -0.3, out, into) * (out * into) ** 0.5


def corner(out: int, into: int) -> torch.Tensor:
    delta = torch.zeros(out, into)
    delta[:30, :20] = torch.randn(30, 20, generator=seeded(5))
    return delta


def gaussian(out: int, into: int) -> torch.Tensor:
    return torch.randn(out, into, generator=seeded(6))


def with_law(law: Callable[[int], torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
    return lambda out, into: matrix_of(law(min(out, into)), out, into)


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "power 0.25": with_law(lambda n: index(n) ** -0.25),
    "power 0.5": with_law(lambda n: index(n) ** -0.5),
    "power 0.75": with_law(lambda n: index(n) ** -0.75),
    "power 1": with_law(lambda n: 1 / index(n)),
    "power 2": with_law(lambda n: index(n) ** -2),
    "exponential": with_law(lambda n: torch.exp(-index(n) / 8)),
    "steep exponential": with_law(lambda n: torch.exp(-2 * index(n))),
    "flat": with_law(torch.ones),
    "linear": with_law(lambda n: (n + 1 - index(n)) / n),
    "cluster": with_law(lambda n: steps_then(12, 1.0, 0.9, n)),
    "eight and noise": with_law(lambda n: steps_then(8, 1.0, 0.4, n)),
    "one giant": with_law(lambda n: steps_then(1, 1000.0, 1.0, n)),
    "rank 3": with_law(lambda n: torch.tensor([3.0, 2.0, 1.0])),
    "rank 40": with_law(lambda n: torch.ones(40)),
    "gaussian": gaussian,
    "heavy tails": lambda out, into: gaussian(out, into) ** 5,
    "heavy rows": lambda out, into: gaussian(out, into) * gaussian(out, 1).mul(2).exp(),
    "corner": corner,
    "ones": torch.ones,
    "signs": lambda out, into: gaussian(out, into).sign(),
    "merged LoRA": rounded_merge,
    "biased": biased,
}


@cache
def example(kind: str, out: int = 320, into: int = 448) -> torch.Tensor:
    return KINDS[kind](out, into)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("rank", [1, 8, 16, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_captures_nearly_the_optimum(kind: str, rank: int, compute: str) -> None:
    delta = example(kind)
    # fp32 sums of equal numbers round all the same way, so these come out a little off.
    honest = 1e-5 if kind in {"ones", "biased"} else 1e-6
    check(delta, factorize(delta, rank, compute=compute), rank, honest)


SHAPES = [(1, 1), (1, 700), (700, 1), (2, 3), (10, 8), (17, 700), (200, 200), (448, 320)]


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape: tuple[int, int], rank: int, compute: str) -> None:
    delta = gaussian(*shape)
    result = factorize(delta, rank, compute=compute)
    check(delta, result, min(rank, *shape))
    assert result.certificate.rank == min(rank, *shape)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", ["power 0.5", "gaussian"])
@pytest.mark.parametrize("shape", [(8000, 256), (256, 8000)], ids=str)
def test_long_shapes(shape: tuple[int, int], kind: str, compute: str) -> None:
    delta = example(kind, *shape)
    check(delta, factorize(delta, 8, compute=compute), 8)


def test_many_seeds() -> None:
    delta = example("power 0.5")
    optimal = float(exact_energies(delta)[:8].sum())
    for seed in range(20):
        for compute in COMPUTE:
            assert factorize(delta, 8, compute=compute, seed=seed).certificate.captured >= (
                0.999 * optimal
            )


@pytest.mark.parametrize("compute", COMPUTE)
def test_zero_delta(compute: str) -> None:
    result = factorize(torch.zeros(300, 200), 8, compute=compute)
    assert result.b.shape == (300, 1) and result.a.shape == (1, 200)
    assert not result.b.any() and not result.a.any()
    assert (result.certificate.total, result.certificate.captured) == (0, 0)
    assert result.certificate.energy == 1 and result.certificate.relative_error == 0


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("energy", [None, 0.9, 1.0])
def test_low_rank_is_recovered_and_not_padded(energy: float | None, compute: str) -> None:
    delta = matrix_of(torch.tensor([5.0, 3.0, 2.0, 1.5]), 400, 500)
    result = factorize(delta, 16, energy, compute)
    if energy == 0.9:
        assert result.certificate.rank == 3
    else:
        assert result.certificate.rank == 4
        assert torch.dist(delta, result.b @ result.a) < 1e-5 * delta.norm()


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-19, 1e-8, 1e19, 1e30, 1e36])
def test_any_magnitude(size: float, compute: str) -> None:
    delta = example("power 1")
    scaled = delta / delta.abs().max() * size
    result = factorize(scaled, 8, compute=compute)
    total = float(scaled.double().square().sum())
    assert result.certificate.total == pytest.approx(total, rel=1e-5)
    ends = (result.b.double() @ result.a.double() - scaled.double()).square().sum()
    optimal = float(exact_energies(scaled.double() / size)[:8].sum())
    assert (total - float(ends)) / size**2 >= 0.999 * optimal


@pytest.mark.parametrize("compute", ["auto", *COMPUTE])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(bad: float, compute: str) -> None:
    delta = example("gaussian").clone()
    delta[7, 11] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        factorize(delta, compute=compute)


@pytest.mark.parametrize("shape", [(0, 5), (5,), (2, 3, 4)], ids=str)
def test_refuses_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="only matrices"):
        Krylov().factorize(torch.ones(shape), RankPolicy(4), seeded(0))


@pytest.mark.parametrize("compute", COMPUTE)
def test_same_seed_same_bits_in_any_thread(compute: str) -> None:
    deltas = [example("power 0.5"), example("gaussian"), example("power 0.5", 448, 320)]

    def one(job: int) -> Factorization:
        torch.set_num_threads(1)
        return factorize(deltas[job % 3], compute=compute, seed=job % 3)

    alone = [one(job) for job in range(3)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(one, range(24)))
    for job, result in enumerate(together):
        assert torch.equal(result.a, alone[job % 3].a)
        assert torch.equal(result.b, alone[job % 3].b)
        assert result.certificate == alone[job % 3].certificate
    other = factorize(deltas[0], compute=compute, seed=99)
    assert not torch.equal(other.a, alone[0].a)


def test_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    factorize(example("power 0.5"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_path_is_chosen_by_cpu_flags_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = example("power 0.5")
    methods = {}
    for flag in ("avx512_bf16", "amx_bf16", "avx2"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        methods[flag] = factorize(delta, compute="auto").certificate.method
    assert methods["avx512_bf16"] == methods["amx_bf16"] == "krylov-bf16"
    assert methods["avx2"] == "krylov-fp32"
    assert factorize(delta, compute="bf16").certificate.method == "krylov-bf16"
    # A share that bf16 could not confirm is sought in fp32.
    steep = example("steep exponential")
    assert factorize(steep, 16, 0.9995, "bf16").certificate.method == "krylov-fp32"


@pytest.mark.parametrize("rank", [60, 150, 320, 999])
def test_high_ranks_go_through_the_gram_matrix(rank: int) -> None:
    delta = example("power 0.25")
    result = factorize(delta, rank)
    assert result.certificate.method == "gram"
    check(delta, result, min(rank, 320))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["power 0.25", "power 1", "exponential", "gaussian", "cluster"])
def test_energy_takes_the_fewest_columns(kind: str, share: float, compute: str) -> None:
    delta = example(kind)
    result = factorize(delta, None, share, compute)
    energies = exact_energies(delta)
    total = float(energies.sum())
    assert recomputed(delta, result) >= (share - 1e-6) * total
    # One column fewer could not have held the share, but for the tolerance.
    fewer = float(energies[: result.certificate.rank - 1].sum())
    assert fewer * (1 - 1e-3) < share * total


def test_energy_is_capped_by_rank() -> None:
    assert factorize(example("power 0.25"), 12, 0.9).certificate.rank == 12
    assert factorize(example("power 2"), 12, 0.9).certificate.rank == 1


@pytest.mark.parametrize("compute", COMPUTE)
@given(
    out=st.integers(1, 260),
    into=st.integers(1, 260),
    rank=st.integers(1, 40),
    slope=st.floats(0, 2),
    doublings=st.integers(-50, 50),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_laws(
    compute: str, out: int, into: int, rank: int, slope: float, doublings: int, seed: int
) -> None:
    delta = matrix_of(index(min(out, into)) ** -slope, out, into, seed)
    result = factorize(delta, rank, compute=compute, seed=seed)
    check(delta, result, min(rank, out, into))

    # Scaling: singular values bit by bit; factors too where the square root is a power of two.
    scaled = factorize(delta * 2.0**doublings, rank, compute=compute, seed=seed)
    assert torch.equal(scaled.sigma, result.sigma * 2.0**doublings)
    assert scaled.certificate.rank == result.certificate.rank
    if doublings % 2 == 0:
        half = 2.0 ** (doublings // 2)
        assert torch.equal(scaled.a, result.a * half)
        assert torch.equal(scaled.b, result.b * half)

    # A transpose holds the same energy, to the tolerance.
    turned = factorize(delta.t().contiguous(), rank, compute=compute, seed=seed)
    assert turned.certificate.captured == pytest.approx(result.certificate.captured, rel=1e-3)


@given(share=st.floats(0.01, 1), slope=st.floats(0, 1.5), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_share_asked_for_is_reached(share: float, slope: float, seed: int) -> None:
    delta = matrix_of(index(270) ** -slope, 270, 280, seed)
    result = factorize(delta, None, share, "bf16", seed)
    total = float(delta.double().square().sum())
    assert recomputed(delta, result) >= (share - 1e-6) * total


@given(
    rank=st.integers(1, 6),
    coupling=st.floats(1e-3, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_residual_bound_bounds_what_the_rest_can_add(rank: int, coupling: float, seed: int) -> None:
    # [[T, S^T], [S, C]]: T diagonal (Ritz values), nothing in C above theta_{r+1}.
    generator = seeded(seed)
    ritz = torch.rand(8, generator=generator, dtype=torch.float64).sort(descending=True).values
    rest = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    rest = rest @ rest.t()
    rest *= ritz[rank] / torch.linalg.eigvalsh(rest)[-1]
    between = coupling * torch.randn(10, rank, generator=generator, dtype=torch.float64)
    whole = torch.block_diag(torch.diag(ritz[:rank]), torch.diag(ritz[rank:]), rest)
    whole[8:, :rank] = between
    whole[:rank, 8:] = between.t()
    gained = float(torch.linalg.eigvalsh(whole)[-rank:].sum() - ritz[:rank].sum())
    bound = residual_bound(ritz, rank, float(between.square().sum()))
    assert -1e-9 <= gained <= bound + 1e-9
    widths = torch.logspace(-6, 3, 2000, dtype=torch.float64)
    added = (ritz[rank] + widths[:, None] - ritz[:rank]).clamp(min=0).sum(dim=1)
    tried = float((between.square().sum() / widths + added).min())
    assert bound <= tried * (1 + 1e-9)


def test_expected_gain_sums_the_geometric_series() -> None:
    assert expected_gain(0.0, 1.0, 1.5) == pytest.approx(0.5)  # 1/4 + 1/8 + ...
    assert expected_gain(0.0, 1.0, 1.01) == pytest.approx(0.01 / 3)  # never below a quarter
    assert expected_gain(1.0, 1.01, 1.03) == pytest.approx(0.02 * 19)  # never above 0.95
    assert expected_gain(0.0, 0.0, 1.0) == pytest.approx(19)  # one judgement tells nothing
    assert expected_gain(0.0, 1.0, 0.99) == 0


def test_workspace_reuses_within_a_thread_only() -> None:
    workspace = Workspace()
    first = workspace.take("x", (4, 5), torch.float32)
    assert workspace.take("x", (2, 3), torch.float32).data_ptr() == first.data_ptr()
    assert workspace.take("y", (4, 5), torch.float32).data_ptr() != first.data_ptr()
    assert workspace.take("x", (4, 5), torch.bfloat16).dtype == torch.bfloat16
    assert workspace.take("x", (40, 50), torch.float32).shape == (40, 50)
    mine = workspace.take("x", (4, 5), torch.float32)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(workspace.take, "x", (4, 5), torch.float32).result()
    assert theirs.data_ptr() != mine.data_ptr()


@pytest.mark.parametrize("shape", [(1,), (511,), (512,), (3, 1000), (700, 3000)], ids=str)
def test_squared_norm(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=seeded(0)) + 3
    assert squared_norm(values) == pytest.approx(float(values.double().square().sum()), rel=3e-7)
    assert squared_norm(values.t() if values.dim() == 2 else values) > 0
    assert not math.isfinite(squared_norm(values.index_fill(0, torch.tensor([0]), math.nan)))


def failing_eigh(times: int) -> Callable[[torch.Tensor], object]:
    """torch.linalg.eigh, which does not converge the first few times."""
    genuine, calls = torch.linalg.eigh, iter(range(times))

    def eigh(matrix: torch.Tensor) -> object:
        if next(calls, None) is not None:
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge\nmore")  # type: ignore[attr-defined]
        return genuine(matrix)

    return eigh


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_search_that_does_not_converge_is_made_again_in_fp64(
    compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = matrix_of(torch.arange(1, 201).float() ** -0.7, 260, 300)
    expected = exact_energies(delta)[:8].sum()
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh(1))
    found = factorize(delta, compute=compute)
    assert found.certificate.method == "gram"
    assert found.certificate.captured == pytest.approx(float(expected), rel=1e-6)


def test_what_never_converges_is_an_error_that_names_the_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh(1000))
    reader = DeltaReader(Krylov(), RankPolicy(4), seed=0)
    base, tuned = (lazy_tensor("layer.0.weight", torch.randn(90, 80)) for _ in range(2))
    with pytest.raises(InputError, match=r"tuned.*layer\.0\.weight: .*fp64 .*failed to converge\)"):
        reader.factorize(base, tuned, False, "F32")


def lazy_tensor(name: str, value: torch.Tensor) -> LazyTensor:
    return LazyTensor(name, "F32", tuple(value.shape), lambda: iter([value]), "tuned")

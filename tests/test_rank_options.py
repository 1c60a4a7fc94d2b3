"""What the options of an extraction that are about ranks mean together."""

from __future__ import annotations

from typing import Any

import pytest

from loratool.errors import UsageError
from loratool.linalg import RankPolicy
from loratool.rank_options import RankOptions


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, RankPolicy(16)),
        ({"rank": 3}, RankPolicy(3)),
        ({"energy": 0.9}, RankPolicy(None, 0.9)),
        ({"energy": 0.9, "rank": 3}, RankPolicy(3, 0.9)),
        ({"energy": 0.9, "max_rank": 3}, RankPolicy(3, 0.9)),
        ({"ratio": 10.0}, RankPolicy(None, None, 10.0)),
        ({"noise_floor": True}, RankPolicy(None, floor=0.0)),
        ({"noise_floor": True, "max_rank": 5, "ratio": 2.0}, RankPolicy(5, None, 2.0, 0.0)),
        ({"budget": "1MiB"}, RankPolicy(256)),
        ({"budget": "1MiB", "max_rank": 40}, RankPolicy(40)),
        ({"budget": "1MiB", "rank": 40, "energy": 0.5}, RankPolicy(40, 0.5)),
        ({"ranks": "8,2,4,4"}, RankPolicy(8)),
    ],
)
def test_the_largest_rank_in_question(given: dict[str, Any], policy: RankPolicy) -> None:
    assert RankOptions(**given).policy == policy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"ranks": "4", "rank": 2, "energy": 0.5, "ratio": 2.0, "noise_floor": True,
             "budget": "1MiB", "max_rank": 4},
            ["--ranks", "--rank", "--energy", "--ratio", "--noise-floor", "--budget", "--max-rank"],
        ),
        ({"ranks": "4,,8"}, ["--ranks", "4,,8"]),
        ({"ranks": "0,4"}, ["--ranks", "1 up"]),
        ({"ranks": "many"}, ["--ranks", "many"]),
        ({"rank": 4, "max_rank": 8}, ["--rank", "--max-rank"]),
        ({"max_rank": 8}, ["--max-rank", "--energy", "--ratio", "--noise-floor", "--budget"]),
        ({"max_rank": 0, "energy": 0.5}, ["--max-rank", "at least 1"]),
        ({"weigh": "relative"}, ["--weigh", "--budget"]),
        ({"weigh": "much", "budget": "1MiB"}, ["--weigh", "much"]),
        ({"budget": "lots"}, ["lots"]),
        ({"rank": 0}, ["rank"]),
        ({"energy": 1.5}, ["energy"]),
        ({"ratio": 0.5}, ["ratio"]),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said_in_one_message(
    given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        RankOptions(**given)
    assert all(word in str(caught.value) for word in words)


def test_the_manifest_tells_what_was_asked_for() -> None:
    assert RankOptions().facts()["rank"] == 16
    facts = RankOptions(budget="1MiB", max_rank=9).facts()
    assert (facts["rank"], facts["budget"], facts["weigh"], facts["max_rank"]) == (
        None, "1MiB", "energy", 9,
    )  # fmt: skip
    assert RankOptions(ranks="8,4").facts()["ranks"] == [4, 8]

"""Which name in one model is which name in another: laws, and the messages where none is known."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratool.alignment import Alignment, align, parse_moves
from loratool.errors import MismatchError, UsageError

Shapes = dict[str, tuple[int, ...]]

words = st.sampled_from(["encoder", "layer", "0", "1", "query", "dense", "weight", "bias"])
names = st.lists(words, min_size=1, max_size=4).map(".".join)
shapes = st.lists(st.integers(1, 9), max_size=2).map(tuple)
models = st.dictionaries(names, shapes, min_size=1, max_size=8)
# Words that no tail of a name above begins with: the prefix is the only one.
prefixes = st.lists(st.sampled_from(["bert", "model", "transformer"]), min_size=1, max_size=2).map(
    lambda parts: ".".join(parts) + "."
)


def prefixed(model: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in model.items()}


@given(models)
def test_a_model_aligns_with_itself(model: Shapes) -> None:
    found = align(model, model)
    assert found.pairs == {name: name for name in model}
    assert found.describe() == ""


@given(models, models)
def test_equal_names_win_and_no_tensor_is_taken_twice(here: Shapes, there: Shapes) -> None:
    try:
        pairs = align(here, there).pairs
    except MismatchError:
        return
    assert all(pairs[name] == name for name in here if name in there)
    assert len(set(pairs.values())) == len(pairs)
    assert here.keys() >= pairs.keys() and there.keys() >= set(pairs.values())


@given(models, prefixes)
def test_one_prefix_is_found_either_way(model: Shapes, prefix: str) -> None:
    # A name that is another's tail makes a second way, as in test_several_ways...
    assume(not any(a != b and a.endswith(f".{b}") for a in model for b in model))
    longer = prefixed(model, prefix)
    there = align(model, longer)
    assert there.pairs == {name: prefix + name for name in model}
    assert (there.prefix_here, there.prefix_there) == ("", prefix)
    assert there.describe() == f"names match with the prefix {prefix!r} added"
    here = align(longer, model)
    assert here.pairs == {prefix + name: name for name in model}
    assert (here.prefix_here, here.prefix_there) == (prefix, "")
    assert here.describe() == f"names match with the prefix {prefix!r} removed"


@given(models, prefixes, st.sets(st.integers(0, 7), max_size=3))
def test_name_here_undoes_the_pairs(model: Shapes, prefix: str, heads: set[int]) -> None:
    assume(not any(a != b and a.endswith(f".{b}") for a in model for b in model))
    longer = prefixed(model, prefix) | {f"head{i}": (i,) for i in heads}
    for found in (align(model, longer), align(longer, model)):
        assert all(found.name_here(other) == name for name, other in found.pairs.items())


@given(models, prefixes)
def test_tensors_without_a_partner_stay_alone(model: Shapes, prefix: str) -> None:
    found = align(model | {"head": (2,)}, prefixed(model, prefix) | {"cls": (3,)})
    assert "head" not in found.pairs and "cls" not in found.pairs.values()


def several_ways() -> tuple[Shapes, Shapes]:
    here: Shapes = {"layers.0.weight": (4, 4), "layers.1.weight": (4, 4)}
    return here, prefixed(here, "encoder.") | prefixed(here, "decoder.")


def test_several_ways_are_an_error_that_lists_what_decides() -> None:
    here, there = several_ways()
    with pytest.raises(MismatchError) as caught:
        align(here, there)
    text = str(caught.value)
    assert text.startswith("names match in several ways; choose with --map OLD=NEW:")
    options = re.findall(r": --map (\S*=\S*)$", text, re.MULTILINE)
    assert options == ["=decoder.", "=encoder."]
    for option in options:
        found = align(here, there, parse_moves([option]))
        assert found.pairs == {name: option.removeprefix("=") + name for name in here}


def test_several_ways_the_other_way_round() -> None:
    there, here = several_ways()
    with pytest.raises(MismatchError, match=r"--map encoder\.="):
        align(here, there)
    found = align(here, there, parse_moves(["encoder.="]))
    assert found.pairs["encoder.layers.0.weight"] == "layers.0.weight"
    assert "decoder.layers.0.weight" not in found.pairs


def test_where_nothing_decides_no_option_is_named() -> None:
    here, there = several_ways()
    with pytest.raises(MismatchError) as caught:
        align(here, there, option="")
    assert "--map" not in str(caught.value)
    assert "layers.0.weight may be encoder.layers.0.weight" in str(caught.value)


def test_shapes_decide_between_prefixes() -> None:
    here, there = several_ways()
    there |= {"decoder.layers.1.weight": (4, 5)}
    assert align(here, there).prefix_there == "encoder."


def test_a_stray_head_does_not_make_a_prefix() -> None:
    body = {f"layers.{i}.weight": (4, 4) for i in range(3)}
    found = align(body | {"dense.weight": (2, 4)}, body | {"head.dense.weight": (2, 4)})
    assert found.pairs == {name: name for name in body}


def test_transposed_shapes_count_as_equal() -> None:
    here = {"h.0.attn.c_attn.weight": (96, 32)}
    assert align(here, {"transformer.h.0.attn.c_attn.weight": (32, 96)}).pairs


@given(models, prefixes)
def test_a_move_decides(model: Shapes, prefix: str) -> None:
    here, there = prefixed(model, "old."), prefixed(model, prefix) | prefixed(model, "new.")
    found = align(here, there, [("old.", "new.")])
    assert found.pairs == {f"old.{name}": f"new.{name}" for name in model}
    assert all(found.name_here(other) == name for name, other in found.pairs.items())


def test_a_move_wins_over_equal_names() -> None:
    model: Shapes = {"a.weight": (2,), "b.weight": (2,)}
    found = align(model, model, [("a.", "b.")])
    assert found.pairs == {"a.weight": "b.weight"}


def test_a_whole_name_can_be_moved() -> None:
    found = align({"score.weight": (2,)}, {"head.w": (2,)}, [("score.weight", "head.w")])
    assert found.pairs == {"score.weight": "head.w"}


def test_a_move_that_leads_nowhere_is_an_error() -> None:
    with pytest.raises(MismatchError, match=r"--map x\.=y\.: no tensor x\.\* of the fine-tune"):
        align({"x.a": (1,)}, {"x.a": (1,)}, [("x.", "y.")])


def test_two_moves_to_one_place_are_an_error() -> None:
    with pytest.raises(MismatchError, match=r"--map: x\.a and y\.a both become z\.a"):
        align({"x.a": (1,), "y.a": (1,)}, {"z.a": (1,)}, [("x.", "z."), ("y.", "z.")])


def test_moves_are_written_with_an_equals_sign() -> None:
    assert parse_moves(["a.=b.", "=c.", "d.="]) == (("a.", "b."), ("", "c."), ("d.", ""))
    with pytest.raises(UsageError, match="write OLD=NEW"):
        parse_moves(["a.b"])


def test_without_a_rule_a_name_stays() -> None:
    assert Alignment({}).name_here("head.weight") == "head.weight"

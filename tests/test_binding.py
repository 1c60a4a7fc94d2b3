"""Binding: every update finds its tensor, or says why not; headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from loratool.adapter import Adapter, LazyUpdate
from loratool.binding import Binding, bind
from loratool.checkpoint import Checkpoint, LazyTensor
from loratool.updates import Update

Shape = tuple[int, ...]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BERT: Mapping[str, Shape] = {
    "bert.embeddings.word_embeddings.weight": (50, 8),
    QUERY: (8, 8),
    "bert.encoder.layer.0.attention.self.query.bias": (8,),
    "bert.encoder.layer.0.intermediate.dense.weight": (16, 8),
    "cls.predictions.bias": (50,),
}
LLAMA: Mapping[str, Shape] = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
}


def never() -> None:
    raise AssertionError("binding reads headers only")


def checkpoint(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Checkpoint:
    def blocks() -> Iterator[Any]:
        never()
        yield

    dtypes = dtypes or {}
    tensors = {n: LazyTensor(n, dtypes.get(n, "F32"), s, blocks) for n, s in shapes.items()}
    return Checkpoint(tensors, config=config, **fields)


def low_rank(name: str, *shape: int, transposed: bool | None = None) -> LazyUpdate:
    def load() -> Update | None:
        never()
        return None

    return LazyUpdate(name, "low_rank", shape, "F32", load, rank=2, transposed=transposed)


def whole(name: str, *shape: int) -> LazyUpdate:
    def load() -> Update | None:
        never()
        return None

    return LazyUpdate(name, "replacement", shape, "F32", load)


def bound(updates: list[LazyUpdate], base: Checkpoint, **fields: Any) -> Binding:
    return bind(Adapter({update.name: update for update in updates}, **fields), base)


def complaints(binding: Binding) -> list[tuple[str, str, str]]:
    return [(p.severity, p.tensor, p.message) for p in binding.problems]


def test_equal_names_bind() -> None:
    found = bound([low_rank(QUERY, 8, 8)], checkpoint(BERT))
    assert found.problems == ()
    assert found.changed[QUERY].tensor == QUERY
    assert not found.changed[QUERY].transposed


@pytest.mark.parametrize("prefix", ["bert.", "model.encoder."])
def test_a_prefix_binds_either_way(prefix: str) -> None:
    bare = {name.removeprefix("bert."): shape for name, shape in BERT.items()}
    base = checkpoint({prefix + name: shape for name, shape in bare.items()})
    for start, end in (("", prefix), (prefix, "")):
        update = low_rank(start + "encoder.layer.0.intermediate.dense.weight", 16, 8)
        target = checkpoint({end + n: s for n, s in bare.items()}) if start else base
        found = bound([update], target)
        assert found.problems == ()
        assert list(found.changed) == [end + "encoder.layer.0.intermediate.dense.weight"]


def test_one_transposed_weight_is_enough_to_find_the_prefix() -> None:
    base = checkpoint({"h.0.attn.c_attn.weight": (8, 24)})
    update = low_rank("transformer.h.0.attn.c_attn.weight", 24, 8, transposed=True)
    found = bound([update], base)
    assert found.problems == ()
    assert found.changed["h.0.attn.c_attn.weight"].transposed


def test_names_that_match_in_several_ways_are_a_problem_without_an_option() -> None:
    base = checkpoint({f"{side}.layers.0.weight": (8, 8) for side in ("encoder", "decoder")})
    found = bound([low_rank("layers.0.weight", 8, 8)], base)
    ((severity, _, message),) = complaints(found)
    assert severity == "error"
    assert "several ways" in message and "encoder.layers.0.weight" in message
    assert "--map" not in message


def test_moves_of_the_adapter_decide() -> None:
    base = checkpoint({f"{side}.layers.0.weight": (8, 8) for side in ("encoder", "decoder")})
    moves = (("layers.", "decoder.layers."), ("unused.", "nowhere."))
    found = bound([low_rank("layers.0.weight", 8, 8)], base, moves=moves)
    assert found.problems == ()
    assert list(found.changed) == ["decoder.layers.0.weight"]


def test_a_missing_tensor_is_named_with_what_is_like_it() -> None:
    name = "roberta.encoder.layer.0.self.query.weight"
    ((severity, tensor, message),) = complaints(bound([low_rank(name, 8, 8)], checkpoint(BERT)))
    assert (severity, tensor) == ("error", name)
    assert message == f"the base has no tensor {name}; the base has {QUERY}"


def test_another_shape_is_named() -> None:
    (problem,) = bound([low_rank(QUERY, 8, 4)], checkpoint(BERT)).problems
    assert (problem.severity, problem.expected, problem.found) == ("error", "(8, 8)", "(8, 4)")
    assert QUERY in problem.message


@pytest.mark.parametrize("told", [None, True, False])
def test_the_module_decides_the_orientation(told: bool | None) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    base = checkpoint({name: (8, 24)}, config={"model_type": "gpt2"})
    found = bound([low_rank(name, 24, 8, transposed=told)], base)
    assert found.problems == ()
    assert found.changed[name].transposed
    linear = bound([low_rank(QUERY, 8, 8, transposed=told)], checkpoint(BERT))
    assert not linear.changed[QUERY].transposed


@pytest.mark.parametrize(
    ("told", "stored", "transposed"),
    [(True, (8, 24), True), (None, (8, 24), True), (None, (24, 8), False), (False, (24, 8), False)],
)
def test_where_the_module_is_unknown_file_or_shape_decides(
    told: bool | None, stored: Shape, transposed: bool
) -> None:
    found = bound([low_rank("a.weight", 24, 8, transposed=told)], checkpoint({"a.weight": stored}))
    assert found.problems == ()
    assert found.changed["a.weight"].transposed is transposed


def test_integers_are_refused() -> None:
    found = bound([low_rank(QUERY, 8, 8)], checkpoint(BERT, {QUERY: "I8"}))
    (complaint,) = complaints(found)
    assert complaint[:2] == ("error", QUERY) and "quantized or integer" in complaint[2]


def test_every_complaint_is_collected() -> None:
    updates = [low_rank(QUERY, 4, 8), low_rank("x.weight", 2, 2), low_rank("y.z.weight", 2, 2)]
    assert len(bound(updates, checkpoint(BERT)).problems) == 3


def test_a_replacement_may_have_other_rows_only() -> None:
    table = "bert.embeddings.word_embeddings.weight"
    (more,) = bound([whole(table, 60, 8)], checkpoint(BERT)).problems
    assert (more.severity, more.expected, more.found) == ("warning", "(50, 8)", "(60, 8)")
    (wider,) = bound([whole(table, 50, 9)], checkpoint(BERT)).problems
    assert wider.severity == "error"
    assert bound([whole(table, 50, 8)], checkpoint(BERT)).problems == ()


def test_norms_have_one_size_and_biases_of_heads_any() -> None:
    base = checkpoint({"norm.weight": (8,), "norm.bias": (8,), "cls.predictions.bias": (50,)})
    updates = [whole("norm.weight", 9), whole("norm.bias", 9), whole("cls.predictions.bias", 60)]
    assert [p.severity for p in bound(updates, base).problems] == ["error", "error", "warning"]


def test_what_the_base_lacks_is_added() -> None:
    base = checkpoint(BERT)
    warned = bound([whole("classifier.weight", 3, 8)], base)
    assert list(warned.added) == ["classifier.weight"]
    assert [p.severity for p in warned.problems] == ["warning"]
    config = {"architectures": ["BertForSequenceClassification"]}
    assert bound([whole("classifier.weight", 3, 8)], base, model_config=config).problems == ()


def test_dropped_tensors_are_those_that_the_base_has() -> None:
    found = bound([low_rank(QUERY, 8, 8)], checkpoint(BERT), dropped=("cls.predictions.bias", "x"))
    assert found.dropped == ("cls.predictions.bias",)


TIED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


def test_a_tied_head_that_the_base_does_not_store_is_left_alone() -> None:
    updates = [whole("model.embed_tokens.weight", 50, 8), whole("lm_head.weight", 50, 8)]
    found = bound(updates, checkpoint(LLAMA, config=TIED))
    assert found.problems == ()
    assert (list(found.changed), list(found.added)) == (["model.embed_tokens.weight"], [])


def test_a_tied_head_that_the_base_stores_changes_too() -> None:
    base = checkpoint({**LLAMA, "lm_head.weight": (50, 8)}, config=TIED)
    found = bound([whole("model.embed_tokens.weight", 50, 8)], base)
    assert set(found.changed) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert found.changed["lm_head.weight"].update.name == "model.embed_tokens.weight"


def test_a_copy_changes_with_its_original_unless_it_is_dropped() -> None:
    shapes = {**LLAMA, "copy.weight": (16, 8)}
    base = checkpoint(shapes, aliases={"copy.weight": "model.layers.0.mlp.up_proj.weight"})
    update = low_rank("model.layers.0.mlp.up_proj.weight", 16, 8)
    assert set(bound([update], base).changed) == {update.name, "copy.weight"}
    assert set(bound([update], base, dropped=("copy.weight",)).changed) == {update.name}


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_cannot_be_updated_alone(stored: bool) -> None:
    shapes = {**LLAMA, "lm_head.weight": (50, 8)} if stored else LLAMA
    found = bound([low_rank("lm_head.weight", 50, 8)], checkpoint(shapes, config=TIED))
    ((severity, name, message),) = complaints(found)
    assert (severity, name) == ("error", "lm_head.weight")
    assert "tied to model.embed_tokens.weight" in message


def test_the_files_own_problems_come_first() -> None:
    from loratool.errors import Problem

    own = Problem("error", "a", "broken")
    assert bound([low_rank(QUERY, 8, 8)], checkpoint(BERT), problems=(own,)).problems == (own,)

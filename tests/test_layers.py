"""Names tell where in a model a tensor lies."""

from __future__ import annotations

from loratool.layers import places


def test_layers_and_matrices_of_a_llama() -> None:
    modules = [f"mlp.{name}_proj" for name in ("down", "gate", "up")]
    modules += [f"self_attn.{name}_proj" for name in "koqv"] + ["input_layernorm"]
    names = [f"model.layers.{n}.{module}.weight" for n in (0, 10, 2) for module in modules]
    found = places([*names, "model.embed_tokens.weight"])
    labels = list(dict.fromkeys(place.label for place in found.values()))
    assert labels == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                      "down_proj", "input_layernorm", "embed_tokens"]  # fmt: skip
    assert found["model.layers.10.mlp.up_proj.weight"].layer == 10
    assert found["model.layers.10.mlp.up_proj.weight"].row == "model.layers.*.mlp.up_proj"
    assert found["model.embed_tokens.weight"].layer is None
    assert found.keys() == {*names, "model.embed_tokens.weight"}


def test_equal_ends_are_told_apart() -> None:
    ends = ("attention.output.dense", "intermediate.dense", "output.dense")
    found = places(f"bert.encoder.layer.{n}.{end}.weight" for n in range(2) for end in ends)
    assert [place.label for place in found.values()][::2] == list(ends)


def test_numbers_that_never_change_belong_to_the_matrix() -> None:
    names = [f"{side}.block.{n}.layer.0.SelfAttention.q.weight"
             for side in ("encoder", "decoder") for n in range(3)]  # fmt: skip
    found = places(names)
    assert [place.layer for place in found.values()] == [0, 1, 2, 0, 1, 2]
    assert {place.label for place in found.values()} == {
        "encoder: SelfAttention.q", "decoder: SelfAttention.q",
    }  # fmt: skip


def test_blocks_of_a_unet_are_counted_through() -> None:
    names = [f"down_blocks.{n}.attentions.{m}.to_q.weight" for n in range(2) for m in range(2)]
    assert [place.layer for place in places(names).values()] == [0, 1, 2, 3]


def test_a_bias_has_a_row_of_its_own() -> None:
    found = places(["h.0.fc.weight", "h.0.fc.bias"])
    assert {place.label for place in found.values()} == {"fc", "bias"}

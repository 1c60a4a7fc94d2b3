"""Inputs for models: files of texts, token ids and images, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import save_file

from fixtures.weights import RXNFP_TUNED, fetch
from loratool.calibration import Inputs, Limits, length_limit, read_inputs
from loratool.checkpoint import Checkpoint
from loratool.errors import InputError, UsageError
from loratool.opening import open_checkpoint
from loratool.running import open_model, run
from tests.models import CONFIGS, build, tiny_config

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("calibration") / "bert"
    build("BertForSequenceClassification", tiny_config("bert", pad_token_id=0)).save_pretrained(
        folder
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "vit"
    config = transformers.ViTConfig(**{**CONFIGS["bert"], "image_size": 16, "patch_size": 4})
    build("ViTForImageClassification", config).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def read(path: Path, folder: Path, **options: Any) -> Inputs:
    checkpoint = open_checkpoint(folder)
    limits = Limits(options.pop("samples", 128), options.pop("length", None))
    return read_inputs(path, open_model(checkpoint), limits, [checkpoint], **options)


def samples(inputs: Inputs) -> dict[int, list[int]]:
    """Sample -> its tokens without padding."""
    found = {}
    for number, (batch, rows) in enumerate(zip(inputs.batches, inputs.rows, strict=True)):
        real = inputs.real(number)
        assert real is not None
        for row, ids, mask in zip(rows, batch["input_ids"], real, strict=True):
            found[row] = ids[mask].tolist()
    return found


EXPECTED = {0: [2, 5, 6, 7, 3], 1: [2, 9, 10, 3], 2: [2, 5, 10, 7, 8, 5, 6, 3]}
TEXTS = ["the cat sat", "a mat", "the mat sat on the cat"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "\n\n".join(TEXTS)),
        ("texts.jsonl", "\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS)),
        ("strings.jsonl", "\n".join(map(json.dumps, TEXTS)) + "\n"),
        ("texts.json", json.dumps([{"text": text} for text in TEXTS])),
        ("ids.json", json.dumps(list(EXPECTED.values()))),
        ("ids.jsonl", "\n".join(json.dumps({"input_ids": ids}) for ids in EXPECTED.values())),
    ],
)
def test_texts_and_token_ids_become_padded_batches(
    bert: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    found = read(tmp_path / name, bert)
    assert samples(found) == EXPECTED and found.count == 3 and found.tokens == 17
    assert found.kind == ("texts" if "text" in name or "strings" in name else "token ids")
    assert not found.notes
    model = open_model(open_checkpoint(bert))
    assert len(list(run(model, found.batches))) == len(found.batches)


def test_arrays_end_in_padding_or_have_a_mask(bert: Path, tmp_path: Path) -> None:
    width = 10
    ids = np.array([row + [0] * (width - len(row)) for row in EXPECTED.values()])
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    assert samples(read(tmp_path / "ids.npy", bert)) == EXPECTED
    mask = (ids != 0).astype(np.int64)
    mask[1, 2:] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 1 - mask}
    save_file(tensors, tmp_path / "ids.safetensors")
    found = read(tmp_path / "ids.safetensors", bert)
    assert samples(found) == {**EXPECTED, 1: [2, 9]}
    assert "token_type_ids" not in found.batches[0] or not found.batches[0]["token_type_ids"].any()


def test_what_is_cut_is_told(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "the cat " * 40]))
    found = read(tmp_path / "texts.txt", bert)
    assert max(map(len, samples(found).values())) == 24  # the model's positions
    assert found.notes == (f"{tmp_path / 'texts.txt'}: 1 sample cut to 24 tokens",)
    fewer = read(tmp_path / "texts.txt", bert, samples=2, length=4)
    assert samples(fewer) == {0: [2, 5, 6, 7], 1: [2, 9, 10, 3]}
    assert "only the first 2 of 4 samples" in fewer.notes[0]
    assert "1 sample cut to 4 tokens" in fewer.notes[1]


def test_padding_has_no_part_in_anything(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(list(EXPECTED.values())))
    found = read(tmp_path / "ids.json", bert)
    batch = found.batches[0]["input_ids"]
    values = torch.randn(*batch.shape, 5)
    kept = found.unpadded(0, values)
    assert kept.shape == (17, 5)
    assert torch.equal(kept, found.unpadded(0, values.flatten(0, 1)))
    assert found.unpadded(0, values[:, 0]).shape == (3, 5)


def test_inputs_are_divided(bert: Path, tmp_path: Path) -> None:
    rows = [[2, 5 + number % 5, 3] for number in range(40)]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    found = read(tmp_path / "ids.json", bert)
    assert len(found.batches) == 2  # at most 32 rows
    fit, held = found.split(0.25)
    assert (fit.count, held.count) == (30, 10)
    assert samples(fit) | samples(held) == dict(enumerate(rows))


def test_an_encoder_and_decoder_gets_both_inputs(tmp_path: Path) -> None:
    build("T5ForConditionalGeneration", tiny_config("t5")).save_pretrained(tmp_path / "t5")
    (tmp_path / "ids.json").write_text("[[5, 6, 7], [8, 9]]")
    found = read(tmp_path / "ids.json", tmp_path / "t5")
    assert found.batches[0]["decoder_input_ids"].tolist() == [[0, 8, 9], [0, 5, 6]]
    list(run(open_model(open_checkpoint(tmp_path / "t5")), found.batches))


def test_roberta_has_fewer_positions_than_it_says(tmp_path: Path) -> None:
    config = tiny_config("roberta", pad_token_id=1)
    build("RobertaModel", config).save_pretrained(tmp_path / "model")
    model = open_model(open_checkpoint(tmp_path / "model"))
    assert length_limit(model) == 22
    rows = [list(range(2, 24))]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    list(run(model, read_inputs(tmp_path / "ids.json", model).batches))


def test_images_through_the_models_processor(vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (20 + number, 30), (80 * number, 9, 9)).save(folder / f"{number}.png")
    found = read(folder, vit, samples=2)
    assert found.batches[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert found.tokens is None and "only the first 2 of 3 images" in found.notes[0]
    (folder / "list.txt").write_text("2.png\n0.png\n")
    listed = read(folder / "list.txt", vit)
    assert torch.equal(listed.batches[0]["pixel_values"][1], found.batches[0]["pixel_values"][0])
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    expected = processor(images=[Image.open(folder / "1.png")], return_tensors="pt")
    assert torch.equal(found.batches[0]["pixel_values"][1:], expected["pixel_values"])
    list(run(open_model(open_checkpoint(vit)), found.batches))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder; give texts"),
        ("empty.txt", b"\n \n", r"empty\.txt: is empty; give texts"),
        ("empty.jsonl", b"", "is empty"),
        ("table.csv", b"a,b", r"\.csv is no kind that is known; give texts \(\.txt"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2: is not valid JSON"),
        ("number.jsonl", b"17", 'line 1: must be a text, a list of token ids, or an object with'),
        ("other.json", b'{"text": "a"}', "must be a list"),
        ("mixed.json", b'["a mat", [5]]', "item 2: texts and token ids in one file"),
        ("floats.json", b"[[1.5]]", "item 1: must be"),
        ("outside.json", b"[[5], [5, 64]]", "sample 2: token id 64 is not in .* vocabulary of 64"),
        ("negative.json", b"[[-4]]", "token id -4 is not in"),
        ("long.json", json.dumps([[5] * 25]).encode(), "has 25 tokens, but .* has only 24 pos"),
        ("segments.json", b'[{"input_ids": [5], "token_type_ids": [2]}]', "must lie below 2"),
        ("strange.txt", b"O=C(N)c1ccccc1 qwerty", "of the tokens are unknown to the tokenizer"),
        ("bad.npy", b"nothing", r"is no \.npy file"),
        ("bad.safetensors", b"nothing", "cannot be read"),
        ("picture.png", b"nothing", "reads no images"),
    ],
)  # fmt: skip
def test_bad_files_are_told(
    bert: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, bert)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.int64), r"of shape \(samples, length\), not int64 of shape \(3,\)"),
        (np.full((2, 3), np.nan), "must be integers"),
        (np.zeros((0, 3), np.int64), "is empty"),
        (np.array([[5, 6], [-1, -1]]), "sample 2: holds nothing but padding"),
    ],
)
def test_bad_arrays_are_told(bert: Path, tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "ids.npy", bert)


def test_bad_images_are_told(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        read(tmp_path, vit)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"a\.png: is no image"):
        read(tmp_path, vit)
    (tmp_path / "list.txt").write_text("b.png")
    with pytest.raises(InputError, match=r"names .*b\.png, which is no file"):
        read(tmp_path / "list.txt", vit)
    (tmp_path / "texts.json").write_text('["a"]')
    with pytest.raises(InputError, match="reads images: give a folder"):
        read(tmp_path / "texts.json", vit)


def test_a_model_without_a_tokenizer_asks_for_token_ids(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a mat")
    checkpoint = open_checkpoint(bert)
    bare = Checkpoint(checkpoint.tensors, checkpoint.config)
    model = open_model(bare)
    with pytest.raises(InputError, match=r"has no tokenizer; give token ids .* \(--tokenizer DIR"):
        read_inputs(tmp_path / "texts.txt", model, owners=[bare])
    found = read_inputs(tmp_path / "texts.txt", model, owners=[bare, checkpoint])
    assert samples(found) == {0: EXPECTED[1]}
    found = read_inputs(tmp_path / "texts.txt", model, owners=[bare], tokenizer=bert)
    assert samples(found) == {0: EXPECTED[1]}


def test_limits_that_no_model_can_keep(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[[5]]")
    with pytest.raises(UsageError, match="only 24 positions"):
        read(tmp_path / "ids.json", bert, length=25)
    with pytest.raises(UsageError, match="at least one sample"):
        Limits(samples=0)


def test_rxnfp_reads_token_ids(tmp_path: Path) -> None:
    from fixtures.reactions import encode, reactions

    fetch()
    ids, _ = encode(reactions(8), RXNFP_TUNED / "vocab.txt")
    np.save(tmp_path / "ids.npy", np.array(ids))
    found = read(tmp_path / "ids.npy", RXNFP_TUNED)
    assert samples(found) == {n: [t for t in row if t] for n, row in enumerate(ids)}

"""What is published of a folder, and what never is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.card import is_unchanged
from loratool.card_choice import Wishes
from loratool.disclosure import (
    Machine,
    as_json,
    is_model_name,
    require_no_secrets,
    strings_in,
    without_paths,
)
from loratool.errors import FormatError, InputError, MismatchError, UsageError
from loratool.files import file_content
from loratool.front_matter import completed, parse_card
from loratool.opening import open_checkpoint
from loratool.publication import Publication
from loratool.publication_card import made_by
from loratool.publishing import prepare
from tests.adapters import factors, write_adapter
from tests.cli.tiny import (
    CONFIG,
    done,
    finetuned,
    llama,
    loratool,
    save_model,
    snapshot,
    unchanged,
)

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tune, the adapter between them and what they merge into."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "base", llama())
    (folder / "base" / "README.md").write_text("---\nlicense: llama3\n---\n# The base\n")
    save_model(folder / "tuned", finetuned(llama()))
    done(loratool("extract", folder / "base", folder / "tuned", "-o", folder / "adapter"))
    done(
        loratool(
            "merge", folder / "base", folder / "adapter", "--reversible", "-o", folder / "merged"
        )
    )
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def prepared(folder: Path, **wishes: Any) -> Publication:
    return prepare(folder, Wishes("anna/math", **wishes))


def text(publication: Publication, name: str) -> str:
    return file_content(publication.files[name]).decode()


def card(publication: Publication) -> dict[str, Any]:
    return dict(parse_card(text(publication, "README.md"), "README.md").metadata)


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


# Which files


def test_an_adapter_is_its_files_and_nothing_else(adapter: Path) -> None:
    for name in ("notes.txt", ".env", ".git/config", "checkpoint-5/optimizer.pt", "model/run.log"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("x")
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "LICENSE").write_text("MIT")
    with unchanged(adapter):
        found = prepared(adapter)
    assert found.kind == "adapter"
    assert [*found.files] == [
        "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "loratool.json", "model/config.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "not sent: .env, .git/, checkpoint-5/, model/run.log, notes.txt" in found.notes


def test_a_merged_model_keeps_its_shards_index_and_record(made: Path, tmp_path: Path) -> None:
    found = prepared(made / "merged", base_name="org/base")
    assert found.kind == "model"
    record = {n for n in snapshot(made / "merged") if n.startswith("loratool-record/")}
    files = {n for n in record if (made / "merged" / n).is_file()}
    assert {*found.files} == {"README.md", "config.json", "model.safetensors", *files}
    assert card(found)["base_model_relation"] == "finetune"
    assert "unmerge anna/math" in text(found, "README.md")

    save_model(tmp_path / "sharded", llama(), files=2)
    (tmp_path / "sharded" / "eval.csv").write_text("1")
    found = prepared(tmp_path / "sharded")
    assert sum(name.endswith(".safetensors") for name in found.files) == 2
    assert "model.safetensors.index.json" in found.files and "eval.csv" not in found.files


def test_an_onnx_folder_needs_its_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"\x08\x01 location\x12\x0fmodel.onnx.dataj\x00")
    with pytest.raises(InputError, match=r"model\.onnx\.data.*missing"):
        prepared(folder)
    (folder / "model.onnx.data").write_bytes(b"1234")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "_name_or_path": str(tmp_path)}))
    found = prepared(folder)
    assert found.kind == "onnx"
    assert [*found.files] == ["README.md", "config.json", "model.onnx", "model.onnx.data"]
    assert "_name_or_path" not in json.loads(text(found, "config.json"))
    assert card(found)["library_name"] == "onnx"
    change(folder / "loratool.json", files={"model.onnx.data": 5})
    with pytest.raises(FormatError, match="not the file that"):
        prepared(folder)
    (folder / "loratool.json").unlink()
    (folder / "model.onnx").write_bytes(f'File "{tmp_path}/train.py"'.encode())
    with pytest.raises(InputError, match=r"model\.onnx: names a path of this machine"):
        prepared(folder)


def test_links_must_not_leave_the_folder(adapter: Path, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere.json"
    secret.write_text("{}")
    (adapter / "model" / "generation_config.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"generation_config\.json: is, or lies behind, a link"):
        prepared(adapter)
    (adapter / "model" / "generation_config.json").unlink()
    shutil.move(adapter / "model", tmp_path / "model")
    (adapter / "model").symlink_to(tmp_path / "model")
    with pytest.raises(InputError, match="a link that leaves the folder"):
        prepared(adapter)


def test_the_cache_of_the_hub_is_made_of_links(adapter: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    place = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    shutil.copytree(adapter, place)
    shutil.move(place / "adapter_config.json", blobs / "abcd")
    (place / "adapter_config.json").symlink_to(blobs / "abcd")
    assert "adapter_config.json" in prepared(place).files


def test_pickles_are_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"old")
    assert "not sent: adapter_model.bin" in prepared(adapter).notes
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(1, 2),
                "base_model.model.x.lora_B.weight": torch.ones(2, 1)},
               adapter / "adapter_model.bin")  # fmt: skip
    with pytest.raises(InputError, match=r"adapter_model\.bin: is a pickle.*rescale"):
        prepared(adapter)
    save_model(tmp_path / "model", llama())
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(llama(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: is a pickle"):
        prepared(tmp_path / "model")


def test_settings_may_be_lists_and_must_be_json(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", llama())
    (folder / "modules.json").write_text('[{"idx": 0, "path": "1_Pooling"}]')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert {"modules.json", "1_Pooling/config.json"} <= {*prepared(folder).files}
    (folder / "modules.json").write_text("[{")
    with pytest.raises(FormatError, match=r"modules\.json: is not valid JSON"):
        prepared(folder)


def test_only_directories_with_something_in_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no directory of this machine"):
        prepared(tmp_path / "nothing")
    with pytest.raises(FormatError, match="holds no"):
        prepared(tmp_path)


# Checked first


def test_a_faulty_adapter_is_not_published(adapter: Path, made: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", llama(hidden=32))
    with pytest.raises(MismatchError, match="is not published:\n"):
        prepared(adapter, base=open_checkpoint(other))
    prepared(adapter, base=open_checkpoint(made / "base"))
    b, a = factors(0, 4, 3, 2)
    b[1, 1] = float("nan")
    broken = write_adapter(tmp_path / "broken", {"layer": (b, a)})
    with pytest.raises(MismatchError, match=r"lora_B.*holds NaN or Inf"):
        prepared(broken)


# Paths


def test_no_file_keeps_a_path(adapter: Path) -> None:
    here, home = str(adapter), str(Path.home() / "work")
    planted = {
        "adapter_config.json": {"base_model_name_or_path": f"{here}/base", "note": f"see {here}"},
        "model/config.json": {"_name_or_path": "../base", "rope": {"cache_dir": "/x"}, "keep": "a"},
        "loratool.json": {"run": {"host": f"file://{here}", "log": "~/log"}},
        "tokenizer_config.json": {"name_or_path": home, "vocab_file": "C:\\Users\\anna\\vocab"},
    }
    for name, values in planted.items():
        change(adapter / name, **values)
    found = prepared(adapter)
    machine = Machine.around(adapter)
    for name in planted:
        for place, value in strings_in(json.loads(text(found, name))):
            assert not machine.is_path(value, str(place[-1])), (name, place)
    config = json.loads(text(found, "adapter_config.json"))
    assert config["base_model_name_or_path"] is None and "note" not in config
    assert json.loads(text(found, "model/config.json"))["keep"] == "a"
    assert any("--base-name" in note for note in found.notes)
    assert "model/config.json: rope.cache_dir: left out: a path of this machine" in found.notes

    named = prepared(adapter, base_name="org/base")
    config = json.loads(text(named, "adapter_config.json"))
    assert config["base_model_name_or_path"] == card(named)["base_model"] == "org/base"


def test_files_without_paths_are_sent_as_they_are(adapter: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    found = prepared(adapter)
    sent = {name: file_content(content) for name, content in found.files.items()}
    del sent["README.md"]
    assert sent == {name: (adapter / name).read_bytes() for name in sent}
    assert not any("path" in note for note in found.notes)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"])
def test_text_with_a_path_is_refused_by_line(adapter: Path, name: str) -> None:
    (adapter / name).write_text(json.dumps({"/usr/bin": 1, "a": f"\n{adapter}/x"}, indent=0))
    with pytest.raises(InputError, match=rf"{name}:3: names a path of this machine"):
        prepared(adapter)
    (adapter / name).write_text(json.dumps({"/usr/bin": 1, "</s>": 2, "//": 3}))
    assert name in prepared(adapter).files


def test_lists_and_headers_with_paths_are_refused(adapter: Path, tmp_path: Path) -> None:
    change(adapter / "model/config.json", datasets=["a", f"{tmp_path}/data"])
    with pytest.raises(InputError, match=r"datasets\[1\]: names a path of this machine"):
        prepared(adapter)
    save_model(tmp_path / "model", llama())
    save_file(llama(), tmp_path / "model/model.safetensors", metadata={"from": str(tmp_path)})
    with pytest.raises(InputError, match="__metadata__: from: names a path"):
        prepared(tmp_path / "model")
    inner = json.dumps([{"folders": {"image_dir": str(tmp_path)}}])
    trained = {"loratool": json.dumps({"settings": {"ss_datasets": inner}}), "odd": "{not JSON"}
    save_file(llama(), tmp_path / "model/model.safetensors", metadata=trained)
    with pytest.raises(InputError, match=r"ss_datasets.*image_dir: names a path"):
        prepared(tmp_path / "model")


def test_the_record_of_a_merge_is_looked_into(made: Path, tmp_path: Path) -> None:
    found = prepared(made / "merged")
    inner = json.loads(text(found, "loratool-record/adapters/1-adapter/adapter_config.json"))
    assert inner["base_model_name_or_path"] is None
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    change(base / "config.json", _name_or_path=str(base))
    done(loratool("merge", base, made / "adapter", "--reversible", "-o", tmp_path / "merged"))
    change(tmp_path / "merged/config.json", _name_or_path="org/base")
    with pytest.raises(InputError, match=r"config\.json of the base.*merge again"):
        prepared(tmp_path / "merged")


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert is_model_name("org/name") and is_model_name("gpt2")
    for path in ("runs/a", "runs", "./x", "../x", "/x", "a/b/c", "~/x", "C:\\x", ""):
        assert not is_model_name(path), path
    machine = Machine(("/work/anna",))
    for value in ("/data/x", "~/x", "file:///x", "D:/x", "see /work/anna/x", "(/home/bob/x)"):
        assert machine.is_path(value), value
    for value in ("/", "</s>", "/think", "https://a.b/home/bob", "a/b/c", "x/work/anna/y",
                  "see /work/annabel", "and/or", "//", "\\n", "{% if /a/b %}"):  # fmt: skip
        assert not machine.is_path(value), value
    assert machine.is_path("/think", key="cache_dir")


_NAMES = st.text("abcdefgh_-.", min_size=1, max_size=6).filter(lambda t: t.strip("."))
_PATHS = st.builds(
    lambda start, parts: start + "/".join(parts),
    st.sampled_from(["/", "~/", "file:///", "/home/", "C:\\", str(Path.home()) + "/"]),
    st.lists(_NAMES, min_size=2, max_size=4),
)
_PLAIN = st.one_of(st.none(), st.integers(), st.sampled_from(["gelu", "org/name", "</s>", ""]))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(
        _NAMES,
        st.recursive(
            st.one_of(_PLAIN, _PATHS),
            lambda inner: st.dictionaries(_NAMES, inner, max_size=3),
            max_leaves=8,
        ),
        max_size=6,
    )
)
def test_law_cleaned_data_holds_no_path_and_all_else(content: dict[str, Any]) -> None:
    machine = Machine.around(Path("/work/somewhere"))
    clean, gone = without_paths(content, machine)
    assert all(not machine.is_path(value, str(place[-1])) for place, value in strings_in(clean))
    assert without_paths(clean, machine) == (clean, [])
    for place, value in gone:  # what was left out is what was there, put back: the original
        inner = clean
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = value
    assert clean == content and json.loads(as_json(clean)) == content


_FILES = (
    "adapter_config.json", "model/config.json", "model/tokenizer_config.json", "tokenizer.json",
    "loratool.json", "chat_template.jinja", "README.md", "model/merges.txt",
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(_FILES),
    st.sampled_from(["base_model_name_or_path", "_name_or_path", "x", "dir"]),
    st.sampled_from(["", "see ", "a:", "("]),
    st.lists(_NAMES, min_size=1, max_size=3),
    st.booleans(),
)
def test_law_nothing_of_this_machine_is_prepared(
    made: Path, tmp_path: Path, name: str, key: str, before: str, parts: list[str], listed: bool
) -> None:
    folder = tmp_path / "planted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made / "adapter", folder)
    secret = "/".join((str(tmp_path), *parts))
    value = [before + secret] if listed else before + secret
    if name.endswith(".json"):
        change(folder / name, **{key: value})
    else:
        (folder / name).write_text(f"# Title\n\n{before}{secret}\n")
    try:
        found = prepared(folder)
    except InputError as error:
        assert name in str(error)
        return
    assert name not in found.files or str(tmp_path) not in text(found, name)
    everything = b"".join(file_content(content) for content in found.files.values())
    assert str(tmp_path).encode() not in everything


# Tokens


def test_no_token_is_sent(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("README.md", "tokenizer.json", "loratool.json"):
        before = (adapter / name).read_bytes() if (adapter / name).exists() else None
        (adapter / name).write_text(json.dumps({"a": 1, "key": TOKEN}, indent=0))
        with pytest.raises(InputError, match=rf"{name}:3: holds an access token") as caught:
            prepared(adapter)
        assert TOKEN not in str(caught.value)
        (adapter / name).unlink()
        if before is not None:
            (adapter / name).write_bytes(before)
    (adapter / "merges.txt").write_text("my secret")
    prepared(adapter)
    monkeypatch.setenv("HF_TOKEN", "my secret")
    with pytest.raises(InputError, match=r"merges\.txt:1: holds an access token"):
        prepared(adapter)


def test_placeholders_are_no_tokens() -> None:
    for harmless in (b"hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", b"HF_TOKEN=hf_...", b"hf_transfer"):
        require_no_secrets("x", harmless, [])


# The card


def test_a_new_card_says_what_the_hub_wants_to_know(adapter: Path, made: Path) -> None:
    found = prepared(adapter, base=open_checkpoint(made / "base"), base_name="org/base")
    assert card(found) == {
        "license": "llama3", "library_name": "peft", "base_model": "org/base",
        "base_model_relation": "adapter", "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "loratool"],
    }  # fmt: skip
    body = text(found, "README.md")
    assert is_unchanged(body)
    assert "| self_attn.q_proj | 2 | 2 | 99.99% | 99.99% |" in body
    assert "loratool extract org/base FINETUNED --rank 16\n" in body
    assert 'PeftModel.from_pretrained(base, "anna/math")' in body
    assert "vLLM does not serve this adapter" in body  # it replaces a norm
    assert "loratool merge org/base anna/math" in body
    assert not any(note.startswith("no license") for note in found.notes)
    assert card(prepared(adapter, license="mit"))["license"] == "mit"
    without = prepared(adapter)
    assert "license" not in card(without) and "base_model" not in card(without)
    assert any(note.startswith("no license is stated") for note in without.notes)


def test_the_card_of_a_stranger_s_adapter(tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.self_attn.q_proj": factors(n, 8, 8, 24) for n in range(2)}
    folder = write_adapter(
        tmp_path / "x", modules, task_type="CAUSAL_LM", base_model_name_or_path="org/base"
    )
    body = text(prepared(folder), "README.md")
    assert "| self_attn.q_proj | 2 | 24 |\n" in body and "energy" not in body
    assert "Made by" not in body
    assert "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules math=anna/math" in (
        body
    )
    assert "AutoModelForCausalLM.from_pretrained" in body
    change(folder / "adapter_config.json", alpha_pattern={"model.layers.0.self_attn.q_proj": 3})
    assert "rescale --normalize" in text(prepared(folder), "README.md")


def test_the_command_that_made_it_has_placeholders() -> None:
    extract = {"finetuned": {}, "options": {"rank": 4, "energy": None, "factorizer": "krylov",
                                            "seed": 3, "lora_only": True}}  # fmt: skip
    assert made_by(extract, "") == ("loratool extract BASE FINETUNED --rank 4 --seed 3 --lora-only")
    stack = {"parts": [{"name": "/a/b", "weight": 0.5}, {"name": "c", "weight": 1.0}],
             "options": {"combiner": "ties:density=0.5", "weights": ["*.q_proj*=2"]}}  # fmt: skip
    assert made_by(stack, "") == (
        "loratool stack ADAPTER1=0.5 ADAPTER2=1 --combiner ties:density=0.5 --weights *.q_proj*=2"
    )
    assert made_by({"rescaled": {}, "options": {"budget": "20MiB", "normalize": True}}, "") == (
        "loratool rescale ADAPTER --budget 20MiB --normalize"
    )
    assert made_by({}, "") == ""


def test_what_the_user_wrote_stays(adapter: Path) -> None:
    own = "---\n# mine\nlicense:   mit   # yes\ntags: [a, b]\n---\n\n# My adapter\n\nBest one.  \n"
    (adapter / "README.md").write_text(own)
    found = prepared(adapter, base_name="org/base")
    kept = text(found, "README.md")
    start, rest = own.index("---\n\n#"), own[own.index("---\n\n#") :]
    assert kept.startswith(own[:start]) and kept.endswith(rest)
    assert card(found) == {
        "license": "mit", "tags": ["a", "b"], "library_name": "peft", "base_model": "org/base",
        "base_model_relation": "adapter", "pipeline_tag": "text-generation",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"README\.md: says the license is 'mit'"):
        prepared(adapter, license="apache-2.0")


def test_a_changed_card_of_ours_is_the_user_s(adapter: Path) -> None:
    ours = (adapter / "README.md").read_text()
    assert is_unchanged(ours)
    (adapter / "README.md").write_text(ours.replace("# LoRA adapter", "# Sums and products"))
    assert "# Sums and products" in text(prepared(adapter), "README.md")


def test_a_card_without_metadata_gets_some(adapter: Path) -> None:
    (adapter / "README.md").write_text("# Mine\n\n---\n\nend\n")
    found = text(prepared(adapter), "README.md")
    assert found.startswith("---\nlibrary_name: peft\n")
    assert found.endswith("---\n\n# Mine\n\n---\n\nend\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\na: [1\nb: 2\n---\n", r"README\.md:3: the metadata is not valid YAML"),
        ("\n---\nlicense: mit\n\n# Text\n", r"README\.md:2: the metadata that begins here"),
        ("---\n- a\n- b\n---\n", r"README\.md:2: the metadata must be lines"),
        ("---\n{license: mit}\n---\n", r"README\.md: write its metadata as lines"),
        ("---\nlicense: mit\n---\n\nsee HERE/data\n", r"README\.md:5: names a path"),
    ],
)
def test_a_card_that_cannot_be_completed(adapter: Path, content: str, message: str) -> None:
    (adapter / "README.md").write_text(content.replace("HERE", str(adapter)))
    with pytest.raises(InputError, match=message):
        prepared(adapter)


def test_peft_s_own_card_names_paths(adapter: Path) -> None:
    (adapter / "README.md").write_text(
        f"---\nbase_model: {adapter}/base\nlibrary_name: peft\ntags:\n"
        f"- base_model:adapter:{adapter}/base\n- lora\n---\n\n# Model Card for Model ID\n"
    )
    found = prepared(adapter)
    assert str(adapter) not in text(found, "README.md")
    assert card(found)["tags"] == ["lora"] and "base_model" not in card(found)
    assert "README.md: 2 lines of its metadata left out: a path of this machine" in found.notes
    named = card(prepared(adapter, base_name="org/base"))
    assert named["base_model"] == "org/base"
    assert named["tags"] == ["base_model:adapter:org/base", "lora"]


def test_a_merged_model_does_not_go_under_its_base_s_card(made: Path) -> None:
    assert (made / "merged" / "README.md").read_text().endswith("# The base\n")
    found = prepared(made / "merged")
    assert "# The base" not in text(found, "README.md")
    assert card(found)["license"] == "llama3"


def test_wishes_are_checked() -> None:
    with pytest.raises(UsageError, match="--base-name"):
        Wishes("a/b", base_name="/models/base")
    with pytest.raises(UsageError, match="--license"):
        Wishes("a/b", license="do what you want")


_KEYS = st.text("abcdefgh_", min_size=1, max_size=8)
_WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=8)
_VALUES = st.one_of(st.integers(), st.booleans(), _WORDS, st.lists(_WORDS, max_size=3))


@settings(deadline=None)
@given(
    st.dictionaries(_KEYS, _VALUES, max_size=4),
    st.dictionaries(_KEYS, _VALUES, min_size=1, max_size=4),
    st.text("# ab\n-", max_size=20),
    st.booleans(),
)
def test_law_completing_keeps_every_character(
    known: dict[str, Any], added: dict[str, Any], body: str, crlf: bool
) -> None:
    block = yaml.safe_dump(known, sort_keys=False) if known else ""
    original = f"---\n{block}---\n{body}"
    if crlf:
        original = original.replace("\n", "\r\n")
    before = parse_card(original, "x")
    after = completed(before, added, "x")
    assert parse_card(after, "x").metadata == {**added, **before.metadata}
    new = len(after) - len(original)
    at = len(before.start + before.block)
    assert after[:at] + after[at + new :] == original
    assert completed(parse_card(after, "x"), added, "x") == after
    assert not re.search(r"(?<!\r)\n", after) if crlf and "\n" not in str(added) else True

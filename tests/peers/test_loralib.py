"""What loralib's own modules merge into their weights is what loratool merges from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import InputError, MismatchError
from loratool.opening import open_adapter, open_checkpoint
from tests.adapter_forms import convert, merged, save_base


class Net(torch.nn.Module):
    """One module of each kind, with random factors."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, module in modules.items():
            self.add_module(name, module)
        for name, parameter in self.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 1.0)


def linear_net(alpha: int) -> Net:
    return Net(
        lin=loralib.Linear(6, 5, r=3, lora_alpha=alpha),
        turned=loralib.Linear(6, 5, r=2, lora_alpha=alpha, fan_in_fan_out=True),
        table=loralib.Embedding(11, 4, r=2, lora_alpha=alpha),
        embed_tokens=loralib.Embedding(7, 7, r=2, lora_alpha=alpha),
        plain=torch.nn.Linear(3, 3),
    )


def base_of(net: Net, folder: Path) -> Path:
    """The frozen weights under the names that they have without loralib."""
    net.train()
    state = net.state_dict()
    tensors = {n.replace(".conv.", "."): v for n, v in state.items() if "lora_" not in n}
    return save_base(folder, tensors)


def wanted_of(net: Net) -> dict[str, torch.Tensor]:
    """The weights as loralib merges them."""
    net.eval()
    state = net.state_dict()
    return {n.replace(".conv.", "."): v for n, v in state.items() if "lora_" not in n}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=2e-6, rtol=1e-6, msg=name)


def save(net: Net, file: Path, bias: str = "none") -> Path:
    state = loralib.lora_state_dict(net, bias)
    if file.suffix == ".safetensors":
        save_file({n: v.clone() for n, v in state.items()}, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", ["adapter.pt", "mine.bin", "mine.safetensors"])
def test_linear_and_embedding_merge_as_loralib_merges(name: str, tmp_path: Path) -> None:
    net = linear_net(alpha=1)
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / name)
    adapter = open_adapter(file)
    assert adapter.path == file
    assert adapter.files == {name: file}
    assert "taken as its default 1" in adapter.notes[0]
    compare(merged(base, file, tmp_path / "merged"), wanted_of(net))


def test_alpha_is_told_and_comes_along(tmp_path: Path) -> None:
    net = linear_net(alpha=12)
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / "adapter.pt")
    told = convert(file, "loralib", tmp_path / "told", alpha=12.0)
    assert open_adapter(told).notes == ()
    compare(merged(base, told, tmp_path / "merged"), wanted_of(net))
    # loralib itself, told nothing, computes the same from what was written.
    plain = linear_net(alpha=1)
    plain.load_state_dict(net.train().state_dict())
    state = torch.load(told / "lora.pt", weights_only=True)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lora_" not in name for name in missing)
    compare(wanted_of(plain), wanted_of(net))
    with pytest.raises(InputError, match="leave that out"):
        convert(told, "peft", tmp_path / "again", alpha=3.0)


@pytest.mark.parametrize("slots", [(1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, 0)])
@pytest.mark.parametrize("turned", [True, False])
def test_fused_weights_merge_as_loralib_merges(
    slots: tuple[int, ...], turned: bool, tmp_path: Path
) -> None:
    enabled = [bool(slot) for slot in slots]
    module = loralib.MergedLinear(
        8, 12, r=2, lora_alpha=4, enable_lora=enabled, fan_in_fan_out=turned
    )
    net = Net(c_attn=module)
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / "adapter.pt")
    text = ",".join(map(str, slots))
    told: dict[str, Any] = {"alpha": 4.0, "enable_lora": text, "fan_in_fan_out": turned}
    for form in ("peft", "loralib"):
        path = convert(file, form, tmp_path / form, **told)
        compare(merged(base, path, tmp_path / f"merged-{form}"), wanted_of(net))


def test_which_slots_are_updated_has_to_be_told(tmp_path: Path) -> None:
    options = {"r": 2, "enable_lora": [True, False, True], "fan_in_fan_out": True}
    net = Net(c_attn=loralib.MergedLinear(8, 12, **options))
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / "adapter.pt")
    (problem,) = open_adapter(file).problems
    assert "updates 2 slots" in problem.message
    assert "--enable-lora" in problem.message
    with pytest.raises(MismatchError, match="c_attn: updates 2 slots"):
        merged(base, file, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(MismatchError, match="does not fit"):
        convert(file, "peft", tmp_path / "x", enable_lora="1,1,1")


def test_all_slots_enabled_is_seen_from_the_base(tmp_path: Path) -> None:
    net = Net(c_attn=loralib.MergedLinear(8, 12, r=2, enable_lora=[True] * 3))
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / "adapter.pt")
    compare(merged(base, file, tmp_path / "merged"), wanted_of(net))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_convolutions_merge_as_loralib_merges(groups: int, tmp_path: Path) -> None:
    net = Net(
        conv=loralib.Conv2d(6, 12, kernel_size=3, r=2, groups=groups),
        small=loralib.Conv2d(4, 6, kernel_size=1, r=2),
        line=loralib.Conv1d(4, 6, kernel_size=1, r=2),
    )
    base = base_of(net, tmp_path / "base")
    file = save(net, tmp_path / "adapter.pt")
    compare(merged(base, file, tmp_path / "merged"), wanted_of(net))


def test_trained_biases_and_heads_replace_the_bases(tmp_path: Path) -> None:
    net = Net(
        lin=loralib.Linear(6, 5, r=3),
        conv=loralib.Conv2d(2, 4, kernel_size=3, r=2),
        classifier=torch.nn.Linear(5, 2),
    )
    base = base_of(net, tmp_path / "base")
    torch.nn.init.normal_(net.lin.bias)
    torch.nn.init.normal_(net.conv.conv.bias)
    torch.nn.init.normal_(net.classifier.weight)
    state = loralib.lora_state_dict(net, "all")
    state["classifier.weight"] = net.classifier.weight.detach()
    torch.save(state, tmp_path / "adapter.pt")
    compare(merged(base, tmp_path / "adapter.pt", tmp_path / "merged"), wanted_of(net))


def test_a_whole_state_dict_is_merged_once(tmp_path: Path) -> None:
    net = linear_net(alpha=1)
    base = base_of(net, tmp_path / "base")
    torch.save(net.train().state_dict(), tmp_path / "train.pt")
    torch.save(net.eval().state_dict(), tmp_path / "eval.pt")
    (problem,) = open_adapter(tmp_path / "train.pt").problems
    assert problem.severity == "warning"
    assert "eval()" in problem.message
    compare(merged(base, tmp_path / "train.pt", tmp_path / "merged"), wanted_of(net))
    with pytest.raises(InputError, match="the adapter's copy of the layer"):
        merged(base, tmp_path / "eval.pt", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_convolution_needs_its_base(tmp_path: Path) -> None:
    net = Net(conv=loralib.Conv2d(6, 12, kernel_size=3, r=2))
    base = open_checkpoint(base_of(net, tmp_path / "base"))
    file = save(net, tmp_path / "adapter.pt")
    path = convert(file, "peft", tmp_path / "peft", base=base)
    assert open_adapter(path).keys() == {"conv.weight"}

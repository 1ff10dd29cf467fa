"""Folders of networks: what is saved comes back, and what is spoiled is named."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from networks import arguments, network
from torch import Tensor, nn

from fastdiff.files import save_tensors, sha256
from fastdiff.nn import UNet, embedded_models, load_config, pretrained

DIFFUSION = {"schedule": {"kind": "cosine", "steps": 10}, "prediction": "v", "shape": [2, 4, 4]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network().save_pretrained(tmp_path / "model", DIFFUSION, {"seed": 7})
    return tmp_path / "model"


def save_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Exchange the weights for others that the configuration vouches for."""
    save_tensors(folder / "model.safetensors", state)
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_saved_network_comes_back_bit_for_bit(folder):
    model, loaded = network(), UNet.from_pretrained(folder)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in loaded.state_dict().items())
    assert torch.equal(loaded(*arguments(model)), model(*arguments(model)))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_load_config_gives_what_was_saved(folder):
    config = load_config(str(folder))
    assert config["format"] == 1
    assert config["model"] == network().config
    assert (config["diffusion"], config["about"]) == (DIFFUSION, {"seed": 7})
    assert config["sha256"] == sha256(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_smaller_file_holds_the_rounded_weights(tmp_path, dtype):
    model = network()
    model.save_pretrained(tmp_path, dtype=dtype)
    loaded = UNet.from_pretrained(tmp_path)
    weight = model.stem.weight
    assert loaded.stem.weight.dtype == torch.float32
    assert torch.equal(loaded.stem.weight, weight.to(dtype).float())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(size - model.num_parameters * dtype.itemsize) < 20_000  # the header: names and shapes


def test_weights_too_large_for_a_dtype_are_refused(folder):
    model = network()
    nn.init.constant_(model.norm.weight, 1e5)
    with pytest.raises(ValueError, match=r"`dtype` torch.float16 .*`norm.weight`"):
        model.save_pretrained(folder, dtype=torch.float16)
    assert torch.equal(UNet.from_pretrained(folder).norm.weight, network().norm.weight)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"diffusion": {"shape": torch.zeros(1)}}, "JSON"),
        ({"about": {"loss": math.nan}}, "JSON"),
        ({"dtype": torch.float64}, "`dtype` must be"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, changes, match):
    with pytest.raises((TypeError, ValueError), match=match):
        network().save_pretrained(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("survivors", [0, 1])
def test_a_save_that_dies_between_its_files_leaves_a_whole_or_a_named_pair(folder, monkeypatch, survivors):
    old, new = network(), network()
    nn.init.constant_(new.norm.weight, 2.0)
    replace, done = os.replace, []

    def die(source, target):
        if len(done) == survivors:
            raise OSError("killed")
        replace(source, target)
        done.append(target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="killed"):
        new.save_pretrained(folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    if survivors == 0:
        assert torch.equal(UNet.from_pretrained(folder).norm.weight, old.norm.weight)
    else:
        with pytest.raises(
            ValueError, match=r"`model\.safetensors`.*SHA-256.*interrupted.*save the model again"
        ):
            UNet.from_pretrained(folder)
    new.save_pretrained(folder)
    assert torch.equal(UNet.from_pretrained(folder).norm.weight, new.norm.weight)


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def missing_key(folder: Path) -> None:
    state = network().state_dict()
    del state["stem.bias"]
    save_state(folder, state)


def pickled(folder: Path) -> None:
    torch.save(network().state_dict(), folder / "model.safetensors")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (truncate, r"model\.safetensors.*truncated"),
        (flip_a_bit, r"`model\.safetensors`.*SHA-256"),
        (pickled, r"model\.safetensors.*pickle.*weights_only=True"),
        (only_a_pickle, r"`model\.safetensors` must lie in .*pytorch_model\.bin.*weights_only=True"),
        (missing_key, r"1 missing \(stem\.bias\)"),
        (lambda f: save_state(f, network().state_dict() | {"foo": torch.zeros(1)}), r"1 extra \(foo\)"),
        (
            lambda f: save_state(f, network(3).state_dict()),
            r"wrong shape \(stem\.weight \[8, 3, 3, 3\] in place",
        ),
        (lambda f: (f / "config.json").unlink(), r"`config\.json` must lie in"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
        (lambda f: (f / "config.json").write_text("[]"), r"`format` .*must be 1, got None"),
        (lambda f: edit_config(f, format=2), r"`format` .*must be 1, got 2.*newer"),
        (lambda f: edit_config(f, sha256=None), r"`sha256` .*must be a str"),
        (lambda f: edit_config(f, model={"in_channels": 2, "foo": 1}), r"`model` .*foo"),
        (lambda f: edit_config(f, model={"in_channels": 0}), r"`model` .*`in_channels`"),
    ],
)
def test_a_spoiled_folder_is_named(folder, spoil, match):
    spoil(folder)
    with pytest.raises(ValueError, match=match):
        UNet.from_pretrained(folder)


def test_a_pickle_is_no_model(tmp_path):
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt.*pickles are not read.*weights_only=True"):
        UNet.from_pretrained(tmp_path / "model.pt")


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"folder.*model\.safetensors.*name its folder"):
        UNet.from_pretrained(folder / "model.safetensors")
    with pytest.raises(ValueError, match="`path` must be a folder"):
        network().save_pretrained(folder / "model.safetensors")


def test_embedded_models_are_found_by_name_and_near_names_are_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_embedded_folder", lambda: tmp_path)
    (tmp_path / "no model").mkdir()
    assert embedded_models() == ["model"]
    assert torch.equal(UNet.from_pretrained("model").stem.weight, UNet.from_pretrained(folder).stem.weight)
    with pytest.raises(ValueError, match=r"'modle'.*did you mean 'model'\?"):
        UNet.from_pretrained("modle")


def test_every_embedded_model_loads():
    for name in embedded_models():
        assert UNet.from_pretrained(name).num_parameters > 0

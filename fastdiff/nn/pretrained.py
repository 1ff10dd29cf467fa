"""Folders that hold a network: `model.safetensors` beside `config.json`.

    config.json = {"format": 1, "model": the constructor's arguments, "sha256": of model.safetensors,
                   "diffusion": what a sampler needs or null, "about": where it comes from or null}

The models of the package itself lie in `fastdiff/models/<name>/` and are known by that name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.clip import clip_to_config
from fastdiff.files import atomic_path, load_tensors, read_json, sha256, to_json, write_tensors

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_Network = TypeVar("_Network", bound=nn.Module)


def embedded_models() -> list[str]:
    """The names of the models that the package holds."""
    return sorted(config.parent.name for config in _embedded_folder().glob(f"*/{CONFIG}"))


def load_config(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of an embedded model or of a folder: see the head of this file.

    Raises:
        ValueError: an unknown name or no such folder (with the nearest names); a configuration that is
            missing, no JSON, incomplete, or of a newer format.
    """
    return _read_config(_folder(name_or_path))


def save_pretrained(
    model: nn.Module,
    arguments: Mapping[str, Any],
    path: str | os.PathLike[str],
    diffusion: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
) -> None:
    """Write a network's folder; `UNet.save_pretrained` says what, how, and which errors."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`path` must be a folder, got {os.fspath(path)!r}, which is a file; name another")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be None or one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    config = {
        "format": FORMAT,
        "model": dict(arguments),
        "diffusion": diffusion and {key: clip_to_config(value) for key, value in diffusion.items()},
        "about": about,
        "sha256": "",
    }
    to_json(config)
    state = {name: _cast(name, tensor, dtype) for name, tensor in model.state_dict().items()}
    # Both files are complete before either is in place: only a kill between two renames mixes the pair.
    with atomic_path(folder / CONFIG) as config_file, atomic_path(folder / WEIGHTS) as weights_file:
        write_tensors(weights_file, state, {"format": "pt"})
        config["sha256"] = sha256(weights_file)
        config_file.write_text(to_json(config), encoding="utf-8")


def load_pretrained(cls: type[_Network], name_or_path: str | os.PathLike[str]) -> _Network:
    """The network of a folder, float32, in eval mode; `UNet.from_pretrained` says which errors."""
    folder = _folder(name_or_path)
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        found = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in _PICKLES]
        raise ValueError(f"`{WEIGHTS}` must lie in {str(folder)!r}, and does not{_about_pickles(found)}")
    tensors, _ = load_tensors(weights)
    if sha256(weights) != config["sha256"]:
        raise ValueError(
            f"`{WEIGHTS}` in {str(folder)!r} is not the file that {CONFIG} describes (its SHA-256 "
            "differs): a save was interrupted or a file was changed; save the model again or restore the pair"
        )
    try:
        model = cls(**config["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`model` in {str(folder / CONFIG)!r} must be arguments of {cls.__name__}: {error}; restore it, "
            "or read it with the version of fastdiff that wrote it"
        ) from None
    _check_tensors(tensors, model.state_dict(), weights)
    model.load_state_dict(tensors)
    return model.eval()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.detach().to(dtype)
    if not torch.equal(cast.isfinite(), tensor.isfinite()):
        limit = torch.finfo(dtype).max
        raise ValueError(
            f"`dtype` {dtype} holds numbers up to {limit:g}, `{name}` has larger; use torch.float32"
        )
    return cast


def _embedded_folder() -> Path:
    return Path(str(resources.files("fastdiff") / "models"))


def _folder(name_or_path: str | os.PathLike[str]) -> Path:
    names = embedded_models()
    if isinstance(name_or_path, str) and name_or_path in names:
        return _embedded_folder() / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    contract = "`name_or_path` must be an embedded model or a folder that save_pretrained wrote"
    if folder.is_file():
        hint = _about_pickles([folder.name] if folder.suffix in _PICKLES else [])
        raise ValueError(f"{contract}, got the file {str(folder)!r}{hint or '; name its folder'}")
    near = get_close_matches(folder.name, names, n=3, cutoff=0.5) or names
    known = f"did you mean {' or '.join(map(repr, near))}?" if near else "this package embeds no model"
    raise ValueError(f"{contract}, got {os.fspath(name_or_path)!r}, and there is none; {known}")


def _about_pickles(found: list[str]) -> str:
    if not found:
        return ""
    return (
        f" ({', '.join(found)}: pickles are not read, they could run any code); build the network, "
        "call load_state_dict(torch.load(file, weights_only=True)) and save_pretrained"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        found = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in _PICKLES]
        raise ValueError(f"`{CONFIG}` must lie in {str(folder)!r}, and does not{_about_pickles(found)}")
    config = read_json(path)
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"`format` in {str(path)!r} must be {FORMAT}, got {version!r}; it was written by another program "
            "or a newer fastdiff"
        )
    for key, kind in (("model", dict), ("sha256", str)):
        if not isinstance(config.get(key), kind):
            raise ValueError(
                f"`{key}` in {str(path)!r} must be a {kind.__name__}, got {config.get(key)!r}; save again"
            )
    return {"diffusion": None, "about": None} | config


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    def listed(kind: str, names: list[str]) -> str:
        return f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"

    shapes = [
        f"{name} {list(tensors[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "extra": [name for name in tensors if name not in expected],
        "of a wrong shape": shapes,
    }
    faults = [listed(kind, names) for kind, names in problems.items() if names]
    if faults:
        raise ValueError(
            f"the tensors of {str(path)!r} must be those of the network that {CONFIG} describes, got "
            f"{' and '.join(faults)}; the two files do not belong together"
        )

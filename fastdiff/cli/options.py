"""What several commands read from their options: classes, devices, numbers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)


def labels(chosen: str | None, num: int, num_classes: int) -> Any:
    """[num] classes: the chosen ones, or all, in equal runs; None for a network without classes."""
    import torch

    if not num_classes:
        if chosen is not None:
            raise ValueError(
                f"`--class` is for networks with classes, this one has none, got {chosen!r}; leave it out"
            )
        return None
    try:
        classes = list(range(num_classes)) if chosen is None else [int(part) for part in chosen.split(",")]
    except ValueError:
        raise ValueError(f"`--class` must be numbers such as 7 or 3,7, got {chosen!r}") from None
    if outside := [c for c in classes if not 0 <= c < num_classes]:
        raise ValueError(f"`--class` must be in 0..{num_classes - 1}, got {outside[0]}")
    return torch.tensor([classes[i * len(classes) // num] for i in range(num)])


def device(chosen: str | None) -> Any:
    """The chosen device, or a GPU if there is one, else the CPU; each of torchrun's processes its own GPU.

    Raises:
        ValueError: it does not exist here.
    """
    import torch

    if chosen is None:
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and "LOCAL_RANK" in os.environ:
        chosen = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's processes share the machine's GPUs out
    try:
        return torch.zeros(1, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there = ", ".join(["cpu", *gpus, *["mps"] * torch.backends.mps.is_available()])
        raise ValueError(f"`--device` must be one of {there} here, got {chosen!r}") from error


def numbers(option: str, text: str, kind: Callable[[str], _Number] = int) -> list[_Number]:  # type: ignore[assignment]
    """`1,2` -> [1, 2]; of `kind`, int or float."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"`{option}` must be numbers such as 1,2, got {text!r}") from None


def network(text: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The network that `--model` names, and the settings that were saved with it, {} where there are none.

    Args:
        text: an embedded model, a folder that `save_pretrained` wrote, or Python: `file.py:name` or
            `module:name`, which is imported. The name is a network, a function (x, t, **cond), or a class or
            function that builds one from no arguments.

    Raises:
        ValueError: there is no such model, file or name.
        TypeError: what it names is no network and builds none.
    """
    from fastdiff.nn import UNet, load_config

    where, colon, name = text.rpartition(":")
    if not (colon and name.isidentifier() and (where.endswith(".py") or _is_dotted(where))):
        return UNet.from_pretrained(text), dict(load_config(text).get("diffusion") or {})
    found = getattr(_module(where), name, None)
    if found is None:
        raise ValueError(f"`--model` must name what {where} has, got {name!r}; check the spelling")
    if isinstance(found, type) or not _takes_arguments(found):
        found = found()
    if not callable(found):
        raise TypeError(f"`--model` must name a network or build one, got {type(found).__name__} by {name}")
    return found, {}


def example(
    model: Any, shape: str | None, settings: dict[str, Any], batch: int, cond: Sequence[str]
) -> tuple[Any, Any, dict[str, Any]]:
    """What a network is called with: x and t of zeros, and its conditioning, each [batch, ...].

    Args:
        model: the network, whose dtype x has.
        shape: of one sample, as `3,32,32`; None: the one that was saved with it.
        settings: those saved with it.
        batch: how many samples.
        cond: `name=shape`, as `encoder_hidden_states=77,768`; `name=shape:long` are whole numbers. An
            `fd.UNet` with classes gets labels by itself.
    """
    import torch

    sizes = numbers("--shape", shape) if shape else list(settings.get("shape") or [])
    if not sizes or min(sizes) < 1:
        got = repr(shape) if shape else "none, and none was saved with the model"
        raise ValueError(f"`--shape` must be one sample's, such as 3,32,32, got {got}")
    first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    dtype = torch.float32 if first is None else first.dtype
    given: dict[str, Any] = {}
    if getattr(model, "num_classes", 0) and not cond and hasattr(model, "forward_embedded"):
        given["labels"] = torch.zeros(batch, dtype=torch.int64)
    for text in cond:
        name, equals, rest = text.partition("=")
        rest, _, kind = rest.partition(":")
        if not (name.isidentifier() and equals and kind in ("", "long")):
            raise ValueError(f"`--cond` must be name=shape or name=shape:long, got {text!r}")
        of = torch.int64 if kind else dtype
        given[name] = torch.zeros(batch, *numbers("--cond", rest), dtype=of)
    return torch.zeros(batch, *sizes, dtype=dtype), torch.zeros(batch, dtype=torch.int64), given


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _module(where: str) -> Any:
    """A module by its file or its name, which may lie in the working directory."""
    if not where.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(where)
    path = Path(where).expanduser()
    if not path.is_file():
        raise ValueError(f"`--model` must name a file that exists, got {where!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses and the like look for it
    sys.path.insert(0, str(path.parent))  # its neighbours, as `python file.py` would find them
    spec.loader.exec_module(module)
    return module


def _takes_arguments(found: Any) -> bool:
    """Whether a callable needs arguments: then it is a network, else it builds one."""
    import inspect

    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
    )

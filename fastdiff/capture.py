"""Whether a network can be captured in a CUDA graph, found without a GPU.

The network runs on fake tensors that say they lie on a CUDA device (_fake.py): shapes and devices are
computed, values are not. Two modes of torch see every call and hold it against _capture_rules.py.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff import _capture_rules as rules
from fastdiff._capture_rules import Rule
from fastdiff._fake import CUDA, FakeCopy, fake_arguments, is_fake, is_on

CAVEAT = "A pass is necessary, not sufficient: only a capture on a GPU decides."
_META = torch.device("meta")
_NOT_LINKED = "not linked with support for cuda"
_ABOUT_DEVICES = re.compile(r"cuda|not linked|\bdevice\b|accelerator", re.IGNORECASE)
# frames in these folders are not the user's: torch's own, Python's, and this file
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = str(Path(linecache.__file__).parent)
_WAITS = {
    torch.cuda.synchronize.__code__: "torch.cuda.synchronize",
    torch.cuda.Stream.synchronize.__code__: "torch.cuda.Stream.synchronize",
    torch.cuda.Event.synchronize.__code__: "torch.cuda.Event.synchronize",
}
_CAST_TO_TEXT = (torch.Tensor.__repr__, torch.Tensor.__format__)
_TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)
_INDEXING = (torch._C.TensorBase.__getitem__, torch._C.TensorBase.__setitem__)


@dataclass(frozen=True)
class Finding:
    """One operation that a capture does not allow.

    Attributes:
        operation: as torch names it, e.g. "torch.Tensor.item".
        file, line: where the user's code, not torch's, calls it.
        source: that line.
        module: the path of the innermost module that was running, "" for the network itself.
        why: what is wrong with it.
        remedy: what usually helps.
        times: how often this line does it in one call of the network.
    """

    operation: str
    file: str
    line: int
    source: str
    module: str
    why: str
    remedy: str
    times: int = 1

    def __str__(self) -> str:
        where = f" in module {self.module!r}" if self.module else ""
        often = f" ({self.times} times)" if self.times > 1 else ""
        return (
            f"{self.file}:{self.line}{where}{often}\n    {self.source}\n"
            f"  {self.operation}: {self.why}\n  remedy: {self.remedy}"
        )


@dataclass(frozen=True)
class CaptureReport:
    """What `explain_capture` found; true as a condition where that is nothing.

    Attributes:
        model: the network's name.
        findings: in the order in which they were met.
        complete: whether the whole call was examined; a value that the host needs ends it.
        operations: operators that were examined.
    """

    model: str
    findings: tuple[Finding, ...]
    complete: bool
    operations: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.model}: nothing found in {self.operations} operations. {CAVEAT}"
        count = f"{len(self.findings)} operation{'s' * (len(self.findings) > 1)}"
        lines = [f"{self.model} cannot be captured in a CUDA graph: {count}", *map(str, self.findings)]
        if not self.complete:
            lines.append("What follows needs a value that only a device has, and was not examined.")
        return "\n\n".join(lines)


def explain_capture(model: Callable[..., Any], example: tuple[Any, ...]) -> CaptureReport:
    """Whether `model(*example)` can be captured in a CUDA graph, and if not, which lines forbid it.

    Nothing is computed and no GPU is needed: a copy of the network with fake parameters runs on fake CUDA
    tensors, in evaluation mode without gradients, as in a chain. If something is found it runs once more, so
    that what only a first call does (fill a cache, say) is forgiven, as the calls before a capture do it.

    Args:
        model: a network, or any callable over networks. It stays where and as it is. What caches tensors
            outside of the network keeps fake ones: examine such a network in a process of its own.
        example: what it is called with: positional arguments, and behind them, if there are any, one dict of
            keyword arguments: (x, t) or (x, t, {"labels": y}). Only shapes and dtypes count; every tensor is
            taken to lie on the device.

    Returns:
        A report whose text names each operation, source line and remedy. A pass is necessary, not
        sufficient.

    Raises:
        TypeError: `model` cannot be called or copied, `example` is no tuple.
        ValueError: `model` fails on `example` for another reason than a device.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not callable(model):
        raise TypeError(f"`model` must be callable as model(x, t, **cond), got {type(model).__name__}")
    if not isinstance(example, tuple) or not example:
        raise TypeError(
            "`example` must be a tuple of what the network is called with, such as (x, t) or "
            f"(x, t, {{'labels': y}}), got {type(example).__name__}"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("`model` must be Python code, got a TorchScript module; examine the original")
    name = type(model).__name__ if isinstance(model, torch.nn.Module) else _name_of(model)
    *args, last = example
    kwargs: Mapping[str, Any] = {}
    if isinstance(last, Mapping) and args:
        kwargs = last
    else:
        args.append(last)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        copied, paths = FakeCopy().of(model)
        args, kwargs = fake_arguments((args, kwargs))
    first = _examine(fake, copied, paths, args, kwargs)
    again = first if first.findings == {} or first.ended else _examine(fake, copied, paths, args, kwargs)
    return CaptureReport(name, tuple(again.findings.values()), not again.ended, again.operations)


def _examine(
    fake: Any, model: Callable[..., Any], paths: Mapping[int, str], args: Any, kwargs: Any
) -> _Examination:
    """One call of the copied network."""
    seen = _Examination(paths)
    with torch.no_grad(), fake, _Operators(seen), _Calls(seen), seen.waits():
        try:
            model(*args, **kwargs)
        except _End:
            seen.ended = True
        except Exception as error:
            seen.ended = True
            seen.error(error)
    return seen


class _End(BaseException):
    """Ends an examination; not an Exception, so that no network's `except` catches it."""


class _Examination:
    """What has been found in one call."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.paths = paths
        self.findings: dict[Any, Finding] = {}
        self.operations = 0
        self.ended = False
        self.calls: list[Any] = []
        # whether torch's own C++ is told that a fake tensor lies on no device at all: a build without CUDA
        # has no guard for one, and refuses
        self.unguarded = False
        self.scalar = False

    def found(self, rule: Rule, operation: str, frames: list[Any] | None = None) -> None:
        """Keep a finding; end the examination where its value would be needed."""
        file, line, module = self._where(frames if frames is not None else _frames())
        key = (operation, file, line)
        before = self.findings.get(key)
        if before is not None:
            self.findings[key] = replace(before, times=before.times + 1)
        else:
            source = linecache.getline(file, line).strip()
            self.findings[key] = Finding(operation, file, line, source, module, rule.why, rule.remedy)
        if rule.ends:
            raise _End

    def error(self, error: Exception) -> None:
        """Translate what a network raised.

        Raises:
            ValueError: it is not about devices.
        """
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
        frames.reverse()
        file, line, _ = self._where(frames)
        if any(f.file == file and f.line == line for f in self.findings.values()):
            return  # this is what the finding said would happen
        text = str(error).strip().split("\n")[0]
        kind = type(error).__name__
        if not _ABOUT_DEVICES.search(text):
            raise ValueError(
                f"`model` must run on `example`, but raised {kind} at {file}:{line}: {text}"
            ) from error
        what = self.operation() if self.calls else f"{kind}: {text}"
        try:
            self.found(rules.NEEDS_CUDA, what, frames)
        except _End:
            return

    def operation(self, func: Any = None) -> str:
        """The name of the function that is running, or of an operator where none is."""
        from torch._subclasses.fake_tensor import FakeTensor

        if not self.calls:
            return str(func)
        if any(frame.f_code is FakeTensor.tolist.__code__ for frame, _ in _frames()):
            return "torch.Tensor.tolist"  # which a fake tensor does by its items
        call = self.calls[-1]
        name = resolve_name(call) or getattr(call, "__name__", str(call))
        return name.replace("linalg.linalg_", "linalg.").replace("torch.functional.", "torch.")

    def _where(self, frames: list[Any]) -> tuple[str, int, str]:
        """File and line of the innermost frame of the user's, and the innermost module's path."""
        place = next(((f.f_code.co_filename, line) for f, line in frames if not _is_ours(f)), ("?", 0))
        for frame, _ in frames:
            path = self.paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                return *place, path
        return *place, ""

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Find calls of torch.cuda.synchronize and its like, which no mode of torch sees."""

        def profile(frame: Any, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code in _WAITS and not _is_ours(frame.f_back):
                self.found(rules.SYNCHRONISE, _WAITS[frame.f_code], _frames(frame.f_back))

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(before)


class _Operators(TorchDispatchMode):
    """Holds every operator against the rules, and runs it on fake tensors, or as it is on the CPU's own."""

    def __init__(self, seen: _Examination) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses import fake_tensor

        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            device = args[0].device
            return _META if self.seen.unguarded and device.type == "cuda" else device
        if self.seen.unguarded and kwargs.get("device") is not None:
            kwargs["device"] = CUDA if torch.device(kwargs["device"]).type == "meta" else kwargs["device"]
        self.seen.operations += 1
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        rule = rules.rule_of(func, args, kwargs, leaves, self.seen.scalar)
        if rule is not None:
            self.seen.found(rule, self.seen.operation(func))
        if rule is rules.PIN:
            return args[0]
        if rule is rules.MEET:
            args, kwargs = fake_arguments((args, kwargs))
        faked = any(map(is_fake, tensors))
        device = kwargs.get("device")
        try:
            if faked or (device is not None and torch.device(device).type == "cuda"):
                return func(*args, **kwargs)
            # Ordinary tensors of the CPU, whose values may be read at any time.
            with fake_tensor.unset_fake_temporarily():
                return func(*args, **kwargs)
        except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
            if not rules.on(tensors, "cuda"):
                raise _End from None  # of a copy to the CPU, which has been found
            self.seen.found(rules.READ, self.seen.operation(func))
        except (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException):
            self.seen.found(rules.UNKNOWN, self.seen.operation(func))
        raise AssertionError("a rule that ends has ended")


class _Calls(TorchFunctionMode):
    """Knows which function of torch is running, and sees what reaches no operator: text, NumPy, lists."""

    def __init__(self, seen: _Examination) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen.calls.append(func)
        try:
            if func in _CAST_TO_TEXT and is_on(args[0], "cuda"):
                self.seen.found(rules.PRINT, self.seen.operation())
                return f"tensor(..., shape={list(args[0].shape)})"
            if func in _TO_NUMPY and is_fake(args[0]):
                if is_on(args[0], "cuda"):
                    self.seen.found(rules.TO_CPU, self.seen.operation())
                raise _End
            if func in _INDEXING and is_on(args[0], "cuda"):
                if _has_list(args[1]):
                    self.seen.found(rules.LIST, self.seen.operation())
                value = args[2] if len(args) > 2 else None
                self.seen.scalar = value is not None and (
                    not isinstance(value, torch.Tensor) or (is_on(value, "cpu") and not value.dim())
                )
            before = dict(self.seen.findings)
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if _NOT_LINKED not in str(error) or self.seen.unguarded:
                    raise
            self.seen.findings = before
            return self._unguarded(func, args, kwargs)
        finally:
            self.seen.scalar = False
            self.seen.calls.pop()

    def _unguarded(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The call again, with every CUDA device hidden from what a build without CUDA refuses."""
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)
        args, kwargs = tree_map(_hidden, (args, kwargs))
        self.seen.unguarded = True
        try:
            return func(*args, **kwargs)
        finally:
            self.seen.unguarded = False


def _frames(frame: Any = None) -> list[Any]:
    """The frames that are running and their lines, innermost first."""
    frame, found = frame or sys._getframe(1), []
    while frame is not None:
        found.append((frame, frame.f_lineno))
        frame = frame.f_back
    return found


def _is_ours(frame: Any) -> bool:
    """Whether code is torch's, Python's or this file's, and not the user's."""
    file = frame.f_code.co_filename
    in_library = file.startswith(_STDLIB) and "site-packages" not in file
    return in_library or file.startswith((_TORCH, "<frozen")) or file == __file__


def _name_of(model: Any) -> str:
    """What a callable that is no network is called."""
    model = model.func if isinstance(model, partial) else model
    return getattr(model, "__qualname__", type(model).__name__)


def _has_list(index: Any) -> bool:
    """Whether an index holds numbers in a list or an array."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | range) or type(part).__module__ == "numpy" for part in parts)


def _hidden(value: Any) -> Any:
    """A CUDA device as an argument, in whichever form, as the device of no memory."""
    if isinstance(value, torch.device):
        return torch.device("meta") if value.type == "cuda" else value
    return "meta" if isinstance(value, str) and value.split(":")[0] == "cuda" else value

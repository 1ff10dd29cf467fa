"""When the CPU's operators go without the way through Python, which costs 40 µs and 100 more with a gradient.

Where nobody looks on (a compiler, a tracer, a transform, a mode, a subclass), an operator of torch's own kind
takes the call, once it is built (kernels/_torch_ops.py). Who looks on sees the one operator.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from fastdiff.kernels import _torch_ops


def _keys(*names: str) -> int | None:
    """A set of dispatch keys as a number; None where this torch does not say."""
    try:
        key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
        return int(reduce(or_, (keys(getattr(key, name)) for name in names)).raw_repr())
    except AttributeError:
        return None


# What torch dispatches on where nothing intercepts: a mode, a tracer, a transform would add a key.
_UNWATCHED = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
# These are torch's own, not its interface: where one is missing, every call takes the operator.
_intercepting: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_has_looks = None not in (*_UNWATCHED, _intercepting, getattr(forward_ad, "_current_level", None))


def is_watched(operands: Iterable[Any]) -> bool:
    """Whether something looks on that should see the one operator, or this torch does not say."""
    if torch.compiler.is_compiling() or not _has_looks or has_torch_function(operands):
        return True
    return _intercepting().raw_repr() not in _UNWATCHED or forward_ad._current_level >= 0


def operators() -> _torch_ops.Operators | None:
    """Those of torch's own kind, for calls that are not watched; the first begins to build them."""
    if (loaded := _torch_ops.library.loaded) is not None:
        return loaded  # type: ignore[no-any-return]
    # who has chosen a backend has no use for them
    return None if os.environ.get("FASTDIFF_BACKEND") else _torch_ops.operators()

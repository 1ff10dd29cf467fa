"""Torch's operations by what they do to a tensor of the state, and walks through their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# linear whatever the arguments; a constant that is added shows in the result
ADDITIVE = _names(
    """add sub rsub neg positive __add__ __radd__ __sub__ __rsub__ __neg__ __iadd__ __isub__ add_ sub_ neg_
    stack cat clone detach contiguous cpu view reshape unsqueeze squeeze flatten expand chunk split unbind
    __getitem__ __iter__ __deepcopy__ __get__"""
)
# linear where one factor, or the dividend alone, depends on the state
SCALING = _names("mul div true_divide __mul__ __rmul__ __truediv__ __imul__ __itruediv__ mul_ div_")
CASTS = _names("to float half bfloat16 double type type_as")
CLAMPS = _names("clamp clip clamp_ clip_ clamp_min clamp_max clamp_min_ clamp_max_ hardtanh")
# depend on the shape alone
CONSTANTS = _names(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor"
)
QUERIES = _names(
    """size dim ndimension numel nelement stride is_floating_point is_complex is_contiguous get_device
    element_size __len__ __hash__ __repr__ __format__"""
)
# let values decide what is done next
READS_VALUES = _names(
    """item tolist numpy is_nonzero equal allclose __array__ __bool__ __float__ __int__ __index__
    __contains__"""
)
NORMAL = _names("randn randn_like")
OTHER_RANDOM = _names(
    """rand rand_like randint randint_like randperm normal normal_ uniform_ bernoulli bernoulli_ multinomial
    poisson exponential_ log_normal_ cauchy_ geometric_ random_ dropout"""
)
_AUGMENTED = _names("__iadd__ __isub__ __imul__ __itruediv__ __setitem__")


def writes_in_place(name: str) -> bool:
    """Whether the operation of this name changes its first argument."""
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))


def shape_and_dtype(args: Any, kwargs: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """What a call of `randn` or `randn_like` returns."""
    like = kwargs.get("input", args[0] if args else None)
    if isinstance(like, torch.Tensor):
        return tuple(like.shape), kwargs.get("dtype") or like.dtype
    size = kwargs.get("size", args)
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return tuple(int(n) for n in size), kwargs.get("dtype") or torch.get_default_dtype()


def leaves(value: Any) -> Iterator[Any]:
    """What a nest of lists, tuples and dicts holds."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def changed(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same nest of lists, tuples and dicts, with everything of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([changed(item, kind, change) for item in value])
    if isinstance(value, dict):
        return {key: changed(item, kind, change) for key, item in value.items()}
    return value

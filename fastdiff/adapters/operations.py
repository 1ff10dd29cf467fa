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
# where the lower and the upper bound stand behind the clamped tensor, their names, and their defaults
_CLAMPS = {
    **dict.fromkeys(("clamp", "clip", "clamp_", "clip_"), ((0, "min"), (1, "max"))),
    **dict.fromkeys(("hardtanh", "hardtanh_"), ((0, "min_val", -1.0), (1, "max_val", 1.0))),
    **dict.fromkeys(("clamp_min", "clamp_min_"), ((0, "min"), None)),
    **dict.fromkeys(("clamp_max", "clamp_max_"), (None, (0, "max"))),
}
_EXTREMA = {
    **dict.fromkeys(("maximum", "fmax", "max"), ((0, "other"), None)),
    **dict.fromkeys(("minimum", "fmin", "min"), (None, (0, "other"))),
}
# depend on the shape alone
CONSTANTS = _names(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor"
)
QUERIES = _names(
    """size dim ndimension numel nelement stride storage_offset is_floating_point is_complex is_signed
    is_conj is_neg is_contiguous is_inference is_pinned is_shared is_same_size result_type get_device
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
_SCALES = (1.0, 1e-12, 1e12)  # no bound of an operation lies beyond both, or is passed over by all three
_AUGMENTED = _names("__iadd__ __isub__ __imul__ __itruediv__ __setitem__")


def writes_in_place(name: str) -> bool:
    """Whether the operation of this name changes its first argument."""
    return name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))


def bounds(name: str, args: Any, kwargs: Any, state: type) -> tuple[Any, Any, Any] | None:
    """What an operation clamps, its lower and its upper bound (None: none there); None where it is no clamp.

    The elementwise `maximum` or `minimum` of a state and another tensor, in either order, is a clamp too.
    """
    places = _CLAMPS.get(name) or _EXTREMA.get(name)
    if places is None or "out" in kwargs:
        return None
    value, *rest = (kwargs["input"], *args) if "input" in kwargs else args

    def given(place: tuple[Any, ...] | None) -> Any:
        if place is None:
            return None
        return rest[place[0]] if len(rest) > place[0] else kwargs.get(*place[1:])

    low, high = map(given, places)
    if name in _CLAMPS:
        return value, low, high
    other = high if low is None else low
    if not isinstance(other, torch.Tensor) or (isinstance(value, state) and isinstance(other, state)):
        return None  # a reduction, or of two states
    if isinstance(other, state):
        value, other = other, value
    return (value, other, None) if high is None else (value, None, other)


def acts_linearly(
    func: Callable[..., Any], name: str, args: Any, kwargs: Any, state: type[torch.Tensor]
) -> bool:
    """Whether an operation acts linearly on random numbers of very different sizes in place of the states.

    f(s (1.7 a - 0.6 b)) = s (1.7 f(a) - 0.6 f(b)),   a, b ~ N(0, 1),   s in `_SCALES`
    """
    generator = torch.Generator().manual_seed(0)
    states = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, state)]

    def drawn() -> dict[int, torch.Tensor]:
        return {id(t): torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in states}

    def results(values: dict[int, torch.Tensor], scale: float = 1.0) -> list[torch.Tensor]:
        given, named = changed((args, kwargs), state, lambda tensor: scale * values[id(tensor)])
        result = func(*given, **named)
        kept = given[0] if writes_in_place(name) else result
        return [leaf for leaf in leaves(kept) if isinstance(leaf, torch.Tensor)]

    a, b = drawn(), drawn()
    both = {key: 1.7 * a[key] - 0.6 * b[key] for key in a}
    expected = list(zip(results(a), results(b), strict=True))
    if not expected:  # a handle to the values, such as their storage
        return False
    for scale in _SCALES:
        for (of_a, of_b), found in zip(expected, results(both, scale), strict=True):
            if not found.is_floating_point():
                return False
            error = found / scale - (1.7 * of_a - 0.6 * of_b)
            size = torch.cat([of_a.flatten(), of_b.flatten(), torch.zeros(1)]).abs().max()
            if not bool((error.abs() <= 1e-9 * size).all()):
                return False
    return True


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

"""What a network returns, of whichever project it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def prediction_of(result: Any) -> Tensor:
    """The tensor that a network returned: as it is, or the `.sample` of diffusers' output objects.

    Raises:
        TypeError: something else, such as a tuple.
    """
    found = result if isinstance(result, Tensor) else getattr(result, "sample", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "`model` must return a tensor, or an object with a tensor `.sample`, got "
            f"{type(result).__name__}; for a tuple pass `lambda x, t, **cond: model(x, t, **cond)[0]`"
        )
    return found

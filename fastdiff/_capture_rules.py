"""What a CUDA graph's capture does not allow, operator by operator: why, and what to do instead.

Where torch synchronises inside of a kernel no dispatch shows it, so those operators are listed by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Rule(NamedTuple):
    """Why an operation cannot be captured, and the usual remedy.

    Attributes:
        why: completes "it cannot be captured: ...".
        remedy: what to write instead.
        ends: whether what comes after depends on a value that a fake tensor does not have.
    """

    why: str
    remedy: str
    ends: bool = False


READ = Rule(
    "the host reads a value from the device and waits for it",
    "keep the value in a tensor: torch.where in place of `if`, arithmetic on tensors in place of numbers; "
    "what does not depend on x and t belongs in __init__",
    ends=True,
)
PRINT = Rule(
    "printing reads the tensor's values, for which the host waits",
    "remove it, or print the shape",
)
TO_CPU = Rule(
    "it copies from the device to the CPU, where a replay would not run what follows",
    "stay on the device: torch has a counterpart of nearly every NumPy function",
)
TO_CUDA = Rule(
    "it copies pageable memory of the CPU to the device",
    "make the tensor on the device (`device=x.device` in arange, full, zeros, ...), or once in __init__ with "
    "register_buffer, which moves with the network",
)
LIST = Rule(
    "a list as an index becomes a tensor on the CPU, which is copied to the device",
    "make the index once in __init__ with register_buffer, or use slices",
)
PIN = Rule("it allocates pinned memory of the CPU", "pin and copy before the network is called")
MEET = Rule(
    "a tensor on the CPU with dimensions meets one on the device",
    "register_buffer(..., persistent=False) in place of a plain attribute, so that it moves with the "
    "network, or make it with `device=x.device`",
)
SHAPE = Rule(
    "the size of its result depends on values, for which the host waits",
    "keep the size: torch.where or multiplication by the mask in place of selecting",
    ends=True,
)
REPEAT = Rule(
    "the size of its result depends on values, for which the host waits",
    "give `output_size`, or repeat by a Python number",
    ends=True,
)
LINALG = Rule(
    "it reads on the host whether the decomposition has worked",
    "use the form that does not check (torch.linalg.inv_ex, solve_ex, cholesky_ex), or decompose in __init__",
)
INSIDE = Rule(
    "its CUDA implementation waits for the device inside",
    "compute it before the chain, or by operations on tensors that do not wait",
)
FILL = Rule(
    "the CUDA implementation reads a fill value that is a tensor on the device",
    "fill with a Python number, or use torch.where(mask, value, x)",
)
CPU_GENERATOR = Rule(
    "a generator of the CPU cannot draw on the device",
    "draw with the default generator, or before the chain, and pass the numbers in",
)
GENERATOR = Rule(
    "a generator of one's own has to be registered with the graph",
    "draw with the default generator, or before the chain, and pass the numbers in",
)
SYNCHRONISE = Rule("it makes the host wait for the device", "remove it; a chain needs no synchronisation")
NEEDS_CUDA = Rule(
    "it needs a build of torch with CUDA and is examined no further here",
    "leave devices and streams to the caller, or examine the network where there is a GPU",
    ends=True,
)
UNKNOWN = Rule(
    "torch knows no fake implementation of it, so nothing can be said",
    "give the operator one with torch.library.register_fake",
    ends=True,
)

_BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(("_local_scalar_dense", "item", "equal", "allclose", "is_nonzero"), READ),
    **dict.fromkeys(
        (
            "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
            "unique_dim_consecutive", "bincount", "_to_sparse", "to_sparse", "argwhere",
        ),
        SHAPE,
    ),
    **dict.fromkeys(
        ("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"), LINALG
    ),
    **dict.fromkeys(
        (
            "multinomial", "embedding_renorm_", "linalg_matrix_exp", "_nested_tensor_from_mask",
            "_nested_tensor_from_mask_left_aligned",
        ),
        INSIDE,
    ),
    "_pin_memory": PIN,
    "pin_memory": PIN,
}  # fmt: skip


def on(tensors: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    """Those of the tensors that lie on a kind of device."""
    return [tensor for tensor in tensors if tensor.device.type == device]


def rule_of(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], leaves: Sequence[Any], scalar: bool
) -> Rule | None:
    """The rule that a call of an operator breaks, if any.

    Args:
        func, args, kwargs: the call, as a dispatch mode sees it.
        leaves: everything in args and kwargs, flat.
        scalar: whether the call assigns a Python number to a selection.
    """
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    target = kwargs.get("device")
    on_cuda = bool(on(tensors, "cuda"))
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        ends_on = args[0].device if name == "copy_" else torch.device(target or args[0].device)
        if source.device.type != ends_on.type:
            return TO_CUDA if ends_on.type == "cuda" else TO_CPU
        return None
    if name in ("pin_memory", "_pin_memory"):
        return PIN
    if not on_cuda and (target is None or torch.device(target).type != "cuda"):
        return None
    for generator in leaves:
        if isinstance(generator, torch.Generator):
            return CPU_GENERATOR if generator.device.type == "cpu" else GENERATOR
    if any(tensor.dim() for tensor in on(tensors, "cpu")):
        return MEET
    if func.namespace != "aten":
        return None
    if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One mask and a number are a masked_fill, which does not ask how many there are.
        return SHAPE if masks and not (scalar and len(masks) == 1) else None
    if name == "repeat_interleave":
        return REPEAT if kwargs.get("output_size") is None else None
    if name in ("masked_fill", "masked_fill_"):
        value = args[2]
        return FILL if isinstance(value, torch.Tensor) and value.device.type == "cuda" else None
    if name == "normal":
        return INSIDE if len(args) > 1 and isinstance(args[1], torch.Tensor) else None
    if name == "histc":
        low, high = (*args[2:], 0, 0)[:2]
        return INSIDE if low == high else None
    return _BY_NAME.get(name)

"""Triton where it is installed; where it is not, the kernels import all the same and only a launch fails."""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
    from triton import jit

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Missing:
        """Stands for a kernel, or for `triton.language`, where Triton is not installed."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, name: str) -> _Missing:
            return _Missing(f"{self.name}.{name}")

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(
                f"`{self.name}` needs Triton, which is not installed here; "
                "install it with `pip install triton`, or choose FASTDIFF_BACKEND=torch"
            )

        def __call__(self, value: Any) -> Any:  # tl.constexpr(value)
            return value

    def jit(fn: Any) -> Any:
        return _Missing(fn.__name__)

    tl: Any = _Missing("triton.language")  # type: ignore[no-redef]

__all__ = ["HAS_TRITON", "jit", "tl"]

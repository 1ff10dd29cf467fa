"""Other projects' conventions turned into ours."""

from __future__ import annotations

from fastdiff.adapters import diffusers, k_diffusion

__all__ = ["diffusers", "k_diffusion"]

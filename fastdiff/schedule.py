"""The forward chain: beta, alpha_bar and everything that follows from them, in float64.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),   q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I)

Glossary: one meaning each, in the whole package.

    name               meaning                                             elsewhere
    beta, alpha_bar    beta_t; prod(1 - beta), [T]                         `alphas_cumprod`
    alpha, sigma       sqrt(alpha_bar), sqrt(1 - alpha_bar): scale of      alpha_t, sigma_t of DPM-Solver
                       signal and noise                                    (never alpha = 1 - beta)
    sigma_ve           sigma / alpha                                       `sigma` of EDM and k-diffusion
    lam                log(alpha / sigma), half the log-SNR                lambda_t
    x_t, x_s, x0       now, next, data; `x0_hat` a prediction of it        sample, prev_sample
    eps, v             noise; velocity alpha * eps - sigma * x0
    out                the network's raw output                            model_output
    guidance_scale w   uncond + w * (cond - uncond); 1 is no guidance
    eta, noise_std     DDIM's eta; the standard deviation that a row injects
    t, row, slot       training time; row of a sampling table; lane of a batch
    sample_id          identity of a sample for its noise
    B C H W, N         batch, channels, height, width; elements of one sample
    T, S, K            training steps, sampling steps, registers of a table
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Config = dict[str, Any]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """An immutable noise schedule of T steps; build it with a constructor below, not by its fields.

        alpha_bar_t = prod_{s <= t} (1 - beta_s),   alpha = sqrt(alpha_bar),   sigma = sqrt(1 - alpha_bar)

    Every array is float64 (`timesteps` int64), [T] and read-only. Schedules are equal if their arrays are.

    Attributes:
        betas: variance of each forward step, in (0, 1]; 1 only as the last (zero terminal SNR).
        alpha_bar: strictly decreasing, in [0, 1).
        timesteps: what the network is told at each step: 0..T-1, or the kept times of a respaced schedule.
        config: what `to_config` copies.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 2 and 4.
    """

    betas: np.ndarray
    alpha_bar: np.ndarray
    timesteps: np.ndarray
    config: Config = field(repr=False)

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas equally spaced from `beta_start` to `beta_end`, both included.

        Source: Ho et al. 2020, sec. 4.
        """
        count = check_count("num_timesteps", num_timesteps)
        config = _config("linear", num_timesteps=count, beta_start=beta_start, beta_end=beta_end)
        return cls._from_betas(np.linspace(beta_start, beta_end, count), config)

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Betas whose square roots are equally spaced.

        Source: Rombach et al. 2022 (arXiv 2112.10752), the latent diffusion code's "linear" schedule.
        """
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not value > 0:
                raise ValueError(f"`{name}` must be in (0, 1), got {value}")
        count = check_count("num_timesteps", num_timesteps)
        config = _config("scaled_linear", num_timesteps=count, beta_start=beta_start, beta_end=beta_end)
        return cls._from_betas(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), count) ** 2, config)

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar falls as a squared cosine; betas are cut at `max_beta`.

            alpha_bar(u) = cos(pi/2 (u + s) / (1 + s))^2,   beta_t = 1 - alpha_bar((t+1)/T) / alpha_bar(t/T)

        Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
        """
        count = check_count("num_timesteps", num_timesteps)

        def curve(u: np.ndarray) -> np.ndarray:
            return np.cos((u + s) / (1 + s) * (math.pi / 2)) ** 2

        betas = _betas_from_curve(count, curve, max_beta)
        return cls._from_betas(betas, _config("cosine", num_timesteps=count, s=s, max_beta=max_beta))

    @classmethod
    def sigmoid(
        cls,
        num_timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        max_beta: float = 0.999,
    ) -> NoiseSchedule:
        """alpha_bar falls as a sigmoid from 1 to 0; betas, made as in `cosine`, are cut at `max_beta`.

            alpha_bar(u) = (g(end) - g(start + u (end - start))) / (g(end) - g(start))
            g(y) = 1 / (1 + exp(-y / tau))

        Source: Jabri et al. 2022 (arXiv 2212.11972), algorithm 4.
        """
        if not (tau > 0 and end > start):
            raise ValueError(
                f"`tau` must be positive and `end` above `start`, got tau={tau}, start={start}, end={end}"
            )

        def gate(y: np.ndarray | float) -> np.ndarray:
            return 1.0 / (1.0 + np.exp(-np.asarray(y) / tau))

        def curve(u: np.ndarray) -> np.ndarray:
            return (gate(end) - gate(start + u * (end - start))) / (gate(end) - gate(start))

        count = check_count("num_timesteps", num_timesteps)
        config = _config("sigmoid", num_timesteps=count, start=start, end=end, tau=tau, max_beta=max_beta)
        return cls._from_betas(_betas_from_curve(count, curve, max_beta), config)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> NoiseSchedule:
        """A schedule from its betas, [T] in (0, 1]; 1 only as the last.

        Raises:
            ValueError: betas that are not finite, out of range, or not one-dimensional.
        """
        values = _vector("betas", betas)
        return cls._from_betas(values, {"name": "from_betas", "betas": values.tolist()})

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Sequence[float] | np.ndarray) -> NoiseSchedule:
        """A schedule from alpha_bar (diffusers' `alphas_cumprod`).

        Args:
            alpha_bar: [T], strictly decreasing, in [0, 1); 0 only as the last.
        Raises:
            ValueError: values that are not finite, out of range, rise or repeat, or are not one-dimensional.
        """
        values = _vector("alpha_bar", alpha_bar)
        return cls._from_alpha_bar(values, {"name": "from_alpha_bar", "alpha_bar": values.tolist()})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that `to_config` described.

        Raises:
            ValueError: an unknown name, or arguments that its constructor does not take.
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
            raise ValueError(
                f"`config` must be a dict with a `name`, as `to_config` makes it, got {config!r}"
            )
        args = {key: value for key, value in config.items() if key != "name"}
        name = config["name"]
        try:
            if name == "respace":
                return cls.from_config(args.pop("base")).respace(**args)
            if name == "rescale_zero_terminal_snr":
                return cls.from_config(args.pop("base")).rescale_zero_terminal_snr(**args)
            if name in _CONSTRUCTORS:
                return getattr(cls, name)(**args)
        except (KeyError, TypeError) as error:
            raise ValueError(f"`config` has the wrong arguments for {name!r}: {error}") from None
        known = ", ".join((*_CONSTRUCTORS, "respace", "rescale_zero_terminal_snr"))
        raise ValueError(f"`config` names an unknown schedule {name!r}; known are {known}")

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule with alpha shifted to 0 at the end and scaled to keep its first value.

            alpha' = (alpha - alpha_T) alpha_1 / (alpha_1 - alpha_T)

        Raises:
            ValueError: T = 1, where one value cannot both stay and become 0.
        Source: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
        """
        if len(self) < 2:
            raise ValueError(f"rescaling to zero terminal SNR needs at least 2 timesteps, got {len(self)}")
        first, last = self.alpha[0], self.alpha[-1]
        alpha = (self.alpha - last) * (first / (first - last))
        config = {"name": "rescale_zero_terminal_snr", "base": self.config}
        return self._from_alpha_bar(alpha**2, config, self.timesteps)

    def respace(self, timesteps: Sequence[int] | np.ndarray) -> NoiseSchedule:
        """The schedule of the subsequence `timesteps`: alpha_bar taken there, betas from it.

            beta'_i = 1 - alpha_bar[t_i] / alpha_bar[t_{i-1}]

        The network still sees the original times, `timesteps[i]` of the result.

        Args:
            timesteps: [S] strictly ascending indices into this schedule, 0 <= t < T.
        Raises:
            ValueError, TypeError: indices that are no integers, out of range or not ascending.
        Source: Nichol & Dhariwal 2021, sec. 4.
        """
        kept = check_timesteps(timesteps, len(self))
        config = {"name": "respace", "base": self.config, "timesteps": kept.tolist()}
        return self._from_alpha_bar(self.alpha_bar[kept], config, self.timesteps[kept])

    def to_config(self) -> Config:
        """A description in JSON's types alone, from which `from_config` makes an equal schedule.

        Named constructors keep name and arguments, others betas or alpha_bar; derived schedules their `base`.
        """
        return copy.deepcopy(self.config)

    def __len__(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alpha(self) -> np.ndarray:
        """sqrt(alpha_bar), the scale of the signal."""
        return _read_only(np.sqrt(self.alpha_bar))

    @cached_property
    def sigma(self) -> np.ndarray:
        """sqrt(1 - alpha_bar), the scale of the noise."""
        return _read_only(np.sqrt(1.0 - self.alpha_bar))

    @cached_property
    def sigma_ve(self) -> np.ndarray:
        """sigma / alpha; infinite where alpha is 0."""
        with np.errstate(divide="ignore"):
            return _read_only(self.sigma / self.alpha)

    @cached_property
    def lam(self) -> np.ndarray:
        """log(alpha / sigma), half the log-SNR; -inf where alpha is 0."""
        with np.errstate(divide="ignore"):
            return _read_only(0.5 * (np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)))

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0): beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); 0 at t = 0.

        Source: Ho et al. 2020, eq. 7.
        """
        return _read_only(self.betas * (1.0 - self._alpha_bar_prev) / (1.0 - self.alpha_bar))

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log(posterior_variance), where t = 0 (variance 0) takes t = 1's value, or log(beta_0) if T = 1."""
        variance = self.posterior_variance.copy()
        variance[0] = variance[1] if len(self) > 1 else self.betas[0]
        return _read_only(np.log(variance))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Of x_0 in the mean of q(x_{t-1} | x_t, x_0): sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)."""
        return _read_only(np.sqrt(self._alpha_bar_prev) * self.betas / (1.0 - self.alpha_bar))

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Of x_t in that mean: sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)."""
        return _read_only(np.sqrt(1.0 - self.betas) * (1.0 - self._alpha_bar_prev) / (1.0 - self.alpha_bar))

    @property
    def _alpha_bar_prev(self) -> np.ndarray:
        return np.concatenate(([1.0], self.alpha_bar[:-1]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def _content(self) -> tuple[bytes, ...]:
        return self.betas.tobytes(), self.alpha_bar.tobytes(), self.timesteps.tobytes()

    @classmethod
    def _from_betas(cls, betas: np.ndarray, config: Config) -> NoiseSchedule:
        _check_betas("betas", betas)
        alpha_bar = np.cumprod(1.0 - betas)
        if len(alpha_bar) > 1 and alpha_bar[-2] <= 0.0:
            raise ValueError(
                "`betas` must leave alpha_bar above 0 before the last step, got an underflow to 0"
            )
        return cls._build(betas, alpha_bar, np.arange(len(betas)), config)

    @classmethod
    def _from_alpha_bar(
        cls, alpha_bar: np.ndarray, config: Config, timesteps: np.ndarray | None = None
    ) -> NoiseSchedule:
        _check_alpha_bar(alpha_bar)
        betas = 1.0 - alpha_bar / np.concatenate(([1.0], alpha_bar[:-1]))
        _check_betas("alpha_bar", betas)
        return cls._build(betas, alpha_bar, np.arange(len(betas)) if timesteps is None else timesteps, config)

    @classmethod
    def _build(
        cls, betas: np.ndarray, alpha_bar: np.ndarray, timesteps: np.ndarray, config: Config
    ) -> NoiseSchedule:
        return cls(_read_only(betas), _read_only(alpha_bar), _read_only(timesteps.astype(np.int64)), config)


_CONSTRUCTORS = ("linear", "scaled_linear", "cosine", "sigmoid", "from_betas", "from_alpha_bar")


def check_count(name: str, value: Any) -> int:
    """`value` as an int of at least 1; the one check behind every "how many"."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an integer, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
    return int(value)


def check_timesteps(timesteps: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """`timesteps` as [S] int64, strictly ascending indices into a schedule of `length` steps, or an error."""
    values = np.asarray(timesteps)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"`timesteps` must be a non-empty list of integers, got shape {list(values.shape)}")
    if values.dtype.kind not in "iu":
        raise TypeError(f"`timesteps` must be integers, got {values.dtype}; round them first")
    if values.min() < 0 or values.max() >= length:
        raise ValueError(
            f"`timesteps` must index the schedule, 0 <= t < {length}, got {values.min()}..{values.max()}; "
            "a respaced schedule is indexed by its own steps, not by the original times"
        )
    if (np.diff(values) <= 0).any():
        raise ValueError(
            "`timesteps` must be strictly ascending, got some that repeat or fall; use sorted(set(...))"
        )
    return values.astype(np.int64)


def _config(name: str, *, num_timesteps: int, **arguments: float) -> Config:
    # Python's own floats: NumPy's are no JSON.
    return {
        "name": name,
        "num_timesteps": num_timesteps,
        **{key: float(value) for key, value in arguments.items()},
    }


def _betas_from_curve(count: int, curve: Callable[[np.ndarray], np.ndarray], max_beta: float) -> np.ndarray:
    """beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), max_beta) of a continuous curve alpha_bar(u)."""
    if not 0 < max_beta < 1:
        raise ValueError(f"`max_beta` must be in (0, 1), got {max_beta}")
    alpha_bar = curve(np.arange(count + 1) / count)
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def _vector(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{name}` must be a non-empty list of numbers, got shape {list(array.shape)}")
    return array


def _check_betas(name: str, betas: np.ndarray) -> None:
    if not np.isfinite(betas).all():
        raise ValueError(f"`{name}` must be finite, got {betas[~np.isfinite(betas)][0]} among them")
    wrong = (betas <= 0) | (betas > 1)
    wrong[:-1] |= betas[:-1] == 1
    if wrong.any():
        i = int(wrong.argmax())
        raise ValueError(f"`{name}` must give beta in (0, 1), 1 only as the last, got beta[{i}] = {betas[i]}")


def _check_alpha_bar(alpha_bar: np.ndarray) -> None:
    if not np.isfinite(alpha_bar).all():
        raise ValueError(
            f"`alpha_bar` must be finite, got {alpha_bar[~np.isfinite(alpha_bar)][0]} among them"
        )
    steps = np.diff(alpha_bar, prepend=1.0)
    if (steps >= 0).any():
        i = int((steps >= 0).argmax())
        raise ValueError(
            f"`alpha_bar` must start below 1 and fall strictly, got alpha_bar[{i}] = {alpha_bar[i]}"
        )
    if alpha_bar[-1] < 0 or (alpha_bar[:-1] == 0).any():
        raise ValueError(
            f"`alpha_bar` must be in [0, 1), 0 only as the last, got {alpha_bar[-1]} as the last"
        )


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array

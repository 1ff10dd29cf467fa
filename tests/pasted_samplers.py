"""Samplers of k-diffusion's shape, as a user would paste them: fn(model, x, sigmas, ...)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def churned(x, sigma, s_churn, s_noise, steps):
    """x with noise added up to sigma * (1 + gamma), and that level."""
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    above = sigma * (gamma + 1)
    if gamma > 0:
        x = x + torch.randn_like(x) * s_noise * (above**2 - sigma**2).sqrt()
    return x, above


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_noise=1.0):
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], s_churn, s_noise, len(sigmas) - 1)
        x0 = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
        callback({"x": x, "i": i, "denoised": x0})
        x = x + (x - x0) / sigma * (sigmas[i + 1] - sigma)
    return x


def heun(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_noise=1.0):
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], s_churn, s_noise, len(sigmas) - 1)
        slope = (x - model(x, sigma)) / sigma
        callback({"i": i})
        ahead = x + slope * (sigmas[i + 1] - sigma)
        if sigmas[i + 1] > 0:
            slope = (slope + (ahead - model(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + slope * (sigmas[i + 1] - sigma)
    return x


def ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
    for i in range(len(sigmas) - 1):
        now, to = sigmas[i], sigmas[i + 1]
        up = min(to, eta * (to**2 * (now**2 - to**2) / now**2) ** 0.5)
        x0 = model(x, now)
        x = x0 + (x - x0) * (to**2 - up**2) ** 0.5 / now
        if to > 0:
            x = x + noise_sampler(now, to) * up
    return x


def two_steps(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Second order from the last two x0, in log sigma; sums in place."""
    old, h_old = None, None
    for i in range(len(sigmas) - 1):
        x0, h = model(x, sigmas[i]), (sigmas[i] / sigmas[i + 1]).log()
        guess = x0.clone()
        if old is not None and sigmas[i + 1] > 0:
            guess += (x0 - old) * (h / (2 * h_old))
        x = guess + (sigmas[i + 1] / sigmas[i]) * (x - guess)
        old, h_old = x0, h
    return x


def clipped(model, x, sigmas, **_):
    for now, to in pairwise(sigmas):
        x0 = model(x, now).clamp(-1, 1)
        x = x0 + (x - x0) * (to / now)
    return x


def two_noises(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two draws that always come in one proportion are one noise."""
    for now, to in pairwise(sigmas):
        x = model(x, now)
        if to > 0:
            x = x + 0.6 * to * torch.randn_like(x)
            x = x + 0.8 * to * torch.randn(x.shape, dtype=x.dtype)
    return x


def noise_first(model, x, sigmas, **_):
    """Draws before it calls the network what it adds afterwards."""
    for now, to in pairwise(sigmas):
        z = torch.randn_like(x)
        x = model(x, now) + to * z
    return x


def in_place(model, x, sigmas, **_):
    """Goes on in the tensors that it was given and has drawn."""
    for now, to in pairwise(sigmas):
        slope = (x - model(x, now)) / now
        x += (to / 2 - now) * slope
        noise = torch.randn_like(x)
        x += noise.mul_(to * 3**0.5 / 2)
    return x


def averaged(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two evaluations at each level before the step from it."""
    for now, to in pairwise(sigmas):
        callback({})
        x0 = (model(x, now) + model(x, now)) / 2
        x = x0 + (x - x0) * (to / now)
    return x


def churned_history(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Two steps of Adams-Bashforth after churn: only its callback tells where its steps start."""
    old = None
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], 3.0, 1.0, len(sigmas) - 1)
        slope = (x - model(x, sigma)) / sigma
        callback({"i": i})
        x = x + (slope if old is None else 1.5 * slope - 0.5 * old) * (sigmas[i + 1] - sigma)
        old = slope
    return x

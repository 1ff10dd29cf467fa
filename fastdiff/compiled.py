"""Compiled networks on the CPU: when one is made, which weights it reads, whether it may be used.

A plan belongs to a network and the shapes that it is called with: the whole network, or a U-Net behind its
embedding where that is tabulated. It adds up the time that eager chains have taken, has the network compiled
in the background once that would have paid for itself (`compile="auto"`), or at once (True), and hands it out
where it still is the network: the same modules with the same settings and layouts of weights. Before its
first use its outputs are compared with the network's own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastdiff import packages
from fastdiff.anatomy import Anatomy, tensors_of
from fastdiff.chain import Batch
from fastdiff.nn import prediction_of
from fastdiff.packages import Call, Package, Refused

Network = Callable[..., Any]
# What compiling costs, and the part of an eager network's time that it saves: measured on two cores, 17 to
# 43 s and 0.4 to 0.5 for an MLP and U-Nets of 1 to 4 million parameters. One on disk costs an export at most.
_SECONDS_TO_COMPILE = 30.0
_SECONDS_TO_EXPORT = 2.0
_SHARE_SAVED = 0.3
_MOST_CHANGES = 3  # of a network between its chains, after which it is left alone
_plans: WeakKeyDictionary[torch.nn.Module, dict[Any, Plan]] = WeakKeyDictionary()
_plans_lock = threading.Lock()


def _after_fork() -> None:
    """A child has none of its parent's threads, and a lock that one of them held would never open."""
    global _plans_lock
    _plans_lock = threading.Lock()
    _plans.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def plan_of(network: torch.nn.Module, batch: Batch) -> Plan:
    """The plan of a network at the shapes of a batch; it lives as long as the network."""
    call = example(batch)
    key = (*call.described(), torch.get_num_threads())
    with _plans_lock:
        plans = _plans.setdefault(network, {})
        return plans.setdefault(key, Plan(call))


class Plan:
    """What is known of a network at one set of shapes, and its compiled form where there is one.

    Args:
        call: of these shapes, without values.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._spent = 0.0
        self._anatomy: Anatomy | None = None
        self._made: Package | None = None
        self._verified = False
        self._assume = True
        self._changes = 0
        self._thread: threading.Thread | None = None
        self._refused = ""

    @property
    def refused(self) -> str:
        """Why the network is not compiled ahead of time; empty where nothing speaks against it."""
        return self._refused

    def network(self, model: torch.nn.Module, batch: Batch, wait: bool) -> Network | None:
        """The compiled network, or None where there is none (yet). Called while the model is in eval mode.

        Args:
            wait: compile it now if need be.
        """
        with self._lock:
            if self._refused or not (wait or self._made):
                return None
            try:
                now = Anatomy(model)
                if self._anatomy is not None and not self._anatomy.same(now):
                    self._forget()
                if self._made is None:
                    if not wait:
                        return None
                    self._made, self._anatomy = self._make(model), now
                try:
                    return self._checked(self._made, model, batch)
                except Refused:
                    if not self._made.assumed:
                        raise
                    # an outline said too little of this network: by its graph, then
                    self._made, self._assume = None, False
                    if not wait:
                        return None
                    self._made = self._make(model)
                    return self._checked(self._made, model, batch)
            except (Refused, OSError) as error:
                self._refuse(str(error))
                return None

    def _make(self, model: torch.nn.Module) -> Package:
        return made(packages.structure_copy(model), self._call, aside=False, assume=self._assume)

    def _checked(self, package: Package, model: torch.nn.Module, batch: Batch) -> Network | None:
        """The package on the network's present weights, once it is known to agree with the network."""
        tensors = dict(tensors_of(model))
        if not package.reads(tensors):
            package.lend(tensors)
        self._verified = self._verified or agree(package, model, calls(batch), package.operations)
        return package if self._verified else None

    def ran(self, seconds: float, model: torch.nn.Module) -> None:
        """Note what an eager chain took; start compiling where that has become worth it."""
        with self._lock:
            self._spent += seconds
            if self._refused or self._made or self._thread:
                return
            # what compiling would have saved so far is what it costs: then it will not have been in vain
            saved = _SHARE_SAVED * self._spent
            if saved < _SECONDS_TO_EXPORT:
                return
            if saved < _SECONDS_TO_COMPILE and not packages.cached(packages.outline(model, self._call)[0]):
                return
            try:
                arguments = (packages.structure_copy(model), Anatomy(model))
            except Refused as error:
                self._refuse(str(error))
                return
            self._thread = threading.Thread(
                target=self._make_aside, args=arguments, name="fastdiff-compile", daemon=True
            )
            self._thread.start()

    def _make_aside(self, duplicate: torch.nn.Module, anatomy: Anatomy) -> None:
        """In a thread: chains that run meanwhile are eager."""
        try:
            found = made(duplicate, self._call, aside=True, assume=self._assume)
        except (Refused, OSError) as error:
            with self._lock:
                self._refuse(str(error))
            return
        with self._lock:
            self._made, self._anatomy, self._verified, self._thread = found, anatomy, False, None

    def _forget(self) -> None:
        """The network has become another."""
        self._made, self._anatomy, self._verified = None, None, False
        self._changes += 1
        if self._changes >= _MOST_CHANGES:
            raise Refused("its modules, their settings or its weights' layout change from chain to chain")

    def _refuse(self, reason: str) -> None:
        self._refused = reason
        self._made = self._anatomy = self._thread = None


def calls(batch: Batch) -> Iterator[Call]:
    """What a batch's steps call, on its input: at two times, or with the embeddings of two rows.

    Each is made when it is asked for, and an embedding stays until the next.
    """
    table = batch.embedding
    if table is None:
        for t in (batch.t, batch.t // 2):
            yield Call((batch.u, t), batch.cond)
    else:
        for row in (0, table.num_rows // 2):
            yield Call((batch.u, table.by_lane(row)), {}, "forward_embedded")


def example(batch: Batch) -> Call:
    """One of them without values; none is computed for it."""

    def like(a: Tensor) -> Tensor:
        return torch.empty(a.shape, dtype=a.dtype, device="meta")

    if batch.embedding is not None:
        return Call((like(batch.u), batch.embedding.example()), {}, "forward_embedded")
    return Call((like(batch.u), like(batch.t)), {name: like(a) for name, a in batch.cond.items()})


def made(duplicate: torch.nn.Module, call: Call, aside: bool, assume: bool) -> Package:
    """Load a network's package, or export its copy and compile that where the cache has none yet.

    Args:
        aside: nobody waits for it.
        assume: take the package that the network's outline leads to, without exporting.
    Raises:
        Refused: it cannot be.
        OSError: the cache's file belongs to another user.
    """
    beginning, is_exact = packages.outline(duplicate, call)
    found = packages.cached(beginning) if assume and is_exact else []
    if len(found) == 1:
        with contextlib.suppress(Refused):  # damaged: it is made anew
            return Package(found[0], assumed=True)
    exported = packages.export(duplicate, call)
    try:
        return Package(exported.path)
    except Refused:  # not there, or damaged
        packages.build(exported, aside)
        return Package(exported.path)


def agree(compiled: Network, model: Any, calls: Iterable[Call], operations: int) -> bool:
    """Whether a compiled network computes in each of these calls what the network does.

    The norm of the difference is held against what rounding explains: G operations that each round once, at
    random, add up to sqrt(G) eps of the output, or of what the network makes of an input that is off by eps,
    where it amplifies that more.

        |c(x, t) - f(x, t)| <= sqrt(G) max(eps |f(x, t)|, |f((1 + eps) x, t) - f(x, t)|)

    Where that fails, as in bfloat16, of which a compiler rounds fewer results (the angle of a time embedding
    among them), both are held against the network in float64: it must not be twice as far from that.

    Returns:
        True; False where the outputs are 0 or not finite and so say nothing.
    Raises:
        Refused: they differ.
    """
    said = False
    for call in calls:
        run, (x, *rest), cond = call.of(model), call.given, call.cond
        expected = run(x, *rest, **cond)
        eps = torch.finfo(expected.dtype).eps
        nudged = run(x * (1 + eps), *rest, **cond).double()
        try:
            got = prediction_of(compiled(x, *rest, **cond))
        except RuntimeError as error:
            raise Refused(f"compiled it fails: {str(error).strip()[:300]}") from error
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise Refused(f"compiled it returns {got.dtype} {list(got.shape)} and not {expected.dtype}")
        far, size = float((got.double() - expected.double()).norm()), float(expected.double().norm())
        bound = operations**0.5 * max(eps * size, float((nudged - expected.double()).norm()))
        if not size > 0 or size == float("inf"):
            continue
        if not far <= bound and not _as_exact(got, expected, model, call):
            raise Refused(
                f"compiled it is off by {far:.3g} where rounding explains {bound:.3g} of {size:.3g}"
            )
        said = True
    return said


def _as_exact(got: Tensor, expected: Tensor, model: Any, call: Call) -> bool:
    """Whether `got` is at most twice as far as `expected` from what the network computes in float64."""
    if not isinstance(model, torch.nn.Module):
        return False
    try:
        exact = call.of(copy.deepcopy(model).double())
        given = [a.double() if a.is_floating_point() else a for a in call.given]
        cond = {name: a.double() if a.is_floating_point() else a for name, a in call.cond.items()}
        truth = exact(*given, **cond)
    except Exception:  # whatever a network raises that does not run in float64: then nothing speaks for `got`
        return False
    near, far = (float((a.double() - truth.double()).norm()) for a in (expected, got))
    return far <= 2 * near

"""A network's forward pass as a package on disk: exported, compiled ahead of time, loaded without a compiler.

torch.export writes the network down as a graph, AOTInductor compiles that in a process of its own, so that
neither the interpreter's lock nor torch's global settings are held meanwhile, and the package lies in the
cache of the C++ kernels (FASTDIFF_CACHE). Its name is a digest of what the code depends on: graph, shapes and
strides, torch, settings, compiler, processor. Weights are not in it: the caller lends them (`Package.lend`).
Another process finds it without exporting, by what the graph follows from: classes, settings, source files.

    python -m fastdiff.packages PROGRAM PACKAGE CONFIG        the compiling process
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.anatomy import description, tensors_of
from fastdiff.kernels import _cache
from fastdiff.nn import prediction_of

_SECONDS = 1800  # after which a compilation is given up
# Iterations below which a loop runs on one thread, as it ends sooner than threads meet at its end; Inductor's
# own bound of 512 for each of them is the same from 16 threads on. A step at batch 1 on two cores of a Xeon,
# AVX-512: digits 1.09 to 1.13x, policy 1.08x, unet 1.03 to 1.05x as fast, the MLP as before. Inductor asks
# again for each loop of a nest, so an outer one of few iterations may get fewer threads; not measured.
_LEAST_LOOP = 8192
_LEAST_CHUNK = 512
_compiling: set[subprocess.Popen[str]] = set()


class Refused(Exception):
    """A network cannot be compiled ahead of time; the text says why."""


class Call(NamedTuple):
    """How a network is called: `method(*given, **cond)`.

    Attributes:
        given, cond: its arguments.
        method: the name of the network's method, which may be a part of the whole.
    """

    given: tuple[Tensor, ...]
    cond: Mapping[str, Tensor]
    method: str = "__call__"

    def of(self, network: Any) -> Callable[..., Tensor]:
        """The network as a function of the arguments that returns a tensor."""
        method = getattr(network, self.method)
        return lambda *given, **cond: prediction_of(method(*given, **cond))

    def described(self) -> list[str]:
        """The method and the arguments' names and layouts."""
        named = [*enumerate(self.given), *sorted(self.cond.items())]
        return [self.method, *(_described(str(name), tensor) for name, tensor in named)]


class _Plain(torch.nn.Module):
    """What a call evaluates of a network, as a module of tensors."""

    def __init__(self, network: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, given: tuple[Tensor, ...], cond: dict[str, Tensor]) -> Tensor:
        return prediction_of(getattr(self.network, self.method)(*given, **cond))


@dataclass(frozen=True)
class Exported:
    """A network as a graph.

    Attributes:
        program: torch's `ExportedProgram`.
        path: where its package belongs; its name ends with the number of operations.
        config: Inductor's settings.
    """

    program: Any
    path: Path
    config: Mapping[str, Any]


def structure_copy(network: torch.nn.Module) -> torch.nn.Module:
    """A copy in eval mode, with modules of its own on the same tensors.

    Exporting puts other tensors in a module's place for a while, which a chain in another thread must not
    see.

    Raises:
        Refused: a module that cannot be copied.
    """
    shared = {
        id(value): value
        for module in network.modules()
        for held in (vars(module), module._parameters, module._buffers)
        for value in held.values()
        if isinstance(value, Tensor)
    }
    try:
        return copy.deepcopy(network, shared).eval()
    except Exception as error:  # whatever a module's own __deepcopy__ or an attribute raises
        raise Refused(f"it cannot be copied: {_first_line(error)}") from error


def outline(network: torch.nn.Module, call: Call) -> tuple[str, bool]:
    """The beginning of the package's name, known without exporting, and whether the graph follows from it."""
    known = description(network)
    kinds = known or [type(module).__qualname__ for module in network.modules()]
    shapes = [_described(name, tensor) for name, tensor in tensors_of(network)]
    parts = (*kinds, *shapes, *call.described(), json.dumps(_settings()))
    name = _cache.digest(*parts, *_circumstances())
    return name[:12], known is not None


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return _cache.compiler() is not None


def cached(beginning: str) -> list[Path]:
    """The packages whose name begins so."""
    return sorted(_cache.folder().glob(f"step-{beginning}-*.pt2"))


def export(network: torch.nn.Module, call: Call) -> Exported:
    """The network's graph for inputs like a call's.

    Args:
        network: a `structure_copy`.
        call: of its arguments only shapes and dtypes count.
    Raises:
        Refused: torch.export cannot follow the network, or what it does is not a function of its input.
    """
    beginning, _ = outline(network, call)
    # tensors of an inference mode cannot be traced
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        like = tuple(torch.zeros(a.shape, dtype=a.dtype) for a in call.given)
        extra = {name: torch.zeros(a.shape, dtype=a.dtype) for name, a in sorted(call.cond.items())}
        try:
            program = torch.export.export(_Plain(network, call.method), (like, extra), strict=False)
        except Exception as error:  # torch.export raises whatever the network or the tracing does
            raise Refused(f"torch.export fails: {_first_line(error)}") from error
    # Inductor names such constants anew, so that they could not be lent, and who changes one is not seen
    if lifted := list(program.graph_signature.inputs_to_lifted_tensor_constants.values()):
        name = lifted[0].removeprefix("network.")
        raise Refused(
            f"it uses a tensor that is no parameter and no buffer ({name}); register it as a buffer"
        )
    if _writes_to_inputs(program.graph):
        raise Refused("it writes to its input, its parameters or its buffers")
    inputs = [
        _described(node.name, node.meta["val"])
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    ]
    config = _settings()
    parts = (str(program.graph), str(program.graph_signature), *inputs, json.dumps(config))
    name = _cache.digest(*parts, *_circumstances())
    operations = sum(node.op == "call_function" for node in program.graph.nodes)
    return Exported(program, _cache.folder() / f"step-{beginning}-{name}-{operations}.pt2", config)


def _settings() -> dict[str, Any]:
    """Inductor's settings, on which a package's name depends."""
    threads = torch.get_num_threads()
    return {
        # weights are lent at run time: nothing may be folded, inlined or kept of them
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.use_runtime_constant_folding": False,
        "always_keep_tensor_constants": True,
        "freezing": False,
        "cpp.threads": threads,
        "cpp.min_chunk_size": max(_LEAST_CHUNK, _LEAST_LOOP // threads),
    }


def _writes_to_inputs(graph: Any) -> bool:
    """Whether an operation of the graph writes to an input or to a view of one."""
    own = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            if own.intersection(node.all_input_nodes):  # an element of a tuple of views
                own.add(node)
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and value in own:
                if argument.alias_info.is_write:
                    return True
                own.add(node)
    return False


def build(exported: Exported, aside: bool = False) -> None:
    """Compile into the cache, in another process.

    Args:
        aside: nobody waits for it: at a lower priority.
    Raises:
        Refused: there is no compiler, or it fails.
    """
    if not has_compiler():
        raise Refused("no C++ compiler was found; install g++")
    try:
        with _cache.building(exported.path.parent) as folder:
            program, package = folder / "program.pt2", folder / "package.pt2"
            with torch.inference_mode(False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that lie channels last
                torch.export.save(exported.program, program)
            _compile(program, package, exported.config, aside)
            _cache.keep(package, exported.path)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise Refused(f"the compilation failed: {_first_line(error)}") from error


def _compile(program: Path, package: Path, config: Mapping[str, Any], aside: bool) -> None:
    """Run the compiling process, which ends with this one at the latest.

    Raises:
        Refused: it fails, or takes too long.
    """
    root = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": search, "FASTDIFF_NATIVE": "0"}
    environment.pop("TRITON_INTERPRET", None)
    settings = json.dumps({**config, "aside": aside})
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff.packages", str(program), str(package), settings],
        cwd=program.parent,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _compiling.add(process)
    try:
        _, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise Refused(f"the compilation took more than {_SECONDS} s") from None
    finally:
        process.kill()
        process.wait()
        _compiling.discard(process)
    if process.returncode or not package.exists():
        lines = said.strip().splitlines() or [f"it ended with status {process.returncode}"]
        raise Refused(f"the compilation failed: {lines[-1][:300]}")


@atexit.register
def _end_children() -> None:
    for process in list(_compiling):
        process.kill()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compiling.clear)  # they are the parent's to end


class Package:
    """A loaded package: the network as `package(*given, **cond)`, on weights that the caller keeps.

    Args:
        path: in the cache.
        assumed: that it is the network's follows from an outline, and not from its graph.
    Attributes:
        operations: how many the graph has.
    Raises:
        Refused: the file is damaged, or torch cannot load it.
        OSError: it belongs to another user.
    """

    def __init__(self, path: Path, assumed: bool = False) -> None:
        if not _cache.intact(path):
            raise Refused(f"{path} is damaged")
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise Refused(f"its package cannot be loaded: {_first_line(error)}") from error
        _cache.used(path)
        self._load: Callable[..., None] = loader.load_constants
        self._run: Callable[[list[Tensor]], list[Tensor]] = loader.run
        self._lock = threading.Lock()
        self._needed = loader.get_constant_fqns()
        self.operations = int(path.stem.rpartition("-")[2])
        self.assumed = assumed
        self._lent: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}

    def reads(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it was lent these and they still lie where they did."""
        return self._addresses == _addresses(tensors)

    def lend(self, tensors: Mapping[str, Tensor]) -> None:
        """Let it read these parameters and buffers, now and after every change in place.

        Raises:
            Refused: it needs a tensor that is not there.
        """
        known = {f"network.{name}": tensor.detach() for name, tensor in tensors.items()}
        if missing := [name for name in self._needed if name not in known]:
            raise Refused(f"its package asks for {missing[0]!r}, which the network does not have")
        lent = {name: known[name] for name in self._needed}
        borrowed = {name: _borrowed(tensor) for name, tensor in lent.items()}
        with self._lock:
            self._load(borrowed, False, True, True)
            self._lent = lent  # after the load: until then the old ones may be read
        self._addresses = _addresses(tensors)

    def __call__(self, *given: Tensor, **cond: Tensor) -> Tensor:
        """The network's output, called as it was exported."""
        # dense, as it was exported; one network runs in one thread at a time, whoever lends it weights
        arguments = [*given, *(cond[name].contiguous() for name in sorted(cond))]
        with self._lock:
            return self._run(arguments)[0]


def _borrowed(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that does not keep it: torch never lets go of the tensors it is lent."""
    if not tensor.numel():
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * ((last + 1) * tensor.element_size())).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())} {tensor.device}"


def _circumstances() -> tuple[str, ...]:
    """What compiled code depends on besides its graph and settings."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (torch.__version__, capability, _cache.processor(), *(_cache.compiler() or ()))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def main(program: str, package: str, config: str) -> None:
    """Compile an exported program: the process that `build` starts."""
    logging.captureWarnings(True)
    settings = json.loads(config)
    if settings.pop("aside") and hasattr(os, "nice"):
        os.nice(10)
    torch.set_num_threads(settings["cpp.threads"])
    graph = torch.export.load(program)
    torch._inductor.aoti_compile_and_package(graph, package_path=package, inductor_configs=settings)


if __name__ == "__main__":
    main(*sys.argv[1:])

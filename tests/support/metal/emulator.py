"""Runs the text of Metal and CUDA kernels on a CPU, and checks what they do.

:class:`Emulator` has twins of ``mx.fast.metal_kernel`` and ``mx.fast.cuda_kernel``. A call builds
the text that MLX would give to the GPU's compiler, compiles it with g++ against shim.h, and runs it
with real threadgroups, barriers and simd operations (runtime.cpp). It fails where a kernel

- reads or writes out of bounds of a buffer or of a threadgroup array, or writes to an input,
- reads what nothing has written, or leaves elements of an output unwritten,
- has two threads touch the same memory with no barrier between them that fences it, one writing,
- lets threads reach different barriers or simd operations, or some of them none,
- uses more threadgroup memory or threads than Metal has.

What it cannot show: that Apple's compiler takes the text, and how fast anything is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_HERE = Path(__file__).parent
_COMPILER = "g++"
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
# A float literal of Metal is a float, without an f too.
_METAL_FLAGS = ("-fsingle-precision-constant",)
_CUDA_FLAGS = ("-DEMULATE_CUDA",)
_ORDERS = ("forward", "reverse", "random")
_RED_ZONE = 1 << 17
_REPORT_BYTES = 1 << 16

# A type's name in Metal, in CUDA, and NumPy's for its bytes.
_TYPES = {
    mx.bool_: ("bool", "bool", np.bool_),
    mx.int32: ("int32_t", "int32_t", np.int32),
    mx.uint32: ("uint32_t", "uint32_t", np.uint32),
    mx.float16: ("float16_t", "__half", np.float16),
    mx.bfloat16: ("bfloat16_t", "__nv_bfloat16", np.uint16),
    mx.float32: ("float", "float", np.float32),
}
# In MLX's order. One that is not here is an unknown name to the compiler.
_ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

Template = Sequence[tuple[str, Any]]
Three = tuple[int, int, int]


class KernelError(RuntimeError):
    """A kernel cannot be compiled, or does what it must not; of the class that MLX raises."""


@dataclass(frozen=True)
class Kernel:
    """What ``mx.fast.metal_kernel`` and ``mx.fast.cuda_kernel`` are given."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True


@dataclass(frozen=True)
class Assembled:
    """A kernel's whole text, the function in it, and the expressions that call it."""

    text: str
    function: str
    arguments: list[str]


def metal_text(
    kernel: Kernel, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype], template: Template
) -> Assembled:
    """What MLX gives to Metal's compiler after its own headers, byte for byte."""
    values = [_TYPES[v][0] if isinstance(v, mx.Dtype) else str(int(v)) for _, v in template]
    name = "custom_kernel_" + kernel.name
    if template:
        name += "__" + "_".join(values).replace("-", "_")
    for array in inputs:
        kind = "s" if array.ndim == 0 else "c" if array.size < 8 else ""
        name += f"_{_TYPES[array.dtype][0]}{kind}"
    name += "".join(f"_{_TYPES[dtype][0]}" for dtype in outputs)

    parameters, arguments = [], []
    for word, array in zip(kernel.input_names, inputs, strict=True):
        space = "constant" if array.size < 8 else "device"
        ctype = _TYPES[array.dtype][0]
        parameters.append(f"const {space} {ctype}{'*' if array.ndim else '&'} {word}")
        arguments.append(f"{'' if array.ndim else '*'}(const {ctype}*)b[{len(arguments)}]")
        if array.ndim and f"{word}_shape" in kernel.source:
            parameters.append(f"const constant int* {word}_shape")
            arguments.append(f"(const int*)b[{len(arguments)}]")
    for word, dtype in zip(kernel.output_names, outputs, strict=True):
        parameters.append(f"device {_TYPES[dtype][0]}* {word}")
        arguments.append(f"({_TYPES[dtype][0]}*)b[{len(arguments)}]")
    lines = [f"  {parameter} [[buffer({i})]]" for i, parameter in enumerate(parameters)]
    for attribute, ctype in _ATTRIBUTES.items():
        if attribute in kernel.source:
            lines.append(f"  {ctype} {attribute} [[{attribute}]]")
            arguments.append(f"at->{attribute}")

    text, function = kernel.header, name
    if template:
        kinds = [
            "typename" if isinstance(v, mx.Dtype) else "bool" if isinstance(v, bool) else "int"
            for _, v in template
        ]
        words = ", ".join(f"{kind} {n}" for kind, (n, _) in zip(kinds, template, strict=True))
        text += f"template <{words}>\n"
        function += f"<{', '.join(values)}>"
    text += f"[[kernel]] void {name}(\n" + ",\n".join(lines) + ") {\n" + kernel.source + "\n}\n"
    if template:
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({function}) {function};\n'
    return Assembled(text, function, arguments)


def cuda_text(
    kernel: Kernel, inputs: Sequence[mx.array], outputs: Sequence[mx.Dtype], template: Template
) -> Assembled:
    """What MLX gives to CUDA's compiler after its own headers, without the namespace."""
    name = "custom_kernel_" + kernel.name
    parameters, arguments = [], []
    for word, array in zip(kernel.input_names, inputs, strict=True):
        parameters.append(f"    const {_TYPES[array.dtype][1]}* {word}")
        arguments.append(f"(const {_TYPES[array.dtype][1]}*)b[{len(arguments)}]")
        if array.ndim and f"{word}_shape" in kernel.source:
            parameters.append(f"    const __grid_constant__ Shape {word}_shape")
            arguments.append(f"*(const Shape*)b[{len(arguments)}]")
    for word, dtype in zip(kernel.output_names, outputs, strict=True):
        parameters.append(f"    {_TYPES[dtype][1]}* {word}")
        arguments.append(f"({_TYPES[dtype][1]}*)b[{len(arguments)}]")
    constants = "".join(
        f"  using {n} = {_TYPES[v][1]};\n"
        if isinstance(v, mx.Dtype)
        else f"  constexpr {'bool' if isinstance(v, bool) else 'int'} {n} = {str(v).lower()};\n"
        for n, v in template
    )
    text = f"{kernel.header}__global__ void {name}(\n" + ",\n".join(parameters) + ") {\n"
    text += (constants and constants + "\n") + kernel.source + "\n}\n"
    return Assembled(text, name, arguments)


_ARRAY = r"\w+\s*(?:\[[^\]]*\]\s*)+"
_SHARED = re.compile(rf"\b(?:threadgroup|__shared__)\s+(\w+)\s+({_ARRAY}(?:,\s*{_ARRAY})*);")


def _to_cpp(text: str) -> str:
    """The text with its threadgroup arrays declared as the emulator's."""
    text = re.sub(r"//[^\n]*", "", text)
    slots = iter(range(1000))

    def declared(match: re.Match[str]) -> str:
        arrays = re.findall(r"(\w+)\s*((?:\[[^\]]*\]\s*)+)", match[2])
        return " ".join(
            f"EMULATOR_SHARED({next(slots)}, {match[1]}, {name}, {size.strip()});"
            for name, size in arrays
        )

    def line_of_code(line: str) -> str:
        if line.lstrip().startswith("#"):
            return line
        line = _SHARED.sub(declared, line)
        if re.search(r"\b(threadgroup|__shared__)\s+\w+\s+\w+\s*[;=\[]", line):
            raise KernelError(f"the emulator cannot read this declaration: {line.strip()}")
        return line

    return "\n".join(map(line_of_code, text.split("\n")))


@functools.cache
def _library(cache: Path, text: str, flags: tuple[str, ...], mode: int) -> ctypes.CDLL:
    """The text as a loaded library, compiled unless the cache has it."""
    parts = [text, *(path.read_text() for path in sorted(_HERE.glob("*.[hc]*"))), *_FLAGS, *flags]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = cache / f"{key}.so"
    if not library.exists():
        own = library.with_suffix(f".{os.getpid()}")
        command = [_COMPILER, *_FLAGS, *flags, f"-I{_HERE}", "-shared", "-xc++", "-"]
        done = subprocess.run(
            [*command, "-o", str(own), "-lm"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise KernelError("does not compile:\n" + "\n".join(errors or [done.stderr]))
        # Two test processes may build the same kernel.
        own.replace(library)
    return ctypes.CDLL(str(library), mode)


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_int32),
        ("element", ctypes.c_int32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int32),
        ("breadth", ctypes.c_int32),
        ("check", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
    )


class _Memory:
    """A buffer of its own, with nothing near it, as the GPU sees it."""

    def __init__(self, name: str, values: np.ndarray, writable: bool):
        self.name, self.values = name, values
        raw = np.full(values.nbytes + 2 * _RED_ZONE, 0xFF, np.uint8)
        self.inside = raw[_RED_ZONE : _RED_ZONE + values.nbytes]
        self.inside[:] = np.frombuffer(values.tobytes(), np.uint8)
        self.entry = _Buffer(
            self.inside.ctypes.data, values.nbytes, name.encode(), writable, values.itemsize
        )

    def read(self) -> np.ndarray:
        return np.frombuffer(self.inside.tobytes(), self.values.dtype).reshape(self.values.shape)


def _numpy(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        # A view of a scalar is refused.
        return np.array(array.reshape(-1).view(mx.uint16)).reshape(array.shape)
    return np.array(array)


def _mlx(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


@dataclass
class Emulator:
    """A GPU that is not there.

    Attributes:
        cache: folder for compiled kernels.
        breadth: whether simdgroups advance one simd operation each in turn, as in lockstep; else
            one runs up to the next barrier before another begins.
        order: of threadgroups, of simdgroups in them and of lanes: ``"forward"``, ``"reverse"`` or
            ``"random"``.
        seed: of the random order.
        check: whether accesses are checked; without, kernels run two to ten times faster.
        strict: whether what was found is an error; else it is in ``findings`` only.
        findings: what the latest launch did that it must not.
        reads: how many elements it read of each buffer, if it was checked.
    """

    cache: Path
    breadth: bool = True
    order: str = "forward"
    seed: int = 1
    check: bool = True
    strict: bool = True
    findings: list[str] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)

    def metal_kernel(self, **given: Any) -> Callable[..., list[mx.array]]:
        """A twin of ``mx.fast.metal_kernel``."""
        return functools.partial(self._call, Kernel(**given), metal_text, _METAL_FLAGS)

    def cuda_kernel(self, **given: Any) -> Callable[..., list[mx.array]]:
        """A twin of ``mx.fast.cuda_kernel``."""
        return functools.partial(self._call, Kernel(**given), cuda_text, _CUDA_FLAGS)

    def _call(
        self,
        kernel: Kernel,
        assemble: Callable[..., Assembled],
        flags: tuple[str, ...],
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Three,
        threadgroup: Three,
        template: Template = (),
    ) -> list[mx.array]:
        assembled = assemble(kernel, inputs, output_dtypes, template)
        memories = []
        for word, array in zip(kernel.input_names, inputs, strict=True):
            memories.append(_Memory(word, _numpy(array), False))
            if array.ndim and f"{word}_shape" in kernel.source:
                sizes = np.zeros(10, np.int32)
                sizes[: array.ndim] = array.shape
                memories.append(_Memory(f"{word}_shape", sizes, False))
        outputs = []
        for word, shape, dtype in zip(
            kernel.output_names, output_shapes, output_dtypes, strict=True
        ):
            unset = np.full(int(np.prod(shape)) * dtype.size, 0xFF, np.uint8)
            outputs.append(_Memory(word, unset.view(_TYPES[dtype][2]).reshape(shape), True))
        if flags is _CUDA_FLAGS:
            # CUDA has whole blocks only; Metal clips the last ones.
            grid = tuple(-(-n // t) * t for n, t in zip(grid, threadgroup, strict=True))
        self._launch(kernel.name, assembled, flags, [*memories, *outputs], grid, threadgroup)
        return [
            _mlx(memory.read(), dtype) for memory, dtype in zip(outputs, output_dtypes, strict=True)
        ]

    def _launch(
        self,
        name: str,
        assembled: Assembled,
        flags: tuple[str, ...],
        memories: list[_Memory],
        grid: Three,
        threadgroup: Three,
    ) -> None:
        text = (
            f'#include "shim.h"\n#line 1 "{name}"\n{_to_cpp(assembled.text)}\n'
            'extern "C" EMULATOR_OWN void kernel_entry(void** b, const Position* at) '
            f"{{ {assembled.function}({', '.join(assembled.arguments)}); }}\n"
        )
        # Kernels find the runtime's functions, and its -fsanitize=thread callbacks, in the process.
        runtime = _library(self.cache, '#include "runtime.cpp"\n', (), ctypes.RTLD_GLOBAL)
        checks = ("-fsanitize=thread", "-nostdlib") if self.check else ()
        kernel = _library(self.cache, text, (*flags, *checks), ctypes.RTLD_LOCAL)
        report = ctypes.create_string_buffer(_REPORT_BYTES)
        entries = (_Buffer * len(memories))(*(memory.entry for memory in memories))
        arguments = (ctypes.c_void_p * len(memories))(*(m.entry.begin for m in memories))
        reads = (ctypes.c_uint64 * len(memories))()
        options = _Options(_ORDERS.index(self.order), self.breadth, self.check, self.seed)
        stopped = runtime.emulator_launch(
            ctypes.cast(kernel.kernel_entry, ctypes.c_void_p),
            arguments,
            entries,
            len(memories),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            ctypes.byref(options),
            report,
            ctypes.c_size_t(_REPORT_BYTES),
            reads,
        )
        self.reads = {memory.name: n for memory, n in zip(memories, reads, strict=True)}
        lines = assembled.text.split("\n")
        self.findings = [
            re.sub(r"\bline (\d+)", lambda at: f"`{lines[int(at[1]) - 1].strip()}`", finding)
            for finding in report.value.decode().splitlines()
        ]
        if stopped or (self.findings and self.strict):
            raise KernelError(f"{name}: " + "; ".join(self.findings))

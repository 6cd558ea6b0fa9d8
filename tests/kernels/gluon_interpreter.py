"""Runs Gluon's kernels for Hopper on CPU tensors, as Triton's interpreter, which knows no Gluon, does Triton's.

    with interpreted(seed=0):
        fp8_gemm(...)  # launches of Gluon kernels come here, others go where they went

The kernels' own Python runs, on the machine of gluon_machine.py, whose groups of warps and copies take turns in an
order drawn from the seed. So a wait, fence or release that is missing gives wrong numbers under some seed, and these
raise at once: groups that all wait, a product read before its wait, shared memory that was written by threads and is
read by a copy or a product without a fence between, addresses outside a tensor's storage, copies that nobody waited
for, barriers with more arrivals than they count. Shared memory begins as NaN.

Not modelled: what the warps of one group, whose work is taken to be one step, do to each other; layouts of registers
(the compiler checks those); how tensor cores round: products and sums are those of Triton's interpreter, so that what
two kernels compute in the same order is the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
import triton.language as tl
from minids_kernels import _launch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.kernels.gluon_machine import (
    BITS,
    DTYPES,
    NAMES,
    Barrier,
    Block,
    Group,
    Memory,
    Pointer,
    Product,
    Program,
    Shared,
    barrier_at,
    of_tensors,
    pause,
    pointer,
    running_group,
    tensors,
)


def _range(*bounds: Any, **options: Any) -> Iterator[Block]:
    return (Block(torch.tensor(i, dtype=torch.int32)) for i in range(*(int(b) for b in bounds)))


class Mbarrier:
    MBarrierLayout = hopper.mbarrier.MBarrierLayout

    @staticmethod
    def init(at: Shared, count: int) -> None:
        at.memory.barriers[at.start] = Barrier(int(count))

    @staticmethod
    def expect(at: Shared, size: int, pred: Any = True) -> None:
        pause()
        if pred:
            barrier_at(at).announce(int(size))

    @staticmethod
    def arrive(at: Shared, count: int = 1, pred: Any = True) -> None:
        pause()
        if pred:
            barrier_at(at).arrive(int(count))

    @staticmethod
    def wait(at: Shared, phase: Any, pred: Any = True) -> None:
        if pred:
            barrier, parity = barrier_at(at), int(phase) & 1
            number = Program.running.memories.index(at.memory)
            what = f"phase {parity} of barrier {at.start // 8} in allocation {number}"
            running_group().pause(lambda: barrier.phase & 1 != parity, what)


def _box(descriptor: TensorDescriptor, corner: Sequence[Any]) -> tuple[Pointer, Block]:
    """Addresses of a block at `corner`, and which of them the described tensor has."""
    start = pointer(descriptor.base)
    place, inside = start.place.x, torch.tensor(True)
    bounds = zip(corner, descriptor.block_shape, descriptor.shape, descriptor.strides, strict=True)
    for axis, (first, width, size, stride) in enumerate(bounds):
        index = (int(first) + torch.arange(width)).view([-1 if i == axis else 1 for i in range(len(corner))])
        inside = inside & (index >= 0) & (index < size)
        place = place + index * stride  # in 64 bits, which wrap: ragged descriptors rely on it
    return Pointer(start.storage, Block(place)), Block(inside)


class Tma:
    @staticmethod
    def async_copy_global_to_shared(
        source: TensorDescriptor, corner: Sequence[Any], at: Shared, to: Shared, pred: Any = True
    ) -> None:
        pause()
        assert to.stored == source.block_shape and to.layout == source.layout and not to.turned
        barrier, (address, inside) = barrier_at(at), _box(source, corner)

        def copy() -> None:
            to.write(_numbers(address, inside, 0))
            barrier.land(to.size)

        if pred:
            Program.running.landing.append(copy)

    @staticmethod
    def async_copy_shared_to_global(target: TensorDescriptor, corner: Sequence[Any], source: Shared) -> None:
        pause()
        assert source.stored == target.block_shape and source.layout == target.layout and not source.turned
        source.check_fenced()
        address, inside = _box(target, corner)
        running_group().queues["store"].append(lambda: _put(address, inside, source.read()))

    @staticmethod
    def store_wait(pendings: int) -> None:
        pause()
        running_group().finish("store", int(pendings))


def _committed() -> None:
    """Ends a group of copies in the queue of them."""


class AsyncCopy:
    """Copies of each thread, in order."""

    @staticmethod
    def async_copy_global_to_shared(to: Shared, source: Pointer, mask: Any = None) -> None:
        pause()
        group, values = running_group(), _numbers(source, mask, 0)
        group.queues["copy"].append(lambda: to.write_by(group, values))

    @staticmethod
    def commit_group() -> None:
        running_group().queues["copy"].append(_committed)

    @staticmethod
    def wait_group(left: int) -> None:
        pause()
        queue = running_group().queues["copy"]
        while queue.count(_committed) > int(left):
            queue.popleft()()


def _fence() -> None:
    group = running_group()
    for memory in Program.running.memories:
        memory.unfenced = [write for write in memory.unfenced if write[0] is not group]


def _warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False) -> Product:
    assert is_async
    pause()
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.check_fenced()
    assert a.shape[1] == b.shape[0] and acc.shape == [a.shape[0], b.shape[1]], (a.shape, b.shape, acc.shape)
    product, adds, group = Product(acc.shape), bool(use_acc), running_group()

    def multiply() -> None:
        left, right = a.read() if isinstance(a, Shared) else a.x, b.read()
        product.x = torch.from_numpy(numpy.matmul(left.float().numpy(), right.float().numpy()))
        if adds:
            product.x += acc.x

    group.queues["product"].append(multiply)
    group.products.append(product)
    return product


def _warpgroup_mma_wait(left: int, deps: Sequence[Any]) -> Any:
    pause()
    running_group().promise(int(left))
    done = [Block(d.x) if isinstance(d, Product) and d.promised else d for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


def _numbers(at: Pointer, mask: Any, hidden: float | None) -> Tensor:
    """What lies there, and where masked `hidden`, or if None bytes that are no number."""
    place, kept = at.places(mask)
    bits = BITS[at.storage.itemsize]
    other = torch.tensor([255] * at.storage.itemsize, dtype=torch.uint8).view(bits)
    if hidden is not None:
        other = torch.tensor([hidden], dtype=at.storage.dtype).view(bits)
    if not at.storage.numel():
        return other[0].expand(kept.shape).clone().view(at.storage.dtype)
    found = torch.from_numpy(at.storage.view(bits).numpy().take(place.reshape(-1).numpy())).view(place.shape)
    return found.where(kept, other[0]).view(at.storage.dtype)


def _load(at: Pointer, mask: Any = None, other: Any = None) -> Block:
    pause()
    return Block(_numbers(at, mask, other))


def _put(at: Pointer, mask: Any, values: Tensor) -> None:
    place, kept = at.places(mask)
    bits = BITS[at.storage.itemsize]
    at.storage.view(bits).numpy()[place[kept].numpy()] = values.expand(place.shape)[kept].view(bits).numpy()


def _store(at: Pointer, block: Any, mask: Any = None) -> None:
    pause()
    _put(at, mask, tensors(block)[0].to(at.storage.dtype))


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    memory = Memory(math.prod(shape) * DTYPES[dtype].itemsize)
    Program.running.memories.append(memory)
    return Shared(memory, 0, dtype, shape, layout, False)


def _warp_specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int], registers: Any) -> None:
    program, own = Program.running, running_group()
    groups = [
        Group(program, f"group {i} ({call.__name__})", count, functools.partial(call, *args))
        for i, ((call, args), count) in enumerate(zip(parts, [own.warps, *warps], strict=True))
    ]
    program.groups += groups
    own.pause(lambda: all(group.done for group in groups), "its groups")


def _scan(x: Block, axis: int, combine: Callable[[Block, Block], Block]) -> Block:
    found = [Block(part) for part in x.x.unbind(axis)]
    for i in range(1, len(found)):
        found[i] = combine(found[i - 1], found[i])
    return Block(torch.stack([part.x for part in found], axis))


def _instruction(name: str, *given: Tensor) -> Tensor:
    """One of PTX, on registers that are tensors of int16, int32, int64 or float32."""
    match name:
        case "mov.b32" | "shfl.sync.idx.b32":  # a number that is the same in all lanes
            return given[0]
        case "cvt.rn.f16x2.e4m3x2":
            return given[0].unsqueeze(-1).view(torch.float8_e4m3fn).half().view(torch.int32).squeeze(-1)
        case "cvt.f32.f16":
            return given[0].view(torch.float16).float()
        case "cvt.rn.bf16x2.f32":  # the upper half comes first
            return torch.stack(given[::-1], -1).bfloat16().view(torch.int32).squeeze(-1)
        case "mul.f32":
            return given[0] * given[1]
    raise NotImplementedError(f"PTX: {name}")


def _assembly(text: str, constraints: str, args: Sequence[Block], dtype: Any, is_pure: bool, pack: int) -> Any:
    """The statements one after the other, for all lanes."""
    if "cp.async.bulk.prefetch" in text:  # changes nothing but when loads come back
        return Block(torch.tensor(0, dtype=torch.int32))
    outputs = constraints.count("=")
    registers = {f"${outputs + i}": arg.x.contiguous() for i, arg in enumerate(args)}
    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        operands = re.findall(r"\{.*?\}|[^,\s]+", rest)
        if name in ("", ".reg"):
            continue
        if operands[0].startswith("{"):
            halves = registers[operands[1]].unsqueeze(-1).view(torch.int16).unbind(-1)
            registers |= zip(re.findall(r"\w+", operands[0]), halves, strict=True)
        else:
            known = [registers.get(operand, torch.zeros(1, dtype=torch.int32)) for operand in operands[1:]]
            registers[operands[0]] = _instruction(name, *known)
    found = [Block(registers[f"${i}"]) for i in range(outputs)]
    return found[0] if outputs == 1 else tuple(found)


def _static_assert(condition: bool, message: str = "") -> None:
    assert condition, message


def _filled(shape: Sequence[int], value: Any, dtype: Any, layout: Any) -> Block:
    return Block(torch.full(list(shape), value, dtype=DTYPES[dtype]))


def _exp(x: Block) -> Block:
    return Block(torch.from_numpy(numpy.exp(x.x.numpy())))  # as Triton's interpreter does


def _sum(x: Block, axis: int) -> Block:
    return Block(x.x.sum(axis, dtype=x.x.dtype))


LANGUAGE = types.SimpleNamespace(
    **vars(gl)
    | dict(
        allocate_shared_memory=_allocate,
        arange=lambda start, end, layout: Block(torch.arange(start, end, dtype=torch.int32)),
        associative_scan=_scan,
        cdiv=lambda a, b: (a + (b - 1)) // b,
        convert_layout=lambda x, layout, assert_trivial=False: x,
        exp2=of_tensors(torch.exp2),
        fma=of_tensors(lambda a, b, c: a * b + c),
        full=_filled,
        inline_asm_elementwise=_assembly,
        join=lambda a, b: Block(torch.stack((a.x, b.x), -1)),
        load=_load,
        log2=of_tensors(torch.log2),
        max=lambda x, axis: Block(x.x.amax(axis)),
        maximum=of_tensors(torch.maximum),
        minimum=of_tensors(torch.minimum),
        num_programs=lambda axis: Block(torch.tensor(Program.running.grid[axis], dtype=torch.int32)),
        num_warps=lambda: running_group().warps,
        program_id=lambda axis: Block(torch.tensor(Program.running.index[axis], dtype=torch.int32)),
        static_assert=_static_assert,
        static_range=range,
        store=_store,
        sum=_sum,
        to_tensor=lambda x: Block(tensors(x)[0]),
        warp_specialize=_warp_specialize,
        where=lambda condition, a, b: Block(torch.where(condition.x, *tensors(a, b))),
        zeros=lambda shape, dtype, layout: _filled(shape, 0, dtype, layout),
    )
)
MEANT = {
    id(thing): meant
    for thing, meant in (
        (gl, LANGUAGE),
        (tl, types.SimpleNamespace(range=_range, exp=_exp)),
        (gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier, pause),  # renamed in Triton 3.7
        (hopper.mbarrier, Mbarrier),
        (hopper.tma, Tma),
        (hopper.async_copy, AsyncCopy),
        (hopper.fence_async_shared, _fence),
        (hopper.warpgroup_mma, _warpgroup_mma),
        (hopper.warpgroup_mma_wait, _warpgroup_mma_wait),
    )
}


PYTHON: dict[types.FunctionType, Callable[..., Any]] = {}


def _python(function: types.FunctionType) -> Callable[..., Any]:
    """A kernel's own code, to which the language's names mean what stands above."""

    def meant(value: Any) -> Any:
        if isinstance(value, JITFunction | InterpretedFunction):  # Gluon's are of the former, too
            return _python(value.fn)
        return value.value if isinstance(value, gl.constexpr) else MEANT.get(id(value), value)

    if function not in PYTHON:
        names, code, scope = function.__globals__, function.__code__, {"range": _range}
        PYTHON[function] = types.FunctionType(code, scope, function.__name__, function.__defaults__)
        scope |= {name: meant(names[name]) for name in code.co_names if name in names}  # itself among them, perhaps
    return PYTHON[function]


def _given(value: Any) -> Any:
    if isinstance(value, Tensor):
        return pointer(value)
    if isinstance(value, TensorDescriptor):
        return types.SimpleNamespace(**vars(value), dtype=NAMES[value.base.dtype])
    dtype = torch.float32 if isinstance(value, float) else torch.int32 if abs(value) < 2**31 else torch.int64
    return Block(torch.tensor(value, dtype=dtype))


@contextlib.contextmanager
def interpreted(seed: int) -> Iterator[None]:
    """Has launches of Gluon kernels run here, their programs one after the other."""
    draw = random.Random(seed)

    def launched(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        if not isinstance(kernel, GluonJITFunction):
            _launch.run(kernel, grid, *args, num_warps=num_warps, **constants)
            return
        call = functools.partial(_python(kernel.fn), *(_given(arg) for arg in args), **constants)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # else OpenMP keeps a second one busy for each group
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for index in itertools.product(*(range(n) for n in grid)):
                    Program(index, grid, draw).run(call, num_warps)
        finally:
            torch.set_num_threads(threads)

    runs_gluon, _launch.RUNS_GLUON = _launch.RUNS_GLUON, True
    try:
        with _launch.launched_by(launched):
            yield
    finally:
        _launch.RUNS_GLUON = runs_gluon

"""Runs Gluon's kernels for Hopper on CPU tensors, as Triton's interpreter, which knows no Gluon, does Triton's.

    with interpreted(seed=0):
        fp8_gemm(...)  # launches of Gluon kernels come here, others go where they went

A program's groups of warps are threads of which one runs at a time. Who goes on is drawn at each of their dealings with
shared memory, barriers, copies and products. What is asynchronous takes place when it is drawn, too: at the latest when
somebody waits for it, at the earliest at once. So a wait, fence or release that is missing gives wrong numbers under
some seed, and these raise at once: groups that all wait, a product read before its wait, shared memory that was written
by threads and is read by a copy or a product without a fence between, addresses outside a tensor's storage, copies that
nobody waited for, barriers with more arrivals than they count. Shared memory begins as NaN.

Not modelled: what the warps of one group, whose work is taken to be one step, do to each other; layouts of registers
(the compiler checks those); how tensor cores round: products and sums are those of Triton's interpreter, so that what
two kernels compute in the same order is the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import random
import re
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy
import torch
import triton.language as tl
from minids_kernels import _launch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {
    gl.int1: torch.bool, gl.int8: torch.int8, gl.uint8: torch.uint8, gl.int32: torch.int32, gl.int64: torch.int64,
    gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32,
    gl.float8e4nv: torch.float8_e4m3fn,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


# --- numbers ----------------------------------------------------------------------------------------------------------


class Block:
    """A tensor of the kernel's, or a number of its own: 0-dimensional."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def dtype(self) -> Any:
        return NAMES[self.x.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return Block(self.x.view(DTYPES[dtype]) if bitcast else self.x.to(DTYPES[dtype]))

    def expand_dims(self, axis: int) -> Block:
        return Block(self.x.unsqueeze(axis))

    def broadcast_to(self, shape: Sequence[int]) -> Block:
        return Block(self.x.expand(shape))

    def reshape(self, shape: Sequence[int]) -> Block:
        return Block(self.x.reshape(shape))

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __neg__(self) -> Block:
        return Block(-self.x)

    def __invert__(self) -> Block:
        return Block(~self.x)

    __hash__ = None  # type: ignore[assignment]


def _tensors(*values: Any) -> list[Tensor]:
    """Operands in their common dtype, as Triton finds it: numbers of Python's take the blocks'."""
    blocks = [v.x for v in values if isinstance(v, Block)]
    if not blocks:
        return [torch.tensor(v, dtype=torch.int32 if isinstance(v, int) else torch.float32) for v in values]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in blocks))
    if any(isinstance(v, float) for v in values) and not dtype.is_floating_point:
        dtype = torch.float32
    if any(isinstance(v, int) and not isinstance(v, bool) for v in values) and dtype == torch.bool:
        dtype = torch.int32
    if len({x.dim() for x in blocks if x.dim()}) > 1:
        raise TypeError(f"blocks of different rank: {[list(x.shape) for x in blocks]}")
    return [v.x.to(dtype) if isinstance(v, Block) else torch.tensor(v, dtype=dtype) for v in values]


def _of_tensors(call: Callable[..., Tensor]) -> Callable[..., Block]:
    return lambda *values: Block(call(*_tensors(*values)))


def _swapped(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: call(b, a)


_divided = functools.partial(torch.div, rounding_mode="trunc")
for _name, _call in {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "and_", "or_", "xor", "lshift", "rshift")},
    **{n: getattr(operator, n) for n in ("lt", "le", "gt", "ge", "eq", "ne")},
    "floordiv": _divided,
    "mod": torch.fmod,
}.items():
    _op = _of_tensors(_call)
    setattr(Block, f"__{_name.strip('_')}__", _op)
    setattr(Block, f"__r{_name.strip('_')}__", _swapped(_op))


class Pointer:
    """Addresses of a tensor's numbers, or of what lies around them in its storage."""

    def __init__(self, storage: Tensor, place: Block) -> None:
        self.storage, self.place = storage, place

    @property
    def dtype(self) -> Any:
        return tl.pointer_type(NAMES[self.storage.dtype])

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.place + offset)

    def to(self, dtype: Any) -> Block:
        return (self.place * self.storage.itemsize + self.storage.data_ptr()).to(dtype)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Of all lanes the places, of those that are masked 0; and the mask."""
        place, kept = torch.broadcast_tensors(self.place.x, torch.tensor(True) if mask is None else mask.x)
        place = place.where(kept, 0)
        if place.numel() and not 0 <= int(place.min()) <= int(place.max()) < max(1, self.storage.numel()):
            raise IndexError(f"an address outside the tensor: {int(place.min())} to {int(place.max())}")
        return place, kept


def _pointer(x: Tensor) -> Pointer:
    storage = x.new_empty(0).set_(x.untyped_storage())  # type: ignore[call-overload]
    return Pointer(storage, Block(torch.tensor(x.storage_offset())))


# --- shared memory ----------------------------------------------------------------------------------------------------


@functools.cache
def _places(shape: tuple[int, ...], itemsize: int, swizzle: int) -> numpy.ndarray:
    """Where the numbers of a buffer lie, counted in numbers. Swizzled: strips of `swizzle` bytes, whose rows' 16 bytes
    change places."""
    if not swizzle:
        return numpy.arange(math.prod(shape)).reshape(shape)
    row, column = numpy.arange(shape[0])[:, None], numpy.arange(shape[1])[None] * itemsize
    strip, within = column // swizzle, column % swizzle
    chunk = within // 16 ^ row // (128 // swizzle) % (swizzle // 16)
    return ((strip * shape[0] + row) * swizzle + chunk * 16 + within % 16) // itemsize


class Memory:
    """One allocation: its bytes, its barriers, and which bytes who has written without a fence since."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.full((size,), 255, dtype=torch.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.unfenced: list[tuple[Group, int, int]] = []


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Memory, start: int, dtype: Any, shape: Sequence[int], layout: Any, turned: bool) -> None:
        self.memory, self.start, self.dtype, self.layout, self.turned = memory, start, dtype, layout, turned
        self.stored = list(shape)  # its shape, before it is permuted

    @property
    def shape(self) -> list[int]:
        return self.stored[::-1] if self.turned else self.stored

    @property
    def size(self) -> int:
        return math.prod(self.stored) * DTYPES[self.dtype].itemsize

    def index(self, i: Any) -> Shared:
        i, inner = int(i), self.stored[1:]
        if not 0 <= i < self.stored[0]:
            raise IndexError(f"buffer {i} of {self.stored[0]}")
        step = math.prod(inner) * DTYPES[self.dtype].itemsize
        return Shared(self.memory, self.start + i * step, self.dtype, inner, self.layout, False)

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0)
        return Shared(self.memory, self.start, self.dtype, self.stored, self.layout, not self.turned)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        view = Shared(self.memory, self.start, dtype, shape, layout, False)
        assert view.size == self.size and not self.turned
        return view

    def numbers(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """What lies there in the order of addresses, a view; and the places in it of each number."""
        raw = self.memory.bytes[self.start : self.start + self.size].view(BITS[DTYPES[self.dtype].itemsize])
        places = _places(tuple(self.stored), raw.itemsize, getattr(self.layout, "swizzle_byte_width", 0))
        return raw.numpy(), places.T if self.turned else places

    def read(self) -> Tensor:
        raw, places = self.numbers()
        return torch.from_numpy(raw[places]).view(DTYPES[self.dtype])

    def write(self, x: Tensor) -> None:
        raw, places = self.numbers()
        if x.shape != places.shape or x.dtype != DTYPES[self.dtype]:
            raise TypeError(f"{x.dtype} {list(x.shape)} into {self.dtype} {self.shape}")
        raw[places] = x.contiguous().view(BITS[x.itemsize]).numpy()

    def load(self, layout: Any) -> Block:
        _pause()
        return Block(self.read())

    def store(self, block: Block) -> None:
        _pause()
        self.write(block.x)
        self.memory.unfenced.append((_group(), self.start, self.start + self.size))

    def check_fenced(self) -> None:
        for group, start, end in self.memory.unfenced:
            if start < self.start + self.size and self.start < end:
                raise RuntimeError(f"{group.name} wrote shared memory that a copy or product reads without a fence")


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.phase = self.bytes = 0

    def arrive(self, count: int) -> None:
        self.missing -= count
        if self.missing < 0:
            raise RuntimeError(f"a barrier of {self.count} has {-self.missing} arrivals too many")
        self._flip()

    def announce(self, size: int) -> None:
        self.bytes += size
        self.arrive(1)

    def land(self, size: int) -> None:
        self.bytes -= size
        self._flip()

    def _flip(self) -> None:
        if self.missing == self.bytes == 0:
            self.phase += 1
            self.missing = self.count


def _barrier(at: Shared) -> Barrier:
    return at.memory.barriers[at.start]


# --- programs and their groups ----------------------------------------------------------------------------------------


def _shut() -> threading.Lock:
    """A gate for one thread: who acquires it waits until another releases it."""
    gate = threading.Lock()
    gate.acquire()
    return gate


class Stopped(BaseException):
    """Ends the threads of a program that has failed."""


class Group:
    """Warps that do the same; a thread. `queues`: its asynchronous work by kind, in order."""

    def __init__(self, program: Program, name: str, warps: int, call: Callable[[], None]) -> None:
        self.program, self.name, self.warps, self.call = program, name, warps, call
        self.queues: dict[str, deque[Callable[[], None]]] = {kind: deque() for kind in ("product", "copy", "store")}
        self.products: deque[Product] = deque()  # not waited for
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = False
        self.go = _shut()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        self.go.acquire()
        try:
            if self.program.error is None:
                self.call()
        except Stopped:
            return
        except BaseException as error:
            self.program.error = error
        finally:
            self.done = True
            self.program.turn.release()

    def pause(self, ready: Callable[[], bool], waits_for: str = "") -> None:
        """Lets others go on, and comes back when drawn once `ready`."""
        self.ready, self.waits_for = ready, waits_for
        self.program.turn.release()
        self.go.acquire()
        if self.program.error is not None:
            raise Stopped

    def finish(self, kind: str, left: int) -> None:
        while len(self.queues[kind]) > left:
            self.queues[kind].popleft()()

    def promise(self, left: int) -> None:
        """All products but the last `left` may be read."""
        self.finish("product", left)
        while len(self.products) > left:
            self.products.popleft().promised = True


class Program:
    """One block of threads, from its first instruction to its last."""

    running: ClassVar[Program]

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], draw: random.Random) -> None:
        self.index, self.grid, self.draw = index, grid, draw
        self.laziness = draw.random()  # of what is asynchronous
        self.haste: dict[str, int] = {}  # of groups
        self.groups: list[Group] = []
        self.memories: list[Memory] = []
        self.landing: list[Callable[[], None]] = []  # copies by descriptors, which keep no order
        self.turn = _shut()
        self.error: BaseException | None = None
        self.current: Group

    def run(self, call: Callable[[], None], warps: int) -> None:
        Program.running = self
        self.groups.append(Group(self, "the kernel", warps, call))
        while self.error is None and not all(group.done for group in self.groups):
            try:
                self.step()
            except Exception as error:
                self.error = error
        for group in self.groups:  # those of a program that failed end by Stopped
            if not group.done:
                group.go.release()
                self.turn.acquire()
            group.thread.join()
        if self.error is not None:
            raise self.error
        if self.landing or any(any(group.queues.values()) for group in self.groups):
            raise RuntimeError("the program ends before copies or products for which nobody waited")

    def step(self) -> None:
        """Something asynchronous takes place, or a group goes on to its next dealings."""
        groups = [group for group in self.groups if not group.done and group.ready()]
        queues = [queue for group in self.groups for queue in group.queues.values() if queue]
        events = len(queues) + len(self.landing)
        if groups and (not events or self.draw.random() < self.laziness):
            haste = [self.haste.setdefault(group.name, self.draw.choice((1, 8, 64))) for group in groups]
            (self.current,) = self.draw.choices(groups, haste)
            self.current.go.release()
            self.turn.acquire()
        elif events:
            event = self.draw.randrange(events)
            (queues[event].popleft() if event < len(queues) else self.landing.pop(event - len(queues)))()
        else:
            waiting = [f"{group.name} for {group.waits_for}" for group in self.groups if not group.done]
            raise RuntimeError(f"all wait: {'; '.join(waiting)}")


def _group() -> Group:
    return Program.running.current


def _pause() -> None:
    _group().pause(lambda: True)


class Product:
    """A product that may be on its way: another can be added to it, nothing else until it is promised."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape
        self.x: Tensor
        self.promised = False


# --- the language -----------------------------------------------------------------------------------------------------


def _range(*bounds: Any, **options: Any) -> Iterator[Block]:
    return (Block(torch.tensor(i, dtype=torch.int32)) for i in range(*(int(b) for b in bounds)))


class Mbarrier:
    MBarrierLayout = hopper.mbarrier.MBarrierLayout

    @staticmethod
    def init(at: Shared, count: int) -> None:
        at.memory.barriers[at.start] = Barrier(int(count))

    @staticmethod
    def expect(at: Shared, size: int, pred: Any = True) -> None:
        _pause()
        if pred:
            _barrier(at).announce(int(size))

    @staticmethod
    def arrive(at: Shared, count: int = 1, pred: Any = True) -> None:
        _pause()
        if pred:
            _barrier(at).arrive(int(count))

    @staticmethod
    def wait(at: Shared, phase: Any, pred: Any = True) -> None:
        if pred:
            barrier, parity = _barrier(at), int(phase) & 1
            number = Program.running.memories.index(at.memory)
            what = f"phase {parity} of barrier {at.start // 8} in allocation {number}"
            _group().pause(lambda: barrier.phase & 1 != parity, what)


def _box(descriptor: TensorDescriptor, corner: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...], tuple[slice, ...]]:
    """The described tensor, and what a block at `corner` has of it: in the tensor, in the block."""
    whole = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    starts = [int(c) for c in corner]
    ends = [
        min(max(s + b, 0), size) for s, b, size in zip(starts, descriptor.block_shape, descriptor.shape, strict=True)
    ]
    begins = [min(max(s, 0), e) for s, e in zip(starts, ends, strict=True)]
    inside = tuple(slice(b, e) for b, e in zip(begins, ends, strict=True))
    return whole, inside, tuple(slice(b - s, e - s) for b, e, s in zip(begins, ends, starts, strict=True))


class Tma:
    @staticmethod
    def async_copy_global_to_shared(
        source: TensorDescriptor, corner: Sequence[Any], at: Shared, to: Shared, pred: Any = True
    ) -> None:
        _pause()
        assert to.stored == source.block_shape and to.layout == source.layout and not to.turned
        barrier, (whole, inside, within) = _barrier(at), _box(source, corner)

        def copy() -> None:
            block = torch.zeros(source.block_shape, dtype=whole.dtype)
            block[within] = whole[inside]
            to.write(block)
            barrier.land(to.size)

        if pred:
            Program.running.landing.append(copy)

    @staticmethod
    def async_copy_shared_to_global(target: TensorDescriptor, corner: Sequence[Any], source: Shared) -> None:
        _pause()
        assert source.stored == target.block_shape and source.layout == target.layout and not source.turned
        source.check_fenced()
        whole, inside, within = _box(target, corner)
        _group().queues["store"].append(lambda: whole[inside].copy_(source.read()[within]))

    @staticmethod
    def store_wait(pendings: int) -> None:
        _pause()
        _group().finish("store", int(pendings))


class AsyncCopy:
    """Copies of each thread, in order."""

    @staticmethod
    def async_copy_global_to_shared(to: Shared, source: Pointer, mask: Any = None) -> None:
        _pause()
        place, kept = source.places(mask)
        values = source.storage[place]
        _group().queues["copy"].append(lambda: to.write(values.where(kept, torch.zeros((), dtype=values.dtype))))

    @staticmethod
    def mbarrier_arrive(at: Shared, increment_count: bool = True) -> None:
        assert not increment_count
        barrier, group = _barrier(at), _group()
        group.queues["copy"].append(lambda: barrier.arrive(32 * group.warps))


def _fence() -> None:
    group = _group()
    for memory in Program.running.memories:
        memory.unfenced = [write for write in memory.unfenced if write[0] is not group]


def _warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False) -> Product:
    assert is_async
    _pause()
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.check_fenced()
    assert a.shape[1] == b.shape[0] and acc.shape == [a.shape[0], b.shape[1]], (a.shape, b.shape, acc.shape)
    product, adds, group = Product(acc.shape), bool(use_acc), _group()

    def multiply() -> None:
        left, right = a.read() if isinstance(a, Shared) else a.x, b.read()
        product.x = torch.from_numpy(numpy.matmul(left.float().numpy(), right.float().numpy()))
        if adds:
            product.x += acc.x

    group.queues["product"].append(multiply)
    group.products.append(product)
    return product


def _warpgroup_mma_wait(left: int, deps: Sequence[Any]) -> Any:
    _pause()
    _group().promise(int(left))
    done = [Block(d.x) if isinstance(d, Product) and d.promised else d for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


def _load(at: Pointer, mask: Any = None, other: Any = None) -> Block:
    _pause()
    place, kept = at.places(mask)
    poison = torch.full((at.storage.itemsize,), 255, dtype=torch.uint8).view(at.storage.dtype)
    hidden = poison if other is None else torch.tensor(other, dtype=at.storage.dtype)
    if not at.storage.numel():
        return Block(hidden.expand(kept.shape))
    return Block(at.storage[place].where(kept, hidden).reshape(kept.shape))


def _store(at: Pointer, block: Any, mask: Any = None) -> None:
    _pause()
    place, kept = at.places(mask)
    values, bits = _tensors(block)[0].to(at.storage.dtype).expand(place.shape), BITS[at.storage.itemsize]
    at.storage.view(bits).numpy()[place[kept].numpy()] = values[kept].view(bits).numpy()


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    memory = Memory(math.prod(shape) * DTYPES[dtype].itemsize)
    Program.running.memories.append(memory)
    return Shared(memory, 0, dtype, shape, layout, False)


def _warp_specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int], registers: Any) -> None:
    program, own = Program.running, _group()
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
        exp2=_of_tensors(torch.exp2),
        fma=_of_tensors(lambda a, b, c: a * b + c),
        full=_filled,
        inline_asm_elementwise=_assembly,
        join=lambda a, b: Block(torch.stack((a.x, b.x), -1)),
        load=_load,
        log2=_of_tensors(torch.log2),
        max=lambda x, axis: Block(x.x.amax(axis)),
        maximum=_of_tensors(torch.maximum),
        minimum=_of_tensors(torch.minimum),
        num_programs=lambda axis: Block(torch.tensor(Program.running.grid[axis], dtype=torch.int32)),
        num_warps=lambda: _group().warps,
        program_id=lambda axis: Block(torch.tensor(Program.running.index[axis], dtype=torch.int32)),
        static_assert=_static_assert,
        static_range=range,
        store=_store,
        sum=_sum,
        to_tensor=lambda x: Block(_tensors(x)[0]),
        warp_specialize=_warp_specialize,
        where=lambda condition, a, b: Block(torch.where(condition.x, *_tensors(a, b))),
        zeros=lambda shape, dtype, layout: _filled(shape, 0, dtype, layout),
    )
)
MEANT = {
    id(thing): meant
    for thing, meant in (
        (gl, LANGUAGE),
        (tl, types.SimpleNamespace(range=_range)),
        (gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier, _pause),  # renamed in Triton 3.7
        (hopper.mbarrier, Mbarrier),
        (hopper.tma, Tma),
        (hopper.async_copy, AsyncCopy),
        (hopper.fence_async_shared, _fence),
        (hopper.warpgroup_mma, _warpgroup_mma),
        (hopper.warpgroup_mma_wait, _warpgroup_mma_wait),
    )
}


@functools.cache
def _python(kernel: GluonJITFunction[Any]) -> Callable[..., Any]:
    """The kernel's own code, to which the language's names mean what stands above."""

    def meant(value: Any) -> Any:
        if isinstance(value, GluonJITFunction):
            return _python(value)
        return value.value if isinstance(value, gl.constexpr) else MEANT.get(id(value), value)

    names, code = kernel.fn.__globals__, kernel.fn.__code__
    scope = {name: meant(names[name]) for name in code.co_names if name in names} | {"range": _range}
    return types.FunctionType(code, scope, kernel.fn.__name__, kernel.fn.__defaults__)


def _given(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _pointer(value)
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
        call = functools.partial(_python(kernel), *(_given(arg) for arg in args), **constants)
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

"""What Gluon's kernels for Hopper work on, for gluon_interpreter.py: blocks, shared memory, barriers, groups of warps.

A program's groups are threads of which one runs at a time. Who goes on is drawn at each of their dealings with shared
memory, barriers, copies and products (`pause`). What is asynchronous takes place when it is drawn, too: at the latest
when somebody waits for it, at the earliest at once.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy
import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

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

    def permute(self, order: Sequence[int]) -> Block:
        return Block(self.x.permute(order))

    def split(self) -> tuple[Block, Block]:
        left, right = self.x.unbind(-1)
        return Block(left), Block(right)

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __neg__(self) -> Block:
        return Block(-self.x)

    def __invert__(self) -> Block:
        return Block(~self.x)

    __hash__ = None  # type: ignore[assignment]


def tensors(*values: Any) -> list[Tensor]:
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


def of_tensors(call: Callable[..., Tensor]) -> Callable[..., Block]:
    return lambda *values: Block(call(*tensors(*values)))


def _swapped(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: call(b, a)


_divided = functools.partial(torch.div, rounding_mode="trunc")
for _name, _call in {
    **{n: getattr(operator, n) for n in ("add", "sub", "mul", "truediv", "and_", "or_", "xor", "lshift", "rshift")},
    **{n: getattr(operator, n) for n in ("lt", "le", "gt", "ge", "eq", "ne")},
    "floordiv": _divided,
    "mod": torch.fmod,
}.items():
    _op = of_tensors(_call)
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


def pointer(x: Tensor) -> Pointer:
    storage = x.new_empty(0).set_(x.untyped_storage())  # type: ignore[call-overload]
    return Pointer(storage, Block(torch.tensor(x.storage_offset())))


# --- shared memory ----------------------------------------------------------------------------------------------------


@functools.cache
def _places(shape: tuple[int, ...], itemsize: int, swizzle: int) -> numpy.ndarray:
    """Where the numbers of a buffer lie, counted in numbers. Swizzled: strips of `swizzle` bytes, whose rows' 16 bytes
    change places; all dimensions but the last count rows."""
    if not swizzle:
        return numpy.arange(math.prod(shape)).reshape(shape)
    rows = math.prod(shape[:-1])
    row, column = numpy.arange(rows)[:, None], numpy.arange(shape[-1])[None] * itemsize
    strip, within = column // swizzle, column % swizzle
    chunk = within // 16 ^ row // (128 // swizzle) % (swizzle // 16)
    return (((strip * rows + row) * swizzle + chunk * 16 + within % 16) // itemsize).reshape(shape)


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
        pause()
        return Block(self.read())

    def store(self, block: Block) -> None:
        pause()
        self.write_by(running_group(), block.x)

    def write_by(self, group: Group, x: Tensor) -> None:
        """As threads write, or their own copies: what descriptors' copies and products read needs a fence after it."""
        self.write(x)
        self.memory.unfenced.append((group, self.start, self.start + self.size))

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


def barrier_at(at: Shared) -> Barrier:
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


def running_group() -> Group:
    return Program.running.current


def pause() -> None:
    running_group().pause(lambda: True)


class Product:
    """A product that may be on its way: another can be added to it, nothing else until it is promised."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape
        self.x: Tensor
        self.promised = False

"""A race detector for Triton kernels in the interpreter: who touches which address of a launch.

Programs of a launch run in any order, or at once: two of them must not write one address, nor one
read what another writes, unless both do it by atomics. Between launches anything goes: they follow
each other on one stream.

Threads of a program run in any order between two barriers (`tl.debug_barrier`). The interpreter has
no threads, but what they could do shows in the order of a program's accesses: an address must not
be loaded after it was stored, nor be stored twice, nor be stored after two loads of it. One load
and one store belong together: the value that is stored is computed from the one that was loaded. A
second load may lie in another layout, whose threads need not have come as far.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

Addresses = NDArray[np.int64]
LOAD, STORE, ATOMIC = 0, 1, 2
ACCESSES = ("load", "store", "atomic")

TWO_STORE = "two programs store"
STORED_AND_READ = "one program loads what another stores"
STORE_AND_ATOMIC = "one program stores where another has an atomic"
ATOMIC_AND_READ = "one program loads where another has an atomic"
STORED_TWICE = "a program stores twice between barriers"
READ_AFTER_STORE = "a program loads after its own store without a barrier"
READ_TWICE = "a program loads twice and then stores between barriers"
LANES_DIFFER = "lanes of one store write different values"

# What does no harm, by argument and race, and why.
HARMLESS = {
    ("flag", TWO_STORE): "all programs that store to it store 1",
    ("row_scale", ATOMIC_AND_READ): "a row's largest value only grows: an old one costs an atomic",
}


@dataclass(frozen=True)
class Race:
    """One kind of race of a launch, at its first address."""

    kernel: str
    argument: str
    what: str
    place: int  # bytes behind the begin of the argument

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what}, {self.argument} at byte {self.place:,}"


@dataclass
class Accesses:
    """Equal-sized pieces of memory that programs touched."""

    addresses: list[Addresses] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)

    def add(self, addresses: Addresses, size: int, program: int) -> None:
        if addresses.size:
            self.addresses.append(addresses)
            self.sizes.append(size)
            self.programs.append(program)

    def units(self, unit: int) -> tuple[Addresses, Addresses]:
        """Return (unit, program) of all accesses, larger elements as several units."""
        keys, programs = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for begin, size, program in zip(self.addresses, self.sizes, self.programs, strict=True):
            parts = -(-size // unit)
            key = (begin[:, None] // unit + np.arange(parts)).ravel()
            keys.append(key)
            programs.append(np.full(key.size, program))
        return np.concatenate(keys), np.concatenate(programs)


class Recorder:
    """What the programs of the present launch have done, and the races of all launches."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.races: list[Race] = []
        self.spared: Counter[tuple[str, str]] = Counter()
        self._kernel = ""

    def begin_launch(self, kernel: str, arguments: dict[str, Tensor]) -> None:
        """Begin a launch; `arguments` are its tensors by name."""
        assert not self._kernel, f"{self._kernel} has not ended"
        self._kernel, self.launches[kernel] = kernel, self.launches[kernel] + 1
        self._arguments = arguments
        self._found: dict[tuple[str, str], int] = {}
        self._by_kind = (Accesses(), Accesses(), Accesses())
        self._program = -1
        self._begin_program()

    def _begin_program(self) -> None:
        self._program += 1
        self._epoch: list[tuple[int, Addresses]] = []

    def next_program(self) -> None:
        """End one program and begin the next."""
        if self._kernel:
            self.barrier()
            self._begin_program()

    def touch(self, kind: int, pointers: Any, mask: Any) -> None:
        """Record one load, store or atomic of the present program."""
        if not self._kernel:
            return
        where, here = np.broadcast_arrays(pointers.data, mask.data)
        addresses = where[here.astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        unique = np.unique(addresses)
        self._epoch.append((kind, unique))
        self._by_kind[kind].add(unique, size, self._program)

    def check_values(self, pointers: Any, value: Any, mask: Any) -> None:
        """Look for lanes of one store that write different values to one address."""
        where, here = np.broadcast_arrays(pointers.data, mask.data)
        here = here.astype(bool)
        addresses = where[here].astype(np.int64)
        data = np.broadcast_to(value.data, where.shape)[here]
        order = np.argsort(addresses, kind="stable")
        addresses, data = addresses[order], data[order]
        differ = (addresses[1:] == addresses[:-1]) & (
            data[1:].view(np.uint8).reshape(-1, data.itemsize)
            != data[:-1].view(np.uint8).reshape(-1, data.itemsize)
        ).any(1)
        if differ.any():
            self._race(LANES_DIFFER, addresses[1:][differ][0])

    def barrier(self) -> None:
        """Check what one program did since the last barrier, and begin anew."""
        done, self._epoch = self._epoch, []
        stores = [addresses for kind, addresses in done if kind == STORE]
        if not stores:
            return
        stored, count = np.unique(np.concatenate(stores), return_counts=True)
        if (count > 1).any():
            self._race(STORED_TWICE, stored[count > 1][0])
        loads, written = np.zeros(stored.size, np.int64), np.zeros(stored.size, bool)
        for kind, addresses in done:
            at = np.searchsorted(stored, addresses)
            at[at == stored.size] = 0
            hit = at[stored[at] == addresses]
            if kind == STORE:
                if (loads[hit] > 1).any():
                    where = stored[hit][loads[hit] > 1][0]
                    self._race(READ_TWICE, where)
                written[hit] = True
            elif written[hit].any():
                where = stored[hit][written[hit]][0]
                self._race(READ_AFTER_STORE, where)
            loads[hit] += kind == LOAD

    def end_launch(self) -> None:
        """Check the launch: what programs did to each other's addresses."""
        self.barrier()
        reads, writes, atomics = self._by_kind
        sizes = {*reads.sizes, *writes.sizes, *atomics.sizes}
        if writes.sizes or atomics.sizes:
            unit = min(sizes)
            read, written, atomic = (kind.units(unit) for kind in (reads, writes, atomics))
            self._between(unit, written, written, TWO_STORE)
            self._between(unit, written, read, STORED_AND_READ)
            self._between(unit, written, atomic, STORE_AND_ATOMIC)
            self._between(unit, atomic, read, ATOMIC_AND_READ)
        for (argument, what), place in self._found.items():
            if (argument, what) in HARMLESS:
                self.spared[argument, what] += 1
            else:
                self.races.append(Race(self._kernel, argument, what, place))
        self._kernel = ""

    def _between(
        self,
        unit: int,
        one: tuple[Addresses, Addresses],
        other: tuple[Addresses, Addresses],
        what: str,
    ) -> None:
        """Find addresses that one program has in `one` and another program in `other`."""
        if not one[0].size or not other[0].size:
            return
        order = np.argsort(one[0], kind="stable")
        keys, first = np.unique(one[0][order], return_index=True)
        programs = one[1][order]
        low, high = np.minimum.reduceat(programs, first), np.maximum.reduceat(programs, first)
        at = np.minimum(np.searchsorted(keys, other[0]), keys.size - 1)
        hit = keys[at] == other[0]
        clash = hit & ((low[at] != other[1]) | (high[at] != other[1]))
        for key in np.unique(other[0][clash] * unit):
            if not self._race(what, key):
                break

    def _race(self, what: str, address: Any) -> bool:
        """Keep a race once per launch and argument; return whether it was new."""
        argument, place = self._name(int(address))
        new = (argument, what) not in self._found
        self._found.setdefault((argument, what), place)
        return new

    def _name(self, address: int) -> tuple[str, int]:
        for name, tensor in self._arguments.items():
            begin = tensor.untyped_storage().data_ptr()
            if begin <= address < begin + tensor.untyped_storage().nbytes():
                return name, address - tensor.data_ptr()
        return "memory of no argument", address


RECORDER = Recorder()  # of the whole run


def tensors_of(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors among a launch's arguments, those behind descriptors too."""
    given = dict(zip(names, args, strict=False)) | kwargs
    bases = {n: v.base if isinstance(v, TensorDescriptor) else v for n, v in given.items()}
    return {name: value for name, value in bases.items() if isinstance(value, Tensor)}


@contextmanager
def recorded(recorder: Recorder) -> Iterator[Recorder]:
    """Record every launch within the block."""
    builder, run = interpreter_builder, interpreter.GridExecutor.__call__
    own = {
        name: getattr(builder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
            "create_barrier",
            "set_grid_idx",
        )
    }

    def load(ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        recorder.touch(LOAD, ptrs, mask)
        return own["create_masked_load"](ptrs, mask, *rest, **named)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        recorder.touch(STORE, ptrs, mask)
        recorder.check_values(ptrs, value, mask)
        return own["create_masked_store"](ptrs, value, mask, *rest, **named)

    def atomic(op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.touch(ATOMIC, ptr, mask)
        return own["create_atomic_rmw"](op, ptr, value, mask, *rest)

    def compare(ptr: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones_like(ptr.data, dtype=bool), ptr.dtype)
        recorder.touch(ATOMIC, ptr, everywhere)
        return own["create_atomic_cas"](ptr, *rest)

    def barrier() -> Any:
        recorder.barrier()
        return own["create_barrier"]()

    def next_program(x: int, y: int, z: int) -> Any:
        recorder.next_program()
        return own["set_grid_idx"](x, y, z)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        recorder.begin_launch(name, tensors_of(self.arg_names, args, kwargs))
        try:
            return run(self, *args, **kwargs)
        finally:
            recorder.end_launch()

    patched = (load, store, atomic, compare, barrier, next_program)
    try:
        for name, function in zip(own, patched, strict=True):
            setattr(builder, name, function)
        interpreter.GridExecutor.__call__ = launch
        yield recorder
    finally:
        interpreter.GridExecutor.__call__ = run
        for name in own:
            delattr(builder, name)

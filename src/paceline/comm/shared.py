"""Sums over the processes of one host through memory that they share, in half the time that sockets take.

A member writes its tensor where all can read it, and says where. When it has heard from all, it adds up what they
wrote, in the order of the members, so that all get the same bits. Then it notes in each other member's memory that it
has read it; a member writes again where all have. What is said, and the loss of a member, goes over the sockets.
"""

import mmap
import os
import platform
import secrets
import weakref
from collections.abc import Callable, Sequence

import torch

LEAST_BYTES = 32 * 1024
"""Smaller tensors travel as quickly over a socket."""

Gather = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Starts to tell all members a small tensor; what it returns waits for theirs, (members, ...) in their order."""


class _Room:
    """Memory of one member: a tensor, and behind it the number of the last sum for which each member has read it."""

    def __init__(self, fd: int, members: int) -> None:
        n_bytes = os.fstat(fd).st_size
        memory = torch.frombuffer(mmap.mmap(fd, n_bytes), dtype=torch.uint8)
        self.data = memory[: n_bytes - 8 * members]
        """uint8."""
        self.read = memory[n_bytes - 8 * members :].view(torch.int64)
        """(members)."""
        self.number = 0
        """Of the sum it was last used for; its owner's alone."""

    def typed(self, tensor: torch.Tensor) -> torch.Tensor:
        """What it holds as values like the tensor's, (numel)."""
        return self.data[: tensor.nbytes].view(tensor.dtype)


class SharedSums:
    """The sums of one member; all make theirs together."""

    def __init__(self, index: int, processes: Sequence[int], gather: Gather) -> None:
        self._index, self._processes, self._gather = index, processes, gather
        self._own: dict[int, dict[int, _Room]] = {}  # by size, by file descriptor
        self._theirs: dict[tuple[int, int], _Room] = {}
        self._number = 0

    def start(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Start a sum; what is returned, called once, puts it in the tensor's place."""
        self._number += 1
        number = self._number
        fd, room = self._free(tensor.nbytes)
        room.number = number
        room.typed(tensor).copy_(tensor.view(-1))
        said = self._gather(torch.tensor([fd]))

        def finish() -> None:
            rooms = [self._room(member, int(fd)) for member, fd in enumerate(said())]
            first, second, *rest = (room.typed(tensor) for room in rooms)
            total = torch.add(first, second, out=tensor.view(-1))
            for other in rest:
                total.add_(other)
            for room in rooms:
                room.read[self._index] = number

        return finish

    def _free(self, n_bytes: int) -> tuple[int, _Room]:
        """Memory of this member that all have read; new memory where there is none."""
        rooms = self._own.setdefault(n_bytes, {})
        for fd, room in rooms.items():
            if bool((room.read == room.number).all()):
                return fd, room
        fd = _new_memory(8 * (-(-n_bytes // 8) + len(self._processes)))
        rooms[fd] = _Room(fd, len(self._processes))
        weakref.finalize(rooms[fd], os.close, fd)
        self._theirs[self._index, fd] = rooms[fd]
        return fd, rooms[fd]

    def _room(self, member: int, fd: int) -> _Room:
        """Memory of any member."""
        if (member, fd) not in self._theirs:
            own = _open(self._processes[member], fd)
            self._theirs[member, fd] = _Room(own, len(self._processes))
            os.close(own)
        return self._theirs[member, fd]


def shared_sums(index: int, gather: Gather) -> SharedSums | None:
    """Sums over shared memory if every member can read that of every other, else None for all of them.

    A member notes what it has read without a lock, which comes in order after the reading on x86 alone.
    """
    fd, word = _new_memory(8), secrets.randbits(62)
    torch.frombuffer(mmap.mmap(fd, 8), dtype=torch.int64)[0] = word
    told = gather(torch.tensor([os.getpid(), fd, word]))()
    is_read = platform.machine() in {"x86_64", "AMD64"} and all(map(_can_read, told.tolist()))
    all_read = gather(torch.tensor([int(is_read)]))()
    os.close(fd)
    return SharedSums(index, told[:, 0].tolist(), gather) if bool(all_read.all()) else None


def _can_read(told: Sequence[int]) -> bool:
    """Whether what a member has written is there; of another host or container it is not."""
    process, fd, word = told
    try:
        own = _open(process, fd)
    except OSError:
        return False
    try:
        return int.from_bytes(os.pread(own, 8, 0), "little") == word
    except OSError:
        return False
    finally:
        os.close(own)


def _new_memory(n_bytes: int) -> int:
    fd = os.memfd_create("paceline")
    os.ftruncate(fd, n_bytes)
    return fd


def _open(process: int, fd: int) -> int:
    return os.open(f"/proc/{process}/fd/{fd}", os.O_RDWR)

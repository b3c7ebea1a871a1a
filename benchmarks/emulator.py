"""A slow network on one machine: each process in a network namespace of its own, and a router that delays packets.

The kernel's own emulator (netem) is often not there, so the router is a process. Every other process has a TUN device;
what is sent through it arrives at the router as packets, which hands each on when it is due:

    sent       a packet begins when the one before it from the same sender has ended, and takes size / rate
    on its way the delay of the sender's side; jitter adds to it, and packets of a pair stay in order
    received   so many bits a second as the receiver's side takes, from all senders together

A packet that would wait longer than ``queue_s`` to begin is dropped, as are ``loss`` of all. Namespaces have no names:
they, and their devices, are gone with the processes in them, however these end. It takes /dev/net/tun and the right to
make namespaces: root, CAP_SYS_ADMIN and CAP_NET_ADMIN, or a kernel that gives users namespaces of their own.

    python benchmarks/emulator.py 100mbit/25ms [BACK]

shows what a plain TCP connection gets.
"""

import ctypes
import fcntl
import heapq
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from paceline.plan.network import Network

INTERFACE = "e0"
PORT = 29500
TRIES = 5
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_TUNSETIFF, _IFF_TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
_UP_AND_RUNNING = 0x41


class Forbidden(Exception):
    """This machine does not allow what the emulator needs."""


def address(place: int) -> str:
    """The IPv4 address of a process."""
    return f"10.77.0.{place + 1}"


def enter_namespace(place: int, mtu: int) -> int:
    """Move this process, which has one thread, into a network of its own; the descriptor of its TUN device.

    ``Forbidden`` where that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0 and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        raise Forbidden(f"no network namespace can be made: {os.strerror(ctypes.get_errno())}")
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN_WITHOUT_HEADER))
        _configure("lo")
        _configure(INTERFACE, address(place), mtu)
    except OSError as error:
        raise Forbidden(f"no TUN device can be made: {error}") from error
    return tun


def _configure(interface: str, ip: str | None = None, mtu: int | None = None) -> None:
    name = interface.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, ip), (_SIOCSIFNETMASK, ip and "255.255.255.0")):
            if value:
                raw = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(control, request, raw)
        if mtu:
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name, mtu))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, _UP_AND_RUNNING))


def join(channel: socket.socket, place: int, mtu: int) -> None:
    """Enter a network of its own, hand its device to the router at ``channel``'s other end, wait for the others."""
    tun = enter_namespace(place, mtu)
    socket.send_fds(channel, [b"tun"], [tun])
    os.close(tun)
    if not channel.recv(1):
        raise Forbidden("the router, or another process, could not join the network")


def sent_bytes(interface: str = INTERFACE) -> int:
    """What this process's network has put on the wire: IP packets with all headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise LookupError(interface)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What goes wrong on the way."""

    loss: float = 0.0
    """Share of the packets."""
    jitter_s: float = 0.0
    """At most so much is added to a delay."""
    queue_s: float = 0.4
    """The longest that a packet waits for those before it."""
    seed: int = 0


@dataclass
class Router:
    """The router. ``tuns[i]`` is the device of process i, which sends by ``sides[i].sends``."""

    tuns: Sequence[int]
    sides: Sequence["Side"]
    weather: Weather = field(default_factory=Weather)
    dropped: int = 0
    late_s: float = 0.0
    """The most that a packet has been handed on after it was due."""
    forwarded: int = 0

    def run(self, until: int) -> None:
        """Hand packets on until the descriptor ``until`` is readable."""
        place = {tun: i for i, tun in enumerate(self.tuns)}
        self._chance = random.Random(self.weather.seed)
        self._free = [0.0] * len(self.tuns)
        self._taken = [0.0] * len(self.tuns)
        self._latest: dict[tuple[int, int], float] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count = 0
        watched = [*self.tuns, until]
        while True:
            wait = max(0.0, self._waiting[0][0] - time.perf_counter()) if self._waiting else None
            ready, _, _ = select.select(watched, [], [], wait)
            if until in ready:
                return
            for tun in ready:
                self._read(tun, place[tun])
            self._hand_on()

    def _read(self, tun: int, source: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(tun, 65536)
            except OSError:  # nothing more to read, or its process is gone
                return
            if packet[0] >> 4 == 4 and packet[16:19] == b"\x0a\x4d\x00" and packet[19] <= len(self.tuns):
                self._take(packet, source, packet[19] - 1)

    def _take(self, packet: bytes, source: int, to: int) -> None:
        now, weather, side = time.perf_counter(), self.weather, self.sides[source]
        begin = max(self._free[source], now)
        if begin - now > weather.queue_s or self._chance.random() < weather.loss:
            self.dropped += 1
            return
        bits = 8 * len(packet)
        self._free[source] = begin + bits / side.sends.bits_per_s
        due = self._free[source] + side.sends.delay_s + self._chance.random() * weather.jitter_s
        due = max(due, self._latest.get((source, to), 0.0), self._taken[to] + bits / self.sides[to].receives_bits_per_s)
        self._latest[source, to] = self._taken[to] = due
        self._count += 1
        heapq.heappush(self._waiting, (due, self._count, to, packet))

    def _hand_on(self) -> None:
        now = time.perf_counter()
        while self._waiting and self._waiting[0][0] <= now:
            due, _, to, packet = heapq.heappop(self._waiting)
            self.late_s = max(self.late_s, now - due)
            self.forwarded += 1
            with suppress(OSError):  # its process is gone
                os.write(self.tuns[to], packet)


def route(channels: Sequence[socket.socket], ends: Sequence["Side"], weather: Weather, until: int) -> Router:
    """Be the router of the processes at the other ends of the channels; the router as it is afterwards."""
    with suppress(PermissionError):
        os.nice(-10)  # a packet that waits for the processor is one that was delayed too long
    tuns = []
    for channel in channels:
        _, descriptors, _, _ = socket.recv_fds(channel, 16, 1)
        if not descriptors:
            raise Forbidden("a process could not join the network")
        tuns += descriptors
    for channel in channels:
        channel.send(b"1")
    router = Router(tuns, ends, weather)
    router.run(until)
    return router


@dataclass(frozen=True, kw_only=True)
class Side:
    """One end of the network."""

    sends: Network
    receives_bits_per_s: float


def sides(link: Network, back: Network, size: int) -> list[Side]:
    """Process 0 sends by ``link`` and receives as quickly as ``back``; for the others it is the other way round."""
    first = Side(sends=link, receives_bits_per_s=back.bits_per_s)
    other = Side(sends=back, receives_bits_per_s=link.bits_per_s)
    return [first, *[other] * (size - 1)]


def trial(link: Network, back: Network, *, n_bytes: int = 2**20, mtu: int = 9000) -> dict[str, float]:
    """Seconds there and back of a byte, and bits a second of a large message from process 0 to process 1."""
    context = multiprocessing.get_context("fork")
    pairs = [socket.socketpair() for _ in range(2)]
    result, told = context.Pipe(duplex=False)
    stop, stops = os.pipe()
    mains = [
        (_route, ([ours for ours, _ in pairs], sides(link, back, 2), stop)),
        (_answer, (pairs[1][1], n_bytes, mtu)),
        (_ask, (pairs[0][1], n_bytes, mtu, told)),
    ]
    children = [context.Process(target=main, args=arguments, daemon=True) for main, arguments in mains]
    try:
        for child in children:
            child.start()
        while not result.poll():
            wait([result, *(child.sentinel for child in children if child.exitcode is None)])
            if any(child.exitcode for child in children):
                raise Forbidden("a process could not join the network; what it said stands above")
        answer: dict[str, float] = result.recv()
        os.write(stops, b"1")
        return answer
    finally:
        for child in children:
            child.kill()
            child.join()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _route(channels: Sequence[socket.socket], ends: Sequence[Side], stop: int) -> None:
    _end_with_parent()
    route(channels, ends, Weather(), stop)


def _answer(channel: socket.socket, n_bytes: int, mtu: int) -> None:
    _end_with_parent()
    join(channel, 1, mtu)
    with socket.create_server((address(1), PORT)) as server:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TRIES):
            connection.sendall(connection.recv(1))
        left = n_bytes
        while left:
            left -= len(connection.recv(2**16))
        connection.sendall(b"1")


def _ask(channel: socket.socket, n_bytes: int, mtu: int, told: Any) -> None:
    _end_with_parent()
    join(channel, 0, mtu)
    with _connected() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        took = []
        for _ in range(TRIES):
            start = time.perf_counter()
            connection.sendall(b"1")
            connection.recv(1)
            took.append(time.perf_counter() - start)
        start = time.perf_counter()
        connection.sendall(bytes(n_bytes))
        connection.recv(1)
        large_s = time.perf_counter() - start
    told.send({"there_and_back_s": min(took), "bits_per_s": 8 * n_bytes / large_s})


def _connected() -> socket.socket:
    while True:
        try:
            return socket.create_connection((address(1), PORT))
        except ConnectionRefusedError:  # it does not listen yet
            time.sleep(0.01)


def main() -> None:
    """Parse the command line, try, print."""
    link, *back = [Network.parse(text) for text in sys.argv[1:]]
    try:
        print(json.dumps(trial(link, *back or [link])))
    except Forbidden as error:
        sys.exit(f"NOT MEASURED: {error}")


if __name__ == "__main__":
    main()

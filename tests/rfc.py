"""X25519, ChaCha20 and a seal in plain Python, from RFC 7748 and RFC 8439: slow, and against which others are tried."""

import hashlib
import hmac

import numpy as np

from paceline.sync.secure.primitives import derive

P = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5."""
    k = int.from_bytes(scalar, "little") & ~7 & ~(128 << 8 * 31) | (64 << 8 * 31)
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def _rotated(x, by):
    return x << np.uint32(by) | x >> np.uint32(32 - by)


def chacha20(key: bytes, counter: int, nonce: bytes, count: int):
    """``count`` words of the key stream (RFC 8439, section 2.3), all blocks at once."""
    blocks = -(-count // 16)
    state = np.empty((16, blocks), np.uint32)
    state[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    state[4:12] = np.frombuffer(key, "<u4")[:, None]
    state[12] = np.arange(counter, counter + blocks, dtype=np.uint32)
    state[13:] = np.frombuffer(nonce, "<u4")[:, None]
    x = state.copy()
    for _ in range(10):
        for a, b, c, d in (
            (0, 4, 8, 12),
            (1, 5, 9, 13),
            (2, 6, 10, 14),
            (3, 7, 11, 15),
            (0, 5, 10, 15),
            (1, 6, 11, 12),
            (2, 7, 8, 13),
            (3, 4, 9, 14),
        ):
            for one, two, three, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[one] += x[two]
                x[three] = _rotated(x[three] ^ x[one], by)
    return (x + state).T.reshape(-1)[:count]


class PlainPython:
    """The primitives of the protocol; its seal is ChaCha20 with an HMAC."""

    def key_pair(self, random):
        private = random(32)
        return private, x25519(private, (9).to_bytes(32, "little"))

    def agree(self, private, public, purpose):
        return derive(x25519(private, public), purpose)

    def stream(self, key, nonce, count):
        return chacha20(key, 0, nonce.to_bytes(12, "little"), count)

    def seal(self, key, nonce, message):
        words = self.stream(key, nonce, -(-len(message) // 4)).astype("<u4").tobytes()
        sealed = bytes(a ^ b for a, b in zip(message, words, strict=False))
        return sealed + hmac.digest(key, bytes([nonce]) + sealed, hashlib.sha256)

    def open(self, key, nonce, sealed):
        body, tag = sealed[:-32], sealed[-32:]
        if hmac.digest(key, bytes([nonce]) + body, hashlib.sha256) != tag:
            raise ValueError("a sealed message was changed on the way")
        words = self.stream(key, nonce, -(-len(body) // 4)).astype("<u4").tobytes()
        return bytes(a ^ b for a, b in zip(body, words, strict=False))

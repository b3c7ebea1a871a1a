"""The cryptography that the protocol is made of: X25519, ChaCha20 and HKDF-SHA256, by the package ``cryptography``."""

import hashlib
import hmac
import importlib.util
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.errors import MissingExtraError
from paceline.sync.secure.shamir import Random

KEY_BYTES = 32
Words = NDArray[np.uint32]


class Primitives(Protocol):
    """What the protocol asks for; keys are 32 bytes."""

    def key_pair(self, random: Random) -> tuple[bytes, bytes]:
        """A private key and its public one."""
        ...

    def agree(self, private: bytes, public: bytes, purpose: bytes) -> bytes:
        """The key that two sides share: the same from either side's private and the other's public key."""
        ...

    def stream(self, key: bytes, nonce: int, count: int) -> Words:
        """``count`` pseudo-random words that follow from key and nonce."""
        ...

    def seal(self, key: bytes, nonce: int, message: bytes) -> bytes:
        """Encrypt and authenticate; a key and a nonce seal one message only."""
        ...

    def open(self, key: bytes, nonce: int, sealed: bytes) -> bytes:
        """The message; ``ValueError`` if it was not sealed so."""
        ...


class Cryptography:
    """By the package of that name."""

    def key_pair(self, random: Random) -> tuple[bytes, bytes]:
        """X25519 (RFC 7748)."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        private = random(KEY_BYTES)
        return private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def agree(self, private: bytes, public: bytes, purpose: bytes) -> bytes:
        """X25519, then HKDF."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

        own, other = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes(public)
        return derive(own.exchange(other), purpose)

    def stream(self, key: bytes, nonce: int, count: int) -> Words:
        """ChaCha20 (RFC 8439) from block 0."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        counter_and_nonce = bytes(4) + nonce.to_bytes(12, "little")
        encryptor = Cipher(algorithms.ChaCha20(key, counter_and_nonce), mode=None).encryptor()
        words = np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4")
        return words.astype(np.uint32)

    def seal(self, key: bytes, nonce: int, message: bytes) -> bytes:
        """ChaCha20-Poly1305 (RFC 8439)."""
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        sealed: bytes = ChaCha20Poly1305(key).encrypt(nonce.to_bytes(12, "little"), message, None)
        return sealed

    def open(self, key: bytes, nonce: int, sealed: bytes) -> bytes:
        """ChaCha20-Poly1305."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        try:
            message: bytes = ChaCha20Poly1305(key).decrypt(nonce.to_bytes(12, "little"), sealed, None)
        except InvalidTag:
            raise ValueError("a sealed message was changed on the way") from None
        return message


def derive(secret: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes: HKDF-SHA256 (RFC 5869) without salt."""
    pseudo_random = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(pseudo_random, purpose + b"\x01", hashlib.sha256)


def primitives() -> Primitives:
    """Those of the package; ``MissingExtraError`` without it."""
    if importlib.util.find_spec("cryptography") is None:
        raise MissingExtraError("sync.secure needs the cryptography package: pip install 'paceline[privacy]'")
    return Cryptography()

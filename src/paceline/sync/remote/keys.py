"""Who a server and its clients are: a certificate that clients check, and a token for each client.

    server/   certificate.pem  key.pem
              clients.txt             a client a line, in the order of their numbers: NAME and the SHA-256 of its token
    CLIENT/   ca.pem
              token.txt               NAME and TOKEN

The server knows the hashes of tokens alone. The key of the authority that signed the certificate is thrown away.
"""

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError, MissingExtraError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOKEN_BYTES = 32
SHUT_OUT = "-"
"""In place of a hash: a client that keeps its number, for a run that goes on, and is let in no more."""


@dataclass(frozen=True)
class Tokens:
    """Those of all clients, as hashes, by name; None for one that is shut out."""

    hashes: dict[str, bytes | None]

    @property
    def names(self) -> list[str]:
        """In the order of their numbers."""
        return list(self.hashes)

    def admits(self, name: str, token: str) -> bool:
        """Whether the token is that of the name; takes as long for names that are not known."""
        given = hashlib.sha256(token.encode()).digest()
        own = self.hashes.get(name)
        return hmac.compare_digest(given, own or bytes(32)) and own is not None


def read_tokens(path: Path) -> Tokens:
    """``clients.txt``; ``ConfigError`` for what is not one."""
    hashes: dict[str, bytes | None] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        try:
            name, digest = words[0], bytes(32) if words[1] == SHUT_OUT else bytes.fromhex(words[1])
        except (IndexError, ValueError):
            name, digest = "", b""
        if len(words) != 2 or len(digest) != 32 or not _NAME.fullmatch(name) or name in hashes:
            raise ConfigError(
                f"{path}, line {number}: expected a new name and the SHA-256 of its token in hexadecimal, or -"
            )
        hashes[name] = None if words[1] == SHUT_OUT else digest
    if not hashes:
        raise ConfigError(f"{path} names no client; `paceline federated-keys` writes one")
    return Tokens(hashes)


def read_token(path: Path) -> tuple[str, str]:
    """Name and token of ``token.txt``."""
    words = _text(path).split()
    if len(words) != 2:
        raise ConfigError(f"{path}: expected a name and a token")
    return words[0], words[1]


def server_context(folder: Path) -> ssl.SSLContext:
    """TLS of the server, with its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{folder}: certificate.pem and key.pem cannot be used ({_reason(error)})") from None
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """TLS of a client, which checks the server's certificate and name against ``ca.pem``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(folder / "ca.pem")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{folder}: ca.pem cannot be used ({_reason(error)})") from None
    return context


def write_keys(folder: Path, *, host: str | None, clients: Sequence[str], days: int = 825) -> None:
    """Make a certificate for ``host``, unless there is one, and tokens for clients that have none."""
    server = folder / "server"
    if bad := [name for name in clients if not _NAME.fullmatch(name) or name == "server"]:
        raise ConfigError(f"--clients {bad[0]!r}: expected a name of letters, digits, '.', '_' and '-', not 'server'")
    if there := [name for name in clients if (folder / name).exists()]:
        raise ConfigError(f"{folder / there[0]} exists already; leave it out, or remove it and its line in clients.txt")
    if (server / "certificate.pem").exists() and host is not None:
        raise ConfigError(f"{server}/certificate.pem exists already; leave --host out, or choose another folder")
    if not (server / "certificate.pem").exists():
        if host is None:
            raise ConfigError("--host is missing: the name or address by which clients reach the server")
        server.mkdir(parents=True, exist_ok=True)
        authority, certificate, key = _certificate(host, days)
        _write(folder / "ca.pem", authority)
        _write(server / "certificate.pem", certificate)
        _write(server / "key.pem", key)
    lines = []
    for name in clients:
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        (folder / name).mkdir(parents=True)
        _write(folder / name / "token.txt", f"{name} {token}\n".encode())
        _write(folder / name / "ca.pem", (folder / "ca.pem").read_bytes())
        lines.append(f"{name} {hashlib.sha256(token.encode()).hexdigest()}\n")
    with open(server / "clients.txt", "a", encoding="utf-8") as file:
        file.writelines(lines)


def _certificate(host: str, days: int) -> tuple[bytes, bytes, bytes]:
    """An authority's certificate, one for the host that it signed, and the key of that, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise MissingExtraError(
            "federated-keys needs the cryptography package: pip install 'paceline[privacy]'; or make the certificate "
            "with openssl, as docs/guides/federated.md shows"
        ) from None

    def signed(
        name: str, own: Any, issuer: str, signer: Any, extensions: Sequence[tuple[Any, bool]]
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(signer, hashes.SHA256())

    def usage(**given: bool) -> x509.KeyUsage:
        every = "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only"
        names = [*every.split(), "digital_signature", "key_cert_sign", "crl_sign"]
        return x509.KeyUsage(**{name: given.get(name, False) for name in names})

    try:
        at: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        at = x509.DNSName(host)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = "paceline federated run"
    authority = signed(
        name,
        authority_key,
        name,
        authority_key,
        [(x509.BasicConstraints(ca=True, path_length=0), True), (usage(key_cert_sign=True), True)],
    )
    server = signed(
        host,
        key,
        name,
        authority_key,
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName([at]), False),
        ],
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return authority.public_bytes(pem), server.public_bytes(pem), private


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({_reason(error)}); `paceline federated-keys` writes it") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

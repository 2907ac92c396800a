"""TLS of both sides: a certificate authority per deployment inwards, verification outwards."""

from __future__ import annotations

import contextlib
import math
import os
import ssl
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)
_MAX_LEAVES = 1024


class Authority:
    """Mints a leaf for each host that is terminated. The key never leaves the egress process."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: dict[str, tuple[float, ssl.SSLContext]] = {}

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Read the authority below `directory`, or make it once: ca.key 0600, ca.pem for all."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key_path, certificate_path = directory / "ca.key", directory / "ca.pem"
        if not certificate_path.exists():
            _make(key_path, certificate_path)
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the authority's key is not an elliptic curve key")
        return cls(x509.load_pem_x509_certificate(certificate_path.read_bytes()), key)

    def context(self, host: str) -> ssl.SSLContext:
        """Server context with a leaf for one host, kept until its certificate is a day old."""
        made, context = self._contexts.get(host, (-math.inf, None))
        if context is None or time.monotonic() - made > _DAY.total_seconds():
            if len(self._contexts) >= _MAX_LEAVES:
                self._contexts.clear()
            context = self._leaf(host)
            self._contexts[host] = time.monotonic(), context
        return context

    def _leaf(self, host: str) -> ssl.SSLContext:
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(self._leaf_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + 30 * _DAY)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        pem = certificate.public_bytes(serialization.Encoding.PEM) + self._leaf_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        # The ssl module loads from files only; a memory file is on no disk.
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        return context


def _make(key_path: Path, certificate_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ringfence egress")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 3650 * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_ca_usage(), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(
        key_path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        0o600,
    )
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _ca_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        os.fchmod(file.fileno(), mode)
        file.write(data)
    Path(file.name).replace(path)


def upstream_context(extra_roots: str | None) -> ssl.SSLContext:
    """Client context: the system's roots, and the operator's own where settings name them."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if extra_roots is not None:
        context.load_verify_locations(cafile=extra_roots)
    return context


class TlsError(Exception):
    """The sandbox's side of TLS failed."""


class ServerTls:
    """TLS towards a sandbox, sans-I/O: ciphertext in and out, plaintext in and out.

    `choose(sni)` returns the host to speak as, or None to refuse: a missing SNI, and one that is
    not what CONNECT named, end in an alert (SNI and Host must be one, no domain fronting).
    """

    def __init__(self, authority: Authority, choose: Callable[[str], str | None]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        base = authority.context("invalid.ringfence")
        self._object = base.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._authority, self._choose = authority, choose
        self._handshaken = False
        base.sni_callback = _on_sni
        # the callback is handed the SSLObject alone; an attribute brings it back to us
        self._object.chooser = self  # type: ignore[attr-defined]
        self.host: str | None = None

    def select(self, sni: str | None) -> int | None:
        """The SNI callback's decision: None goes on, a number is the alert."""
        host = self._choose((sni or "").lower().removesuffix("."))
        if host is None:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        self.host = host
        self._object.context = self._authority.context(host)
        return None

    def feed(self, data: bytes) -> bytes:
        """Ciphertext from the sandbox; returns plaintext. Raises TlsError."""
        self._incoming.write(data)
        try:
            if not self._handshaken:
                self._object.do_handshake()
                self._handshaken = True
            parts = []
            while chunk := self._object.read(65536):
                parts.append(chunk)
                if not self._incoming.pending and not self._object.pending():
                    break  # the next read could only raise SSLWantReadError, which costs more
            return b"".join(parts)
        except ssl.SSLWantReadError:
            return b"".join(parts) if self._handshaken else b""
        except ssl.SSLError as error:
            raise TlsError(error.reason or "tls") from None

    def encrypt(self, data: bytes) -> bytes:
        """Plaintext for the sandbox; returns ciphertext."""
        self._object.write(data)
        return self.pending()

    def pending(self) -> bytes:
        """Ciphertext to send: handshake messages and alerts."""
        return self._outgoing.read()

    def close(self) -> bytes:
        """close_notify."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()
        return self._outgoing.read()


def _on_sni(tls: ssl.SSLObject, sni: str | None, _: ssl.SSLContext) -> int | None:
    chooser = getattr(tls, "chooser", None)
    if not isinstance(chooser, ServerTls):
        return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)
    return chooser.select(sni)

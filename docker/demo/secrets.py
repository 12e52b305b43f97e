"""Makes what compose.yaml needs to be safe, once: an authority, a certificate of all its services,
and tokens.

    python -m demo.secrets FOLDER

`tokens` is what the coordinator reads, hashes alone; `trainer`, `worker` and `admin` hold the
tokens themselves. What is there already is kept.
"""

import datetime
import hashlib
import ipaddress
import secrets
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Whom the certificate is for. All workers show it, and are verified by the last name.
NAMES = ["coordinator", "localhost", "worker"]
SCOPES = {"trainer": ["open", "select", "push", "read"], "worker": ["worker"], "admin": ["admin"]}
VALID = datetime.timedelta(days=3650)


def write(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    path.chmod(mode)


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + VALID)
    )


def certificates(folder: Path) -> None:
    authority, key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    root = (
        builder("superbatch-compose", "superbatch-compose", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    others = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    leaf = (
        builder("superbatch", "superbatch-compose", key)
        .add_extension(
            x509.SubjectAlternativeName([*map(x509.DNSName, NAMES), *others]), critical=False
        )
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    write(folder / "ca.crt", root.public_bytes(pem), 0o644)
    write(folder / "tls.crt", leaf.public_bytes(pem), 0o644)
    write(
        folder / "tls.key",
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def tokens(folder: Path) -> None:
    lines = ["tokens:"]
    for name, scopes in SCOPES.items():
        token = f"sbt_{secrets.token_hex(32)}"
        write(folder / name, token)
        digest = hashlib.sha256(token.encode()).hexdigest()
        lines.append(f"- {{name: {name}, sha256: {digest}, scopes: [{', '.join(scopes)}]}}")
    write(folder / "tokens", "\n".join(lines) + "\n")


def main() -> None:
    folder = Path(sys.argv[1])
    # The last of each to be written.
    if not (folder / "tls.key").exists():
        certificates(folder)
    if not (folder / "tokens").exists():
        tokens(folder)


if __name__ == "__main__":
    main()

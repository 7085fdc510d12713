"""The project's own certificate authority: TLS for the coordinator's server, and nothing else.

Sites pin this CA from their invitation, so no public authority can vouch for a false server. It
signs certificates of servers only; what identifies a site is its Ed25519 identity and its node key.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ConfigError

BACKDATED = datetime.timedelta(minutes=5)  # clocks of sites that lag a little


def create_authority(
    project: str, *, begins: datetime.datetime, ends: datetime.datetime
) -> tuple[bytes, bytes]:
    """A new CA; its private key and its certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Fedward"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{project} CA"[:64]),
        ]
    )
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _private_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def issue_server_certificate(
    authority_key: bytes,
    authority_certificate: bytes,
    hosts: Sequence[str],
    *,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> tuple[bytes, bytes]:
    """A server's new private key and its certificate, both PEM.

    Args:
        authority_key: PEM, from `create_authority`.
        authority_certificate: PEM, from `create_authority`.
        hosts: Names and IP addresses by which the server is reached; the first is its name.
        begins: Valid from.
        ends: Valid until; cut to the authority's own end.

    Raises:
        ConfigError: the authority's files are not usable.
    """
    try:
        signer = serialization.load_pem_private_key(authority_key, password=None)
        issuer = x509.load_pem_x509_certificate(authority_certificate)
    except (ValueError, TypeError):
        raise ConfigError("the project's CA key or certificate is damaged; restore it.") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError("the project's CA key is not an elliptic-curve key; restore it.")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    ends = min(ends, issuer.not_valid_after_utc)
    names = x509.SubjectAlternativeName([_general_name(h) for h in dict.fromkeys(hosts)])
    use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(name, issuer.subject, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(use, critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    return _private_pem(key), certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - BACKDATED)
        .not_valid_after(ends)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )

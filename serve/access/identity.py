"""Who is calling: from a call's metadata and peer to a tenant and what it may do.

The service itself speaks clear text (Serve's gRPC proxy knows no TLS); a front in the cluster ends TLS and passes the
``authorization`` metadata on. See docs/operations.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Protocol

import jwt
from jwt.exceptions import ExpiredSignatureError, ImmatureSignatureError, InvalidTokenError, PyJWTError
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from causal_forcing.errors import InvalidRequest
from serve.errors import NotAllowed, Unauthenticated
from serve.messages import LOCAL_TENANT
from serve.section import Section

from .config import IdentityConfig, JwtConfig
from .tenants import Tenant, TenantPolicy, TenantsFile
from .watched import WatchedFile, parse_section

LOOPBACK = ("ipv4:127.", "ipv6:[::1]:", "ipv6:%5B::1%5D:", "unix:")
"""How gRPC writes the peers of this machine."""

FORWARDED = frozenset({"forwarded", "x-forwarded-for", "x-real-ip", "via"})
"""Metadata that a proxy adds: the caller is not the peer."""

MIN_SECRET_BYTES = 32
"""Shortest secret of HS256. Source: RFC 7518, section 3.2."""

MAX_TOKEN = 8192
"""Longest credential that is looked at, in characters."""

_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class Caller:
    """Who made a call.

    Attributes:
        tenant: Whose the caller is.
        policy: What that tenant may do.
        is_operator: Whether the caller may see and end every session.
    """

    tenant: str = LOCAL_TENANT
    policy: TenantPolicy = field(default_factory=TenantPolicy)
    is_operator: bool = False


class Credentials(Protocol):
    """Turns a bearer token into a tenant."""

    def tenant_of(self, token: str) -> str:
        """Return whose token it is.

        Raises:
            Unauthenticated: If it is nobody's.
        """
        ...

    def refresh(self) -> bool:
        """Read changed files again; return whether something is new."""
        ...


class ApiKey(Section):
    """One key.

    Attributes:
        sha256: Hexadecimal SHA-256 of the key.
        tenant: Whose it is.
        name: What people call it.
    """

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Tenant
    name: str = ""

    @field_validator("tenant")
    @classmethod
    def _check(cls, tenant: str) -> str:
        if tenant == LOCAL_TENANT:
            raise ValueError(f"must not be {tenant}, the tenant of callers without a key")
        return tenant


class ApiKeysFile(Section):
    """The file of keys."""

    keys: tuple[ApiKey, ...] = ()


class ApiKeys:
    """Keys that are random and long, so that a plain hash keeps them; the file holds no key."""

    def __init__(self, config: IdentityConfig) -> None:
        assert config.api_keys_file is not None
        self._file = WatchedFile(config.api_keys_file, _parse_keys)

    def tenant_of(self, token: str) -> str:
        """Return whose key it is."""
        tenant = self._file.value.get(hashlib.sha256(token.encode()).hexdigest())
        if tenant is None:
            raise Unauthenticated("the API key is not known")
        return tenant

    def refresh(self) -> bool:
        """Read the file again if it has changed."""
        return self._file.refresh()


class JsonWebTokens:
    """Signed tokens; signature, lifetime, issuer and audience are checked, and the algorithm is ours to say."""

    def __init__(self, config: JwtConfig) -> None:
        self._config = config
        parse = _parse_secrets if config.algorithm == "HS256" else _parse_public_keys
        self._keys = WatchedFile(config.key_file, parse)

    def tenant_of(self, token: str) -> str:
        """Return the tenant that a token names."""
        claims = self._claims(token)
        name = self._config.tenant_claim
        try:
            tenant = _TENANT.validate_python(claims.get(name), strict=True)
        except ValidationError:
            raise Unauthenticated(f"the token's claim {name} names no tenant") from None
        if tenant == LOCAL_TENANT:
            raise Unauthenticated(f"the token's claim {name} is {tenant}, the tenant of callers without a token")
        return tenant

    def refresh(self) -> bool:
        """Read the keys again if their file has changed."""
        return self._keys.refresh()

    def _claims(self, token: str) -> dict[str, Any]:
        config = self._config
        problem = "the token is not valid here"
        for key in self._keys.value:
            try:
                return dict(
                    jwt.decode(
                        token,
                        key,
                        algorithms=[config.algorithm],
                        audience=config.audience,
                        issuer=config.issuer,
                        leeway=config.leeway_s,
                        options={"require": ["exp", "aud", "iss"]},
                    )
                )
            except ExpiredSignatureError:
                problem = "the token has expired"
            except ImmatureSignatureError:
                problem = "the token is not valid yet"
            except (InvalidTokenError, PyJWTError, ValueError):
                continue
        raise Unauthenticated(problem)


class Identity:
    """Answers who is calling.

    Args:
        config: How callers are told apart.
        any_peer: Whether callers on other machines are served at all.
    """

    def __init__(self, config: IdentityConfig, *, any_peer: bool) -> None:
        self._config = config
        self._any_peer = any_peer
        self._credentials: Credentials | None = None
        if config.mode == "api_keys":
            self._credentials = ApiKeys(config)
        elif config.jwt is not None:
            self._credentials = JsonWebTokens(config.jwt)
        self._tenants: WatchedFile[TenantsFile] | None = None
        if config.tenants_file is not None:
            self._tenants = WatchedFile(config.tenants_file, lambda text: parse_section(text, TenantsFile))

    def identify(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        """Return who makes a call.

        Raises:
            NotAllowed: If callers from there are not served (``REMOTE_PEER``), or this one is not (``TENANT_BANNED``).
            Unauthenticated: If the call has no credentials that are known here.
        """
        given = MappingProxyType({key.lower(): value for key, value in metadata})
        is_here = is_local(peer) and not FORWARDED & given.keys()
        if not self._any_peer and not is_here:
            raise NotAllowed("this service answers callers on its own machine only (peers: loopback)")
        if self._credentials is None:
            caller = self.caller(LOCAL_TENANT)
            is_operator = caller.is_operator or not self._any_peer
            caller = Caller(caller.tenant, caller.policy, is_operator)
        else:
            caller = self.caller(self._credentials.tenant_of(_bearer(given)))
        if caller.policy.banned:
            raise NotAllowed("this tenant is not served here", reason="TENANT_BANNED")
        return caller

    def caller(self, tenant: str) -> Caller:
        """Return a tenant as the files of now describe it."""
        policy = self._tenants.value.policy(tenant) if self._tenants is not None else TenantPolicy()
        return Caller(tenant, policy, policy.operator)

    def refresh(self) -> bool:
        """Read changed files again; return whether what tenants may do has changed."""
        if self._credentials is not None:
            self._credentials.refresh()
        return self._tenants is not None and self._tenants.refresh()


def is_local(peer: str) -> bool:
    """Return whether a peer, as gRPC writes it, is on this machine."""
    return peer.startswith(LOOPBACK)


def _bearer(metadata: Mapping[str, str | bytes]) -> str:
    value = metadata.get("authorization", "")
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN:
        raise Unauthenticated("the call needs the metadata `authorization: Bearer ...`")
    return token


def _parse_keys(text: str) -> dict[str, str]:
    keys = parse_section(text, ApiKeysFile).keys
    tenants = {key.sha256: key.tenant for key in keys}
    if len(tenants) != len(keys):
        raise InvalidRequest("keys", "(not shown)", "must not hold the same hash twice")
    return tenants


def _parse_secrets(text: str) -> tuple[str, ...]:
    secrets = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not secrets or any(len(secret.encode()) < MIN_SECRET_BYTES or "-----BEGIN" in secret for secret in secrets):
        raise InvalidRequest("key_file", "(not shown)", f"must hold secrets of {MIN_SECRET_BYTES} bytes or more")
    return secrets


def _parse_public_keys(text: str) -> tuple[str, ...]:
    keys = tuple(_PEM.findall(text))
    if not keys or "PRIVATE KEY" in text:
        raise InvalidRequest("key_file", "(not shown)", "must hold PEM blocks `PUBLIC KEY`, and nothing private")
    return keys

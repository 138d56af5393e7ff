"""Configuration of who may do what, and of what is kept about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from serve.section import Section


class JwtConfig(Section):
    """JSON Web Tokens.

    Attributes:
        algorithm: The one that tokens must be signed with; any other is refused, whatever the token says.
        key_file: Mounted file, read again when it changes. HS256: a secret a line, 32 bytes or more each. RS256: public
            keys in PEM, one after the other. Several keys let an old one run out beside its successor.
        audience: What ``aud`` must hold.
        issuer: What ``iss`` must be.
        tenant_claim: The claim that names the tenant.
        leeway_s: By how much the clocks of issuer and service may differ.
    """

    algorithm: Literal["HS256", "RS256"]
    key_file: Path
    audience: Annotated[str, Field(min_length=1)]
    issuer: Annotated[str, Field(min_length=1)]
    tenant_claim: Annotated[str, Field(min_length=1)] = "sub"
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 10


class IdentityConfig(Section):
    """How callers are told apart.

    Attributes:
        mode: ``none``: all callers are the tenant ``local``. ``api_keys`` and ``jwt``: the metadata ``authorization:
            Bearer ...`` holds a key, or a token, that names the tenant.
        api_keys_file: Mounted YAML or JSON file with the keys' hashes, read again when it changes.
        jwt: How tokens are checked.
        tenants_file: Mounted YAML or JSON file with what each tenant may do, read again when it changes; None: no
            tenant has limits of its own.
    """

    mode: Literal["none", "api_keys", "jwt"] = "none"
    api_keys_file: Path | None = None
    jwt: JwtConfig | None = None
    tenants_file: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for mode, name in (("api_keys", "api_keys_file"), ("jwt", "jwt")):
            given = getattr(self, name) is not None
            if given and self.mode != mode:
                raise ValueError(f"{name} can have no effect without mode: {mode}")
            if not given and self.mode == mode:
                raise ValueError(f"mode: {mode} needs {name}")
        return self


class ModerationConfig(Section):
    """A hook of the operator's that sees prompts and start images before anything is made of them.

    Attributes:
        hook: ``module:function`` that is called in the gateway (see :mod:`serve.access.moderation`).
        url: HTTP endpoint that is asked instead.
        timeout_s: How long a verdict may take.
        on_failure: What happens to a request whose verdict fails or does not come in time.
    """

    hook: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 2
    on_failure: Literal["allow", "refuse"] = "refuse"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.hook is None) == (self.url is None):
            raise ValueError("exactly one of hook and url must be given")
        return self


class UsageConfig(Section):
    """Where records of what sessions used go: a JSON line a session.

    Attributes:
        file: Path of the file that lines are appended to; ``{process}`` in it becomes the name of the writing process,
            for folders that several machines share. ``-`` writes to the standard output.
    """

    file: Annotated[str, Field(min_length=1)]


class LogConfig(Section):
    """The processes' logs.

    Attributes:
        format: ``text`` for people, ``json`` an object a line.
        level: The least severe records that are written.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

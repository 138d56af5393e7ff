"""Who is calling, and what they may do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from causal_forcing.errors import InvalidRequest
from serve.access.config import IdentityConfig, JwtConfig
from serve.access.identity import ApiKeys, Identity, JsonWebTokens, is_local
from serve.errors import NotAllowed, Unauthenticated
from serve.messages import LOCAL_TENANT

HERE, ELSEWHERE = "ipv4:127.0.0.1:40000", "ipv4:10.0.0.7:40000"
SECRET = "an old secret of more than 32 bytes"
NEW_SECRET = "the secret after it, just as long.."


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def write(path: Path, text: str) -> Path:
    """Change a file as an editor does; the times of two changes differ even on a coarse clock."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    return path


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:40000", True),
        ("ipv4:127.8.9.1:40000", True),
        ("ipv6:[::1]:40000", True),
        ("ipv6:%5B::1%5D:40000", True),
        ("unix:/tmp/socket", True),
        ("ipv4:10.0.0.7:40000", False),
        ("ipv4:128.127.0.1:40000", False),
        ("ipv6:[fe80::1]:40000", False),
        ("", False),
    ],
)
def test_only_this_machine_is_local(peer: str, local: bool) -> None:
    assert is_local(peer) == local


def test_without_identity_everybody_here_is_the_local_operator() -> None:
    caller = Identity(IdentityConfig(), any_peer=False).identify([], HERE)
    assert (caller.tenant, caller.is_operator) == (LOCAL_TENANT, True)


@pytest.mark.parametrize("header", ["x-forwarded-for", "Forwarded", "x-real-ip", "via"])
def test_without_identity_nobody_comes_in_through_a_front_on_this_machine(header: str) -> None:
    identity = Identity(IdentityConfig(), any_peer=False)
    for metadata, peer in (([], ELSEWHERE), ([(header, "10.0.0.7")], HERE)):
        with pytest.raises(NotAllowed) as caught:
            identity.identify(metadata, peer)
        assert caught.value.reason == "REMOTE_PEER"


def test_behind_a_front_without_identity_nobody_is_an_operator_unless_the_file_says_so(tmp_path: Path) -> None:
    assert not Identity(IdentityConfig(), any_peer=True).identify([], ELSEWHERE).is_operator
    tenants = write(tmp_path / "tenants.yaml", "tenants: {local: {operator: true}}")
    assert Identity(IdentityConfig(tenants_file=tenants), any_peer=True).identify([], ELSEWHERE).is_operator


def keys_file(path: Path, **keys: str) -> Path:
    entries = [{"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant} for key, tenant in keys.items()]
    return write(path, json.dumps({"keys": entries}))


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "key-a")],
        [("authorization", "Basic key-a")],
        [("authorization", b"Bearer key-a")],
        [("authorization", "Bearer ")],
        bearer("unknown"),
        bearer("x" * 10_000),
    ],
)
def test_a_call_without_a_known_key_has_bad_credentials(tmp_path: Path, metadata: Any) -> None:
    config = IdentityConfig(mode="api_keys", api_keys_file=keys_file(tmp_path / "keys.json", **{"key-a": "a"}))
    with pytest.raises(Unauthenticated) as caught:
        Identity(config, any_peer=True).identify(metadata, ELSEWHERE)
    assert caught.value.reason == "BAD_CREDENTIALS"
    assert "key-a" not in caught.value.message


def test_a_key_names_a_tenant_and_the_file_may_change(tmp_path: Path) -> None:
    path = keys_file(tmp_path / "keys.json", **{"key-a": "a"})
    identity = Identity(IdentityConfig(mode="api_keys", api_keys_file=path), any_peer=True)
    caller = identity.identify(bearer("key-a"), ELSEWHERE)
    assert (caller.tenant, caller.is_operator) == ("a", False)
    keys_file(path, **{"key-b": "b"})
    identity.refresh()
    assert identity.identify(bearer("key-b"), ELSEWHERE).tenant == "b"
    with pytest.raises(Unauthenticated):
        identity.identify(bearer("key-a"), ELSEWHERE)


ODD_YAML = ("name: 2026-31-12", "x: 0b_", "[" * 3000)
"""What makes the parser fail in ways of its own."""


@pytest.mark.parametrize(
    "text", ["keys: [{sha256: short, tenant: a}]", "- 1", "{", "keys: [{secret-key: x}]", "", *ODD_YAML]
)
def test_a_file_of_keys_that_is_wrong_is_refused_at_the_start_and_never_shown(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "keys.yaml", text)
    with pytest.raises(InvalidRequest) as caught:
        ApiKeys(IdentityConfig(mode="api_keys", api_keys_file=path))
    assert str(path) in caught.value.message
    assert "short" not in caught.value.message


def test_a_change_that_is_wrong_changes_nothing_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path / "keys.json", **{"key-a": "a"})
    keys = ApiKeys(IdentityConfig(mode="api_keys", api_keys_file=path))
    caplog.set_level("ERROR", "ray.serve")
    for text in ("keys: 7", *ODD_YAML):
        write(path, text)
        assert not keys.refresh()
    path.unlink()
    assert not keys.refresh()
    assert keys.tenant_of("key-a") == "a"


def test_a_mounted_file_changes_by_its_links(tmp_path: Path) -> None:
    for name, key in (("v1", "key-a"), ("v2", "key-b")):
        (tmp_path / name).mkdir()
        keys_file(tmp_path / name / "keys.json", **{key: "a"})
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "keys.json").symlink_to("data/keys.json")
    keys = ApiKeys(IdentityConfig(mode="api_keys", api_keys_file=tmp_path / "keys.json"))
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").replace(tmp_path / "data")
    assert keys.refresh()
    assert keys.tenant_of("key-b") == "a"


CLAIMS = {"aud": "video", "iss": "https://id.example", "sub": "studio"}


def claims(**changes: Any) -> dict[str, Any]:
    given = {**CLAIMS, "exp": time.time() + 60, **changes}
    return {name: value for name, value in given.items() if value is not None}


def shared(tmp_path: Path, *secrets: str, **fields: Any) -> JsonWebTokens:
    path = write(tmp_path / "secret", "\n".join(secrets or (SECRET,)))
    return JsonWebTokens(
        JwtConfig(algorithm="HS256", key_file=path, audience="video", issuer="https://id.example", **fields)
    )


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def public_pem(key: rsa.RSAPrivateKey) -> str:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(encoding, form).decode()


def signed(tmp_path: Path, pem: str) -> JsonWebTokens:
    path = write(tmp_path / "key.pem", pem)
    return JsonWebTokens(JwtConfig(algorithm="RS256", key_file=path, audience="video", issuer="https://id.example"))


def test_a_signed_token_names_a_tenant(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    assert shared(tmp_path).tenant_of(jwt.encode(claims(), SECRET, "HS256")) == "studio"
    assert signed(tmp_path, public_pem(rsa_key)).tenant_of(jwt.encode(claims(), rsa_key, "RS256")) == "studio"
    teams = shared(tmp_path, tenant_claim="team")
    assert teams.tenant_of(jwt.encode(claims(team="red"), SECRET, "HS256")) == "red"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exp": time.time() - 60}, "expired"),
        ({"nbf": time.time() + 600}, "not valid yet"),
        ({"exp": None}, "not valid"),
        ({"aud": "mail"}, "not valid"),
        ({"aud": None}, "not valid"),
        ({"iss": "https://elsewhere"}, "not valid"),
        ({"iss": None}, "not valid"),
        ({"sub": None}, "names no tenant"),
        ({"sub": "a\nb"}, "names no tenant"),
        ({"sub": ""}, "names no tenant"),
        ({"sub": LOCAL_TENANT}, "is local, the tenant of callers without a token"),
    ],
)
def test_a_token_that_is_not_for_here_and_now_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    token = jwt.encode(claims(**changes), SECRET, "HS256")
    with pytest.raises(Unauthenticated, match=said) as caught:
        shared(tmp_path).tenant_of(token)
    assert token not in caught.value.message


def test_a_token_with_another_signature_is_refused(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for tokens, key, algorithm in (
        (shared(tmp_path), NEW_SECRET, "HS256"),
        (signed(tmp_path, public_pem(rsa_key)), other, "RS256"),
    ):
        with pytest.raises(Unauthenticated):
            tokens.tenant_of(jwt.encode(claims(), key, algorithm))
    head, body, mac = jwt.encode(claims(), SECRET, "HS256").split(".")
    for token in ("", "a.b.c", f"{head}.{body}.", f"{head}.{body}", f"{head}.{part(claims(sub='root'))}.{mac}"):
        with pytest.raises(Unauthenticated):
            shared(tmp_path).tenant_of(token)


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_the_token_does_not_choose_the_algorithm(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    pem = public_pem(rsa_key)
    unsigned = f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims())}."
    text = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(claims())}"
    mac = hmac.new(pem.encode(), text.encode(), hashlib.sha256).digest()
    public_key_as_secret = f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    for tokens in (shared(tmp_path), signed(tmp_path, pem)):
        for token in (unsigned, public_key_as_secret, jwt.encode(claims(), SECRET, "HS512")):
            with pytest.raises(Unauthenticated):
                tokens.tenant_of(token)
    with pytest.raises(Unauthenticated):
        signed(tmp_path, pem).tenant_of(jwt.encode(claims(), SECRET, "HS256"))


def test_an_old_key_runs_out_beside_its_successor(tmp_path: Path) -> None:
    tokens = shared(tmp_path, SECRET, NEW_SECRET)
    old, new = (jwt.encode(claims(), secret, "HS256") for secret in (SECRET, NEW_SECRET))
    assert tokens.tenant_of(old) == tokens.tenant_of(new) == "studio"
    write(tmp_path / "secret", NEW_SECRET)
    assert tokens.refresh()
    with pytest.raises(Unauthenticated):
        tokens.tenant_of(old)
    assert tokens.tenant_of(new) == "studio"


def test_keys_that_cannot_be_right_are_refused_at_the_start(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    private = rsa_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    for secret in ("short", public_pem(rsa_key)):
        with pytest.raises(InvalidRequest):
            shared(tmp_path, secret)
    for pem in ("", SECRET, private, public_pem(rsa_key) + private):
        with pytest.raises(InvalidRequest):
            signed(tmp_path, pem)


def test_a_tenants_file_says_what_each_may_do_and_may_change(tmp_path: Path) -> None:
    keys = keys_file(tmp_path / "keys.json", a="studio", b="guest", c="ops", d="mallory")
    tenants = write(
        tmp_path / "tenants.yaml",
        """
        default: {max_sessions: 1, max_session_s: 60}
        tenants:
          studio: {weight: 3, max_sessions: 8, max_queued: 2, prompts_per_minute: 30}
          ops: {operator: true}
          mallory: {banned: true}
        """,
    )
    config = IdentityConfig(mode="api_keys", api_keys_file=keys, tenants_file=tenants)
    identity = Identity(config, any_peer=True)
    studio = identity.identify(bearer("a"), ELSEWHERE)
    share = studio.policy.share(studio.tenant)
    assert (share.tenant, share.weight, share.max_sessions, share.max_queued) == ("studio", 3, 8, 2)
    guest = identity.identify(bearer("b"), ELSEWHERE)
    assert (guest.policy.max_sessions, guest.policy.max_session_s, guest.policy.weight) == (1, 60, 1)
    assert identity.identify(bearer("c"), ELSEWHERE).is_operator
    with pytest.raises(NotAllowed) as caught:
        identity.identify(bearer("d"), ELSEWHERE)
    assert caught.value.reason == "TENANT_BANNED"
    write(tenants, "unlisted: refuse\ntenants: {studio: {}}")
    assert identity.refresh()
    assert identity.identify(bearer("a"), ELSEWHERE).policy.weight == 1
    for token in "bcd":
        with pytest.raises(NotAllowed):
            identity.identify(bearer(token), ELSEWHERE)
    assert not identity.refresh()


def test_the_tenant_of_callers_without_credentials_has_none(tmp_path: Path) -> None:
    """It is served also when others that are not listed are refused, and the file may make it an operator."""
    path = keys_file(tmp_path / "keys.json", **{"key-a": LOCAL_TENANT})
    with pytest.raises(InvalidRequest, match="keys.0.tenant: .* must not be local"):
        ApiKeys(IdentityConfig(mode="api_keys", api_keys_file=path))
    tenants = write(tmp_path / "tenants.yaml", "unlisted: refuse")
    assert Identity(IdentityConfig(tenants_file=tenants), any_peer=True).identify([], ELSEWHERE).tenant == LOCAL_TENANT


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "api_keys"}, "needs api_keys_file"),
        ({"mode": "jwt"}, "needs jwt"),
        ({"api_keys_file": "keys.json"}, "can have no effect"),
    ],
)
def test_a_mode_and_its_files_go_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IdentityConfig(**fields)

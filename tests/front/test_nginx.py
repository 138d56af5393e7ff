"""TLS and mutual TLS through the real nginx with the configuration of this repository."""

from __future__ import annotations

import asyncio
import shutil
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from causal_forcing.cli import main
from protos.causal_forcing.v1 import video_pb2 as pb
from protos.causal_forcing.v1 import video_pb2_grpc
from serve.local import free_port
from tests.serve.gateway.test_service import running, send_config

TEMPLATE = Path(__file__).parents[2] / "k8s" / "front" / "nginx.conf.template"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(NGINX is None or OPENSSL is None, reason="nginx or openssl is not installed")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this machine, and one that clients identify themselves with."""
    folder = tmp_path_factory.mktemp("certs")
    for name, subject in (("tls", "localhost"), ("clients", "client")):
        command = [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt"), "-days", "2"]
        names = ["-subj", f"/CN={subject}", "-addext", f"subjectAltName=DNS:{subject}"]
        subprocess.run([*command, *files, *names], check=True, capture_output=True)
    return folder


@contextmanager
def front(upstream: int, certs: Path, folder: Path, verify: str) -> Iterator[str]:
    """Run nginx before a port of this machine; yield its address."""
    port = free_port()
    values = {"FRONT_PORT": port, "UPSTREAM": f"127.0.0.1:{upstream}", "CERTS": certs, "VERIFY_CLIENT": verify}
    server = string.Template(TEMPLATE.read_text()).safe_substitute(values)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
    config = folder / "nginx.conf"
    config.write_text(f"{head}http {{\naccess_log off;\n{temporary}{server}\n}}\n")
    process = subprocess.Popen([str(NGINX), "-e", f"{folder}/error.log", "-c", str(config)])
    try:
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(10)


def credentials(certs: Path, *, as_client: bool = False) -> grpc.ChannelCredentials:
    own = {
        "private_key": (certs / "clients.key").read_bytes(),
        "certificate_chain": (certs / "clients.crt").read_bytes(),
    }
    return grpc.ssl_channel_credentials((certs / "tls.crt").read_bytes(), **(own if as_client else {}))


async def play(address: str, given: grpc.ChannelCredentials, chunks: int) -> list[pb.StreamVideoResponse]:
    """Return what a session says that acknowledges so many chunks and ends."""
    heard: list[pb.StreamVideoResponse] = []
    async with asyncio.timeout(30), grpc.aio.secure_channel(address, given) as channel:
        call: Any = video_pb2_grpc.VideoServiceStub(channel).StreamVideo(wait_for_ready=True)  # type: ignore[no-untyped-call]
        await send_config(call)
        while isinstance(message := await call.read(), pb.StreamVideoResponse):
            heard.append(message)
            if message.frame.last_in_chunk and message.frame.chunk_index < chunks:  # more may come before the end
                done = message.frame.chunk_index == chunks - 1
                ack = pb.StreamVideoRequest(ack=pb.Ack(chunk_index=message.frame.chunk_index))
                await call.write(pb.StreamVideoRequest(end=pb.End()) if done else ack)
    return heard


@pytest.mark.parametrize("verify", ["off", "on"])
async def test_a_session_goes_both_ways_through_the_front(certs: Path, tmp_path: Path, verify: str) -> None:
    async with running(peers="any") as gateway:
        with front(gateway.port, certs, tmp_path, verify) as address:
            heard = await play(address, credentials(certs, as_client=verify == "on"), chunks=6)
    assert heard[-1].HasField("session_ended")
    assert [message.sequence for message in heard] == list(range(len(heard)))


async def test_without_the_setting_nobody_is_served_through_a_front_on_this_machine(
    certs: Path, tmp_path: Path
) -> None:
    async with running() as gateway:
        server = front(gateway.port, certs, tmp_path, "off")
        with server as address, pytest.raises(grpc.aio.AioRpcError) as caught:
            await play(address, credentials(certs), chunks=1)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "REMOTE_PEER" in (caught.value.details() or "")


async def test_mutual_tls_refuses_a_client_without_a_certificate(certs: Path, tmp_path: Path) -> None:
    async with running(peers="any") as gateway:
        with front(gateway.port, certs, tmp_path, "on") as address, pytest.raises(grpc.aio.AioRpcError):
            await play(address, credentials(certs), chunks=1)
    assert gateway.service.session_count == 0


async def test_the_commands_trust_the_authority_that_they_are_given(certs: Path, tmp_path: Path) -> None:
    async with running(peers="any") as gateway:
        with front(gateway.port, certs, tmp_path, "off") as address:
            await play(address, credentials(certs), chunks=1)  # returns when nginx is there
            options = ["--server", address, "--prompt", "a fox", "--seconds", "0.2"]
            assert await asyncio.to_thread(main, ["stream", *options, "--tls-ca", str(certs / "tls.crt")]) == 0
            assert await asyncio.to_thread(main, ["stream", *options, "--tls"]) == 1

"""Connections as the network sees them: certificates, ports, and callers that send noise."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, Process
from grpc_apart import Channel, Refused
from secured import (  # noqa: F401
    Authority,
    Secured,
    authority,
    command,
    folder,
    openssl,
    resident,
    service,
    wait_until,
)
from test_end_to_end import inputs, spec  # noqa: F401


def test_the_service_and_the_client_know_each_other_by_certificate(service, authority, folder):
    other = Authority(folder, "other")
    with pytest.raises(superbatch.Unavailable, match="UnknownIssuer"):
        service.connect(ca=str(other.ca))
    with pytest.raises(superbatch.Unavailable):
        superbatch.connect(service.address.replace("https", "http"), retry_attempts=1).list_runs()
    with pytest.raises(superbatch.Error, match="nope.pem"):
        service.connect(ca="nope.pem")
    with pytest.raises(superbatch.Error, match="without TLS"):
        superbatch.connect("http://192.0.2.1:50051", token="sbt_x")


def test_old_tls_is_not_spoken(service):
    host = service.address.removeprefix("https://")

    def handshake(version: str) -> bool:
        ended = subprocess.run(
            [
                "openssl",
                "s_client",
                version,
                "-cipher",
                "DEFAULT:@SECLEVEL=0",
                "-alpn",
                "h2",
                "-connect",
                host,
            ],
            input=b"",
            capture_output=True,
        )
        return b"Cipher is (NONE)" not in ended.stdout and b"New, " in ended.stdout

    assert handshake("-tls1_2") and handshake("-tls1_3")
    assert not handshake("-tls1_1") and not handshake("-tls1")


def test_a_renewed_certificate_is_shown_without_a_restart(folder, authority):
    new, place = Authority(folder, "new"), folder / "renewed"
    place.mkdir()

    def install(of: Authority, name: str) -> None:
        for made, kept in zip(of.sign(name), ("cert.pem", "key.pem")):
            (place / kept).write_bytes(Path(made).read_bytes())

    install(authority, "first")
    with ExitStack() as stack:
        process = Process(
            place,
            "renewed",
            "serve",
            {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "page_listen": None,
                "state": (place / "state").as_uri(),
                "tls": {"cert": str(place / "cert.pem"), "key": str(place / "key.pem")},
            },
        )
        stack.callback(process.stop)
        client = superbatch.connect(process.address, ca=str(authority.ca))
        install(new, "second")

        def known() -> bool:
            try:
                superbatch.connect(process.address, ca=str(new.ca), retry_attempts=1)
            except superbatch.Unavailable:
                return False
            return True

        wait_until(known)
        assert client.list_runs() == [], "connections that are open go on"


def test_clients_show_certificates_where_they_are_asked_to(folder, authority, inputs):
    place = folder / "mutual"
    place.mkdir()
    with ExitStack() as stack:
        service = Secured(stack, place, authority, client_ca=str(authority.ca))
        with pytest.raises(superbatch.Unavailable, match="(?i)certificate ?required"):
            service.connect()
        stranger = Authority(place, "stranger").sign(
            "stranger-client", "extendedKeyUsage=clientAuth"
        )
        with pytest.raises(superbatch.Unavailable):
            service.connect(cert=stranger[0], key=stranger[1])
        cert, key = authority.sign("client", "extendedKeyUsage=clientAuth")
        run = service.connect(cert=cert, key=key).open_run(spec(inputs, "team-a-mutual"))
        assert len(run.select(0, rank=0, world_size=1)) == 24, "coordinator and worker show theirs"


def test_probes_ask_a_port_of_their_own(service, folder):
    line = next(
        line for line in service.coordinator.log.read_text().splitlines() if "health_listen" in line
    )
    address = line.split("address=")[1].split()[0]
    assert command("health", "--address", f"http://{address}") == "serving\n"
    for name in ("liveness", "superbatch.v1.SelectionService"):
        assert command("health", "--address", f"http://{address}", "--service", name) == "serving\n"
    ended = subprocess.run(
        [BINARY, "health", "--address", "http://127.0.0.1:1"], capture_output=True, text=True
    )
    assert ended.returncode == 1 and "nothing answers" in ended.stderr
    with Channel(address) as channel:
        with pytest.raises(Refused) as caught:
            channel.call("/superbatch.v1.SelectionService/ListRuns", [b""])
        assert caught.value.code == "UNIMPLEMENTED"


def test_noise_and_silence_do_not_stop_the_service(service):
    import os
    import random
    import socket

    noise = random.Random(1)
    host, port = service.address.removeprefix("https://").split(":")
    pages = service.coordinator.metrics_address.removeprefix("http://").split("/")[0].split(":")
    before = resident(service)
    with ExitStack() as stack:

        def open_to(address: tuple[str, int], said: bytes) -> None:
            connection = stack.enter_context(socket.create_connection(address))
            if said:
                connection.sendall(said)

        for _ in range(300):
            open_to((host, int(port)), b"")
            open_to(
                (host, int(port)), os.urandom(64) if noise.random() < 0.5 else b"PRI * HTTP/2.0\r\n"
            )
        for _ in range(20):
            open_to((pages[0], int(pages[1])), b"GET /metrics HTTP/1.1\r\nx-slow: ")
        metadata = [("authorization", f"Bearer {service.secrets['admin']}")]
        with Channel(service.address, Path(service.ca).read_bytes()) as channel:
            for method in ("OpenRun", "GetRun", "Rewind", "CloseRun", "AppendPhases", "GetReceipt"):
                for length in (1, 7, 100, 5000):
                    with pytest.raises(Refused) as caught:
                        channel.call(
                            f"/superbatch.v1.SelectionService/{method}",
                            [noise.randbytes(length)],
                            metadata=metadata,
                        )
                    assert caught.value.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            with pytest.raises(Refused) as caught:
                channel.call(
                    "/superbatch.v1.SelectionService/GetRun", [bytes(9 << 20)], metadata=metadata
                )
            assert caught.value.code == "RESOURCE_EXHAUSTED"
        assert service.connect("reader").list_runs() is not None
        assert resident(service) - before < 200 << 20
    assert service.coordinator.process.poll() is None

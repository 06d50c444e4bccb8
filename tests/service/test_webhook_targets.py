"""Which addresses webhooks are sent to, and the settings that allow them."""

import asyncio
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpcore2
import numpy as np
import pytest
from starlette.testclient import TestClient

from ncml.images import to_png
from ncml.webhooks import SecretError, Signer
from service.app import from_environment
from service.decoders import DecoderPool
from service.webhooks import sending
from service.webhooks.addresses import CheckedNetwork, ForbiddenAddress, is_public
from service.webhooks.sending import Sender
from service.webhooks.targets import Receivers, Target
from tests.conftest import eventually
from tests.receiver import SECRET, Receiver, submit_with, write_secret
from tests.service.test_operations import metrics
from tests.worker.test_address import certificate
from worker.contract import GenerateJob
from worker.deliveries import receiver_of
from worker.queue import JobQueue


def test_a_webhook_is_refused_unless_its_host_is_listed(client: TestClient, hooked: TestClient, receiver) -> None:
    refusal = client.post("/generate", params={"webhook": receiver.url})
    assert refusal.status_code == 422
    detail = "webhook: this service sends no webhooks; omit it, or ask the operator to set NCML_WEBHOOK_HOSTS."
    assert refusal.json()["errors"] == [{"field": "webhook", "detail": detail}]
    refusal = hooked.post("/generate", params={"webhook": "https://example.org/hook"})
    detail = "webhook: example.org is not a receiver that this service allows (NCML_WEBHOOK_HOSTS)."
    assert (refusal.status_code, refusal.json()["detail"]) == (422, detail)
    assert hooked.post("/generate?webhook=").status_code == 200  # as a form sends a field that is empty


@pytest.mark.parametrize("path", ["/score", "/complete"])
def test_a_webhook_is_refused_before_an_image_is_decoded(
    hooked: TestClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    run = DecoderPool.run
    monkeypatch.setattr(DecoderPool, "run", lambda self, field, call: decoded.append(field) or run(self, field, call))
    image = to_png(np.zeros((8, 8, 3), np.uint8))
    hooked.post(path, files={"image": image})
    assert decoded == ["image"]
    refusal = hooked.post(path, params={"webhook": "https://example.org/hook"}, files={"image": image})
    assert (refusal.status_code, refusal.json()["errors"][0]["field"]) == (422, "webhook")
    assert decoded == ["image"]


def test_a_request_checks_its_webhook_once(
    hooked: TestClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receivers, checked = hooked.app.state.jobs._receivers, []
    check = receivers.check
    monkeypatch.setattr(receivers, "check", lambda url: checked.append(url) or check(url))
    image = to_png(np.zeros((8, 8, 3), np.uint8))
    for path, files in (("/generate", None), ("/score", {"image": image})):
        checked.clear()
        assert hooked.post(path, params={"webhook": receiver.url}, files=files).status_code == 200
        assert checked == [receiver.url]


FORGED = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://LOCALHOST:{port}/", "http://127.1:{port}/",
    "http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://017700000001:{port}/", "http://0:{port}/",
    "http://0.0.0.0:{port}/", "http://[::1]:{port}/", "http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/", "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/", "http://[2002:7f00:1::]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/", "http://[::127.0.0.1]:{port}/", "http://[fe80::1%25lo]:{port}/",
    "http://hooks.test@127.0.0.1:{port}/", "http://hooks.test:443@127.0.0.1:{port}/", "http://127.0.0.1:{port}@hooks.test/",
    "http://127.0.0.1:{port}#@hooks.test/", "http://127.0.0.1:{port}\\@hooks.test/", "http://hooks.test\\@127.0.0.1:{port}/",
    "http://hooks.test.:{port}/", "https://hooks.test:{port}/", "http://hooks.test:0{port}/", "http://hooks.test:+{port}/",
    "http://127。0。0。1:{port}/", "http://①②⑦.⓪.⓪.①:{port}/", "//127.0.0.1:{port}/", "http:/127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/", "ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_x", "file:///etc/passwd",
    "http://hooks.test/ HTTP/1.1\r\nHost: 127.0.0.1:{port}/", "http://127.0.0.1:{port}\thooks.test/", "http://:{port}/",
    "http://hooks.test:443:{port}/", "javascript:alert(1)", "http://127.0.0.1:9{port}/",
]  # fmt: skip
"""Forms by which a request reaches a server on this machine past a careless check."""


def test_forged_targets_are_refused_and_not_contacted(
    new_client: Callable[..., TestClient], canary: Receiver, queue: JobQueue, tmp_path: Path
) -> None:
    client = new_client(webhook_hosts=("hooks.test", "10.0.0.0/8"), webhook_secret_file=write_secret(tmp_path))
    assert len(FORGED) >= 30
    for form in FORGED:
        url = form.format(port=canary.port)
        refusal = client.post("/generate", json={"webhook": url})
        assert (refusal.status_code, refusal.json()["errors"][0]["field"]) == (422, "webhook"), url
    assert queue.deliveries.count_all() == 0
    assert not canary.paths


@pytest.mark.parametrize("form", [form for form in FORGED if form.isascii()])
def test_forged_targets_that_reach_the_queue_are_not_contacted(
    form: str, canary: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resolve = socket.getaddrinfo

    def resolve_numbers(host: str, port: int, **options: Any) -> Any:  # in every notation, without a query
        host = "127.0.0.1" if host.lower() in ("localhost", "hooks.test") else host
        return resolve(host, port, flags=socket.AI_NUMERICHOST, **options)

    monkeypatch.setattr("service.webhooks.addresses.socket.getaddrinfo", resolve_numbers)
    url = form.format(port=canary.port)  # as one who may write to the queue, or an earlier setting, could leave them
    receivers = Receivers(("hooks.test", "10.0.0.0/8"))
    with pytest.raises(ValueError, match="webhook"):
        receivers.check(url)
    target = Target("http", url.split("://")[-1].split("/")[0].rpartition(":")[0].strip("[]"), canary.port, "/")
    sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
    attempt = asyncio.run(sender.send(target, "msg_1", "{}"))
    assert attempt.status is None
    assert attempt.fault
    assert not canary.paths


SPECIAL = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::7f00:1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1",
    "2002:7f00:1::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
    "ff02::1",
]  # fmt: skip
"""An address of every special range; those of IPv6 among them embed addresses of IPv4 in every known form."""


@pytest.mark.parametrize("address", SPECIAL)
def test_addresses_of_special_ranges_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:82a::200e"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


class FakeNetwork:
    """Records to which addresses connections are opened, and opens none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        """answers: addresses that the names resolve to, one list for each query."""
        self.connected: list[str] = []
        self.queries = 0
        self._answers = iter(answers)
        monkeypatch.setattr("service.webhooks.addresses.socket.getaddrinfo", self._resolve)
        monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", self._connect)

    def _resolve(self, host: str, port: int, **_: Any) -> list[Any]:
        self.queries += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(self._answers)]

    async def _connect(self, host: str, *_: Any, **__: Any) -> Any:
        self.connected.append(host)
        raise httpcore2.ConnectError("refused")


def connect(permits: Callable[[Any], bool]) -> None:
    with ThreadPoolExecutor(1) as resolver:
        asyncio.run(CheckedNetwork(permits, resolver).connect_tcp("hooks.test", 443))


@pytest.mark.parametrize("address", SPECIAL)
def test_a_listed_name_of_a_special_address_is_not_contacted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork(monkeypatch, [address])
    with pytest.raises(ForbiddenAddress):
        connect(is_public)
    assert network.connected == []


def test_exactly_the_address_that_was_checked_is_contacted(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork(monkeypatch, ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1111"], ["127.0.0.1"])
    with pytest.raises(httpcore2.ConnectError):
        connect(is_public)
    assert network.connected == ["8.8.8.8", "2606:4700::1111"]
    assert network.queries == 1  # a second query could have another answer
    with pytest.raises(ForbiddenAddress):  # as the next attempt does, when the name has been bound to this machine
        connect(is_public)
    assert network.connected == ["8.8.8.8", "2606:4700::1111"]


def test_an_address_that_is_silent_leaves_time_for_the_next(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("service.webhooks.addresses.CONNECT_S", 0.1)
    receivers = Receivers(("127.0.0.0/8", f"hooks.test:{receiver.port}"))
    sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
    with socket.socket() as silent, socket.socket() as waiting:
        silent.bind(("127.0.0.2", receiver.port))
        silent.listen(0)
        waiting.connect(silent.getsockname())  # which fills its backlog, so that it answers no further one
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", receiver.port)) for i in (2, 1)]
        monkeypatch.setattr("service.webhooks.addresses.socket.getaddrinfo", lambda *_, **__: addresses)
        target = receivers.check(f"http://hooks.test:{receiver.port}/")
        attempt = asyncio.run(sender.send(target, "msg_1", "{}"))
    assert attempt.is_accepted, attempt


def test_plain_http_is_sent_to_listed_networks_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    signer = Signer.from_file(write_secret(tmp_path))
    for entries, address, is_contacted in (
        (("hooks.test",), "8.8.8.8", False),
        (("hooks.test", "10.0.0.0/8"), "10.1.2.3", True),
        (("hooks.test", "10.0.0.0/8"), "11.1.2.3", False),
        (("hooks.test", "10.1.2.3:8080"), "10.1.2.3", False),
    ):
        network = FakeNetwork(monkeypatch, [address])
        receivers = Receivers(entries)
        asyncio.run(Sender(receivers, signer).send(receivers.check("http://hooks.test/"), "msg_1", "{}"))
        assert bool(network.connected) == is_contacted, (entries, address)


@pytest.mark.parametrize("name", ["localhost", "hooks.test"])
def test_the_certificate_must_be_that_of_the_name(
    name: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The certificate is one for localhost; the name in it decides, not the address that was checked."""
    certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    receiver.stop()
    receiver.start(tmp_path / "server.pem", tmp_path / "server.key")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        "service.webhooks.addresses.socket.getaddrinfo", lambda _, *p, **o: resolve("127.0.0.1", *p, **o)
    )
    receivers = Receivers((f"{name}:{receiver.port}", "127.0.0.1"))
    sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
    attempt = asyncio.run(sender.send(receivers.check(f"https://{name}:{receiver.port}/"), "msg_1", "{}"))
    assert attempt.is_accepted == (name == "localhost"), attempt
    assert len(receiver.messages) == (name == "localhost")
    assert name == "localhost" or "certificate" in attempt.fault


def test_a_redirect_is_not_followed(hooked: TestClient, receiver: Receiver, canary: Receiver) -> None:
    for status in (301, 302, 303, 307, 308):
        receiver.status, receiver.headers = lambda status=status: status, {"Location": canary.url}
        submit_with(hooked, receiver.url)
        arrived = len(receiver.paths)
        eventually(lambda arrived=arrived: len(receiver.paths) >= arrived + 2)
    assert not receiver.messages
    assert not canary.paths


@pytest.mark.parametrize("answer", [
    b"", b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10**6, b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
])  # fmt: skip
def test_a_server_that_does_not_answer_is_left_in_time(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sending, "SEND_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def serve() -> None:
            connection, _ = server.accept()
            connections.append(connection)
            connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        receivers = Receivers((f"127.0.0.1:{server.getsockname()[1]}",))
        sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
        target = receivers.check(f"http://127.0.0.1:{server.getsockname()[1]}/")
        began = time.monotonic()
        attempt = asyncio.run(sender.send(target, "msg_1", "{}"))
        assert not attempt.is_accepted
        assert attempt.fault
        assert time.monotonic() - began < 60
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(("status", "accepts", "is_gone"), [(200, True, False), (410, False, True)])
def test_a_status_counts_if_the_rest_of_the_response_does_not_arrive(
    status: int, accepts: bool, is_gone: bool, is_open: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sending, "SEND_S", 2.0)
    released = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(f"HTTP/1.1 {status} Status\r\nContent-Length: 5\r\n\r\n".encode())
                connection.recv(2**16)
                if is_open:
                    released.wait(60)

        threading.Thread(target=serve, daemon=True).start()
        receivers = Receivers((f"127.0.0.1:{server.getsockname()[1]}",))
        sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
        target = receivers.check(f"http://127.0.0.1:{server.getsockname()[1]}/")
        attempt = asyncio.run(sender.send(target, "msg_1", "{}"))
        released.set()
    assert (attempt.status, attempt.is_accepted, attempt.is_gone) == (status, accepts, is_gone)


@pytest.mark.parametrize(("value", "seconds"), [("600", 600), ("Wed, 02 Dec 2026 07:28:00 GMT", 0), ("-1", 0)])
def test_the_pause_that_a_receiver_asks_for_is_read(
    value: str, seconds: float, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.status, receiver.headers = lambda: 503, {"Retry-After": value}
    receivers = Receivers((receiver.entry,))
    sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
    attempt = asyncio.run(sender.send(receivers.check(receiver.url), "msg_1", "{}"))
    assert (attempt.status, attempt.retry_after_s) == (503, seconds)


def test_the_body_of_a_response_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sending, "SEND_S", 60.0)  # the limit of the time must not end it
    with socket.create_server(("127.0.0.1", 0)) as server:
        sent: list[int] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    while sum(sent) < 2**27:
                        sent.append(connection.send(b"x" * 2**16))
                except OSError:
                    pass  # the sender has closed the connection

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        receivers = Receivers((f"127.0.0.1:{server.getsockname()[1]}",))
        sender = Sender(receivers, Signer.from_file(write_secret(tmp_path)))
        target = receivers.check(f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert asyncio.run(sender.send(target, "msg_1", "{}")).is_accepted
        thread.join(60)
        assert sum(sent) < 2**27


def test_too_many_messages_for_a_receiver_refuse_further_ones(
    hooked: TestClient, receiver: Receiver, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.MAX_UNDELIVERED", 2)
    receiver.status = lambda: 503
    for _ in range(2):
        submit_with(hooked, receiver.url)
    eventually(lambda: queue.deliveries.count(receiver_of(receiver.url)) == 2)
    refusal = hooked.post("/generate", params={"webhook": receiver.url})
    assert (refusal.status_code, refusal.json()["type"]) == (429, "urn:ncml:problem:queue-full")
    assert hooked.post("/generate").status_code == 200
    assert metrics(hooked)["ncml_jobs_rejected_total", "webhooks-full"] == 1


@pytest.mark.parametrize(
    ("entry", "url", "expected"),
    [
        ("Hooks.Example.org", "https://hooks.example.org/a?b=c", "https://hooks.example.org/a?b=c"),
        ("hooks.example.org", "HTTPS://hooks.example.org/", None),
        ("hooks.example.org", "https://HOOKS.example.org", "https://hooks.example.org/"),
        ("hooks.example.org", "https://hooks.example.org:443/", "https://hooks.example.org/"),
        ("hooks.example.org", "https://hooks.example.org:8443/", None),
        ("hooks.example.org", "https://a.hooks.example.org/", None),
        ("mes.lan:8443", "https://mes.lan:8443/x", "https://mes.lan:8443/x"),
        ("mes.lan:8443", "https://mes.lan/x", None),
        ("10.1.0.0/16", "http://10.1.2.3/x", "http://10.1.2.3/x"),
        ("10.1.0.0/16", "http://10.1.2.3:8080/x", None),
        ("10.1.0.0/16:8080", "http://10.1.2.3:8080/x", "http://10.1.2.3:8080/x"),
        ("fd00::/8", "http://[fd00::1]/", "http://[fd00::1]/"),
        ("[fd00::1]:8080", "http://[fd00:0::1]:8080/", "http://[fd00::1]:8080/"),
    ],
)
def test_entries_name_hosts_and_networks(entry: str, url: str, expected: str | None) -> None:
    receivers = Receivers((entry,))
    if expected is None:
        with pytest.raises(ValueError, match="webhook"):
            receivers.check(url)
    else:
        assert receivers.check(url).url == expected


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.example.org", "https://example.org", "example.org/", "a b", "127.1", "0x7f.1", "2130706433",
     "1.2.3.4/33", "10.1.2.3/8", "0.0.0.0/0", "::/0", "fe00::/6", "example.org:0", "example.org:99999", "10.0.0.0/7"],
)  # fmt: skip
def test_other_entries_are_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ValueError, match=r"entry must be|too large"):
        Receivers((entry,))


def test_invalid_settings_stop_the_service_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal() -> str:
        with pytest.raises(SystemExit):
            from_environment()
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    monkeypatch.setenv("NCML_WEBHOOK_HOSTS", '["hooks.test"]')
    assert refusal().startswith("ncml: NCML_WEBHOOK_HOSTS is ")
    monkeypatch.setenv("NCML_WEBHOOK_SECRET_FILE", str(tmp_path / "no"))
    assert refusal().startswith("ncml: NCML_WEBHOOK_SECRET_FILE: ")
    monkeypatch.setenv("NCML_WEBHOOK_HOSTS", '["*"]')
    assert "each entry must be like hooks.example.org" in refusal()


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "secret", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 200, "whsec_!" * 9, "\xff"),
        60 * ("whsec_" + "A" * 64 + "\n"),  # too large, and what is read of it ends with what looks like a secret
    ],
)
def test_a_file_without_a_secret_is_refused_without_showing_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(SecretError) as caught:
        Signer.from_file(path)
    if len(text.strip()) > 6:
        assert text.strip() not in str(caught.value)


def test_a_secret_can_be_replaced_while_receivers_have_either(tmp_path: Path) -> None:
    from standardwebhooks import Webhook

    other = "whsec_" + "QUJD" * 8
    path = tmp_path / "secrets"
    path.write_text(f"{other}\n{SECRET}\n")
    headers = Signer.from_file(path).headers("msg_1", "{}")
    for secret in (SECRET, other):
        Webhook(secret).verify("{}", headers)


def test_the_log_has_neither_secrets_nor_paths(hooked: TestClient, receiver: Receiver, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.status = lambda: 500
    submit_with(hooked, receiver.url)
    eventually(lambda: len(receiver.paths) > 1)
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("service", "ncml")))
    assert "answered 500; trying again" in text
    assert SECRET not in caplog.text
    assert SECRET.removeprefix("whsec_") not in caplog.text
    assert "token=t" not in text


def test_damaged_records_of_deliveries_are_dropped(queue: JobQueue, receiver: Receiver) -> None:
    job_id = queue.submit(GenerateJob(model="tiny", seed=1), webhook=receiver.url)
    queue.cancel(job_id)
    [key] = eventually(lambda: queue.redis.keys("ncml:delivery:*"))
    queue.redis.hdel(key, "task")
    assert queue.deliveries.claim(9) == []
    assert queue.deliveries.count_all() == 0

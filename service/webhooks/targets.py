"""Which webhooks a request may name: the receivers that the operator lists, in addresses with a single reading."""

import ipaddress
import re
from dataclasses import dataclass
from typing import TypeAlias

from ncml.errors import InputError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|[A-Za-z0-9._-]+)(:(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>(/[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*)?)"
)
"""Addresses on whose parts all programs agree: without userinfo, fragments, backslashes and other characters."""

_NAME = re.compile(r"([a-z0-9_-]+\.)*[a-z_][a-z0-9_-]*", re.IGNORECASE)
"""Names of hosts. The last label begins with no digit, as that of an IPv4 address does in any notation."""

_DEFAULT_PORTS = {"https": 443, "http": 80}
_SHORTEST_PREFIX = {4: 8, 6: 7}
"""The largest private networks are 10.0.0.0/8 and fc00::/7; a larger one would contain those of others."""


@dataclass(frozen=True)
class Target:
    """The address of a webhook, in its parts."""

    scheme: str
    host: str
    """Lower-case name, or IP address without brackets."""
    port: int
    path: str
    """Path and query; at least a slash."""

    @property
    def authority(self) -> str:
        """Host and port as in an address; the default port is omitted."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The address, always in the same form."""
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True)
class Receiver:
    """An entry of NCML_WEBHOOK_HOSTS: a name or a network, with a port or for the default ports."""

    host: str | Network
    port: int | None

    @classmethod
    def parse(cls, entry: str) -> "Receiver":
        """Return the receiver of an entry. Raises `ValueError` with the reason, for the setting's name."""
        name, _, port = entry.rpartition(":")
        for host, number in ((entry, ""), (name, port)):
            if number and not (re.fullmatch(r"[1-9][0-9]{0,4}", number) and int(number) < 2**16):
                continue
            try:
                network = ipaddress.ip_network(host.removeprefix("[").removesuffix("]"))
            except ValueError:
                if _NAME.fullmatch(host):
                    return cls(host.lower(), int(number) if number else None)
                continue
            if network.prefixlen < _SHORTEST_PREFIX[network.version]:
                raise ValueError(
                    f"the network {entry} is too large: list at most a /{_SHORTEST_PREFIX[network.version]}"
                )
            return cls(network, int(number) if number else None)
        raise ValueError(f"each entry must be like hooks.example.org, mes.lan:8443 or 10.1.0.0/16; {entry!r} is not")

    def names(self, target: Target) -> bool:
        """Return whether a request may name this target."""
        if target.port != (self.port or _DEFAULT_PORTS[target.scheme]):
            return False
        if isinstance(self.host, str):
            return self.host == target.host
        address = _as_address(target.host)
        return address is not None and address in self.host


class Receivers:
    """All receivers that the operator lists."""

    def __init__(self, entries: tuple[str, ...]) -> None:
        self._receivers = [Receiver.parse(entry) for entry in entries]

    def check(self, url: str) -> Target:
        """Return the target of an address. Raises `InputError` if it may not be named."""
        match = _URL.fullmatch(url)
        if match is None or int(match["port"] or 1) >= 2**16:
            detail = "webhook must be an address like https://hooks.example.org/ncml, without a user and a fragment."
            raise InputError("webhook", detail)
        scheme, host = match["scheme"], match["host"].strip("[]").lower()
        if ":" in host:
            address = _as_address(host)
            host = str(address) if address else host
        target = Target(scheme, host, int(match["port"] or _DEFAULT_PORTS[scheme]), match["path"] or "/")
        if not self._receivers:
            detail = "webhook: this service sends no webhooks; omit it, or ask the operator to set NCML_WEBHOOK_HOSTS."
            raise InputError("webhook", detail)
        if not any(receiver.names(target) for receiver in self._receivers):
            detail = f"webhook: {target.authority} is not a receiver that this service allows (NCML_WEBHOOK_HOSTS)."
            raise InputError("webhook", detail)
        return target

    def lists(self, address: Address, port: int) -> bool:
        """Return whether the operator lists an address or a network that contains it, for this port if for one."""
        return any(
            not isinstance(entry.host, str) and address in entry.host and entry.port in (None, port)
            for entry in self._receivers
        )


def _as_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None

"""Settings of the service. Each field is read from the environment variable NCML_<NAME>."""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import pydantic_core
from limits import RateLimitItem, parse_many
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.http.validation import field_errors
from service.webhooks.targets import Receivers
from worker.address import with_password
from worker.contract import Lane


class ImageLimits(TypedDict):
    """Limits of one image, as keyword arguments of `ncml.images`."""

    max_bytes: int
    max_pixels: int


LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "service"})
"""Host names by which this machine reaches the service, and other containers of the Compose file."""

MAX_CALIBRATION_IMAGES = 20_000
"""Maximum of the setting `max_calibration_images`."""


class Settings(BaseSettings):
    """The settings; an invalid value stops the service at startup with a sentence."""

    model_config = SettingsConfigDict(env_prefix="NCML_", extra="ignore", frozen=True, arbitrary_types_allowed=True)

    redis_url: str = "redis://localhost:6379/0"
    """Address of the Valkey or Redis server that holds the queue; rediss:// encrypts the connection."""
    redis_password_file: Path | None = None
    """File that contains the password of that server."""
    wait_s: float = Field(default=30.0, ge=0, le=600)
    """Seconds that a request waits for its job: the default and the maximum of `Prefer: wait`."""
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024, le=128 * 2**20)
    """Maximum bytes of a request body, counted while it arrives."""
    max_image_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Maximum bytes of an image file."""
    max_image_pixels: int = Field(default=2**25, ge=1)
    """Maximum pixels of an image, checked in its header before decoding."""
    max_images: int = Field(default=64, ge=1, le=64)
    """Maximum images sent or requested in one request."""
    max_tiles: int = Field(default=4096, ge=1)
    """Maximum tiles of an image."""
    max_waiting: int = Field(default=512, ge=1)
    """Maximum waiting jobs of a lane; further requests receive 429."""
    max_waiting_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Maximum bytes of the waiting jobs of a lane, as the queue holds them; further requests receive 429."""
    max_streams: int = Field(default=64, ge=1)
    """Maximum event streams that one client follows at once; further ones receive 429."""
    max_connections: int = Field(default=4096, ge=1)
    """Maximum open connections of clients; a further one receives 503."""
    max_receiving_bytes: int = Field(default=256 * 2**20, ge=1024)
    """Maximum bytes of request bodies being received or decoded, half from one client; at least 2 `max_body_bytes`."""
    header_timeout_s: float = Field(default=10, gt=0, le=600)
    """Seconds within which the headers of a request must arrive."""
    body_timeout_s: float = Field(default=120, gt=0, le=3600)
    """Seconds within which the body of a request must arrive, and a response be read."""
    idle_timeout_s: int = Field(default=5, ge=1, le=3600)
    """Seconds that a connection stays open after a response."""
    start_within_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds after which a waiting job expires."""
    job_timeout_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds after which a running job fails."""
    allow_calibration: bool = False
    """Whether clients may make new models with /calibrate and /update; set it for the workers, too."""
    max_calibration_images: int = Field(default=2000, ge=40, le=MAX_CALIBRATION_IMAGES)
    """Maximum images of one calibration."""
    max_review_bytes: int = Field(default=64 * 2**20, ge=2**16, le=512 * 2**20)
    """Maximum bytes of reviewed images and their thumbnails, a quarter of them of one API key; a review counts at least
    4096."""
    review_days: float = Field(default=30, gt=0, le=3650)
    """Days after which a review is deleted."""
    default_model: str = ""
    """Model of requests that name none. Empty: the bundled model, or else the first by name."""
    api_keys_file: Path | None = None
    """File of `name:digest` lines, as `ncml key NAME` prints them. Default: the service is open to anyone."""
    high_priority_keys: Annotated[tuple[str, ...], NoDecode] = ()
    """Names of keys whose requests may have the priority `high`, as a JSON list. Default: any request may."""
    rate_limit: Annotated[tuple[RateLimitItem, ...], NoDecode] = ()
    """Maximum requests for new jobs per client (the owner of a key, else an address), such as `60/minute; 1000/day`."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ("localhost", "127.0.0.1", "[::1]")
    """Names in the Host header that are served, as a JSON list; *.example.org: its subdomains, *: any name."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose pages may call the service, as a JSON list such as ["https://example.org"]."""
    webhook_secret_file: Path | None = None
    """File with the secrets that sign messages to webhooks, one `whsec_...` per line."""
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Receivers of webhooks as a JSON list: names, with :port for others than 443, and private addresses and networks.
    Default: none."""
    ready_lanes: Annotated[tuple[Lane, ...], NoDecode] = (Lane.SCORE, Lane.GENERATE)
    """Lanes that need a worker with a loaded model before /readyz returns 200, as a JSON list."""
    decode_threads: int = Field(default=2, ge=1)
    """Maximum images decoded concurrently, plus half as many expensive ones, each in its own process."""
    decode_cpu_s: float = Field(default=2.0, gt=0, le=600)
    """Maximum seconds of CPU time that decoding one image may take."""
    decode_request_s: float = Field(default=120, gt=0, le=3600)
    """Seconds within which the images of one request must be unpacked and decoded."""
    decode_memory_bytes: int = Field(default=400 * 10**6, ge=32 * 10**6)
    """Maximum memory that decoding one image may take: 12 bytes per pixel for PNG, JPEG and TIFF, 20 for WebP."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Level of the log, which has one JSON object per line."""

    @property
    def queue_url(self) -> str:
        """The address of the queue with its password; raises `AddressError` if its file cannot be read."""
        return with_password(self.redis_url, self.redis_password_file)

    @property
    def is_open(self) -> bool:
        """Whether other machines reach the service by a name that it answers for, and need no key."""
        return self.api_keys_file is None and not LOCAL_NAMES.issuperset(self.allowed_hosts)

    @property
    def owner_review_bytes(self) -> int:
        """Maximum bytes of the images and thumbnails of the reviews of one API key."""
        return self.max_review_bytes // 4

    @property
    def image_limits(self) -> ImageLimits:
        """The limits of one image."""
        return {"max_bytes": self.max_image_bytes, "max_pixels": self.max_image_pixels}

    @field_validator("rate_limit", mode="before")
    @classmethod
    def _parse_rate_limit(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            limits = tuple(parse_many(value)) if value.strip() else ()
        except ValueError:
            raise ValueError("it must be like 60/minute, or several of these separated by semicolons") from None
        if not all(limit.amount for limit in limits):
            raise ValueError("it allows no requests: raise it from 0, or omit it for no limit")
        return limits

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _check_named(cls, value: object) -> object:
        if value == "":  # omitting it, by contrast, opens the service to anyone
            raise ValueError("it is empty: name a file of keys, or omit it")
        return value

    @field_validator("redis_password_file", "webhook_secret_file", mode="before")
    @classmethod
    def _omit_if_empty(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator(
        "allowed_hosts", "cors_origins", "high_priority_keys", "ready_lanes", "webhook_hosts", mode="before"
    )
    @classmethod
    def _parse_json_list(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return pydantic_core.from_json(value)
        except ValueError:
            raise ValueError('it must be a JSON list such as ["one", "another"]') from None

    @field_validator("high_priority_keys")
    @classmethod
    def _check_priority_keys(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and not info.data.get("api_keys_file"):
            raise ValueError("it requires NCML_API_KEYS_FILE, which names the keys")
        return value

    @field_validator("webhook_hosts")
    @classmethod
    def _check_webhook_hosts(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        Receivers(value)
        if value and not info.data.get("webhook_secret_file"):
            raise ValueError("it requires NCML_WEBHOOK_SECRET_FILE, whose secret signs the messages")
        return value

    @field_validator("max_receiving_bytes")
    @classmethod
    def _check_receiving_bytes(cls, value: int, info: ValidationInfo) -> int:
        max_body_bytes = info.data.get("max_body_bytes", 0)  # missing if it is invalid itself
        if value < 2 * max_body_bytes:  # a client that sends nothing else would get a 429 every time
            raise ValueError(
                f"it must be at least {2 * max_body_bytes}, twice NCML_MAX_BODY_BYTES: one client may use half of it"
            )
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host):
                raise ValueError(f"each host must be like example.org or [::1], without a port; {host!r} is not")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://[^/*?#\s]+", origin):
                raise ValueError(f"each origin must be like https://example.org; {origin!r} is not")
        return value


def read_settings() -> Settings:
    """Read the settings from the environment; exit with status 2 and one line per invalid or misspelt one."""
    faults = _misspelt()
    try:
        settings = Settings()
    except ValidationError as error:
        invalid = field_errors(error.errors())
        faults += [f"NCML_{each.field.upper()}{each.detail.removeprefix(each.field)}" for each in invalid]
    else:
        if not faults:
            return settings
    for fault in faults:
        print(f"ncml: {fault}", file=sys.stderr)
    sys.exit(2)


def _misspelt() -> list[str]:
    """Return a sentence for each variable whose name is almost that of a setting, such as NCML_API_KEY_FILE.

    Ignored, it would leave the service without its keys or limits. Other unknown variables are left alone: the Compose
    files have their own, and Kubernetes sets some, such as NCML_PORT for a service named ncml.
    """
    settings = [f"NCML_{name.upper()}" for name in Settings.model_fields]
    unknown = sorted(name for name in os.environ if name.upper().startswith("NCML_") and name.upper() not in settings)
    nearest = {name: difflib.get_close_matches(name.upper(), settings, n=1, cutoff=0.9) for name in unknown}
    return [f"{name} is not a setting: did you mean {near[0]}?" for name, near in nearest.items() if near]

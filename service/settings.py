"""What an operator may set. Every field is read from the environment variable NCML_<NAME>."""

import re
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import pydantic_core
from limits import RateLimitItem, parse_many
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.contract import Lane


class ImageLimits(TypedDict):
    """What a picture may have, as `ncml.images` takes it."""

    max_bytes: int
    max_pixels: int


class Settings(BaseSettings):
    """Settings of the service; a value out of range stops it at its start with a sentence."""

    model_config = SettingsConfigDict(env_prefix="NCML_", extra="ignore", frozen=True, arbitrary_types_allowed=True)

    redis_url: str = "redis://localhost:6379/0"
    """The Valkey or Redis that carries the queue."""
    wait_s: float = Field(default=30.0, ge=0, le=600)
    """Seconds that a request waits for its job unless `Prefer` says otherwise; also the most it may ask for."""
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Bytes of one request body, counted while it arrives."""
    max_image_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Bytes of one picture's file."""
    max_image_pixels: int = Field(default=2**25, ge=1)
    """Pixels of one picture, known from its header before it is decoded."""
    max_images: int = Field(default=64, ge=1, le=64)
    """Pictures in one request, sent or asked for."""
    max_tiles: int = Field(default=4096, ge=1)
    """Tiles that one picture may be cut into."""
    max_waiting: int = Field(default=512, ge=1)
    """Jobs that may wait in one lane; a request beyond them is answered 429."""
    start_within_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds after which a job that nobody has started expires."""
    job_timeout_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds that a job may run before it fails."""
    default_model: str = ""
    """The model of a request that names none; empty: the first by name."""
    api_keys_file: Path | None = None
    """A file of `name:digest` lines, as `ncml key NAME` makes them; left out: whoever reaches the service may ask."""
    rate_limit: Annotated[tuple[RateLimitItem, ...], NoDecode] = ()
    """Requests for work that a client (the owner of a key, else an address) may make, as `60/minute; 1000/day`."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins of other sites whose pages may ask, as a JSON list such as ["https://example.org"]."""
    ready_lanes: Annotated[tuple[Lane, ...], NoDecode] = (Lane.SCORE, Lane.GENERATE)
    """Lanes that need a worker with a model before /readyz says yes, as a JSON list."""
    decode_threads: int = Field(default=2, ge=1)
    """Pictures decoded at once, and one for tiles beside them; each may need `max_image_pixels` times 12 bytes."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Level of the service's log, which has one JSON object a line."""

    @property
    def image_limits(self) -> ImageLimits:
        """Those of one picture."""
        return {"max_bytes": self.max_image_bytes, "max_pixels": self.max_image_pixels}

    @field_validator("rate_limit", mode="before")
    @classmethod
    def _limits(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return tuple(parse_many(value)) if value.strip() else ()
        except ValueError:
            raise ValueError("it must be like 60/minute, or several such separated by semicolons") from None

    @field_validator("cors_origins", "ready_lanes", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return pydantic_core.from_json(value)
        except ValueError:
            raise ValueError('it must be a JSON list such as ["one", "another"]') from None

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not re.fullmatch(r"https?://[^/*?#\s]+", origin):
                raise ValueError(f"each origin must be like https://example.org, which {origin!r} is not")
        return value

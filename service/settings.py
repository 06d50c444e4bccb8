"""What an operator may set. Every field is read from the environment variable NCML_<NAME>."""

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.contract import Lane


class Settings(BaseSettings):
    """Settings of the service; a value out of range stops it at its start with a sentence."""

    model_config = SettingsConfigDict(env_prefix="NCML_", extra="ignore", frozen=True)

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
    max_waiting: int = Field(default=512, ge=1)
    """Jobs that may wait in one lane; a request beyond them is answered 429."""
    start_within_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds after which a job that nobody has started expires."""
    job_timeout_s: float = Field(default=600, gt=0, le=86_400)
    """Seconds that a job may run before it fails."""
    default_model: str = ""
    """The model of a request that names none; empty: the first by name."""
    ready_lanes: tuple[Lane, ...] = (Lane.SCORE, Lane.GENERATE)
    """Lanes that need a worker with a model before /readyz says yes, as a JSON list."""
    decode_threads: int = Field(default=2, ge=1)
    """Pictures decoded at once; each may need `max_image_pixels` times 12 bytes."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Level of the service's log, which has one JSON object a line."""

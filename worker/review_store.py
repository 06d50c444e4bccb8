"""Reviews: images that a detector has judged, of which a client knows whether they are good or defective.

They are kept on the queue's server, because it is what all services share: there may be several, on hosts without the
model folders. Each expires; the bytes of one owner and of all together are limited, and reviews are refused as jobs are
when the server is short of memory. A review has its owner in its key, so no client can name that of another.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from worker.redis_keys import REVIEWS, review_key, script

MIN_BYTES = 4096
"""Bytes that a review counts at least, which bounds their number as well."""

Verdict: TypeAlias = Literal["good", "defective"]


@dataclass(frozen=True)
class Review:
    """A review without its image."""

    id: str
    """16 hex digits: the same for every review of an image by one owner."""
    model: str
    verdict: Verdict
    file: str
    """The name that the client gave the file."""
    is_ood: bool
    """Whether the detector flagged the image."""
    p_value: float
    size: int
    """Bytes of the file."""
    created_at: float
    expires_at: float


class NoRoomForReview(Exception):
    """No further review fits: into the quota of its owner (`own`), that of `all`, or the server's `memory`."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"the limit of reviews is reached: {limit}")
        self.limit = limit


class Reviews:
    """The reviews on the queue's server. Raises `redis.exceptions.RedisError` if it does not answer. Thread-safe."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._add = script(client, "review")
        self._remove = script(client, "remove_review")

    def add(
        self,
        owner: str,
        model: str,
        verdict: Verdict,
        image: bytes,
        *,
        thumbnail: bytes,
        file: str,
        is_ood: bool,
        p_value: float,
        keep_s: float,
        owner_bytes: int,
        all_bytes: int,
    ) -> Review:
        """Keep a review of an image for `keep_s`, in place of an earlier one; raise `NoRoomForReview` beyond a limit.

        thumbnail: a small JPEG of the image, which counts as well.
        """
        review_id = hashlib.sha256(f"{model}\0".encode() + hashlib.sha256(image).digest()).hexdigest()[:16]
        fields = {
            "image": image, "thumbnail": thumbnail, "model": model, "verdict": verdict, "file": file,
            "is_ood": int(is_ood), "p_value": p_value,
        }  # fmt: skip
        answer = self._add(
            keys=[REVIEWS, review_key(owner, review_id)],
            args=[owner, review_id, max(len(image) + len(thumbnail), MIN_BYTES), owner_bytes, all_bytes, keep_s]
            + [part for item in fields.items() for part in item],
        )
        if isinstance(answer, bytes):
            raise NoRoomForReview(answer.decode())
        created_at, expires_at = map(float, answer)
        return Review(review_id, model, verdict, file, is_ood, p_value, len(image), created_at, expires_at)

    def find(self, owner: str, model: str) -> list[Review]:
        """Return the reviews of an owner for a model, the oldest first."""
        reviews = [review for review in self._read(owner, self._ids(owner)) if review.model == model]
        return sorted(reviews, key=lambda review: review.created_at)

    def image(self, owner: str, review_id: str) -> bytes | None:
        """Return the image of a review; None if it has expired."""
        data: bytes | None = self._redis.hget(review_key(owner, review_id), "image")
        return data

    def thumbnail(self, owner: str, model: str, review_id: str) -> bytes | None:
        """Return the thumbnail of an owner's review for a model, or None if that review does not exist."""
        own_model, thumbnail = self._redis.hmget(review_key(owner, review_id), "model", "thumbnail")
        return thumbnail if own_model == model.encode() else None

    def remove(self, owner: str, model: str, review_id: str) -> bool:
        """Delete a review of an owner for a model; return whether there was one."""
        return bool(self._remove(keys=[REVIEWS, review_key(owner, review_id)], args=[owner, review_id, model]))

    def _ids(self, owner: str) -> list[str]:
        members: list[bytes] = self._redis.zrange(REVIEWS, 0, -1)
        return [member.decode().split(":")[1] for member in members if member.startswith(f"{owner}:".encode())]

    def _read(self, owner: str, ids: list[str]) -> list[Review]:
        names = ("model", "verdict", "file", "is_ood", "p_value", "created_at", "expires_at")
        pipe = self._redis.pipeline(transaction=False)
        for review_id in ids:
            pipe.hmget(review_key(owner, review_id), *names)
            pipe.hstrlen(review_key(owner, review_id), "image")
        answers: list[Any] = pipe.execute()
        reviews: list[Review] = []
        for review_id, values, size in zip(ids, answers[::2], answers[1::2], strict=True):
            if values[0] is None:  # it has expired meanwhile
                continue
            model, verdict, file, is_ood, p_value, created_at, expires_at = (value.decode() for value in values)
            reviews.append(
                Review(
                    review_id, model, verdict, file, is_ood == "1", float(p_value), size, float(created_at),
                    float(expires_at),
                )
            )  # fmt: skip
        return reviews

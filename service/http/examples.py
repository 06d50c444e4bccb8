"""Example values for the OpenAPI document. Data only."""

from typing import Any

from pydantic.config import JsonDict

TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAfbLI3wAAAABJRU5ErkJggg=="

REQUEST_ID = "5f0c1a7be2d94c38"

PROBLEMS: dict[int, dict[str | None, str]] = {
    400: {"malformed": "The body is not valid JSON: expected value at line 1 column 1."},
    401: {
        "unauthorized": "An API key is required; send it as Authorization: Bearer KEY or X-API-Key, with ncml score "
        "--api-key, or with Client(api_key=...)."
    },
    403: {
        "priority": "priority: high is reserved for certain API keys; send normal or low.",
        "calibration-off": "Calibration is off in this service; start it with NCML_ALLOW_CALIBRATION=1, or run ncml "
        "adapt FOLDER --out models/NAME.",
        "cross-site": "Pages of other sites are refused; name their origin in NCML_CORS_ORIGINS.",
    },
    404: {
        "no-such-job": "The job does not exist or has expired; send the request again.",
        "result-expired": "The result of the job 0b6a3c1e9d has expired; send the request again.",
        "no-preview": "The job 0b6a3c1e9d has no preview at the moment.",
        "no-such-model": "model: 'mnist' is not available; the available models are cifar10, cifar10@9f2c61d07be3.",
        "no-such-review": "There is no review 5f0c1a7be2d94c38 of this client for bottles; list them to find its id.",
        "no-pictures": "cifar10 has no pictures of what it finds and misses; only detectors whose power was measured "
        "have some.",
    },
    406: {"media-type": "Accept is 'text/html'; this endpoint offers application/json or application/x-npz."},
    409: {"running": "The job 0b6a3c1e9d is being canceled but has not ended yet; retry the deletion."},
    410: {"job-canceled": "The job was canceled on request; send the request again."},
    413: {"too-large": "image is 8000 x 8000 pixels; at most 33554432 pixels are accepted, so make it smaller first."},
    415: {"media-type": "This endpoint does not accept the type 'text/plain'; send multipart/form-data or image/*."},
    421: {"unknown-host": "The host 'example.org' is not served; name it in NCML_ALLOWED_HOSTS."},
    422: {
        "invalid-input": "n is 0; it must be at least 1.",
        "job-input": "class: there is no class 'x'; the classes are cat, dog.",
        "too-many-images": "image: 12 images were sent; a detector judges at most 4 in one request, so send fewer "
        "at once.",
    },
    429: {
        "queue-full": "512 jobs are waiting in the score lane already; retry in 12 s.",
        "too-many-streams": "This client has 64 event streams open already; close one, or poll the job.",
        "too-many-uploads": "This client sends too many images at once; wait for its other requests.",
        "too-many-reviews": "Your reviews and thumbnails would take more than 16777216 bytes; delete some reviews.",
        "quota-exceeded": "The quota of 60 requests per minute is exhausted; retry in 20 s.",
    },
    500: {
        "job-engine": "The engine died twice while computing the job.",
        "job-model": "The model 'mnist' cannot be used: mnist/config.json is not JSON.",
        "job-worker": "The worker died 5 times while computing the job.",
        None: "The service failed unexpectedly; its log has the details under this request id.",
    },
    503: {
        "no-worker": "No worker is running for the score lane; start one, or retry later.",
        "no-model": "The workers are still loading their models; retry in a few seconds.",
        "not-ready": "No worker with a loaded model serves the generate lane yet.",
        "queue-down": "The queue is unreachable; retry in a few seconds.",
        "no-room": "There is no space for another upload; retry in a few seconds.",
        "stopping": "The service is stopping; send the request again in a few seconds.",
    },
    504: {
        "job-timeout": "The job ran for more than 600 s; request fewer images or steps at once.",
        "job-expired": "No worker started the job in time; try again later.",
    },
}
"""A detail for every kind of problem, by status."""

PROBLEM_FIELDS = {"too-large": "image", "invalid-input": "n", "job-input": "class", "priority": "priority",
                  "too-many-images": "image"}  # fmt: skip
"""The invalid field of the kinds that name one."""

_VERSION = "9f2c61d07be3a4585e1c0f6db2a87943c5d1e08f7a6b3924d8e5f01c7b9a3d62"
_MODEL: JsonDict = {"name": "cifar10", "version": _VERSION}
_SUCCEEDED: JsonDict = {
    "id": "0b6a3c1e9d",
    "status": "succeeded",
    "model": _MODEL,
    "timing": {"queue_s": 0.004, "compute_s": 0.021, "batch_size": 1},
}
SCORE: JsonDict = {
    **_SUCCEEDED,
    "results": [
        {
            "bpd": 3.42,
            "log_likelihood": -7282.5,
            "ood": {
                "statistic": "multiscale_corr",
                "score": 4.8,
                "p_value": 0.42,
                "threshold": 7.1,
                "is_ood": False,
                "calibration": "default",
                "calibration_version": "5d0c" * 16,
                "is_weak": False,
            },
        }
    ],
}
DETECTION: JsonDict = {
    **_SUCCEEDED,
    "results": [
        {
            "bpd": 3.07,
            "log_likelihood": -6537.2,
            "ood": {
                "statistic": "places",
                "score": 6.92,
                "p_value": 0.0071,
                "threshold": 3.2,
                "is_ood": True,
                "calibration": "detector",
                "calibration_version": "8e3f" * 16,
                "is_weak": False,
            },
            "detection": {
                "width": 800,
                "height": 600,
                "view": "places",
                "score": 6.92,
                "p_value": 0.0071,
                "threshold": 3.2,
                "is_ood": True,
                "is_weak": False,
                "box": {"left": 415, "top": 300, "width": 72, "height": 57},
                "views": {
                    "appearance": {
                        "score": 1.4,
                        "standardised": 2.1,
                        "part": 0.03,
                        "box": {"left": 0, "top": 0, "width": 800, "height": 600},
                    },
                    "places": {
                        "score": 12.6,
                        "standardised": 6.9,
                        "part": 6.88,
                        "box": {"left": 415, "top": 300, "width": 72, "height": 57},
                    },
                },
                "at_least_as_unusual": 0,
                "ranking_images": 139,
                "calibration_version": "8e3f" * 16,
                "covered": {"left": 0, "top": 0, "width": 800, "height": 600},
                "differences": [],
            },
        }
    ],
}
CALIBRATION: JsonDict = {
    **_SUCCEEDED,
    "model": {"name": "bottles", "version": _VERSION},
    "calibration": {
        "n_fit": 86,
        "n_rank": 214,
        "smallest_p": 0.0047,
        "weakness": "",
        "summary": "This calibration detects most of: blur, 1.5 pixels (96%); it misses "
        "most of: pasted patch, 3/8 of the side (21%); no p-value is below 0.0047.",
    },
    "skipped": ["notes.txt is not an image in a supported format; send a PNG, JPEG, WebP, BMP, TIFF or GIF file."],
}
SCAN: JsonDict = {
    **_SUCCEEDED,
    "width": 4000,
    "height": 3000,
    "tile_width": 250,
    "tile_height": 250,
    "tile_overlap": 0.5,
    "rows": 23,
    "columns": 31,
    "view": "peak",
    "score": 3.9,
    "p_value": 0.03,
    "threshold": 2.6,
    "is_ood": True,
    "box": {"left": 1250, "top": 750, "width": 39, "height": 39},
    "views": {
        "worst_tile": {"score": 8.1, "p_value": 0.21, "threshold": 10.6},
        "peak": {"score": 3.9, "p_value": 0.01, "threshold": 2.6},
        "mean": {"score": 4.4, "p_value": 0.55, "threshold": 9.2},
    },
    "is_weak": False,
    "calibration_version": "7b1e" * 16,
}
SCORES: dict[str, JsonDict] = {
    "score": {"value": SCORE},
    "of a detector": {"value": DETECTION},
    "in tiles": {"value": SCAN},
}
REVIEW: JsonDict = {
    "id": "5f0c1a7be2d94c38",
    "model": "bottles",
    "verdict": "good",
    "file": "1.png",
    "is_ood": True,
    "p_value": 0.0071,
    "size": 81_234,
    "created_at": "2026-01-01T12:00:00Z",
    "expires_at": "2026-01-31T12:00:00Z",
}
IMAGES: JsonDict = {**_SUCCEEDED, "images": [{"seed": 7, "png": "iVBORw0KGgo..."}]}
_PROGRESS: JsonDict = {
    "stage": "noisy_sampling",
    "step": 12,
    "total": 32,
    "done": 0,
    "n": 4,
    "preview": "/jobs/0b6a3c1e9d/preview",
}
JOB: JsonDict = {
    "id": "0b6a3c1e9d",
    "status": "running",
    "task": "generate",
    "model": _MODEL,
    "n": 4,
    "priority": "normal",
    "position": None,
    "request_id": REQUEST_ID,
    "created_at": "2026-01-01T12:00:00Z",
    "started_at": "2026-01-01T12:00:01Z",
    "ended_at": None,
    "progress": _PROGRESS,
    "error": None,
    "timing": {"queue_s": 1.0, "compute_s": None, "batch_size": None},
    "webhook": {"id": "msg_5f0c3f7de4b04b0c8f2a54f3a6d1c9e7", "state": "waiting", "attempts": 0},
    "links": {
        "self": "/jobs/0b6a3c1e9d",
        "result": "/jobs/0b6a3c1e9d/result",
        "events": "/jobs/0b6a3c1e9d/events",
        "cancel": "/jobs/0b6a3c1e9d/cancel",
    },
}
_ENDED_JOB: JsonDict = {
    "status": "succeeded",
    "ended_at": "2026-01-01T12:00:09Z",
    "progress": _PROGRESS | {"stage": "refine", "step": 1, "total": 1, "done": 4},
    "timing": {"queue_s": 1.0, "compute_s": 8.0, "batch_size": 4},
}
JOB_ENDED: JsonDict = {
    "type": "job.succeeded",
    "timestamp": "2026-01-01T12:00:09Z",
    "data": {name: _ENDED_JOB.get(name, value) for name, value in JOB.items() if name != "webhook"},
}
EVENTS = """: hello

event: queued
data: {"status":"queued","error":null}
id: 1767268800000-0

event: running
data: {"status":"running","error":null}
id: 1767268800012-0

event: progress
data: {"stage":"noisy_sampling","step":12,"total":32,"done":0,"n":4,"preview":"/jobs/0b6a3c1e9d/preview"}
id: 1767268800115-0

event: succeeded
data: {"status":"succeeded","error":null}
id: 1767268801310-0
"""
_CALIBRATION: dict[str, Any] = {
    "version": "5b0e9d2c7a4f18366e2d1c90b8a7f6e5d4c3b2a1908f7e6d5c4b3a2918070605",
    "statistic": "multiscale_corr",
    "false_positive_rate": 0.05,
    "threshold": 7.1,
    "thresholds": {"bpd": 4.6, "multiscale_corr": 7.1},
    "n_fit": 2000,
    "n_rank": 5000,
    "smallest_p": 0.0002,
    "tolerate": [],
    "weakness": "",
    "power": {
        "images": 100,
        "good": 0.05,
        "processed": {"JPEG, quality 95": 0.85},
        "altered": {"blur, 1.5 pixels": 0.97},
        "foreign": {"one colour": 1.0},
    },
    "preprocessing": "centre-crop-bicubic v1",
    "histograms": {"bpd": {"edges": [2.0, 3.0, 4.0, 5.0], "counts": [700, 3600, 700]}},
}
MODEL: dict[str, Any] = {
    "name": "cifar10",
    "version": _VERSION,
    "height": 32,
    "width": 32,
    "classes": ["airplane", "automobile", "bird"],
    "noise": 10.0,
    "start_noise": 5.0,
    "steps": 1,
    "guidance": 2.0,
    "temperature": 0.95,
    "generates": True,
    "keeps": ["top", "bottom", "left", "right"],
    "solver": "tweedie",
    "stepped_solver": "euler-maruyama",
    "solvers": {"tweedie": 1, "euler-maruyama": 20},
    "preprocessing": {"name": "centre-crop-bicubic", "version": 1},
    "calibration": _CALIBRATION,
    "calibrations": {"default": _CALIBRATION},
    "tiles": {
        "version": "1f7a6b5c4d3e2f100918273645546372819a0bacbdcedfe0f1e2d3c4b5a69788",
        "height": 64,
        "width": 64,
        "false_positive_rate": 0.05,
        "threshold": 10.6,
        "n_fit": 40,
        "n_rank": 100,
        "smallest_p": 0.0297,
        "overlap": 0.5,
        "thresholds": {"worst_tile": 10.6, "peak": 8.2, "mean": 7.4},
        "weakness": "",
    },
    "detector": None,
    "batching": {
        "groups": "fast",
        "check": "passed",
        "detail": "an image is the same bytes in every fast group, at every position.",
    },
    "metrics": {"test_bpd": 3.5},
    "card": "# cifar10",
    "default": True,
}
DETECTOR: dict[str, Any] = MODEL | {
    "name": "bottles",
    "generates": False,
    "keeps": [],
    "calibration": None,
    "calibrations": {},
    "tiles": None,
    "detector": {
        "version": "8e3f" * 16,
        "false_positive_rate": 0.05,
        "confidence": None,
        "cutoff": 0.05,
        "rate_bound": 0.083,
        "threshold": 3.2,
        "smallest_p": 0.0071,
        "n_fit": 60,
        "n_rank": 139,
        "estimation_scenes": 60,
        "ranking_scenes": 139,
        "weakness": "",
        "descriptions": {
            "features": "patches are compared at the same place at 640x480, where marks under about 3 pixels vanish",
        },
        "notes": [],
        "keeps_images": True,
        "power": {
            "images": 20,
            "shares": {"scratch": {"1 pixel wide, 16 long": 0.1, "3 pixels wide, 64 long": 0.95}},
            "smallest_found": {"scratch": "3 pixels wide, 64 long"},
            "foreign": {"one colour": 1.0},
            "pictures": {
                "sha256": "c0de" * 16,
                "examples": [
                    {
                        "kind": "scratch",
                        "size": "1 pixel wide, 16 long",
                        "is_found": False,
                        "left": 8,
                        "top": 32,
                        "width": 144,
                        "height": 144,
                    }
                ],
            },
        },
    },
    "batching": None,
    "default": False,
}
MODELS: dict[str, Any] = {
    "models": [MODEL, DETECTOR],
    "unusable": {},
    "next": None,
    "calibration_allowed": False,
    "webhooks_allowed": False,
    "max_images": 64,
    "max_judged_images": 4,
    "max_tiles": 4096,
    "max_body_bytes": 67_108_864,
}
WITH_NULL = {"JobAnswer": JOB, "JobEnded": JOB_ENDED, "Models": MODELS, "ServedModel": MODEL}
"""Examples of schemas by name that have members that are null; FastAPI would remove these."""
METRICS = """# HELP ncml_queue_depth Waiting jobs.
# TYPE ncml_queue_depth gauge
ncml_queue_depth{queue="ncml:score:normal"} 3.0
"""

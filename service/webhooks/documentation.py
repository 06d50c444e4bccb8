"""The message to webhooks in the OpenAPI document."""

from typing import Annotated

from fastapi import FastAPI, Header

from service.answers import JobEnded


def install_webhook(app: FastAPI) -> None:
    """Describe the message in `webhooks` of the application's document."""
    app.webhooks.add_api_route(
        "job-ended",
        _job_ended,
        methods=["POST"],
        operation_id="job_ended",
        summary="Receive the end of a job",
        tags=["jobs"],
        responses={
            200: {"description": "The message is accepted; so is any other 2xx."},
            "default": {"description": "It is sent again later, for up to three days; after a 410, it is not."},
        },
    )


def _job_ended(
    message: JobEnded,
    webhook_id: Annotated[str, Header(description="The id of the message, the same in every attempt.")],
    webhook_timestamp: Annotated[int, Header(description="When it was sent, in seconds since 1970.")],
    webhook_signature: Annotated[str, Header(description="Its signatures, separated by spaces.")],
) -> None:
    """Receive the state of a job that has ended, if its request named this `webhook`.

    Verify the signature with a library of https://www.standardwebhooks.com, and ignore messages whose id you have
    received before: each arrives at least once.
    """

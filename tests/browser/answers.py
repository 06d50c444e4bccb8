"""Answers of the service that a test changes, as handlers of `Page.route`."""

from collections.abc import Callable
from typing import Any

from playwright.sync_api import Route

Document = dict[str, Any]
Handler = Callable[[Route], None]


def changed(change: Callable[[Document], object]) -> Handler:
    """Answer with the service's document, after `change` has acted on it."""

    def answer(route: Route) -> None:
        response = route.fetch()
        document = response.json()
        change(document)
        route.fulfill(response=response, json=document)

    return answer


def with_members(**members: object) -> Handler:
    """Answer with other members."""
    return changed(lambda document: document.update(members))


def with_models(change: Callable[[Document], object], *names: str) -> Handler:
    """Answer /models as if all models, or those with these names, had changed."""
    return changed(lambda d: [change(model) for model in d["models"] if not names or model["name"] in names])


def without_models(*names: str, fault: str | None = None) -> Handler:
    """Answer /models as if these models were not served: nobody knows of them, or workers cannot use them."""
    unusable = dict.fromkeys(names, fault) if fault else {}
    return changed(
        lambda d: d.update(models=[model for model in d["models"] if model["name"] not in names], unusable=unusable)
    )

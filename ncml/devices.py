"""Where a network can be placed."""

import torch


def problem(device: str) -> str | None:
    """Why nothing can be computed on a device, in a line; None where something can."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every kind of device has errors of its own, down to modules that are not there
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None

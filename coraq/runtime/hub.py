"""Whether the Hugging Face hub can be reached; its clients find out only after a minute of retries."""

from __future__ import annotations

import contextlib
import os
import socket


def go_offline_if_unreachable() -> None:
    """Make the hub's clients skip their retries where there is no network: cached and local files still work."""
    from huggingface_hub import constants

    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = constants.ENDPOINT.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        with contextlib.suppress(ImportError):
            import datasets

            datasets.config.HF_HUB_OFFLINE = True

"""The server in several processes, which Ray Serve starts, watches and shares requests among.

Each replica holds its own copy of the model, follows the alias by itself and has a queue of its
own; Ray's proxy listens. `/version`, `/health` and `/metrics` answer for the replica that is asked.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

from ray import serve

from pipelines.runtime import ensure_ray
from teasr.errors import TeasrError
from teasr.server.app import build_app
from teasr.server.run import make_service
from teasr.server.settings import ServerSettings


def serve_replicas(
    model: str,
    settings: ServerSettings,
    host: str,
    port: int,
    replicas: int,
    started: Callable[[], None],
) -> None:
    """Serve `model` by `replicas` processes of one core each until a signal asks to end.

    Args:
        model: as for `teasr.registry.resolve`; found by each replica.
        started: called once requests are answered.

    Raises:
        TeasrError: when there is no Ray, or the replicas do not start.
    """
    ensure_ray(max(replicas + 1, os.cpu_count() or 2))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    ended = threading.Event()
    try:
        # Ray has taken the signals: one would abort this process and leave the others.
        _on_signal(lambda *_: sys.exit(143))
        serve.run(_deployment(model, settings, replicas), name="teasr")
        _on_signal(lambda *_: ended.set())
        started()
        ended.wait()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TeasrError("The replicas did not start.", reason) from None
    finally:
        serve.shutdown()


def _on_signal(handler: Callable[..., None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _deployment(model: str, settings: ServerSettings, replicas: int) -> serve.Application:
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(("TEASR_", "MLFLOW_"))
    }

    @serve.deployment(
        num_replicas=replicas,
        # What waits beyond is refused by the replica, in a sentence, and not held by the proxy.
        max_ongoing_requests=2 * settings.queue,
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": environment}},
    )
    @serve.ingress(lambda: build_app(lambda: make_service(model, settings)))
    class Replica:
        pass

    return Replica.bind()

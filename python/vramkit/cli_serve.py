"""`vramkit serve chatterbox`: the server on the command line."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import click


@click.group()
def serve() -> None:
    """Serve a model over HTTP."""


@serve.command()
@click.option("--host", help="Address to listen on; default: HOST, 0.0.0.0.")
@click.option("--port", type=int, help="Port; 0 for any that is free; default: PORT, 4123.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "chatterbox", "formant"]),
    help="What speaks; default: ENGINE, auto: Chatterbox where it is installed.",
)
@click.option("--env-file", default=".env", show_default=True, help="A file with settings.")
@click.option(
    "--json", "json_path", metavar="PATH|-", help="Write the settings as JSON to PATH, or stdout."
)
@click.option("--check", is_flag=True, help="Check the settings and stop.")
def chatterbox(
    host: str | None,
    port: int | None,
    engine: str | None,
    env_file: str,
    json_path: str | None,
    check: bool,
) -> None:
    """Serve text to speech with Chatterbox's documented interface (docs/serve.md).

    Settings come from the environment and a .env file. SIGTERM and Ctrl-C let what is running end
    first.
    """
    from .cli import _reported

    with _reported(json_path) as output:
        try:
            import uvicorn

            from .serve.chatterbox import create_app
            from .serve.settings import read_settings
        except ImportError as error:
            raise ImportError(
                f"the server needs more packages ({error}): pip install 'vramkit[serve]'"
            ) from error
        options = {"host": host, "port": port, "engine": engine}
        given = {name: value for name, value in options.items() if value is not None}
        settings = read_settings(env_file, **given)
        app = create_app(settings)
        output.finish(json.loads(settings.model_dump_json()))
        if check:
            return
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                timeout_graceful_shutdown=settings.shutdown_timeout_seconds,
            )
        )
        # uvicorn raises the signal again once it has stopped as it was asked to.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore)
        server.run()
        if not server.started:
            sys.exit(1)


def _ignore(_number: int, _frame: Any) -> None:
    """The server has already acted on it."""

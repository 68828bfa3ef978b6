"""The command `dashboard`: serves the page that shows runs, versions, schedules and what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mongotorch.cli.output import Uri, described, opened


def dashboard(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8265,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MONGOTORCH_DASHBOARD_TOKEN",
            show_envvar=True,
            help="What a browser has to give; needed where others can reach the host.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MONGOTORCH_DASHBOARD_TOKEN_FILE",
            show_envvar=True,
            exists=True,
            dir_okay=False,
            help="A file that holds the token, as secrets of Docker are.",
        ),
    ] = None,
    uri: Uri = None,
) -> None:
    """Show runs, versions, schedules and data in a browser; it only reads. Ctrl-C ends it."""
    try:
        from mongotorch.web.server import serve
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed: the dashboard needs `pip install 'mongotorch[web]'`"
        typer.echo(missing, err=True)
        raise typer.Exit(1) from None

    if token is None and token_file is not None:
        token = token_file.read_text(encoding="utf-8").strip()
    with opened(uri) as db:
        shown = described(db)
        serve(db, host=host, port=port, token=token, say=lambda at: typer.echo(f"dashboard of {shown}: {at}"))

"""The command `doctor`: looks at this installation and at the server, and says what to mend."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform

import typer

from mongotorch._version import __version__
from mongotorch.cli.output import AsJson, Uri, address_of, errors, print_json, print_table

_PACKAGES = ("torch", "pymongo", "numpy", "dill")


def doctor(uri: Uri = None, as_json: AsJson = False) -> None:
    """Look at the server (version, replica set, permissions, clock, disk, indexes); exit code 1 for a problem."""
    from mongotorch.mongo.connection import open_address
    from mongotorch.mongo.driver_errors import redact
    from mongotorch.mongo.server_checks import check_server

    with errors():
        address, settings = address_of(uri)
        with open_address(address, settings) as connection:
            where, checks = redact(connection.uri), check_server(connection)
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    if as_json:
        about = {"mongotorch": __version__, "python": platform.python_version(), **installed}
        print_json({"database": where, "versions": about, "checks": [dataclasses.asdict(one) for one in checks]})
    else:
        versions = ", ".join(f"{name} {version}" for name, version in installed.items())
        typer.echo(f"mongotorch {__version__} on Python {platform.python_version()} ({versions})")
        typer.echo(f"database: {where}")
        print_table(
            ("what", "state", "found"), ((one.name, one.state, one.text) for one in checks), whole=["what"]
        )
    raise typer.Exit(1 if any(one.state == "problem" for one in checks) else 0)

"""The pages of the dashboard. Each is one function that reads, and one template; `?format=json` gives its values.

The functions run in threads, since the driver waits. An error of mongotorch becomes a page that says it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mongotorch._version import __version__
from mongotorch.datalayer import Datalayer
from mongotorch.errors import MongotorchError, NotFoundError, ParameterError, QueryError, ServerUnavailableError
from mongotorch.mongo.driver_errors import redact
from mongotorch.services.overview import MOST_COMPARED
from mongotorch.store.listing import shown
from mongotorch.web.events import ChangeEvents
from mongotorch.web.formatting import FILTERS, short
from mongotorch.web.graph import layout
from mongotorch.web.security import AccessControl

PAGE_RUNS: Final = 200
MOST_RUNS: Final = 1000
"""How many runs one page lists at most."""
_STATUSES: Final = ("queued", "running", "succeeded", "failed", "cancelled")
_STATUS_CODES: Final = (
    (NotFoundError, 404),
    (ParameterError, 400),
    (QueryError, 400),
    (ServerUnavailableError, 503),
)
_STATIC: Final = Path(__file__).parent / "static"
_log = logging.getLogger("mongotorch.web")
Values = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """One page.

    Attributes:
        path: Its route.
        template: The file in `templates`.
        section: The entry of the navigation that is marked.
        topics: The records whose changes load it again, as in `ChangeEvents`.
        read: Reads its values, plain ones, from the database for a request.
    """

    path: str
    template: str
    section: str
    read: Callable[[Datalayer, Request], Values]
    topics: str = ""


def create_app(db: Datalayer, *, token: str | None = None) -> Starlette:
    """The dashboard of a database, as an ASGI application.

    Args:
        db: The database; the caller closes it after the application has ended.
        token: What each request has to bring; None: requests from this machine only.
    """
    templates = Environment(
        loader=PackageLoader("mongotorch.web"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(FILTERS)
    templates.globals.update(database=short(redact(db.uri)), release=__version__, statuses=_STATUSES)
    events = ChangeEvents(db.overview)

    async def listen(_: Request) -> Response:
        if events.is_full:
            return PlainTextResponse("too many pages listen", 503)
        return StreamingResponse(events.stream(), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        with events:
            yield

    def login_page(*, wrong: bool) -> str:
        return templates.get_template("login.html").render(wrong=wrong, section="", topics="")

    pages = [Route(page.path, _endpoint(db, page, templates), methods=["GET"]) for page in PAGES]
    static = Mount("/static", StaticFiles(directory=_STATIC))
    access = Middleware(AccessControl, token=token, login_page=login_page)
    app = Starlette(
        routes=[
            Route("/events", listen),
            static,
            *pages,
            Route("/{rest:path}", _endpoint(db, _NOWHERE, templates)),
        ],
        middleware=[access],
        lifespan=lifespan,
    )
    app.state.events = events
    return app


def _endpoint(db: Datalayer, page: Page, templates: Environment) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await run_in_threadpool(_answer, db, page, templates, request)

    return answer


def _answer(db: Datalayer, page: Page, templates: Environment, request: Request) -> Response:
    template, status = page.template, 200
    try:
        values = page.read(db, request)
    except MongotorchError as error:
        status = next((code for kind, code in _STATUS_CODES if isinstance(error, kind)), 500)
        template, values = "error.html", {"error": type(error).__name__, "message": short(error.message, 2000)}
    except Exception:  # noqa: BLE001 - whatever a record holds, the other pages go on
        _log.exception("the page %s failed", request.url.path)
        template, status = "error.html", 500
        values = {"error": "Error", "message": "this page cannot be shown; the log of the dashboard says why"}
    if request.query_params.get("format") == "json":
        return Response(json.dumps(values, allow_nan=False), status, media_type="application/json")
    links = {"query": dict(request.query_params), "json_url": str(request.url.include_query_params(format="json"))}
    context = {**values, **links, "section": page.section, "topics": page.topics}
    return HTMLResponse(templates.get_template(template).render(context), status)


def _runs(db: Datalayer, request: Request) -> Values:
    asked = request.query_params
    limit, skip = _whole(request, "limit", PAGE_RUNS, MOST_RUNS), _whole(request, "skip", 0, 1_000_000)
    status = asked.get("status") or None
    if status is not None and status not in _STATUSES:
        raise ParameterError(f"no status {short(status, 50)!r}; there are {', '.join(_STATUSES)}", field="status")
    identifier = asked.get("identifier") or None
    found = db.overview.runs(status=status, identifier=identifier, limit=max(limit, 1), skip=skip)
    return {**found, "limit": limit, "skip": skip}


def _whole(request: Request, name: str, default: int, most: int) -> int:
    """A whole number of the address. Raises: ParameterError."""
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise ParameterError(f"{name}={short(text, 50)!r} is no whole number", field=name)
    return min(int(text), most)


def _run(db: Datalayer, request: Request) -> Values:
    return {"run": db.overview.run(request.path_params["job"])}


def _compare(db: Datalayer, request: Request) -> Values:
    chosen = request.query_params.getlist("run")
    if len(chosen) > MOST_COMPARED:
        raise ParameterError(f"{len(chosen)} runs cannot be compared; choose at most {MOST_COMPARED}", field="run")
    # The page itself only names the runs; its script asks for the curves.
    return db.overview.curves(chosen, measured=request.query_params.get("format") == "json")


def _models(db: Datalayer, _: Request) -> Values:
    return db.overview.models()


def _model(db: Datalayer, request: Request) -> Values:
    return db.overview.model(request.path_params["identifier"])


def _diff(db: Datalayer, request: Request) -> Values:
    old, new = (request.query_params.get(name, "") for name in ("old", "new"))
    if not old or not new:
        raise ParameterError("choose an earlier and a later version to compare", field="old")
    return {"old": old, "new": new, "diff": shown(db.diff(old, new).to_document())}


def _lineage(db: Datalayer, request: Request) -> Values:
    found = db.overview.lineage(request.path_params["uuid"])
    return {**found, "drawing": layout(found["nodes"], found["edges"])}


def _schedules(db: Datalayer, _: Request) -> Values:
    return db.overview.schedules()


def _collections(db: Datalayer, _: Request) -> Values:
    return db.overview.collections()


def _collection(db: Datalayer, request: Request) -> Values:
    name = request.path_params["name"]
    if name.startswith(("mt.", "system.")):
        raise NotFoundError(f"{short(name, 100)!r} is not a collection of yours")
    return {"check": shown(db.check(db[name].find()).to_document())}


def _storage(db: Datalayer, request: Request) -> Values:
    collected = None
    if request.query_params.get("gc"):
        found = dataclasses.asdict(db.gc(dry_run=True))
        collected = {name: len(value) if isinstance(value, tuple) else value for name, value in found.items()}
    return {**db.overview.storage(), "collected": collected}


def _nothing(_: Datalayer, request: Request) -> Values:
    raise NotFoundError(f"no page {short(request.url.path, 100)}")


PAGES: Final = (
    Page(path="/", template="runs.html", section="runs", read=_runs, topics="jobs"),
    Page(path="/runs/{job:path}", template="run.html", section="runs", read=_run, topics="jobs metrics"),
    Page(path="/compare", template="compare.html", section="runs", read=_compare, topics="metrics"),
    Page(path="/models", template="models.html", section="models", read=_models, topics="components aliases"),
    Page(
        path="/models/{identifier:path}",
        template="model.html",
        section="models",
        read=_model,
        topics="components aliases",
    ),
    Page(path="/diff", template="diff.html", section="models", read=_diff),
    Page(
        path="/lineage/{uuid:path}",
        template="lineage.html",
        section="models",
        read=_lineage,
        topics="aliases predictions",
    ),
    Page(path="/schedules", template="schedules.html", section="schedules", read=_schedules, topics="schedules"),
    Page(path="/data", template="collections.html", section="data", read=_collections),
    Page(path="/data/{name:path}", template="collection.html", section="data", read=_collection),
    Page(path="/storage", template="storage.html", section="storage", read=_storage),
)
_NOWHERE: Final = Page(path="/", template="error.html", section="", read=_nothing)

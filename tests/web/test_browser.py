"""The dashboard in Chromium: a run appears, its curve grows, pages are used by keyboard, narrow and dark.

Needs Playwright and Debian's `chromium`; skipped where one is missing. With MONGOTORCH_SCREENSHOTS=FOLDER it
leaves screenshots there, for the documentation.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, trainer
from tests.web.pages import fill_with_runs, insert_runs

from mongotorch import Better, Datalayer, NewDocuments, Schedule, Worker
from mongotorch.web.server import serving

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="`chromium` is not installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def shop(server_uri: str, tmp_path: Path) -> Iterator[Datalayer]:
    """A database on the real server, which has change streams."""
    with Datalayer.connect(server_uri, valid_fraction=0.2, progress=False, cache_dir=tmp_path) as db:
        yield db


class Tab:
    """A page of the dashboard; what its scripts report as wrong is collected."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}).new_page()
        self.page.set_default_timeout(60_000)
        self.address = address
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def open(self, path: str) -> Any:
        self.page.goto(self.address + path.removeprefix("/"))
        return self.page

    def shot(self, name: str) -> None:
        folder = os.environ.get("MONGOTORCH_SCREENSHOTS")
        if folder:
            self.page.mouse.move(0, 0)
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def close(self) -> None:
        self.page.context.close()
        assert self.problems == []


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds; Playwright's own way needs `eval`, which the policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(100)


class Gated:
    """An objective that waits, from the tenth step on, until it is let through."""

    def __init__(self) -> None:
        self.open, self.calls = threading.Event(), 0

    def __call__(self, output: Any, target: Any) -> Any:
        import torch

        self.calls += 1
        if self.calls > 10:
            self.open.wait(120)
        return torch.nn.functional.cross_entropy(output, target)


GATE = Gated()


def gated(output: Any, target: Any) -> Any:
    return GATE(output, target)


def test_a_run_appears_grows_and_ends(shop: Datalayer, browser: Any) -> None:
    select = fill(shop)
    with serving(shop) as address:
        runs, run = Tab(browser, address), Tab(browser, address)
        runs.open("/").get_by_text("No runs yet").wait_for()
        runs.page.get_by_text("live").wait_for()
        applied = trainer(select, objective=gated, max_iterations=40, log_interval=1, no_improve_then_stop=100)
        thread = threading.Thread(target=lambda: shop.apply(applied), daemon=True)
        thread.start()
        runs.page.locator("#runs .status.running").wait_for()
        job = shop.jobs()[0].uuid
        page = run.open(f"/runs/{job}")
        page.locator("canvas").first.wait_for()
        points = "lastRuns[0].curves.find((curve) => curve.kind === 'train').steps.length"
        until(page, f"lastRuns && lastRuns[0].curves.length && {points} > 2")
        before = page.evaluate(points)
        GATE.open.set()
        until(page, f"{points} > {before} + 10")
        page.locator("#state .status.succeeded").wait_for()
        runs.page.locator("#runs .status.succeeded").wait_for()
        assert page.get_by_text("Published").is_visible()
        thread.join(60)
        runs.close()
        run.close()


def test_compare_models_lineage_and_verdict(shop: Datalayer, browser: Any) -> None:
    _, model = fill_with_runs(shop)
    other = shop.apply(trainer(shop[COLLECTION].find(), model=model, max_iterations=60, log_interval=3)).result()
    shop.predict("model", "m", select=shop[COLLECTION].find(), into="guess")
    with serving(shop) as address:
        tab = Tab(browser, address)
        page = tab.open("/")
        for box in page.locator("#runs input[type=checkbox]").all():
            box.check()
        tab.shot("dashboard-runs")
        assert page.get_by_text("2 chosen").is_visible()
        page.get_by_role("button", name="Compare the chosen runs").click()
        page.locator("canvas").first.wait_for()
        page.locator("#axis").select_option("seconds")
        assert page.locator("canvas").count() >= 3
        tab.shot("dashboard-compare")
        tab.open(f"/runs/{shop.jobs()[0].uuid}").locator("canvas").first.wait_for()
        tab.shot("dashboard-run")
        page = tab.open("/models/m")
        page.get_by_role("button", name="Compare the two versions").click()
        assert page.get_by_text("trainer.max_iterations").is_visible()
        page = tab.open(f"/lineage/{other.uuid}")
        page.locator("svg.graph a", has_text="run").first.wait_for()
        assert page.locator("svg.graph .predictions").count() == 1
        shop.predict("model", "m", other.version, select=shop[COLLECTION].find().limit(30), into="second")
        page.locator("svg.graph a", has_text="30 written").wait_for()  # the open page loads itself again
        tab.shot("dashboard-lineage")
        page.locator("svg.graph a", has_text="m 1").click()
        assert page.get_by_role("heading", level=1).inner_text().endswith("version 1")
        tab.close()


def test_a_verdict_is_shown_with_both_values(shop: Datalayer, browser: Any) -> None:
    fill_with_runs(shop)
    retrained = trainer(shop[COLLECTION].find())
    shop.apply(Schedule("hourly", trainer=retrained, trigger=NewDocuments(10_000), gate=Better()))
    shop.fire("hourly")
    Worker(shop).run(until_idle=True)
    with serving(shop) as address:
        tab = Tab(browser, address)
        page = tab.open("/models/m")
        assert page.locator(".verdict").first.is_visible()
        tab.shot("dashboard-model")
        page = tab.open("/schedules")
        assert page.get_by_text("hourly").first.is_visible()
        tab.close()


def test_it_is_used_by_keyboard_alone(shop: Datalayer, browser: Any) -> None:
    fill_with_runs(shop)
    with serving(shop) as address:
        tab = Tab(browser, address)
        page = tab.open("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("/")
        page.keyboard.type("nothing is called so")
        assert page.locator("#runs tbody tr:visible").count() == 0
        page.keyboard.press("Control+A")
        page.keyboard.type("t")
        assert page.locator("#runs tbody tr:visible").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert page.get_by_text("1 chosen").is_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url("**/runs/*")
        tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(shop: Datalayer, browser: Any, scheme: str) -> None:
    job, model = fill_with_runs(shop)
    paths = ("/", f"/runs/{job}", f"/compare?run={job}", "/models", "/models/m", f"/lineage/{model.uuid}")
    with serving(shop) as address:
        tab = Tab(browser, address, viewport={"width": 380, "height": 800}, color_scheme=scheme)
        for path in (*paths, "/schedules", "/data", f"/data/{COLLECTION}", "/storage?gc=1"):
            page = tab.open(path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 380, path
        page = tab.open(f"/runs/{job}")
        page.locator("canvas").first.wait_for()
        if scheme == "dark":
            tab.shot("dashboard-narrow-dark")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 25, 27)"
        tab.close()


def lay_all_out(route: Any) -> None:
    every = "#runs .cards tbody tr { content-visibility: visible !important; }"
    route.fulfill(body=every, content_type="text/css")


def test_of_a_thousand_runs_only_those_in_sight_are_laid_out(shop: Datalayer, browser: Any) -> None:
    insert_runs(shop, 1000)
    spent = {}
    with serving(shop) as address:
        for way in ("plain", "as it is"):
            tab = Tab(browser, address)
            if way == "plain":
                tab.page.route("**/uplot.css", lay_all_out)
            session = tab.page.context.new_cdp_session(tab.page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})  # not what others compute meanwhile
            page = tab.open("/?limit=1000")
            found = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
            spent[way] = found["LayoutDuration"]
        assert page.locator("#runs tbody tr").count() == 1000
        lefts = (
            "[...document.querySelectorAll('#runs {}')].map((one) => Math.round(one.getBoundingClientRect().left))"
        )
        assert page.evaluate(lefts.format("thead th")) == page.evaluate(lefts.format("tbody tr:first-child td"))
        last = page.locator("#runs tbody tr").last
        last.scroll_into_view_if_needed()
        assert last.get_by_text("trainer-").is_visible()
        tab.close()
        for width in (720, 900, 1120, 1600):
            tab = Tab(browser, address, viewport={"width": width, "height": 800})
            assert tab.open("/").evaluate("document.documentElement.scrollWidth") <= width
            tab.close()
    assert spent["as it is"] < spent["plain"] / 3, spent


def test_stored_script_does_not_run(shop: Datalayer, browser: Any) -> None:
    hostile = "</script><script>window.ran=1</script><img src=x onerror=window.ran=1>"
    job, _ = fill_with_runs(shop)
    database = shop[COLLECTION].raw.database
    values = {hostile: 1.0, "objective": 2.0}
    database["mt.jobs"].update_one({"_id": job}, {"$set": {"identifier": hostile, "error": {"type": hostile}}})
    database["mt.metrics"].insert_one({"job": job, "step": 99, "kind": hostile, "values": values})
    with serving(shop) as address:
        tab = Tab(browser, address)
        for path in ("/", f"/runs/{job}", f"/compare?run={job}"):
            page = tab.open(path)
            page.wait_for_timeout(300)
            assert page.evaluate("window.ran") is None
            assert page.get_by_text("window.ran").first.is_visible()
        assert page.locator("figcaption", has_text="onerror").count() == 1
        tab.close()

"""Each page of the dashboard, as HTML and as JSON, on both backends."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.helpers import COLLECTION, fill, trainer
from tests.web.pages import as_json, client, fill_with_runs, insert_runs, pages_of

from mongotorch import Datalayer


class Links(HTMLParser):
    """Collects what a page links to and loads, and what is written inside its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [value for name in ("href", "src") if (value := found.get(name))]
        self.inline += [name for name in found if name.startswith("on") or name == "style"]
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)


def links_of(html: str) -> list[str]:
    parser = Links()
    parser.feed(html)
    assert parser.inline == [], "scripts and styles come from files only"
    return parser.links


def test_each_page_has_a_json_twin(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    with client(db) as web:
        for address in pages_of(db, job, model):
            page, twin = web.get(address), web.get(as_json(address))
            assert (page.status_code, twin.status_code) == (200, 200), address
            assert page.headers["content-type"].startswith("text/html")
            assert twin.headers["content-type"] == "application/json"
            json.loads(twin.text, parse_constant=pytest.fail)
            assert "JSON of this page" in page.text


def test_every_link_of_every_page_leads_somewhere(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    seen: set[str] = set()
    with client(db) as web:
        waiting = pages_of(db, job, model)
        while waiting:
            address = waiting.pop().replace("http://127.0.0.1", "")
            if address in seen or address.startswith("#") or len(seen) > 150:
                continue
            seen.add(address)
            answer = web.get(address)
            assert answer.status_code == 200, address
            if answer.headers["content-type"].startswith("text/html"):
                waiting += links_of(answer.text)
    assert f"/lineage/{model.uuid}" in seen
    assert "/static/dashboard.js" in seen


def test_a_run_shows_its_state_recipe_and_version(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    with client(db) as web:
        run = web.get(as_json(f"/runs/{job}")).json()["run"]
        html = web.get(f"/runs/{job}").text
    assert (run["status"], run["step"], run["max_steps"], run["attempt"]) == ("succeeded", 12, 12, 1)
    assert run["version"]["uuid"] == model.uuid
    assert run["version"]["best_step"] in (4, 8, 12)
    assert run["environment"]["python"]
    assert run["left_s"] is None
    assert "succeeded" in html
    assert "batch_size" in html


def test_the_curves_of_a_run_are_its_measurements(db: Datalayer) -> None:
    job, _ = fill_with_runs(db)
    with client(db) as web:
        (run,) = web.get(as_json(f"/compare?run={job}&run={job}&run=nowhere")).json()["runs"]
    curves = {(curve["name"], curve["kind"]): curve for curve in run["curves"]}
    valid = curves["objective", "valid"]
    assert valid["steps"] == [4, 8, 12]
    assert len(valid["values"]) == len(valid["seconds"]) == 3
    assert run["curves"][0]["name"] == "objective"


def test_a_failed_run_shows_its_traceback(db: Datalayer) -> None:
    job = db.apply(trainer(fill(db), objective=fail_always))
    assert job.exception() is not None
    with client(db) as web:
        listed = web.get("/").text
        page = web.get(f"/runs/{job.uuid}").text
    assert "failed" in listed
    assert "it cannot be scored" in listed
    assert "Traceback (most recent call last)" in page


def fail_always(*_: Any) -> Any:
    raise ValueError("it cannot be scored")


def test_runs_are_filtered_and_paged(db: Datalayer) -> None:
    insert_runs(db, 30)
    with client(db) as web:
        first = web.get("/?limit=10&format=json").json()
        assert [run["id"] for run in first["runs"]] == [f"job-{n:05}" for n in range(29, 19, -1)]
        assert first["more"]
        last = web.get("/?limit=10&skip=20&format=json").json()
        assert [run["id"] for run in last["runs"]] == [f"job-{n:05}" for n in range(9, -1, -1)]
        assert not last["more"]
        failed = web.get("/?status=failed&identifier=trainer-0&format=json").json()["runs"]
        assert {run["id"] for run in failed} == {"job-00000"}
        assert first["counts"] == {"queued": 0, "running": 0, "succeeded": 24, "failed": 6, "cancelled": 0}
        assert web.get("/?status=failed").text.count('name="run"') == 6


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/?status=nonsense", 400),
        ("/?limit=-3", 400),
        ("/?limit=ten", 400),
        ("/?skip=99999999999999999999", 400),
        ("/runs/nowhere", 404),
        ("/models/nowhere", 404),
        ("/lineage/nowhere", 404),
        ("/diff", 400),
        ("/diff?old=a&new=b", 404),
        ("/compare?" + "&".join(f"run={n}" for n in range(11)), 400),
        ("/data/mt.jobs", 404),
        ("/data/nowhere", 500),
        ("/data/a$b", 400),
        ("/nowhere", 404),
        ("/static/nowhere.js", 404),
        ("/static/../app.py", 404),
    ],
)
def test_a_wrong_address_is_answered_in_words(db: Datalayer, address: str, status: int) -> None:
    with client(db) as web:
        answer = web.get(address)
        twin = web.get(as_json(address))
    assert answer.status_code == twin.status_code == status
    if not address.startswith("/static"):
        assert twin.json()["message"]
        assert "Traceback" not in answer.text


def test_a_model_shows_versions_sizes_and_moves(db: Datalayer) -> None:
    _, model = fill_with_runs(db)
    db.promote("model", "m", 0, why="back to <the> start")
    with client(db) as web:
        found = web.get("/models/m?format=json").json()
        models = web.get("/models?format=json").json()["models"]
        html = web.get("/models/m").text
    trained, given = found["versions"]
    assert (trained["version"], given["version"]) == (1, 0)
    assert trained["uuid"] == model.uuid
    assert trained["nbytes"] > 0
    assert given["aliases"] == ["live"]
    assert trained["aliases"] == []
    assert [(move["from_version"], move["to_version"]) for move in found["history"]] == [(1, 0), (None, 1)]
    assert models == [{"identifier": "m", "versions": 2, "newest": 1, "created": models[0]["created"], "live": 0}]
    assert "back to &lt;the&gt; start" in html


def test_a_lineage_goes_from_the_query_to_the_alias(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    with client(db) as web:
        found = web.get(f"/lineage/{model.uuid}?format=json").json()
        svg = web.get(f"/lineage/{model.uuid}").text
    kinds = {node["kind"]: node for node in found["nodes"] if node["generation"] == 0}
    assert kinds["query"]["title"] == COLLECTION
    assert kinds["run"]["job"] == job
    assert kinds["alias"]["title"] == "live"
    edges = {tuple(edge) for edge in found["edges"]}
    assert (kinds["query"]["id"], kinds["run"]["id"]) in edges
    assert (kinds["run"]["id"], model.uuid) in edges
    assert (model.uuid, kinds["alias"]["id"]) in edges
    parent = next(node for node in found["nodes"] if node["generation"] == 1)
    assert (parent["uuid"], kinds["run"]["id"]) in edges
    assert len(re.findall(r"<rect ", svg)) == len(found["nodes"])
    assert len(re.findall(r"<path ", svg)) == len(found["edges"])


def test_a_lineage_ends_in_the_predictions(db: Datalayer) -> None:
    _, model = fill_with_runs(db)
    db.predict("model", "m", select=db[COLLECTION].find(), into="guess")
    db.predict("model", "m", 0, select=db[COLLECTION].find({"n": {"$lt": 9}}), into="first.guess", key="x")
    with client(db) as web:
        found = web.get(f"/lineage/{model.uuid}?format=json").json()
        page = web.get(f"/lineage/{model.uuid}").text
    given = db.show("model", "m", 0)["_id"]
    predictions = {node["title"]: node for node in found["nodes"] if node["kind"] == "predictions"}
    assert set(predictions) == {f"{COLLECTION}.guess", f"{COLLECTION}.first.guess"}
    assert predictions[f"{COLLECTION}.guess"]["lines"][:2] == ["120 written in 1 run", "succeeded"]
    edges = {tuple(edge) for edge in found["edges"]}
    assert (f"alias {model.uuid} live", predictions[f"{COLLECTION}.guess"]["id"]) in edges  # chosen by the alias
    assert (given, predictions[f"{COLLECTION}.first.guess"]["id"]) in edges  # and named by its number
    assert page.count(f"{COLLECTION}.first.guess") == 2  # in the graph and in the list
    assert f'href="/data/{COLLECTION}"' in page


def test_a_schedule_shows_what_counts(db: Datalayer) -> None:
    fill_with_runs(db)
    with client(db) as web:
        (found,) = web.get("/schedules?format=json").json()["schedules"]
    assert found["name"] == "nightly"
    assert found["trigger"].startswith("NewDocuments(")
    assert found["counted"]["inserted"] == 0
    assert not found["paused"]


def test_reading_changes_nothing(db: Datalayer) -> None:
    job, model = fill_with_runs(db)
    database = db[COLLECTION].raw.database

    def stored() -> dict[str, Any]:
        return {name: list(database[name].find().sort("_id", 1)) for name in database.list_collection_names()}

    before = stored()
    with client(db) as web:
        for address in pages_of(db, job, model):
            web.get(address)
    assert stored() == before

"""The tests of a compute engine, for a class to inherit. They need no database."""

# ruff: noqa: S101 - these are tests

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from mongotorch.jobs import Engine, engine_named


class EngineSuite:
    """The tests of any engine: a class that inherits it, called `Test…`, defines the fixture `engine`."""

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine."""
        raise NotImplementedError("define the fixture `engine`")

    def test_the_setting_compute_finds_it_by_its_name(self, engine: Engine) -> None:
        """Built in, or by an entry point."""
        assert type(engine_named(engine.name)) is type(engine)

    def test_a_job_runs_once_at_most_and_by_its_id(self, engine: Engine) -> None:
        """An engine calls the function with the id it was given."""
        run_ids: list[str] = []

        engine.submit("a-job", run_ids.append)

        assert run_ids in ([], ["a-job"])

    def test_a_job_that_succeeds_gives_no_error(self, engine: Engine) -> None:
        """None also means that it runs elsewhere."""
        assert engine.submit("a-job", lambda _: None) is None

    def test_it_takes_one_job_after_the_other(self, engine: Engine) -> None:
        """The end of one, by success or error, is not the end of the engine."""
        run_ids: list[str] = []

        engine.submit("first", _raising(ValueError("no")))
        engine.submit("second", run_ids.append)
        engine.submit("third", run_ids.append)

        assert run_ids in ([], ["second", "third"])


class WaitingEngineSuite(EngineSuite):
    """The tests of an engine whose `submit` runs the job itself and returns at its end."""

    def test_the_job_has_ended_when_submit_returns(self, engine: Engine) -> None:
        """It has run once, with its id."""
        run_ids: list[str] = []

        assert engine.submit("a-job", run_ids.append) is None

        assert run_ids == ["a-job"]

    def test_it_keeps_what_the_run_raised(self, engine: Engine) -> None:
        """The very object, with its traceback: a future raises it."""
        error = ValueError("the run failed")

        assert engine.submit("a-job", _raising(error)) is error

        assert error.__traceback__ is not None

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_what_stops_a_process_stops_the_caller_too(self, engine: Engine, kind: type[BaseException]) -> None:
        """Ctrl-C is not a result of the job."""
        with pytest.raises(kind):
            engine.submit("a-job", _raising(kind()))


def _raising(error: BaseException) -> Callable[[str], None]:
    def run(job_id: str) -> NoReturn:  # noqa: ARG001
        raise error

    return run

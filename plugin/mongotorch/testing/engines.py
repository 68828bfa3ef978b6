"""What every compute engine has to do, as tests that a class for one engine inherits.

Always: an engine is told an id and a function, and nothing else; these tests need no database.
"""

# ruff: noqa: S101 - these are tests

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from mongotorch.jobs import Engine, engine_named


class EngineSuite:
    """The tests of any engine: a class that inherits it, called `Test…`, fills in the fixture `engine`."""

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine."""
        raise NotImplementedError("fill in the fixture `engine`")

    def test_the_setting_compute_finds_it_by_its_name(self, engine: Engine) -> None:
        """Built in, or by an entry point."""
        assert type(engine_named(engine.name)) is type(engine)

    def test_a_job_is_performed_once_at_most_and_by_its_id(self, engine: Engine) -> None:
        """What it does for a job is `perform`, with the id as it was given."""
        performed: list[str] = []

        engine.submit("a-job", performed.append)

        assert performed in ([], ["a-job"])

    def test_a_job_that_succeeds_gives_no_error(self, engine: Engine) -> None:
        """None also says that it goes on elsewhere."""
        assert engine.submit("a-job", lambda _: None) is None

    def test_it_takes_one_job_after_the_other(self, engine: Engine) -> None:
        """The end of one, by success or error, is not the end of the engine."""
        performed: list[str] = []

        engine.submit("first", _raising(ValueError("no")))
        engine.submit("second", performed.append)
        engine.submit("third", performed.append)

        assert performed in ([], ["second", "third"])


class WaitingEngineSuite(EngineSuite):
    """The tests of an engine whose `submit` performs the job itself and returns at its end."""

    def test_the_job_has_ended_when_submit_returns(self, engine: Engine) -> None:
        """Performed once, with its id."""
        performed: list[str] = []

        assert engine.submit("a-job", performed.append) is None

        assert performed == ["a-job"]

    def test_it_keeps_what_the_run_raised(self, engine: Engine) -> None:
        """The very object, with its traceback: a future raises it."""
        error = ValueError("the run failed")

        assert engine.submit("a-job", _raising(error)) is error

        assert error.__traceback__ is not None

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_what_stops_a_process_stops_the_caller_too(self, engine: Engine, kind: type[BaseException]) -> None:
        """Ctrl-C is no result."""
        with pytest.raises(kind):
            engine.submit("a-job", _raising(kind()))


def _raising(error: BaseException) -> Callable[[str], None]:
    def perform(job_id: str) -> NoReturn:  # noqa: ARG001
        raise error

    return perform

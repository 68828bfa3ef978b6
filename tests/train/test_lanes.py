"""What `compute_kwargs` say of workers and lanes: defaults, refusals, and how lanes are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.train.test_group import MLP, fitting, trainer

from mongotorch.errors import ParameterError
from mongotorch.train import Alone, Lanes


@pytest.mark.parametrize(
    ("given", "accumulation", "lanes", "workers", "possible"),
    [
        (None, 1, 1, (1, 1), (1,)),
        ({"device": "cpu"}, 3, 1, (1, 1), (1,)),
        ({"workers": 1}, 1, 1, (1, 1), (1,)),
        ({"workers": 1}, 3, 4, (1, 1), (1,)),
        ({"workers": 2}, 1, 2, (2, 2), (2,)),
        ({"workers": 2, "lanes": 8}, 1, 8, (2, 2), (2,)),
        ({"workers": [2, 6]}, 1, 8, (2, 6), (2, 4)),
        ({"workers": (1, 4)}, 8, 8, (1, 4), (1, 2, 4)),
        ({"lanes": 4}, 1, 4, (1, 1), (1,)),
    ],
)
def test_defaults(given: Any, accumulation: int, lanes: int, workers: Any, possible: Any) -> None:
    found = Lanes.of(given, 16, accumulation)
    assert (found.lanes, found.workers, found.possible) == (lanes, workers, possible)
    assert found.is_plain == (lanes == 1)
    assert found.threads == (None if lanes == 1 else 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"workers": 0}, "from 1"),
        ({"workers": True}, "from 1"),
        ({"workers": "two"}, "from 1"),
        ({"workers": (2, 1)}, "least, most"),
        ({"workers": (1, 2, 3)}, "least, most"),
        ({"workers": 3}, "possible are 1, 2, 4 workers"),
        ({"workers": (5, 7)}, "possible are 1, 2, 4, 8 workers"),
        ({"workers": 4, "lanes": 2}, "more than lanes=2"),
        ({"workers": 2, "lanes": 6}, "power of two, such as 8"),
        ({"workers": 2, "lanes": 1}, "more than lanes=1"),
        ({"workers": 32}, "16 row"),
        ({"workers": 2, "reduce": "slow"}, "'exact' or 'fast'"),
        ({"workers": 2, "resources": {"GPU": -1}}, "amounts by name"),
        ({"workers": 2, "resources": ["GPU"]}, "amounts by name"),
        ({"workers": 2, "threads": 0}, "threads=0"),
        ({"wokers": 2}, "not known"),
    ],
)
def test_what_cannot_be_is_refused_where_a_trainer_is_made(given: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        trainer(loader_kwargs={"batch_size": 16}, compute_kwargs=given)
    assert caught.value.field == "compute_kwargs"
    with pytest.raises(ParameterError, match="fewer than gradient_accumulation_steps=4"):
        Lanes.of({"workers": 2, "lanes": 2}, 16, 4)


def test_a_rank_has_as_many_lanes_as_the_others() -> None:
    lanes = Lanes.of({"workers": (1, 4)}, 16, 2)
    assert [list(lanes.mine(rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert lanes.training_stream(1, 4) == {"shard": (1, 4), "lanes": 4, "accumulation": 2}
    assert lanes.validation_stream(1, 4) == {"shard": (1, 4), "shard_by": "batches"}
    assert Lanes().training_stream(0, 1) == Lanes().validation_stream(0, 1) == {}
    for world in (3, 8):
        with pytest.raises(ParameterError, match="possible are 1, 2, 4 workers"):
            lanes.training_stream(0, world)


def test_the_threads_of_a_run_are_pinned_and_recorded() -> None:
    before = torch.get_num_threads()
    fit = fitting(trainer(compute_kwargs={"workers": 1, "lanes": 4, "threads": 3}, max_iterations=2), MLP, Alone())
    seen = {torch.get_num_threads() for _ in fit.run()}
    assert seen == {3}
    assert torch.get_num_threads() == before
    assert fit.trained().compute == {"workers": 1, "lanes": 4, "reduce": "exact", "threads": 3}

import numpy as np
import pytest

from mongotorch.data.decode.ids import mix, salt, same_type, sort_key
from mongotorch.data.stream.shuffle import Order


def test_the_generator_is_splitmix64() -> None:
    # The first outputs of the reference implementation for the seed 0.
    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_the_order_of_an_epoch_never_changes_between_versions() -> None:
    order = Order(seed=7, epoch=1, shuffle=True, window=4)
    assert [window.tolist() for window in order.windows(10)] == [[0], [1, 9], [3, 4, 5, 6], [2, 7, 8]]
    permutation, ranks = order.rows(np.arange(6, dtype=np.uint64))
    assert permutation.tolist() == [2, 1, 0, 5, 3, 4]
    assert ranks.tolist() == sorted(ranks.tolist())


def test_a_row_that_is_gone_does_not_move_the_others() -> None:
    order = Order(seed=7, epoch=1, shuffle=True, window=4)
    keys = np.arange(100, dtype=np.uint64)
    without = np.delete(keys, 40)
    (rows, _), (fewer, _) = order.rows(keys), order.rows(without)
    assert [key for key in keys[rows].tolist() if key != 40] == without[fewer].tolist()


@pytest.mark.parametrize("other", [{"seed": 8}, {"epoch": 2}])
def test_seed_and_epoch_both_change_the_order(other: dict[str, int]) -> None:
    def order(seed: int = 7, epoch: int = 1) -> list[int]:
        windows = Order(seed=seed, epoch=epoch, shuffle=True, window=8).windows(64)
        return [int(index) for window in windows for index in window]

    assert order() != order(**other)


def test_salts_tell_the_order_of_their_parts() -> None:
    assert salt(1, 2) != salt(2, 1)
    assert salt(-1) != salt(1)


def test_mixed_types_sort_as_a_server_sorts_them() -> None:
    ascending = [
        None,
        float("nan"),
        -(2**40),
        1,
        1.5,
        2**60,
        "",
        "a",
        "é",
        {"a": 1},
        b"",
        b"b",
        b"aa",
        False,
        True,
    ]
    assert sorted([*ascending[7:], *ascending[:7]], key=sort_key) == ascending
    assert same_type(1, 2.5)
    assert not same_type(1, "a")
    assert not same_type(float("nan"), 1)

from typing import Any

import pytest

from mongotorch.errors import ParameterError
from mongotorch.signature import Key


@pytest.mark.parametrize(
    ("key", "sample"),
    [
        ("x", "X"),
        (("x", "y"), ("X", "Y")),
        (["x", "y"], ("X", "Y")),
        ({"x": "a", "y": "b"}, {"a": "X", "b": "Y"}),
        ((["x"], {"y": "b"}), (["X"], {"b": "Y"})),
        (("x", {"y": "b"}), (["X"], {"b": "Y"})),
    ],
)
def test_a_sample_has_the_structure_of_the_key(key: Any, sample: Any) -> None:
    assert Key.parse(key).arrange(str.upper) == sample


def test_each_path_is_read_once_and_inner_paths_are_not_projected_twice() -> None:
    key = Key.parse((["a", "a.b", "c.d"], {"a": "again"}))
    assert key.paths == ("a", "a.b", "c.d")
    assert key.projection == {"_id": 1, "a": 1, "c.d": 1}


@pytest.mark.parametrize("key", ["", "a..b", "$x", (), 3, None, {}, {"x": 1}, {"x": "a", "y": "a"}, (1, 2), b"x"])
def test_anything_else_is_refused(key: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        Key.parse(key)
    assert caught.value.field == "key"

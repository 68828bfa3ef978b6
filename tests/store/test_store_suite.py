"""Both backends pass the suite that stores inherit."""

from __future__ import annotations

import pytest

from mongotorch.testing.stores import StoreSuite


class TestStores(StoreSuite):
    @pytest.fixture
    def address(self, uri: str) -> str:
        return uri

"""Which work a job is: by the kind of the component that it names.

Always: a kind that has no work of its own is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from mongotorch.wiring.heart import Heart
from mongotorch.wiring.performing import Work


@final
class Works:
    """Work by kind.

    Args:
        usual: What is done for a kind that is not named.
        special: What is done for the others.
    """

    def __init__(self, usual: Work, special: Mapping[str, Work]) -> None:
        self._usual, self._special = usual, special

    def run(self, job: Mapping[str, Any], heart: Heart) -> str:
        """See `Work.run`."""
        return self._special.get(job["type_id"], self._usual).run(job, heart)

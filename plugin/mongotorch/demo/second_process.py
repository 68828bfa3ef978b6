"""The other process of the demo: `python -m mongotorch.demo.elsewhere UUID` prints what it found, as JSON."""

from __future__ import annotations

import json
import sys

from mongotorch.datalayer import Datalayer
from mongotorch.demo.digits import measure_again

if __name__ == "__main__":
    with Datalayer.connect() as db:
        json.dump(measure_again(db, sys.argv[1]), sys.stdout)

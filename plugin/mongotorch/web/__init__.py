"""The dashboard: a web page that shows runs, versions, lineage, schedules, data and what is kept. It only reads.

Needs the extra `web`.
"""

from mongotorch.web.app import create_app
from mongotorch.web.server import serve

__all__ = ["create_app", "serve"]

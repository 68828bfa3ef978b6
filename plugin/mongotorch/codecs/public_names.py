"""The names under which records and pickles know mongotorch's own classes and functions.

What is public is stored by its public name (`mongotorch.Cron`), wherever the file lies that defines it. The first
releases stored the path of that file; `FIRST_NAMES` says what those paths mean. It only ever grows.

Guarantees: names of other packages and of a user's own code are never changed; a digest of content speaks the
names of the first releases, so that what they stored is recognised.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Final

PACKAGE: Final = "mongotorch"
PUBLIC_MODULES: Final = ("mongotorch.codecs", "mongotorch.demo", "mongotorch.testing")
"""Where else than in `mongotorch` itself names are public; modules that are public themselves need no entry."""


def _first(module: str, names: str, public: str = PACKAGE) -> dict[str, str]:
    return {f"{PACKAGE}.{module}.{name}": f"{public}.{name}" for name in names.split()}


FIRST_NAMES: Final[Mapping[str, str]] = {
    **_first("component", "Component"),
    **_first("datalayer", "Datalayer"),
    **_first("errors", "MongotorchError"),
    **_first("key", "Key"),
    **_first("query", "Query"),
    **_first("run.engine", "Engine LocalEngine QueueEngine"),
    **_first("run.gates", "Always Asked Better Gate Never"),
    **_first("run.job", "Job"),
    **_first("run.preview", "Firing preview"),
    **_first("run.schedule", "Schedule"),
    **_first("run.scores", "Scores Verdict"),
    **_first("run.triggers.base", "Decision State Trigger"),
    **_first("run.triggers.combined", "AllOf AnyOf"),
    **_first("run.triggers.cron", "Cron"),
    **_first("run.triggers.documents", "Changed NewDocuments Waited"),
    **_first("run.triggers.every", "Every"),
    **_first("run.triggers.metric", "MetricAbove MetricBelow"),
    **_first("run.worker", "Worker"),
    **_first("settings", "Settings"),
    **_first("store.aliases", "Move"),
    **_first("train.mapping", "Passed"),
    **_first("train.metrics", "Dataset Metric Validation"),
    **_first("train.model", "TorchModel"),
    **_first("train.trainer", "TorchTrainer"),
    **_first("wiring.collection", "Collection"),
    **_first("wiring.live", "Live"),
    **_first("codecs.arrays", "ArrayParts decode_document encode_document", "mongotorch.codecs"),
    **_first("codecs.arrays", "numpy_array numpy_parts", "mongotorch.codecs"),
    **_first("codecs.base", "Codec", "mongotorch.codecs"),
    **_first("codecs.names", "name_of resolve", "mongotorch.codecs"),
    **_first("codecs.pickles", "Pickled check_python dumps loads running_python", "mongotorch.codecs"),
    **_first("codecs.registry", "Codecs", "mongotorch.codecs"),
    **_first("demo.digits", "DigitsNet Outcome accuracy run_demo", "mongotorch.demo"),
    **_first("testing.codecs", "CodecSuite", "mongotorch.testing"),
    **_first("testing.engines", "EngineSuite WaitingEngineSuite", "mongotorch.testing"),
    **_first("testing.stores", "StoreSuite Thing", "mongotorch.testing"),
    **_first("testing.triggers", "TriggerSuite", "mongotorch.testing"),
}
"""From the path that the first releases stored to the public name."""
_FIRST_OF: Final = {public: first for first, public in FIRST_NAMES.items()}
_first_names_wanted: ContextVar[bool] = ContextVar("mongotorch_first_names", default=False)


def stored_name(module: str, qualname: str) -> tuple[str, str]:
    """The module and name that are stored for a class or function.

    Args:
        module: Its `__module__`.
        qualname: Its `__qualname__`.

    Returns:
        Those of its public name where it is mongotorch's own and public, else both as they are.
    """
    if not module.startswith(f"{PACKAGE}."):
        return module, qualname
    top = qualname.partition(".")[0]
    home = _home(module, top)
    if _first_names_wanted.get() and (first := _FIRST_OF.get(f"{home}.{top}")):
        home = first.rpartition(".")[0]
    return home, qualname


def current_name(name: str) -> str:
    """The name by which today's mongotorch knows what any release stored under a dotted name."""
    if not name.startswith(f"{PACKAGE}."):
        return name
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        public = FIRST_NAMES.get(".".join(parts[:length]))
        if public is not None:
            return ".".join([public, *parts[length:]])
    return name


@contextlib.contextmanager
def first_names() -> Iterator[None]:
    """Inside, in this thread, `stored_name` gives the names that the first releases stored; for digests."""
    before = _first_names_wanted.set(True)
    try:
        yield
    finally:
        _first_names_wanted.reset(before)


def _home(module: str, top: str) -> str:
    """The public module that offers a top-level name of a module; that module where none does."""
    own = getattr(sys.modules.get(module), top, None)
    if own is not None:
        for home in (PACKAGE, *PUBLIC_MODULES):
            inside = home == PACKAGE or module.startswith(f"{home}.")
            if inside and getattr(importlib.import_module(home), top, None) is own:
                return home
    return module

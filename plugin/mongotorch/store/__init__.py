"""mongotorch's own records in the database: blobs, components, aliases, jobs, checkpoints, metrics, schedules.

Every method that asks the database also raises what `mongotorch.mongo.driver_errors.driver_errors` makes of
driver errors: ServerUnavailableError, SettingError (for rights), CodecError and StoreError.
"""

from mongotorch.store.aliases import LIVE, Aliases, Move, current_user, follow_alias
from mongotorch.store.blobs import BlobStore
from mongotorch.store.bundle_file import BundleFile, to_bson, write_bundle
from mongotorch.store.checkpoints import OVER, Checkpoints
from mongotorch.store.components import Components
from mongotorch.store.jobs import Jobs, plain
from mongotorch.store.listing import Listing
from mongotorch.store.maintenance import Collected, GarbageCollector, Verified, Verifier
from mongotorch.store.metrics import MetricEntry, MetricLog
from mongotorch.store.run_events import MirrorPositions, RunEvent, RunLog
from mongotorch.store.schedules import Schedules
from mongotorch.store.signing import Trust, trust_of

__all__ = [
    "LIVE",
    "OVER",
    "Aliases",
    "BlobStore",
    "BundleFile",
    "Checkpoints",
    "Collected",
    "Components",
    "GarbageCollector",
    "Jobs",
    "Listing",
    "MetricEntry",
    "MetricLog",
    "MirrorPositions",
    "Move",
    "RunEvent",
    "RunLog",
    "Schedules",
    "Trust",
    "Verified",
    "Verifier",
    "current_user",
    "follow_alias",
    "plain",
    "to_bson",
    "trust_of",
    "write_bundle",
]

"""Reads the settings of a datalayer from code and environment, when asked and never at import.

The field `uri` is the variable `MONGOTORCH_URI`, and so on; what is given in code wins over the environment.

Guarantees: neither the password of the URI nor a key shows in `repr`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from mongotorch.errors import SettingError


class Settings(BaseSettings):
    """The settings of one datalayer.

    Attributes:
        uri: The address of the database; None is that in `uri_file`, else the embedded server.
        uri_file: A file whose first line is the address: a secret of Docker, Kubernetes or systemd.
        embedded_path: Folder of the embedded server, which is used when there is no URI.
        mongod: The program that the embedded server runs; None is that of the extra `server`, else the `mongod` on
            `PATH`.
        cache_dir: Folder for the memory-mapped columns of `download=True`.
        compute: The compute engine: `local` runs in the calling process, `queue` leaves it to workers. The name of
            a launcher, such as `ray`, is `local` with that launcher.
        launcher: What starts the ranks of a run with several `workers`: `torchrun` on this machine, `ray` on the
            nodes of a cluster. None is `torchrun`, where there are several.
        prefetch_bytes: Most bytes that a stream may read ahead.
        worker_niceness: What is added to the niceness of the processes that read ahead for `num_workers`, 0 to 19:
            with fewer cores than processes they give way to the training, which leaves its core to them when it
            waits. Processes that build samples are as they are started.
        valid_fraction: Share of inserted documents that go to the `valid` fold.
        server_timeout_s: Seconds to look for a server before giving up.
        read_deadline_s: Seconds for which a failed read, or the publication of a trained model, is retried before
            giving up.
        lease_s: Seconds without a heartbeat after which another worker takes a run over.
        max_runtime_s: Seconds that one attempt of a run may take; None is no limit. A run that takes longer fails.
        keep_jobs_days: Days for which `gc` keeps jobs that ended, with what they measured; None is for ever.
            Those of versions that are still there stay in any case.
        stop_grace_s: Seconds that a worker's run has to stop by itself, when the worker is told to stop or the job
            was cancelled, before its process is killed.
        checkpoint_seconds: Seconds between checkpoints of a run, besides the one at each validation.
        lineage: Read the documents of a run once before its first step, and store with the version which they are;
            False stores the query only.
        signing_key: Keys for signatures, `[hmac:]SECRET` or `ed25519:…`; the first signs, all verify.
        signing_key_file: A file of such keys, one a line.
        trust: `signed` refuses components that no accepted key has signed; `any` takes them.
        webhook_secret: The key by which `mongotorch mirror --to webhook:URL` signs its requests.
        progress: Show progress bars; None shows them on a terminal and in a notebook only.
    """

    model_config = SettingsConfigDict(env_prefix="MONGOTORCH_", frozen=True, extra="forbid")

    uri: str | None = Field(default=None, min_length=1, repr=False)
    uri_file: Path | None = None
    embedded_path: Path = Path(".mongotorch/db")
    mongod: Path | None = None
    cache_dir: Path = Path(".mongotorch/cache")
    compute: str = "local"
    launcher: str | None = Field(default=None, min_length=1)
    prefetch_bytes: int = Field(default=256 * 2**20, gt=0)
    worker_niceness: int = Field(default=10, ge=0, le=19)
    valid_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    server_timeout_s: float = Field(default=10.0, gt=0)
    read_deadline_s: float = Field(default=60.0, gt=0)
    lease_s: float = Field(default=30.0, gt=0)
    max_runtime_s: float | None = Field(default=None, gt=0)
    keep_jobs_days: float | None = Field(default=None, ge=0)
    stop_grace_s: float = Field(default=20.0, ge=0)
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    lineage: bool = True
    signing_key: SecretStr | None = None
    signing_key_file: Path | None = None
    trust: Literal["any", "signed"] = "any"
    webhook_secret: SecretStr | None = None
    progress: bool | None = None

    def address(self) -> str:
        """The address to open: `uri`, else what `uri_file` holds, else that of the embedded server.

        Raises:
            SettingError: The file cannot be read, or holds no address.
        """
        if self.uri is not None:
            return self.uri
        if self.uri_file is None:
            return f"embedded:{self.embedded_path}"
        try:
            first = self.uri_file.read_text(encoding="utf-8").strip().partition("\n")[0].strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise SettingError(
                f"uri_file {str(self.uri_file)!r} cannot be read: {why}", setting="uri_file"
            ) from None
        if not first:
            raise SettingError(f"uri_file {str(self.uri_file)!r} is empty", setting="uri_file")
        return first


def read_settings(**given: Any) -> Settings:
    """The settings given, else those of the environment, else the defaults.

    Raises:
        SettingError: A name that does not exist, or a value that cannot be used; `setting` names it.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise SettingError(f"setting {name!r}: {first['msg']}", setting=name) from None

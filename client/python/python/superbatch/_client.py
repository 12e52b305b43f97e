"""Connections, which open runs.

Calls block with the GIL released, and Ctrl-C ends them at once. Those with an async twin can be
awaited too.
"""

from __future__ import annotations

import os

from . import _superbatch
from ._arguments import path, seconds, secret, text, whole, wrong
from ._calls import awaited
from ._record import Record, record
from ._run import Run
from ._spec import RunSpec


def connect(
    uri: str,
    *,
    timeout: float = 10.0,
    retry_attempts: int = 16,
    retry_seconds: float = 120.0,
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    server_name: str | None = None,
    allow_insecure: bool = False,
) -> Client:
    """Connects to a service, such as "http://127.0.0.1:50051". If there is none, it waits for one,
    as while a coordinator restarts, and raises `Unavailable` after `timeout`.

    If the service requires them, such as at "https://superbatch.example:50051"
    (docs/security.md):

    ca: PEM file of the authority of the service's certificate. By default those that the system
    trusts.
    cert, key: PEM files of this client's own certificate and key.
    token: what the operator gave you, or `token_file`, which holds it and may change.
    server_name: the name in the service's certificate, if it is not the host of `uri`.
    allow_insecure: sends the token to another machine without TLS, so that all networks between can
    read it.

    Missing values are taken from the environment: SUPERBATCH_CA, SUPERBATCH_CERT, SUPERBATCH_KEY,
    SUPERBATCH_TOKEN, SUPERBATCH_TOKEN_FILE, SUPERBATCH_SERVER_NAME.

    timeout: seconds in which a service that is not there may come. Also those for one attempt to
    connect, of which the last one may begin at the end of these.
    retry_attempts, retry_seconds: how often and how long faults that pass are tried again, once
    connected. A service that
        falls silent is asked for a sign of life after `retry_seconds`, but at least 5 and at most
        20, and has as long to give it; calls to it end within that of `retry_seconds`. One that
        gives it may take as long as it needs to answer.
    """
    text("uri", uri, "write it as http://HOST:PORT or https://HOST:PORT")
    attempts = whole("retry_attempts", retry_attempts, bits=32)
    timeout, retry_seconds = seconds("timeout", timeout), seconds("retry_seconds", retry_seconds)
    files = {"ca": ca, "cert": cert, "key": key, "token_file": token_file}
    shown = {name: path(name, file) for name, file in files.items() if file is not None}
    if token is not None:
        shown["token"] = secret("token", token)
    if server_name is not None:
        shown["server_name"] = text("server_name", server_name, "give a host's name")
    if allow_insecure:
        shown["allow_insecure"] = "true"
    return Client(_superbatch.connect(uri, timeout, attempts, retry_seconds, shown).wait())


RUN_ID = "give a run's id, a string"


class Client:
    """A connection to a service. Made by `connect`, in the process that uses it."""

    def __init__(self, client: _superbatch.Client) -> None:
        self._client = client

    def open_run(self, spec: RunSpec, *, incarnation: str = "") -> Run:
        """Opens a run, or joins it: the same id with the same spec is the same run.

        incarnation: names this start of the trainer, the same on all ranks
        (`superbatch.torch.incarnation()` makes one). Needed where a restarted trainer may come with
        another world size.
        """
        return Run(self._opening(spec, incarnation).wait())

    async def open_run_async(self, spec: RunSpec, *, incarnation: str = "") -> Run:
        """`open_run`, in asyncio."""
        return Run(await awaited(self._opening(spec, incarnation)))

    def _opening(self, spec: RunSpec, incarnation: str) -> _superbatch.Call:
        if not isinstance(spec, RunSpec):
            raise wrong("spec", spec, "give superbatch.RunSpec(run_id=..., ...)")
        text("incarnation", incarnation, "give a string, the same on all ranks")
        return self._client.open_run(spec.run_id, spec.to_dict(), incarnation)

    def get_run(self, run_id: str) -> Record:
        """What is known about a run, without joining it: state, spec, cursors, accounts."""
        return record(self._client.get_run(text("run_id", run_id, RUN_ID)).wait())

    def close_run(self, run_id: str) -> None:
        """Ends a run for all ranks, without joining it: no further steps or pushes. Its receipts
        stay.

        Close runs that are finished: until then the service holds steps ready for them, and lists
        them as open.
        """
        self._client.close_run(text("run_id", run_id, RUN_ID)).wait()

    def list_runs(self) -> list[Record]:
        """All runs that the service knows."""
        return record(self._client.list_runs().wait())

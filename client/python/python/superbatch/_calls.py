"""Waiting for calls of the extension module."""

from __future__ import annotations

import asyncio
from typing import Any

from . import _superbatch


async def awaited(call: _superbatch.Call) -> Any:
    """Waits for a call in asyncio. Whatever ends the wait early, such as a time-out, cancels the
    call.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def wake() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish)

    call.on_done(wake)
    try:
        await done
    except BaseException:
        call.cancel()
        raise
    return call.result()

"""Direct delivery where all speak TLS: trainers reach workers by addresses that no certificate
names, show a certificate of their own, and need no token beside their ticket.
"""

from contextlib import ExitStack

import pytest
from secured import Secured, authority, folder  # noqa: F401
from test_delivery import RANKS, opened_by, pool, rows  # noqa: F401


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mtls"])
def test_tickets_lead_over_tls(folder, authority, pool, mutual):
    place = folder / ("mutual" if mutual else "plain")
    place.mkdir()
    wanted = {"client_ca": str(authority.ca)} if mutual else {}
    shown = {}
    if mutual:
        cert, key = authority.sign("trainer", "extendedKeyUsage=clientAuth")
        shown = {"cert": cert, "key": key}
    with ExitStack() as stack:
        service = Secured(stack, place, authority, **wanted)
        client = service.connect(**shown)
        through, direct = (
            opened_by(client, pool, delivery, prefix="team-a-")
            for delivery in ("coordinator", "direct")
        )
        columns = ("_superbatch_id", "caption", "image")
        expected = [rows(through, step, *columns) for step in range(2)]
        assert [rows(direct, step, *columns) for step in range(2)] == expected
        assert "superbatch_direct_fallbacks_total{" not in service.metrics("admin")
        assert service.worker.metric("superbatch_direct_bytes_total") > 0
        # A ticket is counted after the last of its rows is sent.
        service.worker.wait_for("superbatch_tickets_total", lambda count: count == 2 * RANKS)

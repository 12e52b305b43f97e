"""What tests of refusals share."""

import pytest
import superbatch
from test_end_to_end import reason, service  # noqa: F401


def refused(ask, wanted: str, says: str = "", **metadata: str) -> superbatch.Error:
    """`ask` fails for this reason; the message holds `says`, and the metadata these values."""
    with pytest.raises(superbatch.Error) as caught:
        ask()
    error = caught.value
    assert reason(caught) == wanted, error
    assert says in str(error), error
    assert metadata.items() <= error.metadata.items(), error.metadata
    return error


def opening(service, asked: superbatch.RunSpec):
    return lambda: superbatch.connect(service.address).open_run(asked)

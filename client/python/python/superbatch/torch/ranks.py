"""What the ranks of a trainer agree on."""

from __future__ import annotations

import uuid
from typing import Any

import torch.distributed


def incarnation(group: Any = None) -> str:
    """A new id for this start of the trainer, agreed on by all ranks of the initialised process
    group.

    Without a process group it is this process's own.
    """
    agreed = [uuid.uuid4().hex]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0, group=group)
    return agreed[0]

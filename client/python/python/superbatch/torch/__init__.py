"""What trainers in PyTorch repeat.

`SelectedBatches` stands where a data set and its `DataLoader` stood, `ImageText` decodes and
tokenizes for it, `Pushes` and `state_dict` hand weights back. `superbatch.torch.transformers` and
`superbatch.torch.lightning` hold callbacks for those trainers.
"""

from .loader import WORKER_NEED_AFTER, WORKERS_MAX, SelectedBatches
from .pushes import Pushes, state_dict
from .ranks import incarnation
from .transform import ImageText

__all__ = [
    "WORKERS_MAX",
    "WORKER_NEED_AFTER",
    "ImageText",
    "Pushes",
    "SelectedBatches",
    "incarnation",
    "state_dict",
]

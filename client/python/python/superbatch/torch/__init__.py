"""What trainers in PyTorch repeat.

`SelectedBatches` replaces a data set and its `DataLoader`, `ImageText` decodes and
tokenizes for it, `by_fidelity` and `two_fidelities` train a batch at two fidelities,
`export_module` writes a folder of any dual encoder, `export_losses` one of a model that gives a
loss an example, `sigmoid_loss` and `softmax_loss` span all
ranks (and `gather` lets one of your own do so), `Pushes` and `state_dict` hand weights back.
`superbatch.torch.transformers` and `superbatch.torch.lightning` hold callbacks for those trainers.
"""

from .exported import export_module
from .exported_losses import export_losses
from .fidelities import (
    TwoFidelities,
    TwoResolutions,
    by_fidelity,
    two_fidelities,
    two_resolutions,
)
from .loader import WORKER_NEED_AFTER, WORKERS_MAX, SelectedBatches
from .losses import sigmoid_loss, softmax_loss
from .pushes import Pushes, state_dict
from .ranks import gather, incarnation
from .transform import ImageText

__all__ = [
    "WORKERS_MAX",
    "WORKER_NEED_AFTER",
    "ImageText",
    "Pushes",
    "SelectedBatches",
    "TwoFidelities",
    "TwoResolutions",
    "by_fidelity",
    "export_losses",
    "export_module",
    "gather",
    "incarnation",
    "sigmoid_loss",
    "softmax_loss",
    "state_dict",
    "two_fidelities",
    "two_resolutions",
]

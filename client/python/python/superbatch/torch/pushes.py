"""A trainer's weights on their way to the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import _weights
from .._errors import invalid
from .._run import Run


def state_dict(model: Any, *, prefix: str = "") -> dict[str, Any]:
    """The weights of a model under the names that it has alone, whatever is wrapped around it.

    model: a module, or a module in DistributedDataParallel, FSDP, `torch.compile`, activation
        checkpointing, `AveragedModel` of torch or `ModelEma` of timm, and in several of them. Under
        FSDP 2 each rank has its shards; under FSDP 1 all ranks must call this, as all must call
        `model.state_dict()`.
    prefix: of the part to take, such as "model." for `self.model` of a LightningModule; the rest is
        left out.
    """
    named = {_weights.clean(name): value for name, value in model.state_dict().items()}
    part = {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }
    if named and not part:
        raise invalid(
            "prefix",
            f"no tensor of the model begins with {prefix!r}; one of them is {next(iter(named))}",
        )
    return part


class Pushes:
    """Pushes a learner's weights when its run wants them: before the first step, and after every
    `push_every_steps`.

    run: from `open_run`, in the trainer's own process. Where its spec has no learner, nothing is
        pushed.
    model: what is trained, or its moving average where that is to choose; or a function that
        returns a state dict.
    prefix: as in `state_dict`. rank, dtype: as in `Run.push_weights`.
    """

    def __init__(
        self,
        run: Run,
        model: Any | Callable[[], Mapping[str, Any]],
        *,
        prefix: str = "",
        rank: int | None = None,
        dtype: Any = None,
    ) -> None:
        self.run = run
        self.model = model
        self.prefix = prefix
        self.rank = rank
        self.dtype = dtype
        self._begun = False

    def before(self, start_step: int) -> None:
        """Call it before the first batch; further calls do nothing. Pushes what `start_step` begins
        with.

        At step 0 these are the initial weights, if the run waits for them (`first_push=True`).
        Later they are the checkpoint's, as each push that was on its way when the trainer ended
        (`Run.missing_pushes`): under `exact(1)` there may be two. If none was, this changes
        nothing.
        """
        if self._begun:
            return
        if start_step > 0 and self.wanted:
            for step in self.run.missing_pushes(start_step):
                if step < start_step - 1:
                    self._push(step)
            self.after(start_step - 1)
        elif self.wanted and (self.run.spec.learner.get("first_push") or False):
            self._push(-1)
        self._begun = True

    def after(self, step: int) -> None:
        """Call it after the optimizer's update of a step. Steps at which no push is due are passed
        over.
        """
        if self.wanted and (step + 1) % (self.run.spec.get("push_every_steps") or 1) == 0:
            self._push(step)

    def flush(self) -> None:
        """Waits until every push is published. Call it before the process ends."""
        self.run.flush()

    @property
    def wanted(self) -> bool:
        """Whether the run looks at a learner at all."""
        return self.run.spec.get("learner") is not None

    def _push(self, step: int) -> None:
        whole = callable(getattr(self.model, "state_dict", None))
        weights = state_dict(self.model, prefix=self.prefix) if whole else self.model()
        self.run.push_weights(weights, step=step, rank=self.rank, dtype=self.dtype)

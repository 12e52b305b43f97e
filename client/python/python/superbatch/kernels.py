"""Joint selection in your own loop, without a service: the package `superbatch_kernels` under this
name.

    from superbatch.kernels import Model, select

    drawn = select(learner=Model(images, texts, scale, bias), reference=..., sub_batch_size=1024,
    step=step)

It is a distribution of its own, so that a trainer that uses the service carries no selection code.
`help(select)` explains every argument; docs/kernels-python.md has a training loop.
"""

try:
    from superbatch_kernels import Criterion, Loss, Model, Policy, Selection, select
except ModuleNotFoundError as error:
    if error.name != "superbatch_kernels":
        raise
    raise ImportError(
        "superbatch.kernels needs the package superbatch-kernels: in a checkout `make wheel`, then "
        "pip install target/wheels/superbatch_kernels-*.whl (where an index has both, pip "
        "install 'superbatch[kernels]')",
        name="superbatch_kernels",
    ) from error

__all__ = ["Criterion", "Loss", "Model", "Policy", "Selection", "select"]

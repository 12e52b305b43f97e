"""Joint example selection (JEST) inside your own training loop: embeddings in, indices of the
sub-batch out.

    from superbatch_kernels import Model, select

    drawn = select(
        learner=Model(images, texts, scale, bias),              # float32 or float16, [B, d], rows
        L2-normalised reference=Model(ref_images, ref_texts, ref_scale, ref_bias),
        sub_batch_size=len(images) // 5,                        # the paper leaves four of five out
        seed=0, step=step,
    )
    images[drawn.indices], texts[drawn.indices]                 # train on these

The method is Algorithm 1 of Evans et al. 2024, arXiv 2406.17711. Arrays are read where they lie
(`help(select)` says what memory a call takes), and other Python threads run meanwhile. No service,
no PyTorch and no GPU are needed.
"""

from ._kernels import __version__
from ._select import select
from ._types import Criterion, Loss, Model, Policy, Selection

__all__ = ["Criterion", "Loss", "Model", "Policy", "Selection", "__version__", "select"]

"""Other people's arrays as NumPy sees them: the same memory, never a copy. Errors name the argument
and say what to do.
"""

import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

CPU, PINNED = 1, 3
"""DLPack's numbers of the devices whose memory the processor reads."""
ROWS_LOOKED_AT = 32


def embeddings(name: str, given: Any) -> NDArray[Any]:
    """A tower, `[B, d]`.

    Raises TypeError or ValueError if it is not float32 or float16, not in CPU memory, not
    two-dimensional or not C-contiguous.
    """
    array = shared(name, given)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} has the shape {array.shape}: [candidates, dim] is needed, neither of them 0"
        )
    if array.dtype not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise TypeError(
            f"{name} is {array.dtype}: float32 or float16 in this machine's byte order is needed; "
            f"pass {name}.astype(numpy.float32) (torch: .float()), which copies"
        )
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{name} of shape {array.shape} is not C-contiguous (strides of {array.strides} "
            f"bytes), and rows are read where they lie: pass numpy.ascontiguousarray({name}) "
            "(torch: .contiguous()), which copies"
        )
    if not array.flags.aligned:
        raise ValueError(
            f"{name} starts at an address that is no multiple of {array.itemsize}: pass "
            f"{name}.copy()"
        )
    return array


def shared(name: str, given: Any) -> NDArray[Any]:
    """`given` as a NumPy array over the same memory."""
    if "bfloat16" in str(getattr(given, "dtype", "")):
        raise TypeError(
            f"{name} is bfloat16, whose rounding changes one draw in six at a scale of 100, "
            "float16's of the same size next to none: normalise in float32 and pass that or "
            "float16 (torch: .float() or .half())"
        )
    _refuse_masked(name, given)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        return _of_torch(name, given)
    if isinstance(given, np.ndarray):
        return given
    if hasattr(given, "__dlpack__"):
        device, _ = given.__dlpack_device__()
        if device not in (CPU, PINNED):
            raise ValueError(
                f"{name} is not in CPU memory (DLPack device {device}): copy it to the CPU first"
            )
        return np.from_dlpack(given)
    try:
        return np.asarray(memoryview(given))
    except TypeError:
        kind = type(given).__name__
        raise TypeError(
            f"{name} is a {kind}: a NumPy array or a CPU torch tensor of [candidates, dim] is "
            "needed"
        ) from None


def _refuse_masked(name: str, given: Any) -> None:
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and masks are not read: pass {name}.data, and masked rows "
            "as holes"
        )


def _of_torch(name: str, tensor: Any) -> NDArray[Any]:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is a torch tensor on {tensor.device}, and CPU memory is read: pass "
            f"{name}.cpu()"
        )
    if str(tensor.layout) != "torch.strided":
        raise ValueError(
            f"{name} is a torch tensor of layout {tensor.layout}: pass {name}.to_dense()"
        )
    return tensor.detach().numpy()


def some_of(count: int, holes: NDArray[np.uint32]) -> NDArray[np.int64]:
    """A few candidates, evenly spread over those that are no holes."""
    offered = np.ones(count, np.bool_)
    offered[holes] = False
    left = np.flatnonzero(offered)
    return left[:: max(1, len(left) // ROWS_LOOKED_AT)]


def warn_unless_normalised(name: str, rows: NDArray[Any], looked_at: NDArray[np.int64]) -> None:
    """Looks at a few rows, so that forgotten normalisation does not go on unseen."""
    some = rows[looked_at].astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", some, some))
    looked_at, norms = looked_at[np.isfinite(norms)], norms[np.isfinite(norms)]
    median = float(np.median(norms)) if len(norms) else 1.0
    if abs(median - 1.0) > 0.05:
        worst = np.abs(norms - 1.0).argmax()
        warnings.warn(
            f"{name}: rows are not L2-normalised (median norm {median:.3g}, candidate "
            f"{looked_at[worst]} has "
            f"{norms[worst]:.3g}), so logits are not scale * cosine + bias",
            stacklevel=3,
        )


def holes(given: Any, count: int) -> NDArray[np.uint32]:
    """Candidates that may not be chosen, from their indices or from a mask."""
    _refuse_masked("holes", given)
    array = np.asarray(() if given is None else given)
    if array.dtype == np.bool_:
        if array.shape != (count,):
            raise ValueError(
                f"holes is a mask of shape {array.shape}: one of shape ({count},) is needed"
            )
        array = np.flatnonzero(array)
    array = _whole_numbers("holes", array)
    if array.size and (array.min() < 0 or array.max() >= count):
        wrong = array[(array < 0) | (array >= count)][0]
        raise ValueError(f"holes names candidate {wrong}: there are {count}, numbered from 0")
    return np.ascontiguousarray(array, np.uint32)


def keys(given: Any) -> NDArray[np.uint64]:
    """What each candidate's noise depends on, beside seed, generation, step and chunk."""
    _refuse_masked("keys", given)
    array = _whole_numbers("keys", np.asarray(given))
    if array.size and array.min() < 0:
        raise ValueError(f"keys holds {array.min()}: keys are at least 0")
    rising = np.sort(array)
    shared_keys = np.unique(rising[1:][rising[1:] == rising[:-1]])
    if shared_keys.size:
        warnings.warn(
            f"keys: several candidates have the key {shared_keys[0]} "
            f"({shared_keys.size} such keys), and with it the same noise; give each its own",
            stacklevel=3,
        )
    return np.ascontiguousarray(array, np.uint64)


def noise(given: Any) -> NDArray[np.float32]:
    """Given noise, `[draws or more, B]`."""
    array = shared("noise", given)
    if array.dtype.kind != "f":
        raise TypeError(f"noise is {array.dtype}: float32 is needed")
    if array.ndim != 2:
        raise ValueError(
            f"noise has the shape {array.shape}: [draws or more, candidates] is needed, a row for "
            "every chunk"
        )
    return np.ascontiguousarray(array, np.float32)


def _whole_numbers(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim != 1 or array.dtype.kind not in "iu" and array.size:
        raise TypeError(
            f"{name} is {array.dtype} of shape {array.shape}: one-dimensional integers are needed"
        )
    return array

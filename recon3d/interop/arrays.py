"""Arrays of other libraries as torch tensors and back, sharing memory where they can."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

__all__ = ["as_given", "to_torch"]


def to_torch(array: Any) -> Tensor:
    """The array as a tensor on the device where it lies.

    Memory is shared with torch tensors, numpy arrays (a copy where they are read-only or run backwards), and arrays
    that speak DLPack or __cuda_array_interface__; lists and numbers are copied.

    Raises:
        TypeError: something that is no array of numbers.

    >>> to_torch([1.0, 2.0]).dtype
    torch.float64
    """
    if isinstance(array, Tensor):
        return array
    if not isinstance(array, np.ndarray):
        if hasattr(array, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(array)
        if hasattr(array, "__cuda_array_interface__"):
            return torch.as_tensor(array, device="cuda")
        array = np.asarray(array)
    if array.dtype.kind not in "fciub":
        raise TypeError(f"to_torch: an array of numbers is needed, got dtype {array.dtype}")
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    forward = all(s >= 0 for s in native.strides)
    return torch.from_numpy(native if forward and native.flags.writeable else native.copy())


def as_given(result: Tensor, given: Any) -> Any:
    """The result as the kind of array that was given: numpy for numpy and lists, cupy for cupy, else a tensor.

    >>> type(as_given(torch.ones(2), [1.0])).__name__
    'ndarray'
    """
    if isinstance(given, Tensor):
        return result
    if type(given).__module__.split(".")[0] == "cupy":
        return sys.modules["cupy"].from_dlpack(result.detach().contiguous())
    if isinstance(given, np.ndarray) or not hasattr(given, "__dlpack__"):
        return result.detach().resolve_conj().cpu().numpy()
    return result

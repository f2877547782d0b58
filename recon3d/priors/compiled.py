"""A network compiled by torch for the shapes it meets, and on a GPU replayed as one CUDA graph.

The compiler joins norms, activations and sums into few kernels; the graph starts all kernels of a call at once. Both
want fixed shapes, which the engine's batches have. Choices that would change how a sum is rounded from one process to
the next are switched off, so a resumed run goes on with the same bits.

On a CPU it did not pay: the compiler takes minutes, and its code was no faster than the network as it is.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.priors.networks import Network

__all__ = ["CompiledNetwork", "compiles"]

Compile = Literal["auto", "on", "off"]
# calls before a graph is recorded: the first compiles, the next ones let libraries choose their kernels
_WARMUP = 3
# sizes of image whose graphs are kept
_SIZES = 4


def compiles(device: torch.device, wish: Compile) -> bool:
    """Whether networks on a device are compiled: auto says yes on CUDA.

    >>> compiles(torch.device("cpu"), "auto"), compiles(torch.device("cpu"), "on")
    (False, True)
    """
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"compile must be auto, on or off, got {wish!r}")
    return wish == "on" or (wish == "auto" and device.type == "cuda")


class CompiledNetwork:
    """Calls a network's compiled form; answers as the network does, but for rounding, and records no gradients.

    A graph is kept for each size of image (planes of a volume have up to three), all in one part of the memory; another
    batch of the same size takes its place. Safe to call from several threads.

    Args:
        net: frozen, on its device. fall_back: where the compiler cannot be used, warn and go on with the network as it
            is, instead of raising what it said.
    """

    def __init__(self, net: Network, fall_back: bool = False) -> None:
        self._net = net
        self._call: Any = None
        self._fall_back = fall_back
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        # one mode whatever the caller's, since each would be compiled on its own
        with torch.inference_mode():
            if self._call is None:
                self._compile(x, t)
            if self._call is self._net or not x.is_cuda:
                out: Tensor = self._call(x, t)
                return out
            with self._lock:
                return self._recorded(x, t)(x, t)

    def _recorded(self, x: Tensor, t: Tensor) -> _Graph:
        key = tuple(x.shape)
        if key not in self._graphs:
            # their memory makes room for the next one's: batches are halved when it runs out
            others = {k: graph for k, graph in self._graphs.items() if k[1:] != key[1:]}
            self._graphs = others if len(others) < _SIZES else {}
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self._call, x, t, self._pool)
        return self._graphs[key]

    def _compile(self, x: Tensor, t: Tensor) -> None:
        """Once; a network that cannot be compiled takes the place of its compiled form."""
        with self._lock:
            if self._call is not None:
                return
            call: Any = self._net
            try:
                # not before a call wants it, for the compiler takes seconds to import
                call = torch.compile(self._net, dynamic=False, options={"deterministic": True})
                call(x, t)
            except (RuntimeError, ImportError, OSError) as error:
                if isinstance(error, torch.OutOfMemoryError) or not self._fall_back:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"the network is not compiled and runs as it is: {reason}", stacklevel=4)
                call = self._net
            self._call = call


class _Graph:
    """All kernels of one call, recorded; inputs and answer have places of their own.

    Graphs may share a pool of memory, for each is replayed to its end and its answer copied before the next.
    """

    def __init__(self, call: Any, x: Tensor, t: Tensor, pool: Any) -> None:
        self._x, self._t = x.clone(memory_format=torch.channels_last), t.clone()
        before, beside = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        beside.wait_stream(before)
        with torch.cuda.stream(beside):
            for _ in range(_WARMUP):
                call(self._x, self._t)
        before.wait_stream(beside)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device), torch.cuda.graph(self._recorded, pool=pool):
            self._out: Tensor = call(self._x, self._t)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        self._recorded.replay()
        # the next call writes over the answer's place
        return self._out.clone()

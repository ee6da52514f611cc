"""Makes a GPU ready for torch, which uses the primary context that its driver library keeps for a process, whoever asks for it first.

CUDA Driver API, Primary Context Management. It takes 0.3 s in C that lets other threads run: as long as a part of importing torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

DRIVER = "libcuda.so.1"


def wake_gpu() -> None:
    """The first GPU that this process may use. Nothing where torch has no use for one, or something fails: torch tells later what it is."""
    if not _torch_computes_there():
        return
    import ctypes

    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _torch_computes_there() -> bool:
    """Without importing it: a torch for CPUs would never use the memory that a context takes."""
    torch = find_spec("torch")
    folders = torch.submodule_search_locations if torch is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())

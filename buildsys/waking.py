"""Makes a GPU ready for torch, which uses the primary context that its driver library keeps for a process, whoever asks for it first.

CUDA Driver API, Primary Context Management. It takes 0.3 s in C that lets other threads run: as long as a part of importing torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

DRIVER = "libcuda.so.1"


def wake_gpu() -> bool:
    """The first GPU that this process may use; whether there is one. Where torch has no use for it, or something fails, nothing happens:
    torch tells later what it is."""
    if not _torch_computes_there():
        return False
    import ctypes

    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return False
    return bool(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0)


def wake_triton() -> None:
    """Its names for what it has compiled hold a digest of its own files: a quarter of a second that lets other threads run. After torch was
    imported, since each of the two may import the other."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # there is none, or one that keeps it elsewhere and is asked with its first kernel
        return
    triton_key()


def _torch_computes_there() -> bool:
    """Without importing it: a torch for CPUs would never use the memory that a context takes."""
    torch = find_spec("torch")
    folders = torch.submodule_search_locations if torch is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())

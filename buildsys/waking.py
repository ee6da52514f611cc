"""Makes a GPU, and Triton, ready while torch is imported: what they take their time for lets other threads run.

torch uses the primary context that the driver library keeps for a process, whoever asks for it first (CUDA Driver API, Primary Context
Management): 0.3 s.
"""

from __future__ import annotations

from importlib import import_module
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
    """Its names for what it has compiled hold a digest of its own files: a quarter of a second that lets other threads run. It imports no
    torch, and torch none of it, so that both may be imported at a time."""
    for place in ("triton.runtime.cache", "triton.compiler.compiler"):  # since 3.5, and before
        try:
            key = getattr(import_module(place), "triton_key", None)
        except ImportError:  # there is none
            return
        if key is not None:
            key()
            return


def _torch_computes_there() -> bool:
    """Without importing it: a torch for CPUs would never use the memory that a context takes."""
    torch = find_spec("torch")
    folders = torch.submodule_search_locations if torch is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())

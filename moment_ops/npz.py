"""Moments files: `.npz` archives that numpy opens without pickle, and the `mu`/`sigma` files of the FID tools."""

import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

FORMAT = "moment_ops.Moments 1"


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as an array. numpy has no bfloat16; float32 holds its values exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a moments file, whole or not at all. A file that `write` did not write is not overwritten."""
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} exists and was not written by Moments.save; it is not overwritten")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, format=np.array(FORMAT), **arrays)  # type: ignore[arg-type]
        # Temporary files can be read by their owner only; this one gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a moments file. Raises ValueError for any other file."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it is an archive of other files than arrays")
        if not ({"mu", "sigma"} <= arrays.keys() or str(arrays.get("format")) == FORMAT):
            raise ValueError(f"it holds {sorted(arrays)}")
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        # For other files numpy's message advises to unpickle them.
        reason = "it is not an .npz archive of arrays" if "pickle" in str(error) else error
        raise ValueError(
            f"{path} is not a moments file: {reason}; expected a file of Moments.save, or one with mu and sigma"
        ) from None
    return arrays


def _is_ours(path: Path) -> bool:
    try:
        return "format" in read(path)
    except ValueError:
        return False

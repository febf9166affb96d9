"""PyTorch archives as bytes, written with Python's own pickle and zipfile, independent of ours."""

from __future__ import annotations

import collections
import io
import pickle
import sys
import zipfile
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

KINDS = {
    np.dtype("f4"): "FloatStorage",
    np.dtype("f8"): "DoubleStorage",
    np.dtype("f2"): "HalfStorage",
    np.dtype("u2"): "BFloat16Storage",  # bfloat16 bits rest in uint16
    np.dtype("i8"): "LongStorage",
    np.dtype("i4"): "IntStorage",
    np.dtype("i2"): "ShortStorage",
    np.dtype("i1"): "CharStorage",
    np.dtype("u1"): "ByteStorage",
    np.dtype("?"): "BoolStorage",
}


class _Storage:
    """Stands for a torch storage while pickling."""

    def __init__(self, kind: type, key: str, size: int) -> None:
        self.reference = ("storage", kind, key, "cpu", size)


class _Tensor:
    """Stands for a torch tensor: pickled as a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any) -> None:
        self.arguments: tuple[Any, ...] = (
            storage,
            offset,
            shape,
            strides,
            False,
            collections.OrderedDict(),
        )

    def __reduce__(self) -> Any:
        return sys.modules["torch._utils"].__dict__["_rebuild_tensor_v2"], self.arguments


class _Pickler(pickle._Pickler):
    """Python's pickler, which can be told what "torch" is without importing it."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None


def pretend_torch() -> dict[str, ModuleType]:
    """Modules with the names that the pickle refers to."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in KINDS.values():
        torch.__dict__[name] = type(name, (), {"__module__": "torch", "__qualname__": name})

    def _rebuild_tensor_v2(*arguments: Any) -> None:
        raise AssertionError("nothing in a pickle is called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils.__dict__["_rebuild_tensor_v2"] = _rebuild_tensor_v2
    return {"torch": torch, "torch._utils": utils}


def torch_file(tensors: Mapping[str, np.ndarray], **options: Any) -> bytes:
    """What torch.save would write for a state dict of these arrays."""
    content: dict[str, Any] = collections.OrderedDict()
    storages: dict[str, np.ndarray] = {}
    modules = pretend_torch()
    for name, array in tensors.items():
        key = str(len(storages))
        flat = array.reshape(-1) if array.flags.c_contiguous else array.T.reshape(-1)
        storages[key] = flat
        kind = modules["torch"].__dict__[KINDS[array.dtype]]
        strides = tuple(step // array.itemsize for step in array.strides)
        content[name] = _Tensor(_Storage(kind, key, flat.size), 0, array.shape, strides)
    return archive(dump(content, modules), storages, **options)


def dump(content: Any, modules: Mapping[str, ModuleType]) -> bytes:
    """Pickle, protocol 2, with stand-ins for torch."""
    missing = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        stream = io.BytesIO()
        _Pickler(stream, protocol=2).dump(content)
        return stream.getvalue()
    finally:
        for name, module in missing.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def archive(
    code: bytes,
    storages: Mapping[str, np.ndarray],
    compression: int = zipfile.ZIP_STORED,
    root: str = "consolidated",
    byteorder: bytes = b"little",
) -> bytes:
    """The zip file around a pickle and its storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", code)
        file.writestr(f"{root}/byteorder", byteorder)
        for key, array in storages.items():
            file.writestr(f"{root}/data/{key}", array.tobytes())
        file.writestr(f"{root}/version", b"3\n")
    return stream.getvalue()

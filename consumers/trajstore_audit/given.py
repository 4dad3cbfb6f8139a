"""Another party's logprobs in a file, read trajectory by trajectory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from trajstore.errors import SchemaError

__all__ = ["GivenLogprobs"]


_FLOATS = ("F16", "F32", "F64")
"""What numpy knows: bfloat16, which it does not, has too few digits for logprobs anyway."""


class GivenLogprobs(Mapping[str, npt.NDArray[np.float32]]):
    """Trajectory id → float32 `[T]`, NaN where there is none, from a safetensors file whose names are the ids.

    Nothing of the file is held: each look opens it.

    Raises:
        SchemaError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: frozenset[str] = frozenset(self._open().keys())

    def __getitem__(self, id: str) -> npt.NDArray[np.float32]:
        if id not in self._ids:
            raise KeyError(id)
        file = self._open()
        if file.get_slice(id).get_dtype() not in _FLOATS:
            raise SchemaError(
                f"{self._path}: the logprobs of {id} are {file.get_slice(id).get_dtype()}; store them as float32"
            )
        found: npt.NDArray[np.float32] = file.get_tensor(id)
        return found

    def __contains__(self, id: object) -> bool:
        return id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="np")
        except (SafetensorError, OSError) as error:
            raise SchemaError(
                f"{self._path} is no safetensors file ({error}); give one tensor of logprobs, float32 [T], per "
                "trajectory, named by its id"
            ) from error

"""Page-locked batches, which a GPU copies from while the CPU goes on."""

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import torch

__all__ = ["pinned"]

T = TypeVar("T")


def pinned(batch: T) -> T:
    """A batch with its tensors in page-locked memory.

    Args:
        batch: a dataclass; what it holds beside tensors stays as it is. Anything else is returned unchanged.
    """
    if not is_dataclass(batch) or isinstance(batch, type):
        return batch
    values = {one.name: getattr(batch, one.name) for one in fields(batch)}
    return replace(batch, **{name: value.pin_memory() for name, value in values.items() if torch.is_tensor(value)})

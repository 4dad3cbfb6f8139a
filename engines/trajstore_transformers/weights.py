"""New weights into a model's own parameters: all of them, or none."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trajstore import SchemaError

__all__ = ["copy_weights"]


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and persistent buffers of the same names, in place.

    Args:
        weights: by the names of `model.state_dict()`. Any device; cast to the parameter's dtype. Of tied parameters one
            name is enough.

    Raises:
        SchemaError: names missing or unexpected, another shape, integers for floats, or tied names with different
            values; nothing was changed.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}  # tied parameters are one object under several names
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [known[0] for known in names.values() if not any(name in weights for name in known)]
    unexpected = [name for name in weights if name not in own]
    if missing or unexpected:
        raise SchemaError(
            f"the weights do not name the parameters of {type(model).__name__}: missing {_brief(missing)}; "
            f"unexpected {_brief(unexpected)}. Use the names of its state_dict()"
        )
    for name, given in weights.items():
        if not isinstance(given, Tensor):
            raise SchemaError(f"weight {name!r} is a {type(given).__name__}, not a tensor")
        if given.shape != own[name].shape or given.is_floating_point() != own[name].is_floating_point():
            raise SchemaError(
                f"weight {name!r} is {given.dtype} {list(given.shape)}, "
                f"the model's is {own[name].dtype} {list(own[name].shape)}"
            )
    for known in names.values():
        first, *others = [name for name in known if name in weights]
        for other in others:
            if not torch.equal(weights[first], weights[other].to(weights[first])):
                raise SchemaError(f"{first!r} and {other!r} are tied in {type(model).__name__}, but not in the weights")
    with torch.no_grad():
        for name, given in weights.items():
            own[name].copy_(given)


def _brief(names: Iterable[str]) -> str:
    shown = list(names)
    rest = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return (", ".join(map(repr, shown[:4])) or "none") + rest

"""What an engine serves so that recorded rollouts can be run again and gone on with, and finding one by its name.

An engine is registered in the entry-point group `trajstore.engines`. What is registered there serves replay if it has
`for_replay`, which makes an engine from a model's folder:

    @classmethod
    def for_replay(cls, folder: Path, *, weight_version: str, dtype: str, seed: int) -> Scorer | Resumer: ...

`dtype` is "auto" (as the folder says) or a name like "bfloat16"; `seed` is of the sampling. What it returns is a
`Scorer`, a `Resumer`, or both. What is registered for a `Resumer` has its `takes`, too, so that a rollout with which it
cannot go on as it began is refused before a model is loaded.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import UNLOADABLE, Conflict, NotFound, SchemaError
from trajstore.routing import RoutingSpec
from trajstore.writing import TrajectoryWriter

__all__ = [
    "Resumer",
    "Scored",
    "Scorer",
    "load_resumer",
    "load_scorer",
    "require_recorded_routing",
    "sampling_taken",
]

_GROUP = "trajstore.engines"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What an engine says of T given tokens. H all hidden layers, L those that route, K experts per token.

    Attributes:
        logprobs: float32 `[T]`, natural log of the probability of each token given those before it; NaN for the first.
        routed_experts: any integers `[R, H, K]` or `[R, L, K]`, the rows from 0 on; R is T, or T - 1 of an engine that
            gives no row for the last token. None: the engine does not tell.
        margins: float32 `[R, H]` or `[R, L]`, by how much the router's logit of the last expert chosen exceeds that of
            the best one left out; NaN where that is not known. None: the engine does not tell.
    """

    logprobs: npt.NDArray[np.float32]
    routed_experts: npt.NDArray[np.integer[Any]] | None = None
    margins: npt.NDArray[np.float32] | None = None


@runtime_checkable
class Scorer(Protocol):
    """An engine that reads given tokens, and says how likely it finds each, and which experts it uses for it.

    It may have a `routing_spec`, the `RoutingSpec` of its model: a trajectory that records another one is refused
    before its tokens are read. Of an engine without one, only the shape of the rows that it gives is checked.

    Attributes:
        name: with its version, e.g. "transformers/5.0".
    """

    @property
    def name(self) -> str: ...

    def score(self, token_ids: npt.NDArray[np.int32], *, temperature: npt.NDArray[np.float32]) -> Scored:
        """Teacher-force these tokens.

        Args:
            token_ids: int32 `[T]`.
            temperature: float32 `[T]`, positive: the logits are divided by it for the token's logprob.

        Raises:
            SchemaError: tokens that the model cannot read, too many of them, or a temperature that the engine cannot
                score at.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@runtime_checkable
class Resumer(Protocol):
    """An engine that goes on with a rollout and records what it generates.

    Attributes:
        name: as of a `Scorer`.
        takes: names of the sampling parameters that it takes beside those that all do, e.g. "top_p".
    """

    @property
    def name(self) -> str: ...

    @property
    def takes(self) -> Collection[str]: ...

    def resume(
        self,
        trajectory: TrajectoryWriter,
        *,
        max_tokens: int,
        temperature: float,
        stop_token_ids: tuple[int, ...],
        ignore_eos: bool,
        further: Mapping[str, Any],
    ) -> str:
        """Open a segment over all tokens so far, generate, record all that comes, and close it.

        However it ends, nothing that was generated is lost: an exception leaves behind it a closed segment.

        Args:
            max_tokens: at most so many new ones.
            temperature: 0 for greedy.
            stop_token_ids: any of these ends the output, and is part of it.
            ignore_eos: the tokens that the model itself names as the end of a text do not.
            further: sampling parameters that the rollout began with, as they were recorded; only such as `takes` names.

        Returns:
            The finish reason: stop, length or abort.

        Raises:
            Conflict: the model's routing is not what the trajectory records, or as `TrajectoryWriter.segment`.
            SchemaError: parameters that the engine cannot sample by; nothing was written.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def load_scorer(
    name: str, folder: str | Path, *, weight_version: str = "", dtype: str = "auto", seed: int = 0
) -> Scorer:
    """An engine that scores, over the model in a folder. Close it after use.

    Args:
        name: in the entry-point group, e.g. "transformers".
        folder: configuration and weights, as the engine loads them from disk; nothing is downloaded.
        weight_version, dtype, seed: see the module.

    Raises:
        NotFound: no such engine or folder.
        SchemaError: the engine cannot be loaded here, cannot do this, or cannot use the model.
    """
    engine = _load(name, folder, weight_version=weight_version, dtype=dtype, seed=seed)
    if not isinstance(engine, Scorer):
        raise SchemaError(f"engine {name!r} cannot score given tokens; {_others(name)}")
    return engine


def load_resumer(
    name: str, folder: str | Path, *, weight_version: str = "", dtype: str = "auto", seed: int = 0
) -> Resumer:
    """An engine that goes on with rollouts, over the model in a folder; arguments and errors as of `load_scorer`."""
    engine = _load(name, folder, weight_version=weight_version, dtype=dtype, seed=seed)
    if not isinstance(engine, Resumer):
        raise SchemaError(f"engine {name!r} cannot go on with rollouts; {_others(name)}")
    return engine


def sampling_taken(name: str) -> Collection[str] | None:
    """`Resumer.takes` of an engine by its name, before there is a model; None if what is registered does not tell.

    Raises:
        NotFound, SchemaError: as `load_scorer`.
    """
    taken: Collection[str] | None = getattr(_registered(name), "takes", None)
    return taken


def require_recorded_routing(id: str, recorded: RoutingSpec | None, model: RoutingSpec) -> None:
    """That a model routes as a trajectory records, apart from the order in which expert ids are kept.

    Args:
        recorded: the trajectory's; None fits every model.
        model: that of the engine.

    Raises:
        Conflict: it does not: another model.
    """
    if recorded is None or msgspec.structs.replace(recorded, order=model.order) == model:
        return
    raise Conflict(
        f"{id} records {_brief(recorded)}; this model has {_brief(model)}. Give the model that the rollout began with"
    )


def _load(name: str, folder: str | Path, *, weight_version: str, dtype: str, seed: int) -> object:
    registered = _registered(name)
    path = Path(folder)
    if not path.is_dir():
        raise NotFound(f"{path} is no folder; give the one that holds the model's configuration and weights")
    made: object = registered.for_replay(path, weight_version=weight_version, dtype=dtype, seed=seed)
    return made


def _registered(name: str) -> Any:
    """What is registered under a name, and serves replay."""
    points = _points()
    if name not in points:
        raise NotFound(f"there is no engine {name!r}; {_others(name)}")
    try:
        registered: object = points[name].load()
    except UNLOADABLE as error:
        raise SchemaError(
            f"engine {name!r} cannot be loaded here: {type(error).__name__}: {error}. Is it installed in this "
            f"environment, with the extra that it needs? {_others(name).capitalize()}"
        ) from error
    if not hasattr(registered, "for_replay"):
        raise SchemaError(f"engine {name!r} records, but serves no replay (it has no `for_replay`); {_others(name)}")
    return registered


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _others(name: str) -> str:
    """Those that serve replay, for an error about one that does not."""
    able = [other for other, point in sorted(_points().items()) if other != name and _serves_replay(point)]
    return f"engines that serve replay: {', '.join(able) or 'none'}"


def _serves_replay(point: EntryPoint) -> bool:
    try:
        return hasattr(point.load(), "for_replay")
    except UNLOADABLE:
        return False


def _brief(spec: RoutingSpec) -> str:
    names = ("layer_ids", "top_k", "num_experts", "num_hidden_layers")
    return ", ".join(f"{name}={getattr(spec, name)}" for name in names)

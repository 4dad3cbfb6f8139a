"""Recorded rollouts on this engine: loading a model from its folder, reading given tokens, going on with a trajectory.

`TransformersEngine` serves `trajstore.engine.Scorer` and `Resumer` through these functions.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from trajstore import Conflict, NotFound, SchemaError, TrajectoryWriter
from trajstore.engine import Scored, require_recorded_routing
from trajstore.routing import RoutingArray
from trajstore_transformers.forward import Forward
from trajstore_transformers.recording import record_output
from trajstore_transformers.request import SamplingParams

if TYPE_CHECKING:
    from trajstore_transformers.engine import TransformersEngine

__all__ = ["end_tokens", "load_model", "read_tokens", "resume"]

_CHUNK = 256
"""Tokens of one forward: what the logits of a large vocabulary take is bounded by it."""


def load_model(folder: Path, *, dtype: str) -> PreTrainedModel:
    """A causal language model from a folder, onto an accelerator where there is one. Nothing is downloaded.

    Args:
        dtype: "auto" as its configuration says, or the name of one of torch's.

    Raises:
        NotFound: no model in the folder.
        SchemaError: transformers cannot load it, or there is no such dtype.
    """
    if not (folder / "config.json").is_file():
        raise NotFound(f"there is no model in {folder} (no config.json); give a folder as save_pretrained writes it")
    chosen = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if chosen != "auto" and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise SchemaError(f"{dtype!r} is no floating dtype of torch; use auto, float32, bfloat16, ...")
    try:
        with _bar_in_terminals():
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=chosen
            )
    except (OSError, ValueError, KeyError) as error:  # missing or torn files; an unknown configuration
        raise SchemaError(f"transformers cannot load the model in {folder}: {error}") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    loaded: PreTrainedModel = model if accelerator is None else torch.nn.Module.to(model, accelerator)
    return loaded


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a text, as the model's own generation configuration names them; none if it names none."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    if ends is None:
        ends = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return () if ends is None else tuple(ends) if isinstance(ends, Sequence) else (int(ends),)


def read_tokens(
    forward: Forward, token_ids: npt.NDArray[np.int32], temperature: npt.NDArray[np.float32], *, chunk: int = _CHUNK
) -> Scored:
    """Teacher-force T tokens, chunk by chunk over one cache.

    Args:
        token_ids: int32 `[T]`, T > 0.
        temperature: float32 `[T]`, of each token's own logprob.

    Returns:
        T logprobs, and T rows over all hidden layers.
    """
    ids = torch.from_numpy(token_ids.astype(np.int64)).to(forward.device)
    divisor = torch.from_numpy(temperature.astype(np.float32)).to(forward.device)
    logprobs = np.full(len(token_ids), np.nan, np.float32)
    rows: list[RoutingArray] = []
    margins: list[npt.NDArray[np.float32]] = []
    cache = DynamicCache()  # without a configuration: it keeps every column, and the mask does the sliding
    with torch.inference_mode():
        for start in range(0, len(token_ids), chunk):
            logits, routed, margin = forward.read(ids[start : start + chunk], start, cache)
            rows.append(routed)
            margins.append(margin)
            following = ids[start + 1 : start + 1 + len(logits)]
            logits = logits[: len(following)]
            scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
            scaled = scaled / divisor[start + 1 : start + 1 + len(following), None].to(scaled.dtype)
            own = scaled.gather(-1, following[:, None])[:, 0] - scaled.logsumexp(-1)
            logprobs[start + 1 : start + 1 + len(following)] = own.float().cpu().numpy()
    return Scored(logprobs=logprobs, routed_experts=np.concatenate(rows), margins=np.concatenate(margins))


def resume(
    engine: "TransformersEngine", trajectory: TrajectoryWriter, params: SamplingParams, sampling: Mapping[str, Any]
) -> str:
    """One segment that goes on from all of a trajectory's tokens, recorded step by step; returns its finish reason.

    An exception, also that of a Ctrl-C, aborts the request: what it had is recorded before the exception goes on.

    Args:
        sampling: what the segment keeps of the parameters.

    Raises:
        Conflict: other requests are in flight, whose outputs would get lost; the model routes otherwise than the
            trajectory records; or as `TrajectoryWriter.segment`.
        SchemaError: as `TransformersEngine.add_request`; nothing was written.
    """
    if engine.has_unfinished_requests:
        raise Conflict("requests are in flight on this engine; bring them to their end before a trajectory is resumed")
    require_recorded_routing(trajectory.id, trajectory.routing, engine.routing_spec)
    engine.add_request(trajectory.id, trajectory.token_ids, params)
    try:
        segment = trajectory.segment(
            engine=engine.name,
            weight_version=engine.weight_version,
            sampling=sampling,
        )
    except BaseException:
        engine.abort_request(trajectory.id)
        raise
    with segment:
        try:
            while not segment.closed:
                for output in engine.step():
                    if output.request_id == trajectory.id and record_output(segment, output):
                        return output.finish_reason
        except BaseException:
            last = engine.abort_request(trajectory.id)
            if last is not None and not segment.closed:
                record_output(segment, last)
            raise
    raise AssertionError("a request ends with a finish reason")


@contextlib.contextmanager
def _bar_in_terminals() -> Iterator[None]:
    """transformers' bar of a loading model, kept out of logs."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]

"""A recorder around an `LLM`: whole batches of trajectories, one request of each at a time."""

import contextlib
from collections.abc import Sequence
from typing import Any, get_args

import numpy.typing as npt

from trajstore import SchemaError, TrajectoryWriter, TrajstoreError
from trajstore.ingest import check_choice, check_label
from trajstore_vllm.flight import Flight
from trajstore_vllm.outputs import record_output
from trajstore_vllm.requests import Rerecord, engine_label
from trajstore_vllm.segments import fail, open_segment

__all__ = ["LLMRecorder"]


class LLMRecorder:
    """Generates with an `LLM`, a batch of trajectories at a time, and records it.

    Args:
        llm: a `vllm.LLM`, made with `enable_return_routed_experts=True`.
        weight_version: label of the weights that it has now.
        rerecord: as in `AsyncLLMRecorder`.

    Attributes:
        weight_version: of requests to come.
    """

    def __init__(self, llm: Any, *, weight_version: str = "", rerecord: Rerecord = "rows") -> None:
        self.weight_version = check_label(weight_version, name="weight_version")
        self._llm = llm
        self._rerecord: Rerecord = check_choice(rerecord, get_args(Rerecord), name="rerecord")
        self._label = engine_label()

    def set_weight_version(self, weight_version: str) -> None:
        """Say that the engine has other weights from now on."""
        self.weight_version = check_label(weight_version, name="weight_version")

    def generate(
        self,
        trajectories: Sequence[TrajectoryWriter],
        contexts: Sequence[npt.ArrayLike] | None = None,
        sampling_params: Any = None,
        *,
        rerecord: Rerecord | None = None,
    ) -> list[Any]:
        """One segment of each trajectory, generated as one batch.

        Args:
            trajectories: different ones.
            contexts: new input of each; default none, which resumes them all.
            sampling_params: a `vllm.SamplingParams` with n = 1, or one for each trajectory.
            rerecord: default the recorder's.

        Returns:
            The engine's `RequestOutput` of each.

        Raises:
            SchemaError: not one context or parameters for each, or n > 1.
            Conflict: as `TrajectoryWriter.segment`.
            ExceptionGroup: outputs that cannot be; all others are recorded.
            Exception: what the engine raises; the segments are closed as `error`.
        """
        count = len(trajectories)
        inputs: Sequence[npt.ArrayLike] = [()] * count if contexts is None else contexts
        params = list(sampling_params) if isinstance(sampling_params, list | tuple) else [sampling_params] * count
        if len(inputs) != count or len(params) != count:
            raise SchemaError(f"{count} trajectories, {len(inputs)} contexts and {len(params)} sampling parameters")
        mode = rerecord or self._rerecord
        with contextlib.ExitStack() as open_segments:
            flights, requests = [], []
            for trajectory, context, given in zip(trajectories, inputs, params, strict=True):
                flight = Flight(trajectory.id, self.weight_version)
                request = open_segment(flight, trajectory, context, given, None, mode, self._label, cumulative=False)
                open_segments.enter_context(request.segment)
                flights.append(flight)
                requests.append(request)
            try:
                outputs = list(
                    self._llm.generate(
                        [request.prompt for request in requests],
                        [request.params for request in requests],
                        use_tqdm=False,
                    )
                )
            except BaseException as error:
                for flight in flights:
                    fail(flight, error)
                raise
            if len(outputs) != count:
                raise SchemaError(f"the engine returned {len(outputs)} outputs for {count} requests")
            refused: list[Exception] = []
            for request, output in zip(requests, outputs, strict=True):
                try:
                    record_output(request.segment, output, output_kind="FINAL_ONLY")
                except TrajstoreError as error:
                    refused.append(error)
            if refused:
                raise ExceptionGroup(f"{len(refused)} of {count} outputs could not be recorded", refused)
        return outputs

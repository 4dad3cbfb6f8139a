"""Recorded rollouts on an `LLM` of vLLM: given tokens are read as a prompt, and trajectories are gone on with.

Serves `trajstore.engine.Scorer` and `Resumer`. vLLM is imported when a model is loaded.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trajstore import Conflict, NotFound, SchemaError, TrajectoryWriter
from trajstore.engine import Scored
from trajstore_vllm.llm import LLMRecorder
from trajstore_vllm.requests import engine_label

__all__ = ["LLMReplay"]


class LLMReplay:
    """Reads and goes on with recorded rollouts, one at a time.

    Args:
        llm: a `vllm.LLM`, made with `enable_return_routed_experts=True`. For trajectories of T tokens its
            `max_model_len` is above T.
        weight_version: label of the weights that it has.

    Attributes:
        name: as segments name the engine, "vllm/0.30.0".
        weight_version: as given.
        takes: see `trajstore.engine.Resumer`. Not the penalties that count output alone, for vLLM takes what was
            sampled before for a prompt; and no stop strings, for there is no tokenizer here.
    """

    takes = frozenset({"top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"})

    def __init__(self, llm: Any, *, weight_version: str = "") -> None:
        self.name = engine_label()
        self.weight_version = weight_version
        self._llm = llm

    @classmethod
    def for_replay(cls, folder: Path, *, weight_version: str, dtype: str = "auto", seed: int = 0) -> Self:
        """Over the model in a folder, run eagerly: a few rollouts are not worth a compilation.

        Raises:
            NotFound: no model in the folder.
            SchemaError: no vLLM here.
        """
        if not (folder / "config.json").is_file():
            raise NotFound(f"there is no model in {folder} (no config.json)")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
        try:
            from vllm import LLM
        except ImportError as error:
            raise SchemaError(f"vLLM cannot be imported here ({error}); it wants an environment of its own") from error
        llm = LLM(
            model=str(folder),
            dtype=dtype,
            seed=seed,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_return_routed_experts=True,
        )
        return cls(llm, weight_version=weight_version)

    def score(self, token_ids: npt.NDArray[np.int32], *, temperature: npt.NDArray[np.float32] | None = None) -> Scored:
        """Read tokens as a prompt, and sample one that nobody wants.

        vLLM's logprobs of a prompt are those of the model itself, before any temperature (`logprobs_mode` raw).

        Args:
            token_ids: int32 `[T]`.
            temperature: 1 for every token.

        Raises:
            SchemaError: another temperature, or an output that is not of these tokens.
            Conflict: part of the prompt came from the prefix cache, so its rows may be other weights'.
            Exception: what vLLM raises, e.g. for too many tokens.
        """
        from vllm import SamplingParams

        ids = token_ids.tolist()
        if temperature is not None and not (np.asarray(temperature) == 1.0).all():
            raise SchemaError(
                "vLLM tells logprobs of given tokens at temperature 1 only; take another engine, or give temperature=1 "
                "where the routing alone matters"
            )
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": ids}], [params], use_tqdm=False)
        if getattr(output, "num_cached_tokens", 0):
            raise Conflict(
                f"{output.num_cached_tokens} tokens came from the prefix cache, perhaps under other weights; call "
                "reset_prefix_cache() of the LLM"
            )
        given = output.prompt_logprobs
        if given is None or len(given) != len(ids):
            raise SchemaError(f"vLLM returned {0 if given is None else len(given)} logprobs for {len(ids)} tokens")
        logprobs = np.full(len(ids), np.nan, np.float32)
        for at in range(1, len(ids)):
            logprobs[at] = given[at][ids[at]].logprob
        routed = output.outputs[0].routed_experts
        return Scored(logprobs=logprobs, routed_experts=None if routed is None else np.asarray(routed)[: len(ids)])

    def resume(
        self,
        trajectory: TrajectoryWriter,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Go on with a trajectory to the end of one segment, its prefix's routing included; see `LLMRecorder`.

        Raises:
            Exception: what vLLM raises, e.g. for a temperature above 2; nothing was written if it refuses parameters.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=ignore_eos,
            detokenize=False,
            **further,
        )
        recorder = LLMRecorder(self._llm, weight_version=self.weight_version, rerecord="prefix")
        (output,) = recorder.generate([trajectory], None, params)
        return str(output.outputs[0].finish_reason)

    def close(self) -> None:
        """Let go of the LLM, which ends with its last user."""
        self._llm = None

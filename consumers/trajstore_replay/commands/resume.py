"""The command `resume`: goes on with a rollout that was cut off, and records what comes."""

from contextlib import closing
from pathlib import Path

import click
import msgspec

from trajstore.cli.place import Place, open_run, place_argument
from trajstore.cli.terminal import print_json, say
from trajstore.engine import load_resumer, sampling_taken
from trajstore_replay.resuming import CLOSINGS, Closing, Resumed, require_resumable, require_sampling
from trajstore_replay.resuming import resume as go_on

__all__ = ["resume"]


@click.command()
@place_argument
@click.option("--engine", default="transformers", show_default=True, metavar="NAME", help="Which engine generates.")
@click.option("--model", required=True, metavar="DIR", help="The model's folder; nothing is downloaded.")
@click.option("--dtype", default="auto", show_default=True, help="The engine's precision, e.g. bfloat16.")
@click.option(
    "--weight-version", metavar="V", help="Label of these weights; default the name of DIR, where a link leads."
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Default what the rollout's limit leaves.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Default as before; 0 is greedy.")
@click.option(
    "--stop-token", "stop_tokens", type=click.IntRange(min=0), multiple=True, metavar="ID",
    help="Ends the output, beside the model's own; repeatable. Default as before.",
)  # fmt: skip
@click.option(
    "--without", multiple=True, metavar="NAME", help="Go on without this sampling parameter, e.g. top_p; repeatable."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sampling.")
@click.option(
    "--takeover",
    is_flag=True,
    help="Also while a segment is open, whose writer is fenced; and from below a hole in the log.",
)
@click.option(
    "--close", type=click.Choice(CLOSINGS), help="Then close it; auto: completed at a stop, truncated at the limit."
)
@click.option("--json", "as_json", is_flag=True, help="What was done as one JSON object on stdout.")
def resume(
    place: Place,
    engine: str,
    model: str,
    dtype: str,
    weight_version: str | None,
    max_tokens: int | None,
    temperature: float | None,
    stop_tokens: tuple[int, ...],
    without: tuple[str, ...],
    seed: int,
    takeover: bool,
    close: Closing | None,
    as_json: bool,
) -> None:
    """Go on with an aborted rollout.

    The engine is given all tokens so far, and what it generates is recorded as a new segment, routing of the whole
    prefix included. It is sampled as before; a parameter that the engine does not take is refused, unless you go on
    --without it. A rollout whose writer died has an open segment: look with `trajstore doctor`, then --takeover.
    Ctrl-C keeps what came, and closes the trajectory as aborted, to be resumed again.

    \b
    Examples:
      trajstore resume runs/exp1 01JD3Z... --model /ckpt/v4 --close auto
      trajstore resume 01JD3Z... --model /ckpt/v4 --weight-version v4 --takeover --max-tokens 512
    """
    label = Path(model).resolve().name if weight_version is None else weight_version
    with open_run(place.store) as store:
        require_resumable(store, place.id, max_tokens=max_tokens, takeover=takeover)  # before a large model is loaded
        takes = sampling_taken(engine)
        if takes is not None:
            require_sampling(store, place.id, takes, engine=engine, temperature=temperature, without=without)
        say(f"loading {model}")
        with closing(load_resumer(engine, model, weight_version=label, dtype=dtype, seed=seed)) as resumer:
            say(f"going on with {place.id} on {resumer.name}")
            done = go_on(
                store,
                place.id,
                resumer,
                max_tokens=max_tokens,
                temperature=temperature,
                stop_token_ids=stop_tokens or None,
                without=without,
                takeover=takeover,
                close=close,
            )
    if as_json:
        print_json(msgspec.structs.asdict(done))
    say(_told(done))


def _told(done: Resumed) -> str:
    text = (
        f"segment {done.segment} of {done.id}: {done.tokens} tokens after {done.base} under weights "
        f"{done.weight_version!r}, ended with {done.finish_reason}; the trajectory is {done.status}"
    )
    return text + ("; score and close it, or give --close" if done.status == "open" else "")

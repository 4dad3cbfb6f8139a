"""What to do about a trajectory that stands still: commands that work on it as it stands, or what nobody can do."""

from trajstore.errors import Conflict, Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.store import Store
from trajstore.summary import Summary
from trajstore_replay.resuming import require_resumable

__all__ = ["resuming", "what_to_do"]


def what_to_do(kind: str, summary: Summary, where: str, run: Store | None) -> str:
    """Advice on a finding about one trajectory.

    Args:
        kind: of the finding, see `trajstore_replay.diagnosis`.
        where: the store, as a word of a command line.
        run: None for an archive without its server, in which nothing can be gone on with.

    Raises:
        Unavailable: the server or the archive does not answer.
    """
    if kind == "failed":
        return f"`trajstore replay {where} {summary.id}` shows how it came to that"
    if run is None:
        return "in its run it can be gone on with or closed; its archive alone is only read"
    resume = resuming(summary, where, run)
    close = f"`trajstore close {where} {summary.id}"
    score = "close it" if summary.reward is not None else "score it and close it"
    reward = "" if summary.reward is not None else " --reward R"
    if kind == "open-segment":
        end = f"{close} {'aborted' if summary.tokens else 'failed'} --takeover`"
        how = f"{resume}, or {end} ends it; either" if resume else f"{end} ends it, which"
        advice = [f"if its engine is gone, {how} fences the writer", "left alone, an archiver closes it after a day"]
    elif kind == "unbegun":
        advice = ["nothing is lost", f"{close} failed` closes it, so that its group does not wait for it"]
    elif summary.finish_reason == "stop":
        advice = [f"{score}: {close} completed{reward}`"]
    elif kind == "idle":
        advice = [f"{score}: {close} truncated{reward}`" + (f"; or {resume}" if resume else "")]
    elif resume:
        advice = [resume, f"{close} truncated` ends it if nobody will"]
    else:
        advice = [f"nobody can go on with it; {close} {'truncated' if summary.tokens else 'failed'}` ends it"]
    if kind == "lost" and summary.tokens:
        advice.append(f"`trajstore why {where} {summary.id} --token -1` tells what is missing")
    return "; ".join(advice)


def resuming(summary: Summary, where: str, run: Store) -> str:
    """The command that goes on with a trajectory, and from where; "" if none does.

    Raises:
        Unavailable: the server or the archive does not answer.
    """
    if not summary.tokens or summary.finish_reason == "stop":  # which needs no reading
        return ""
    for takeover, limit in ((False, None), (True, None), (False, 1), (True, 1)):
        try:
            require_resumable(run, summary.id, max_tokens=limit, takeover=takeover)
        except (Conflict, SchemaError):
            continue
        except (NotFound, SequenceGap, RoutingError, Corrupt):  # a finding of its own
            return ""
        options = (" --takeover" if takeover else "") + (" --max-tokens N" if limit else "")
        return f"`trajstore resume {where} {summary.id} --model DIR{options}` goes on from its {summary.tokens} tokens"
    return ""

"""The model of the server answers as servers do: the same random commands to both, reply for reply."""

import random
from typing import Any

import pytest
import redis

from tests.conftest import REAL
from tests.servers import RealServer, binary_of, running
from tests.simulation.network import Line, Network
from tests.simulation.scheduler import Scheduler
from tests.simulation.server import Server
from trajstore.log.wire import Wire

ROUNDS = 20
COMMANDS = 150

KEYS = ("s", "t")
IDS = ("1-0", "1-1", "2-0", "2-3", "3-0", "5-1")
GROUPS, CONSUMERS = ("g", "h"), ("one", "two")


@pytest.fixture(scope="module", params=REAL)
def server(request, tmp_path_factory):
    if binary_of(request.param) is None:
        pytest.skip(f"backend {request.param}: no server of that kind on this machine")
    with running(request.param, tmp_path_factory.mktemp("model")) as one:
        yield one


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_model_replies_as_a_server_does(server: RealServer, seed: int):
    rng = random.Random(seed)
    real = Wire.to_url(f"redis://127.0.0.1:{server.port}/0", timeout=10.0)
    real.call("FLUSHALL")
    scheduler = Scheduler(rng)
    line = Line(Network(Server(lambda: 1_800_000_000_000), scheduler, rng, loss=0.0))
    for number in range(COMMANDS):
        commands = [command(rng) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            commands = [("MULTI",), *commands, ("EXEC",)]
        wanted = [plain(reply) for reply in real.exchange(commands)]
        told = [plain(r) for r in line.deliver([[str(part).encode() for part in one] for one in commands])]
        assert told == wanted, f"number {number}: {commands}"
    real.close()


def command(rng: random.Random) -> tuple[Any, ...]:
    """One command, of those whose replies do not depend on the clock."""
    key, at, group, consumer = rng.choice(KEYS), rng.choice(IDS), rng.choice(GROUPS), rng.choice(CONSUMERS)
    return rng.choice(
        [
            ("XADD", key, at, "e", rng.randrange(9)),
            ("XADD", key, "NOMKSTREAM", at, "e", rng.randrange(9)),
            ("XADD", key, f"{rng.randint(1, 9)}-{rng.randint(0, 9)}", "e", "x", "k", "y"),
            ("XRANGE", key, rng.choice(["-", at, f"({at}"]), "+", "COUNT", rng.randint(1, 5)),
            ("XREVRANGE", key, "+", "-", "COUNT", 1),
            ("XTRIM", key, "MINID", at),
            ("XLEN", key),
            ("XSETID", key, "9-9"),
            ("XREAD", "COUNT", 2, "STREAMS", *KEYS, at, "0-0"),
            ("XGROUP", "CREATE", key, group, rng.choice(["0", "$"]), "MKSTREAM"),
            ("XGROUP", "DELCONSUMER", key, group, consumer),
            ("XREADGROUP", "GROUP", group, consumer, "COUNT", 2, "STREAMS", key, ">"),
            ("XREADGROUP", "GROUP", group, consumer, "COUNT", 2, "STREAMS", key, "0"),
            ("XACK", key, group, at, rng.choice(IDS)),
            ("XPENDING", key, group),
            ("XCLAIM", key, group, consumer, 0, at, "JUSTID"),
            ("XCLAIM", key, group, consumer, 0, at),
            ("XAUTOCLAIM", key, group, consumer, 0, "0-0", "COUNT", rng.randint(1, 3)),
            ("UNLINK", key),
            ("EXISTS", key),
            ("HSET", "hash", "a", rng.randrange(9), "b", 1),
            ("HSETNX", "hash", "c", 1),
            ("HGET", "hash", "a"),
            ("HMGET", "hash", "a", "c"),
            ("HDEL", "hash", rng.choice("abc")),
            ("HGETALL", "hash"),
            ("XADD", key, "MAXLEN", "~", 10_000, at, "e", rng.randrange(9)),
            ("SET", "text", rng.randrange(9), "NX"),
            ("SET", "text", rng.randrange(9), "NX", "EX", 100),
            ("EXPIRE", rng.choice(["text", "none"]), 100),
            ("PTTL", rng.choice(["hash", "none"])),
            ("GET", "text"),
            ("GET", key),
            ("PERSIST", "text"),
            ("PEXPIRE", "text", 100_000),
        ]
    )


def plain(reply: Any) -> Any:
    """A reply as far as the protocol goes by it: of an error its kind."""
    if isinstance(reply, list):
        return [plain(part) for part in reply]
    if isinstance(reply, redis.RedisError):
        text = str(reply)
        missing = any(words in text for words in ("NOGROUP", "requires the key", "no such key"))
        kinds = ("WRONGTYPE", "BUSYGROUP", "equal or smaller", "smaller than")
        return "missing" if missing else next((kind for kind in kinds if kind in text), text)
    return reply

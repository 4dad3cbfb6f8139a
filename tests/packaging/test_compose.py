"""docker-compose.yml against the compose schema, and against what the log protocol wants of its server."""

import subprocess
import sys
from pathlib import Path

import yaml

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"


def test_compose_file_follows_the_compose_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_compose_redis_keeps_a_log_and_never_evicts():
    redis = yaml.safe_load(COMPOSE.read_text())["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert int(redis["image"].removeprefix("redis:").split(".")[0]) >= 8
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert redis["healthcheck"]["test"][-1] == "ping"
    assert all(str(port).startswith("127.0.0.1:") for port in redis["ports"]), "without a password: loopback only"


def test_compose_workers_are_commands_that_exist():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services["archiver"]["command"][:2] == ["archive", "--archive"]
    inside, outside = services["archiver"]["volumes"][0].split("}:")
    assert inside + "}" == outside == services["archiver"]["command"][2], "the run remembers this path"
    assert services["materializer"]["command"][0] == "materialize"
    for name in ("archiver", "materializer", "status"):
        arguments = [sys.executable, "-m", "trajstore", services[name]["command"][0], "--help"]
        shown = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert shown.returncode == 0, shown.stderr
        for option in services[name]["command"]:
            assert not option.startswith("--") or option in shown.stdout, f"{name} has no {option}"
        port = services[name]["command"][-1].rpartition(":")[2]
        assert f":{port}/healthz" in services[name]["healthcheck"]["test"][-1]
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy"

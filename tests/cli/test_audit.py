"""`audit`: the numbers of a recorded chain on every way out, thresholds as exit codes, and wrong input."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import environment, in_terminal, invoke, run
from tests.consumers.audits import HOSTILE
from tests.consumers.chains import record_chain
from tests.engines.vllm_fixtures import case

PAIRS = [case("10_chain_reset_seg2")["drift_vs_seg1"], case("10_chain_reset_seg3")["drift_vs_seg2"]]
"""What vLLM's recorder counted itself."""

CELLS = 4 * sum(pair["rows"] for pair in PAIRS)
DIFFERING = sum(pair["cells_set_differs"] for pair in PAIRS)
SHARE = DIFFERING / CELLS


@pytest.fixture
def chain(durable: trajstore.Store) -> str:
    """Id of a rollout that a real vLLM made in three segments, in a group with a hostile name."""
    return record_chain(durable, group=HOSTILE[:60]).id


def test_every_way_out_gives_the_numbers_that_vllm_recorded(chain, folder, tmp_path):
    page, tables = tmp_path / "audit.html", tmp_path / "tables"
    result = invoke("audit", folder, "--html", page, "--parquet", tables, "--json")
    assert (result.exit_code, result.stderr) == (0, f"written: {tables}\nwritten: {page}\n")
    total = json.loads(result.stdout)["segments"]["total"]
    assert (total["cells"], total["differing"], total["router_disagreement"]) == (CELLS, DIFFERING, SHARE)
    assert parquet.read_table(tables / "totals.parquet")["differing"].to_pylist() == [DIFFERING, 0]
    pairs = parquet.read_table(tables / "pairs").to_pylist()
    assert [pair["differing"] for pair in pairs] == [pair["cells_set_differs"] for pair in PAIRS]
    assert {pair["id"] for pair in pairs} == {chain}
    shown = f"{DIFFERING} of {CELLS} cells"
    assert shown in page.read_text()
    assert f"{100 * SHARE:.1f} % of {CELLS} cells" in invoke("audit", folder).stdout


def test_the_summary_says_what_matters_first(chain, folder):
    lines = invoke("audit", folder).stdout.splitlines()
    headline = next(i for i, line in enumerate(lines) if line.startswith("router disagreement"))
    gaps = lines.index("by version gap")
    worst = lines.index("worst trajectories")
    assert headline < gaps < worst
    assert lines[worst + 2].startswith(chain)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_it_within_its_width(chain, folder, width):
    written = in_terminal(width, "audit", folder).decode()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is back
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    drawn = [line for line in text.replace("\r", "\n").splitlines() if "│" in line or "─" in line]
    assert any("router disagreement" in line for line in drawn)
    assert max(map(len, drawn)) <= width


def test_the_commands_that_it_names_are_ones(chain, folder):
    """Ready to copy: each is run as it stands."""
    named = re.findall(r"look closer: trajstore (\w+) (.*)", invoke("audit", folder).stdout)
    assert {command for command, _ in named} == {"diff", "why"}
    for command, words in named:
        result = invoke(command, *shlex.split(words))
        assert result.exit_code == 0, result.output


def test_the_commands_that_it_names_find_rows_that_were_rewound_and_those_that_came_late(durable, folder):
    """Row 25 is of a token that the third segment left behind; the other trajectory's segment recorded twice."""
    rewound, late = durable.create(routing=SPEC), durable.create(routing=SPEC)
    recorded = rows(40, 1)
    changed = recorded.copy()
    changed[25:] = rows(15, 2)
    with rewound.segment(context=range(40), engine="e", weight_version="v1") as segment:
        segment.tokens([7])
        segment.routing(recorded, start=0)
    with rewound.segment(engine="e", weight_version="v1") as segment:
        segment.tokens([8])
        segment.routing(changed, start=0)
    with rewound.segment(base=10, context=[3], engine="e", weight_version="v1") as segment:
        segment.tokens([9])
    with late.segment(context=range(40), engine="e", weight_version="v1") as segment:
        segment.tokens([7])
        segment.routing(recorded, start=0)
    late.late_routing(segment=0, rows=changed, start=0)
    durable.flush()
    for trajectory in (rewound, late):
        said = invoke("audit", folder, "--id", trajectory.id).stdout
        named = re.findall(r"(?:look closer: |  )trajstore (diff|why|events) (.*)", said)
        assert {command for command, _ in named} == ({"diff", "why"} if trajectory is rewound else {"events", "why"})
        for command, words in named:
            result = invoke(command, *shlex.split(words))
            assert result.exit_code == 0, (command, words, result.output)
            assert not result.stdout.startswith("the same")
            assert command != "why" or "token 25" in result.stdout
    (words,) = {words for command, words in named if command == "why"}
    assert words.endswith("--until 'note 1-0'")


@pytest.mark.parametrize(
    ("threshold", "code", "said"),
    [
        (f"router_disagreement>{SHARE - 1e-9}", 1, "FAILED"),
        (f"router_disagreement>{SHARE + 1e-9}", 0, "passed"),
        ("findings.swapped>0", 0, "passed"),
        ("observations.jaccard<0.1", 1, "nothing was compared"),
        ("k3_kl>0.1", 1, "--logprobs"),
    ],
)
def test_a_threshold_is_an_exit_code(chain, folder, threshold, code, said):
    result = invoke("audit", folder, "--json", "--fail-if", threshold)
    assert result.exit_code == code
    assert said in result.stderr
    assert threshold in result.stderr
    (outcome,) = json.loads(result.stdout)["thresholds"]
    assert (outcome["threshold"], outcome["failed"]) == (threshold, code == 1)


def test_one_failed_threshold_of_several_is_enough(chain, folder):
    given = ("--fail-if", "jaccard<0.1", "--fail-if", "findings>100", "--fail-if", "tokens_touched>0")
    result = invoke("audit", folder, *given)
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["passed", "passed", "FAILED"]


def test_a_shifted_segment_is_named_on_every_way_out(durable, folder, tmp_path):
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(1, 25)), top_k=4, num_experts=64, num_hidden_layers=25)
    recorded = rows(121, 1, spec)
    writer = durable.create(routing=spec)
    for given in (recorded[:120], np.vstack([recorded[1:121], recorded[:1]])):
        with writer.segment(context=range(120) if given.shape[0] == 120 else [], weight_version="v1") as segment:
            segment.tokens([7])
            segment.routing(given, start=0)
            segment.close("stop")
    writer.close("completed")
    durable.flush()
    page = tmp_path / "audit.html"
    result = invoke("audit", folder, "--html", page, "--fail-if", "findings.shifted>0")
    assert result.exit_code == 1
    assert "FAILED: findings.shifted>0: findings.shifted is " in result.stderr
    named = re.search(r"^shifted: (\S+), event 3-2, row 0", result.stdout, re.MULTILINE)
    assert named is not None, result.stdout
    assert named[1] == writer.id
    assert f'<b class="kind">shifted</b>\n<span class="id">{writer.id}</span>' in page.read_text()


def test_a_check_that_audits_nothing_is_not_green(chain, folder):
    given = [word for name in ("findings>0", "zero_rows>0", "skipped>0") for word in ("--fail-if", name)]
    for nothing in (("--group", "typo"), ("--sample", "1e-9")):
        result = invoke("audit", folder, *nothing, *given)
        assert result.exit_code == 1
        assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["FAILED"] * 3
        assert result.stderr.count("no trajectory was audited") == 3
    assert invoke("audit", folder, "--fail-if", "findings>1000", "--fail-if", "skipped>0").exit_code == 0


def test_the_report_of_a_failed_audit_is_written_all_the_same(chain, folder, tmp_path):
    page = tmp_path / "audit.html"
    assert invoke("audit", folder, "--html", page, "--fail-if", "cells>0").exit_code == 2
    assert not page.exists()
    assert invoke("audit", folder, "--html", page, "--fail-if", "tokens_touched>0").exit_code == 1
    assert "fails</b> <code>tokens_touched&gt;0" in page.read_text()
    assert [path.name for path in tmp_path.glob("audit*")] == ["audit.html"]


def test_only_what_was_asked_for_is_audited(chain, seed, folder):
    def cells(*options):
        said = json.loads(invoke("audit", folder, "--json", *options).stdout)
        return said["totals"]["trajectories"], (said["segments"] or {"total": {"cells": None}})["total"]["cells"]

    assert cells() == (2, CELLS + 7 * 3)
    assert cells("--id", seed) == (1, 7 * 3)
    assert cells("--group", "prompt-17") == (1, 7 * 3)
    assert cells("--status", "completed") == (2, CELLS + 7 * 3)
    assert cells("--status", "open") == (0, 0)
    assert cells("--against", "observations") == (2, None)


def test_another_partys_logprobs_come_from_a_file(chain, durable, folder, tmp_path):
    recorded = durable.load(chain).logprobs
    given = tmp_path / "trainer.safetensors"
    save_file({chain: recorded + np.float32(0.1)}, given)
    found = json.loads(invoke("audit", folder, "--logprobs", given, "--json").stdout)["logprobs"]
    assert found["tokens"] == np.count_nonzero(~np.isnan(recorded))
    assert found["logprob_difference"] == pytest.approx(0.1, rel=1e-5)
    assert found["k3_kl"] == pytest.approx(np.expm1(0.1) - 0.1, rel=1e-4)
    assert found["f_1.25"] == 0


def test_logprobs_of_other_trajectories_are_told_of(chain, durable, folder, tmp_path):
    recorded = durable.load(chain).logprobs
    given = tmp_path / "trainer.safetensors"
    save_file({"another": recorded}, given)
    result = invoke("audit", folder, "--logprobs", given)
    assert result.exit_code == 0
    assert f"{given} has no logprob of any sampled token that was audited (it names 1 " in result.stderr
    assert "'another'" in result.stderr
    save_file({"another": recorded, chain: recorded}, given)
    assert "--logprobs" not in invoke("audit", folder, "--logprobs", given).stderr


def test_a_sample_says_how_sure_it_is(durable, folder):
    for _ in range(12):
        record_seed_case(durable)
    durable.flush()
    total = json.loads(invoke("audit", folder, "--sample", "0.6", "--json").stdout)["segments"]["total"]
    assert total["router_disagreement_low"] <= total["router_disagreement"] <= total["router_disagreement_high"]


def test_an_audit_in_pieces_is_the_same_audit(chain, folder, tmp_path):
    first, second = (
        json.loads(invoke("audit", folder, "--work", tmp_path / "work", "--json").stdout)["segments"] for _ in range(2)
    )
    assert list((tmp_path / "work").rglob("*")) != []
    assert first == second == json.loads(invoke("audit", folder, "--json").stdout)["segments"]


def test_the_work_of_another_audit_is_refused(chain, folder, tmp_path):
    assert invoke("audit", folder, "--work", tmp_path / "work").exit_code == 0
    result = invoke("audit", folder, "--work", tmp_path / "work", "--against", "observations")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "another audit" in result.stderr


def test_without_the_extra_the_numbers_are_there_and_the_rest_says_what_to_install(chain, folder, tmp_path):
    code = (
        "import sys; sys.modules |= dict.fromkeys(('jinja2', 'markupsafe', 'pyarrow', 'matplotlib', 'distributed')); "
        "from trajstore.cli import main; main(sys.argv[1:])"
    )

    def call(*options):
        return subprocess.run(
            [sys.executable, "-c", code, "audit", str(folder), *map(str, options)],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment(),
        )

    done = call("--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["segments"]["total"]["differing"] == DIFFERING
    for option, value, name, extra in (
        ("--html", tmp_path / "a.html", "jinja2", "audit"),
        ("--parquet", tmp_path / "tables", "pyarrow", "audit"),
        ("--scheduler", "tcp://127.0.0.1:1", "distributed", "dask"),
    ):
        done = call(option, value)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"trajstore: {option} needs {name}: pip install 'trajstore[{extra}]'\n"
    assert list(tmp_path.glob("a.html*")) + list(tmp_path.glob("tables*")) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--fail-if", "router_disagrement>0.1"), "router_disagreement, tokens_touched"),
        (("--fail-if", "router_disagreement"), "NAME OPERATOR NUMBER"),
        (("--fail-if", "router_disagreement>much"), "'much'"),
        (("--sample", "0"), "--sample"),
        (("--sample", "1.5"), "--sample"),
        (("--sample", "nan"), "--sample"),
        (("--workers", "0"), "--workers"),
        (("--top", "0"), "--top"),
        (("--seed", str(1 << 63)), "--seed"),
        (("--load-rows", "some"), "a number of rows, or all"),
        (("--against", "trainer"), "--against"),
        (("--status", "done"), "--status"),
        (("--workers", "2", "--scheduler", "tcp://127.0.0.1:1"), "not both"),
        (("--logprobs", "missing.safetensors"), "does not exist"),
        (("--html", "missing/audit.html"), "no folder"),
        (("--html", "."), "is a directory"),
    ],
)
def test_wrong_usage_is_told_before_any_work(chain, folder, options, said):
    result = invoke("audit", folder, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_what_is_not_there_or_not_ours_is_an_error(chain, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    for given, said in (
        ((tmp_path / "typo",), "typo does not exist (STORE is a Redis URL"),
        ((tmp_path / "mine",), "neither store.json nor archive.json"),
        ((folder, "--id", "01UNKNOWN"), "01UNKNOWN"),
        ((folder, "--parquet", tmp_path / "mine"), "notes.txt"),
        ((folder, "--logprobs", tmp_path / "noise"), "no safetensors file"),
        ((folder, "--scheduler", "nonsense"), "tcp://host:8786"),
    ):
        result = invoke("audit", *given)
        assert (result.exit_code, result.stdout) == (1, ""), given
        assert result.stderr.startswith("trajstore: ")
        assert said in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert invoke("audit", folder, "--parquet", tmp_path / "tables").exit_code == 0
    before = sorted(path for path in (tmp_path / "tables").rglob("*") if path.is_file())
    for given in ((tmp_path / "typo",), (folder, "--id", "01UNKNOWN")):
        assert invoke("audit", *given, "--parquet", tmp_path / "tables").exit_code == 1
        assert sorted(path for path in (tmp_path / "tables").rglob("*") if path.is_file()) == before != []
    assert not (tmp_path / "typo").exists()


def test_logprobs_of_another_length_or_type_are_an_error(chain, folder, tmp_path):
    for wrong in (np.zeros((3, 2), np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32)):
        save_file({chain: wrong}, tmp_path / "wrong.safetensors")
        result = invoke("audit", folder, "--logprobs", tmp_path / "wrong.safetensors")
        assert (result.exit_code, result.stdout) == (1, "")
        assert chain in result.stderr


def test_logprobs_in_bfloat16_are_refused_and_double_ones_are_not(chain, durable, folder, tmp_path):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    recorded = torch.from_numpy(durable.load(chain).logprobs)
    save({chain: recorded.bfloat16()}, tmp_path / "given.safetensors")
    result = invoke("audit", folder, "--logprobs", tmp_path / "given.safetensors")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "BF16; store them as float32" in result.stderr
    save({chain: recorded.double()}, tmp_path / "given.safetensors")
    said = json.loads(invoke("audit", folder, "--logprobs", tmp_path / "given.safetensors", "--json").stdout)
    assert said["logprobs"]["k3_kl"] == 0


def test_an_empty_store_is_audited_too(durable, folder, tmp_path):
    result = invoke("audit", folder, "--html", tmp_path / "a.html")
    assert result.exit_code == 0
    assert "nothing to compare" in result.stdout
    assert "Nothing to compare" in (tmp_path / "a.html").read_text()


def test_an_archive_is_audited_without_its_server(chain, durable, folder):
    assert run("archive", folder, "--once").returncode == 0
    said = json.loads(invoke("audit", folder / "archive", "--json").stdout)
    assert said["segments"]["total"]["differing"] == DIFFERING


def test_the_url_of_a_run_is_shown_with_its_name_and_without_its_password(durable_server, run_name, tmp_path):
    with trajstore.open(durable_server.url(run_name), partitions=1):
        said = json.loads(invoke("audit", durable_server.url(run_name), "--json").stdout)
        assert said["parameters"]["place"] == durable_server.url(run_name)

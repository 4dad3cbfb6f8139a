"""The wheel as a stranger gets it: installed alone, importable, with its command, and polite to other packages."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the working tree."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT],
        check=True,
        timeout=120,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter with the wheel, what it depends on, and nothing else."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel],
        check=True,
        timeout=300,
    )
    return python


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_wheel_brings_no_generic_top_level_name(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {name for name in names if not name.endswith(".dist-info")}
    assert "trajstore" in packages
    assert {name for name in packages if not name.startswith("trajstore")} == set()
    assert packages >= {"trajstore_transformers", "trajstore_trainer", "trajstore_audit", "trajstore_demo"}


def test_wheel_ships_types_license_and_the_prompts(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "trajstore/py.typed" in names
    assert "trajstore_demo/passages.txt" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.timeout(400)
def test_installed_alone_it_imports_and_shows_its_command(python, tmp_path):
    shown = run(python, "-c", "import trajstore; print(trajstore.__version__)", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, "0.1.0\n"), shown.stderr
    listed = run(python.with_name("trajstore"), "--help", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    for command in ("archive", "demo", "events", "ls", "materialize", "show", "stop", "tail"):
        assert command in listed.stdout


@pytest.mark.timeout(400)
def test_installed_alone_the_core_is_light(python, tmp_path):
    """No torch, no engine: what a rollout worker imports must not drag a framework in."""
    found = run(python, "-m", "pip", "list", "--format=freeze").stdout.lower()
    for heavy in ("torch", "transformers", "vllm", "sglang", "fakeredis", "pytest"):
        assert f"{heavy}==" not in found


@pytest.mark.timeout(400)
def test_installed_alone_without_a_server_it_says_what_to_install(python, tmp_path):
    shown = run(python, "-c", "import trajstore; trajstore.open('exp')", cwd=tmp_path, env={"PATH": str(python.parent)})
    assert shown.returncode == 1
    assert "pip install 'trajstore[embedded]'" in shown.stderr.splitlines()[-1]


@pytest.mark.timeout(400)
def test_installed_alone_the_demo_says_what_to_install(python, tmp_path):
    shown = run(python.with_name("trajstore"), "demo", "run", cwd=tmp_path)
    assert shown.returncode != 0
    assert "pip install 'trajstore[embedded,transformers,trainer]'" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()

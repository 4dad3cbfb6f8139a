"""`python -m trajstore_vllm_demo runs/vllm`: the main job with vLLM, in an environment that has vLLM and trajstore."""

import importlib.util
import sys
from pathlib import Path

import click
from rich.console import Console

from trajstore import TrajstoreError
from trajstore_demo.command import run_demo
from trajstore_demo.plan import DemoPlan
from trajstore_demo.report import next_commands, render

__all__ = ["main"]


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--groups", type=click.IntRange(min=4), default=20, show_default=True, help="Prompts, of 4 rollouts each."
)
@click.option("--seed", type=int, default=7, show_default=True, help="Of the model; vLLM samples as it likes.")
def main(directory: Path, groups: int, seed: int) -> None:
    """Run the main job over a new embedded store in DIRECTORY, with vLLM on this machine's CPU as the engine."""
    if importlib.util.find_spec("vllm") is None:
        raise click.ClickException("no vLLM in this environment; `make engines-live` builds one, .venv-vllm")
    console = Console()
    try:
        report = run_demo(directory, DemoPlan(groups=groups, seed=seed), console, rollout="trajstore_vllm_demo.rollout")
    except TrajstoreError as error:
        raise click.ClickException(str(error)) from error
    console.print(render(report))
    console.print(next_commands(report, directory), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

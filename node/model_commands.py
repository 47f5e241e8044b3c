"""`llm-node generate` and `llm-node export`: what to do with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from node.command_options import HomeOption, RunOption, numbers, say

__all__ = ["export", "generate"]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    run: RunOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length of the sample.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1.0, help="Sample from this share of probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sample.")] = 0,
    skip_stages: Annotated[
        str,
        typer.Option("--skip-stages", metavar="2,3", help="Leave out these stages; they count from 0, which stays."),
    ] = "",
    home: HomeOption = None,
) -> None:
    """Continue a text with the model trained so far.

    A model in stages is whole in the home of its bootstrap node only.
    """
    from node.artifacts import load_trained
    from node.home import Home

    skipped = numbers(skip_stages, "--skip-stages")
    trained = load_trained(Home.at(home), run)
    trained.omit_stages(skipped)
    sys.stdout.write(prompt)
    for piece in trained.sample(prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; made if missing.")],
    run: RunOption = None,
    home: HomeOption = None,
) -> None:
    """Write the trained model as a folder that Hugging Face transformers loads.

    A model in stages is whole in the home of its bootstrap node only.
    """
    from node.artifacts import load_trained
    from node.home import Home

    trained = load_trained(Home.at(home), run)
    trained.export(folder)
    say(
        f"Wrote {folder}: {trained.manifest.name} after round {trained.round}, for AutoModelForCausalLM.from_pretrained."
    )

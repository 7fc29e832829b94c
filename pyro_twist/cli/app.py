# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""The commands and their options. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

WRONG_OPTION, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="pyro-twist",
    help="Align pretrained diffusion models to a reward while they sample, without training.",
    epilog="Start with: pyro-twist align emoji --class food --reward red",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(args: list[str] | None = None) -> None:
    """
    Runs the command line and exits: 0 if all went well, 1 if a run failed, 2 for wrong options.

    :param args: The arguments, by default those of the process.
    """
    # before PyTorch loads: threads that spin while they wait make a busy machine many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = typer.main.get_command(app)
    try:
        code = command.main(args=args, prog_name="pyro-twist", standalone_mode=False)
    except Exception as error:
        if type(error).__name__ == "Abort":  # what becomes of ctrl-c inside a command
            complain("interrupted")
            sys.exit(INTERRUPTED)
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(WRONG_OPTION)
        complain(_one_sentence(error.format_message()))
        sys.exit(WRONG_OPTION)
    sys.exit(code if isinstance(code, int) else 0)


def complain(message: str) -> None:
    """
    Says what is wrong.

    :param str message: One sentence.
    """
    print(f"pyro-twist: {message}", file=sys.stderr)


def _one_sentence(message: str) -> str:
    return f"{' '.join(message.split()).rstrip('.')}; see --help"


def _version(wanted: bool) -> None:
    if wanted:
        from pyro_twist import __version__

        print(f"pyro-twist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Align pretrained diffusion models to a reward while they sample, without training."""


WHAT, HOW, RUN, PIPELINES = "What to align", "How", "The run", "Pipelines of diffusers"


_ALIGN_HELP = (
    "Sample a model tilted by a reward, with several methods at equal budget.\n\n"
    "Runs the base model, best-of-N and steering with the same number of denoiser calls, prints "
    "what each found, and writes pictures, plots, all numbers and a page that shows them, "
    "report.html.\n\n"
    "The samplers draw from p(x) exp(lambda * reward(x)); best-of-N only looks for the highest "
    "lambda * reward. A reward may be a black box: its gradient is never used."
)
_ALIGN_EXAMPLES = (
    "Examples: pyro-twist align emoji -c people -r green;  pyro-twist align emoji -c all "
    "-r compressible --strength 2;  pyro-twist align digits -c 3 -r my_reward.py:score;  "
    "pyro-twist align molecules -r qed;  pyro-twist align text -r sentiment;  pyro-twist align "
    "emoji-text --prompt 'red apple' -r fidelity"
)


@app.command(help=_ALIGN_HELP, epilog=_ALIGN_EXAMPLES)
def align(
    model: Annotated[
        str,
        typer.Argument(
            help="A shipped model, see 'pyro-twist models'; or a pipeline of diffusers: a folder, "
            "or owner/name on the hub.",
            show_default=True,
        ),
    ] = "emoji",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            metavar="REWARD",
            help="What to align to: a name ('pyro-twist rewards' lists them), with options as in "
            "compressible:quality=50 or colour:orange; class:NAME, the log-probability of a class; "
            "or a function of your own, as package.module:function or file.py:function, which "
            "takes images of shape (B, C, H, W) in [0, 1], or a list of B strings, and returns B "
            "numbers. Repeat it to add rewards up.",
            show_default="red; bright for digits, qed for molecules, sentiment for text, pickscore "
            "for pipelines",
            rich_help_panel=WHAT,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            metavar="CLASS",
            help="Sample this class: its name, part of it, or its number; 'all' for all. Repeat "
            "it, or use commas, for several, each with its own particles.",
            show_default="any class",
            rich_help_panel=WHAT,
        ),
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            "--strength",
            metavar="SD",
            help="How far to tilt: lambda is this many over the standard deviation of the reward "
            "under the model, measured on 64 samples or more, of a pipeline on 16 of each prompt. "
            "Once, or once for each reward.",
            show_default="3",
            rich_help_panel=WHAT,
        ),
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            metavar="LAMBDA",
            help="Set lambda itself instead, in units of 1 / reward. Once, or once for each "
            "reward.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="For pipelines: what to draw; repeat it for several prompts, each with a folder "
            "of its own. For text: its beginning, with _ for a free word piece. For antibodies: "
            "the sequence, with ? at free positions.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Strength of classifier-free guidance towards class or prompt; 1 is none.",
            show_default="what the model's card, or the pipeline, recommends",
            rich_help_panel=WHAT,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            help="Run only this method, and others by repeating it: see 'pyro-twist methods'.",
            show_default="the usual ones",
            rich_help_panel=HOW,
        ),
    ] = None,
    particles: Annotated[
        int,
        typer.Option(
            "--particles",
            "-n",
            metavar="N",
            help="Particles of each class, for every method alike.",
            rich_help_panel=HOW,
        ),
    ] = 16,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            help="Steps of the reverse process, 1 to 1000.",
            show_default="the model's usual number, 50 for images",
            rich_help_panel=HOW,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="For images: ddpm, or ddim with eta = 1; for pipelines also euler-ancestral.",
            show_default="ddpm; a pipeline's own where it has noise",
            rich_help_panel=HOW,
        ),
    ] = None,
    resampling: Annotated[
        str,
        typer.Option(
            help="systematic, stratified, multinomial, residual, ssp or none.",
            rich_help_panel=HOW,
        ),
    ] = "systematic",
    ess_threshold: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Resample when the effective sample size falls below this share of the "
            "particles: 0 never, 1 always.",
            rich_help_panel=HOW,
        ),
    ] = 0.5,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS",
            help="Samples per call of the network, to save memory.",
            show_default="all",
            rich_help_panel=HOW,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What guidance leads away from.", rich_help_panel=PIPELINES
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="REWARD",
            help="A reward that is measured, not optimised, to see whether another is exploited.",
            show_default="none; a shipped model's own",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Height of images.",
            show_default="usual",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Width of images.",
            show_default="usual",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    lookahead_decoder: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A tiny autoencoder for look-aheads, such as madebyollin/taesd; final samples are "
            "decoded and scored in full.",
            show_default="the pipeline's own",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to run, such as cuda or cpu.",
            show_default="cuda where there is one",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the network: float32, bfloat16 or float16. Densities are in float32 "
            "and weights in float64 all the same.",
            show_default="bfloat16 on a GPU, else float32",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Every method's randomness depends on it alone; lambda does not.",
            rich_help_panel=RUN,
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where results go; those of an earlier run there are replaced, but for prompts "
            "that it had finished with the same options. A folder with other files is refused.",
            show_default="results/align, or results/ and the name of the pipeline",
            rich_help_panel=RUN,
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="Print where the results are, nothing else.", rich_help_panel=RUN
        ),
    ] = False,
) -> None:
    """Sample a model tilted by a reward, with several methods at equal budget."""
    given: dict[str, Any] = {
        "rewards": tuple(reward or ()),
        "classes": tuple(classes or ()),
        "methods": tuple(method or ()),
        "scales": tuple(scale or ()),
        "strengths": tuple(strength or (3.0,)),
        "guidance": guidance,
        "particles": particles,
        "steps": steps,
        "scheduler": scheduler,
        "seed": seed,
        "resampling": resampling,
        "ess_threshold": ess_threshold,
        "chunk_size": chunk_size,
        "negative_prompt": negative_prompt,
        "judge": judge,
        "height": height,
        "width": width,
        "lookahead_decoder": lookahead_decoder,
        "device": device,
        "dtype": dtype,
        **({} if out is None else {"out": out}),
    }
    if scale and strength:
        complain("--scale sets lambda and --strength derives it; give only one of them")
        raise typer.Exit(WRONG_OPTION)
    from pyro_twist.cli.aligning import align_command

    raise typer.Exit(align_command(model, given, tuple(prompt or ()), quiet))


_COMPARE_HELP = (
    "Compare algorithms on one model: the same trajectories for each, several seeds.\n\n"
    "Runs every algorithm that fits the model, or those that are named, prints means with 95 % "
    "intervals, and writes the rows, the table and a plot. A run that was stopped goes on where it "
    "was: rows that are in the folder already are not computed again."
)
_COMPARE_EXAMPLES = (
    "Examples: pyro-twist compare digits -r bright -n 16 --seeds 5;  pyro-twist compare molecules "
    "-r qed -m fk -m tri-tsmc -m tree-search"
)


@app.command(help=_COMPARE_HELP, epilog=_COMPARE_EXAMPLES)
def compare(
    model: Annotated[
        str, typer.Argument(help="A shipped model, or a pipeline, as for 'pyro-twist align'.")
    ],
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            "-r",
            metavar="REWARD",
            help="What to align to, as for 'pyro-twist align'. Repeat it to add rewards up.",
            show_default="the model's usual one",
            rich_help_panel=WHAT,
        ),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class",
            "-c",
            metavar="CLASS",
            help="Sample this class; with several, by commas, or 'all', figures are their means.",
            show_default="any class",
            rich_help_panel=WHAT,
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            metavar="SD",
            help="Lambda is this many over the standard deviation of the reward under the model.",
            rich_help_panel=WHAT,
        ),
    ] = 3.0,
    scale: Annotated[
        float | None,
        typer.Option(metavar="LAMBDA", help="Set lambda itself instead.", rich_help_panel=WHAT),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="As for 'pyro-twist align', but one.", rich_help_panel=WHAT
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            help="Compare this algorithm, and others by repeating it: see 'pyro-twist methods'.",
            show_default="all that fit",
            rich_help_panel=HOW,
        ),
    ] = None,
    budget: Annotated[
        int,
        typer.Option(
            "--budget",
            "-n",
            metavar="N",
            help="Trajectories of the denoiser for each algorithm.",
            rich_help_panel=HOW,
        ),
    ] = 16,
    seeds: Annotated[
        int, typer.Option(metavar="K", help="The number of seeds.", rich_help_panel=HOW)
    ] = 5,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            help="Steps of the reverse process.",
            show_default="the model's usual number",
            rich_help_panel=HOW,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Where results go.", rich_help_panel=RUN
        ),
    ] = Path("results/compare-methods"),
) -> None:
    """Compare algorithms on one model."""
    given: dict[str, Any] = {
        "rewards": tuple(reward or ()),
        "classes": (class_name,) if class_name else (),
        "prompt": prompt,
        "scales": () if scale is None else (scale,),
        "strengths": (strength,),
        "steps": steps,
        "out": out,
    }
    from pyro_twist.cli.comparing import compare_command

    raise typer.Exit(compare_command(model, given, tuple(method or ()), budget, seeds))


@app.command()
def models() -> None:
    """List the models that can be aligned, and their classes."""
    from pyro_twist.cli.listing import print_models

    print_models()


@app.command()
def rewards(
    model: Annotated[str, typer.Argument(help="The model they are for.")] = "emoji",
) -> None:
    """List the rewards that have a name."""
    from pyro_twist.cli.listing import print_rewards

    raise typer.Exit(print_rewards(model))


@app.command()
def methods() -> None:
    """List the methods, and what each returns."""
    from pyro_twist.cli.listing import print_methods

    print_methods()

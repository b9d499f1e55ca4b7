"""The command `sample`: text from a checkpoint."""

import warnings
from pathlib import Path

import torch

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, building
from experiments.core.loading import checkpoint_in, load_task
from experiments.tasks import LanguageModelling


def main(invocation: Invocation) -> None:
    """Print the prompt and what the checkpoint's network writes after it.

    Raises ExperimentError for a file that is no checkpoint of a language model, or a prompt with unknown symbols.
    """
    options = _parser().parse_args(invocation.argv[1:])
    checkpoint = checkpoint_in(options.checkpoint)
    task = load_task(checkpoint)
    if not isinstance(task, LanguageModelling):
        raise ExperimentError(f"{checkpoint}: the checkpoint of a {type(task).__name__}, which writes no text.")
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        with building(f"sample: the generator of seed {options.seed}"):
            generator.manual_seed(options.seed)
    if options.unk and (task.vocabulary is None or task.vocabulary.unknown is None):
        warnings.warn("--unk: no effect, this network writes no words.", stacklevel=2)
    print(task.text(options.prompt, options.length, options.temperature, options.top_k, generator, options.unk))


def _parser() -> OptionParser:
    parser = OptionParser(prog="python -m experiments sample", description="Text from a checkpoint.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="the text to go on from; of words: with spaces between them")
    parser.add_argument("--length", type=int, default=500, help="characters, bytes or words to write (500)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: safer text; 0: the likeliest (1.0)")
    parser.add_argument("--top_k", type=int, default=None, help="draw from the K likeliest only (all)")
    parser.add_argument("--unk", action="store_true", help="let <unk>, any word outside the vocabulary, be drawn too")
    parser.add_argument(
        "--seed", type=int, default=None, help="the same seed gives the same text (a new one each time)"
    )
    return parser

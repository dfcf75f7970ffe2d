"""`ebt-vision generate`: continue a text, token by token."""

import argparse
import time
from typing import TYPE_CHECKING

from ebt_vision.commands.console import duration, say
from ebt_vision.core.arguments import count, name, not_negative, whole_number

if TYPE_CHECKING:
    from ebt_vision.data.tokenizer import Tokenizer
    from ebt_vision.text.generation import GeneratedToken

STEPS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.description = "Continue PROMPT with a text model. An EBT thinks about every token."
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", metavar="NAME_OR_PATH", type=name, help="a shipped name, a folder or hub:OWNER/NAME")
    parser.add_argument("--tokens", metavar="N", type=count, default=200, help="maximum number of new tokens (default 200)")
    parser.add_argument("--steps", metavar="N", type=count, help=f"thinking steps per token (default {STEPS})")
    parser.add_argument(
        "--candidates", metavar="N", type=count, default=1, help="think N times per token and keep the lowest energy"
    )
    parser.add_argument(
        "--tolerance",
        metavar="T",
        type=not_negative,
        help="stop when the gain of a step falls below this fraction of the first",
    )
    parser.add_argument("--langevin", metavar="STD", type=not_negative, default=0.0, help="noise on the logits at every step")
    parser.add_argument("--temperature", metavar="T", type=not_negative, default=1.0, help="0 selects the most likely token")
    parser.add_argument("--top-p", metavar="P", type=not_negative, help="sample from this share of the probability (default 1)")
    parser.add_argument("--seed", metavar="S", type=whole_number, default=0, help="seed of all draws (default 0)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print one line per token: energies by step, probability, runner-up, and the choice after one step",
    )
    parser.add_argument("--tokenizer", metavar="FILE", type=name, default="bytes", help="a tokenizer.json (default: bytes)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest available)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ebt_vision.core.thinking_results import ThinkingError
    from ebt_vision.data.tokenizer import load_tokenizer
    from ebt_vision.models.checkpoint import default_pretrained, load_pretrained, program_device
    from ebt_vision.text.generation import GenerateOptions, generate

    options = GenerateOptions(
        num_tokens=args.tokens,
        num_steps=args.steps or STEPS,
        num_candidates=args.candidates,
        tolerance=args.tolerance,
        langevin_std=args.langevin,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
        explain=args.explain,
    )
    tokenizer = load_tokenizer(args.tokenizer)
    model = load_pretrained(args.model or default_pretrained("causal_text_ebt"), device=program_device(args.device))
    _check_options(model.model_type, args)
    start, num_tokens, text = time.perf_counter(), 0, ""
    if args.explain:
        print(f"{'token':8} {'probability':>11}  {'runner-up':16} {'after one step':16} energies by step", flush=True)
    energies: list[float] = []
    try:
        for token in generate(model, tokenizer, args.prompt, options):
            if args.explain:
                print(explanation_line(token, tokenizer), flush=True)
            else:
                print(args.prompt * (num_tokens == 0) + token.text, end="", flush=True)
            text += token.text
            num_tokens += 1
            if token.energy is not None:
                energies.append(token.energy)
    except ThinkingError as error:
        raise ValueError(f"{error}; or use another --seed") from error
    finally:
        if num_tokens:
            print(args.prompt + text if args.explain else "", flush=True)
    energy = f", mean energy {sum(energies) / len(energies):.3f}" if energies else ""
    say(f"{num_tokens} tokens in {duration(time.perf_counter() - start)}{energy}")
    return 0


def explanation_line(token: "GeneratedToken", tokenizer: "Tokenizer") -> str:
    """Return one line of --explain: the token, its probability, the runner-up, the choice after one step, and the energies."""
    found = token.explanation
    assert found is not None

    def shown(number: int) -> str:
        return "end" if number == tokenizer.boundary else repr(tokenizer.decode([number]))

    first = "the same" if found.first_choice == token.token else shown(found.first_choice)
    energies = " ".join(f"{energy:.2f}" for energy in found.energies)
    runner_up = f"{shown(found.runner_up)} {found.runner_up_probability:.3f}"
    first += f" ({found.first_probability:.3f})"
    return f"{shown(token.token):8} {found.probability:11.3f}  {runner_up:16} {first:16} {energies}"


def _check_options(model_type: str, args: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect with the model or with another option."""
    if args.temperature == 0 and args.top_p is not None:
        raise ValueError("--top-p has no effect at --temperature 0, which selects the most likely token; remove one of them")
    if model_type != "causal_transformer":
        return
    thinking = {"--steps": args.steps, "--tolerance": args.tolerance, "--langevin": args.langevin}
    thinking |= {"--candidates": args.candidates - 1, "--explain": args.explain}
    for option, value in thinking.items():
        if value:
            raise ValueError(f"{option} has no effect on a {model_type}, which does not think; leave it out")

"""The `lora-jax` command: one table of subcommands, each imported only when it is asked for.

To add a command, add one line to `COMMANDS`. Its target is a function whose parameters become arguments
(those without a default become positional), or a function of one dataclass, whose fields become options:
nested dataclasses give dotted options (`--optim.lr 1e-3`). Every command gets `--config file.yaml`
(command-line values override it) and `--print_config`. `--flag` alone means `--flag true`, and dashes in
option names are read as underscores. The help texts come from the `Args:` section of the docstring.

A `ValueError`, `OSError` or `ImportError` is the user's to mend: it ends as one line and exit status 2
(set `LORA_JAX_TRACEBACK=1` to see where it came from). Anything else is our fault and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Command(NamedTuple):
    target: str  # "module:function"
    help: str
    defaults: str = ""  # "module:function" from the words of the command line to defaults that depend on them


_TASK_DEFAULTS = "lora_jax.cli.training.config_files:task_defaults"
COMMANDS: dict[str, Command] = {
    "train": Command("lora_jax.cli.train:train", "fine-tune a model with LoRA on real text", _TASK_DEFAULTS),
    "plan": Command("lora_jax.cli.plan:plan", "show what a configuration adapts, and why not the rest", _TASK_DEFAULTS),
    "eval": Command("lora_jax.cli.evaluate:evaluate", "measure a run with and without its adapter"),
    "generate": Command("lora_jax.cli.generate:generate", "continue a text with a language model and its adapter"),
    "export": Command("lora_jax.cli.export:export", "convert an adapter between orbax checkpoint and PEFT directory"),
    "inspect": Command("lora_jax.cli.inspect:inspect", "show what a PEFT adapter directory holds, layer by layer"),
    "diff": Command("lora_jax.cli.diff:diff", "compare two PEFT adapter directories, module by module"),
    "tune": Command("lora_jax.cli.tune:tune", "measure which kernels are the fastest on the GPU here, and keep it"),
    "merge": Command("lora_jax.cli.merge:merge", "merge a PEFT LoRA adapter into a Hugging Face base directory"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    **Arguments:** `argv`: the words after `lora-jax`; `sys.argv[1:]` if None.

    **Returns:** the exit status: 0, what the command returned, 2 for an error the user can mend, or 130 when
    interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lora-jax {version('lora-jax')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return _fail("lora-jax", f"there is no command `{name}`{_closest(name, COMMANDS)}; see `lora-jax --help`")
    try:
        return _run(name, rest)
    except SystemExit as stop:  # argparse ends --help and --print_config this way
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # `lora-jax inspect ... | head`: the reader has had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the interpreter flushes stdout once more at exit)
        return 0
    except KeyboardInterrupt:
        return _fail(f"lora-jax {name}", "interrupted", status=130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LORA_JAX_TRACEBACK"):
            raise
        return _fail(f"lora-jax {name}", f"error: {error}")


def _run(name: str, words: Sequence[str]) -> int:
    """Parses `words` for the command `name` and calls it."""
    from argparse import ArgumentError
    from importlib import import_module

    def load(target: str) -> Callable[..., Any]:
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)

    parser, call = _parser(name, load(COMMANDS[name].target))
    if COMMANDS[name].defaults:
        parser.set_defaults(load(COMMANDS[name].defaults)(words))
    defaults = dict(parser.get_defaults().items())
    try:
        parsed = parser.parse_args(_normalise(words, defaults))
    except ArgumentError as error:
        message = str(error)
        if message.startswith("unrecognized arguments: --"):
            message += _closest(message.split()[2].lstrip("-").partition("=")[0], defaults)
        return _fail(f"lora-jax {name}", f"error: {message} (see `lora-jax {name} --help`)")
    parsed.pop("config", None)
    try:
        values = vars(parser.instantiate(parsed))
    except TypeError as error:  # a dataclass refuses a value of the user's
        raise ValueError(str(error)) from error
    status = call(**values)
    return 0 if status is None else int(status)


def _parser(name: str, function: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """A parser for `function`, and what to call with the parsed values."""
    import dataclasses
    import inspect
    from typing import get_type_hints

    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog=f"lora-jax {name}",
        description=(inspect.getdoc(function) or "").partition("\n\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it")
    parameters = list(inspect.signature(function).parameters)
    kind = get_type_hints(function)[parameters[0]] if len(parameters) == 1 else None
    if not dataclasses.is_dataclass(kind):
        parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
        return parser, function
    assert isinstance(kind, type)
    parser.add_class_arguments(kind, as_group=False, fail_untyped=True)
    _explain_fields(parser, kind)
    return parser, lambda **values: function(kind(**values))


def _explain_fields(parser: Any, kind: type) -> None:
    """Help for options whose dataclass lists its `**Fields:**`, which jsonargparse does not read."""
    import re
    from typing import get_type_hints

    for group, nested in get_type_hints(kind).items():
        text = (getattr(nested, "__doc__", None) or "").partition("**Fields:**")[2].partition("**Raises:**")[0]
        for names, told in re.findall(r"^ *- ((?:`\w+`(?:, )?)+): (.*?)(?=^ *- |\Z)", text, re.M | re.S):
            for name in re.findall(r"\w+", names):
                for action in parser._actions:
                    if action.dest == f"{group}.{name}" and not action.help:
                        action.help = " ".join(told.replace("`", "").replace("%", "%%").split())


def _normalise(words: Sequence[str], defaults: dict[str, Any]) -> list[str]:
    """Reads `--dry-run` as `--dry_run`, and a yes-or-no option without a value as `true`."""
    out: list[str] = []
    for i, word in enumerate(words):
        if word == "--":
            return out + list(words[i:])
        name, equals, value = word.removeprefix("--").partition("=")
        plain = name.replace("-", "_")
        if word.startswith("--") and (plain in defaults or plain == "print_config"):
            name = plain
            following = words[i + 1].lower() if i + 1 < len(words) else ""
            if not equals and isinstance(defaults.get(name), bool) and following not in ("true", "false"):
                equals, value = "=", "true"
            word = f"--{name}{equals}{value}"
        out.append(word)
    return out


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: lora-jax [-h] [--version] COMMAND ...\n\n"
        f"Low-rank adapters for Flax models, exchanged with PyTorch.\n\ncommands:\n{rows}\n\n"
        "`lora-jax COMMAND --help` lists a command's options."
    )


def _closest(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _fail(who: str, message: str, status: int = 2) -> int:
    print(f"{who}: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: str) -> str:
    """A message as one line; indented lines are a list, of which the first few stand in full."""
    from itertools import groupby

    from lora_jax.cli._show import listed

    lines = [line for line in message.splitlines() if line.strip()]
    out = []
    for is_list, group in groupby(lines, key=lambda line: line[:1].isspace()):
        texts = [" ".join(line.split()) for line in group]
        out.append(listed(texts) if is_list else " ".join(texts))
    return " ".join(out)

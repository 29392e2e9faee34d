"""The command line: one file per verb, imported only when that verb is called.

A verb is a plain function: its signature is the command's, its docstring the help (``Args:`` the options, ``Examples:`` the
examples), its result the exit code. Nothing here or at the top of a verb's file may import torch, so that help is immediate.

Exit codes: 0 done; 1 a check failed (``verify``, ``zoo --check``, ``eval`` below its threshold); 2 the user can mend it, and one line
says how; 3 a fault of mmtp itself; 130 interrupted; 141 the reader of our output went away.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

CHECK_FAILED, USER_ERROR, INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141

# verb: (function, what the list of verbs says of it)
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("mmtp.cli.demo:demo", "The whole path on real pictures and questions, in minutes; writes a report."),
    "tokenize": ("mmtp.cli.tokenize:tokenize", "Turn pictures or text into shards of tokens."),
    "decode": ("mmtp.cli.decode:decode", "Turn shards of tokens back into pictures and text."),
    "inspect": ("mmtp.cli.inspect:inspect", "Show what a shard, a data set or a saved folder holds."),
    "verify": ("mmtp.cli.verify:verify", "Check every byte of a data set."),
    "teach": ("mmtp.cli.teach:teach", "Ask frozen models about a data set, and keep what they say for training."),
    "train": ("mmtp.cli.train:train", "Train a tokenizer or a model from a recipe."),
    "ngrams": ("mmtp.cli.ngrams:ngrams", "Count which text follows which, for a model's drafts of words."),
    "refiner": ("mmtp.cli.refiner:refiner", "Make a small layer by which a model drafts, from what it writes."),
    "generate": ("mmtp.cli.generate:generate", "Answer a question about a picture, or draw one from words."),
    "eval": ("mmtp.cli.eval:eval", "Measure a tokenizer or a model."),
    "bench": ("mmtp.cli.bench:bench", "Time plain and speculative decoding side by side."),
    "doctor": ("mmtp.cli.doctor:doctor", "Find out what may be wrong with a model on this machine."),
    "export": ("mmtp.cli.export:export", "Write a model as a checkpoint of transformers."),
    "zoo": ("mmtp.cli.zoo:zoo", "List, show and check the trained tokenizers and models that come along."),
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs a command line and leaves with its exit code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Runs a command line and returns its exit code; errors become one line on stderr."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    debug = "--debug" in own
    argv = [a for a in own if a != "--debug"] + argv[len(own) :]
    try:
        code = _dispatch(argv, bool({"--help", "-h"} & set(own)))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more on its way out
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if (message := _user_message(error)) is not None:
            return _fail(f"error: {message}", USER_ERROR)
        hint = "" if debug else " (a fault of mmtp; run again with --debug for the traceback)"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", INTERNAL_ERROR)


def load_verb(name: str) -> Callable[..., Any]:
    """Imports the function behind a verb."""
    module, _, attribute = VERBS[name][0].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _dispatch(argv: list[str], wants_help: bool) -> int:
    # Help and version are written without cyclopts, whose import alone takes most of the 300 ms that help may take.
    verb = argv[0] if argv else None
    if verb in VERBS and wants_help:
        from mmtp.cli.help import verb_help

        print(verb_help(verb, load_verb(verb)), end="")
    elif verb in VERBS:
        result = parser(verb)(argv)
        return result if type(result) is int else 0
    elif verb is None or wants_help:
        from mmtp.cli.help import root_help

        print(root_help({name: line for name, (_, line) in VERBS.items()}), end="")
    elif verb == "--version":
        from mmtp import __version__

        print(__version__)
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(VERBS)}"
        return _fail(f"error: no verb is called {verb!r}; {hint}", USER_ERROR)
    return 0


def parser(verb: str) -> Any:
    """The cyclopts application that reads a verb's arguments and calls it."""
    from cyclopts import App, Parameter

    app = App(
        name="mmtp",
        version_flags=(),
        help_flags=(),
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    app.command(load_verb(verb), name=verb, default_parameter=Parameter(negative_iterable="", negative_none=""))
    return app


def _user_message(error: Exception) -> str | None:
    """What a user can do about an error, or None where the fault is ours."""
    if type(error).__module__.startswith("cyclopts"):
        return f"{error} (mmtp VERB --help shows examples)"
    types = sys.modules.get("mmtp.types")
    if types is not None and isinstance(error, types.MmtpError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{where}the disk is full; what is written so far is kept: make room and run the same command again"
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; lower the batch size"
    return None


def _fail(message: str, code: int) -> int:
    print("mmtp: " + " ".join(message.split()), file=sys.stderr)
    return code

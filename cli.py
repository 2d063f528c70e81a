"""Command lines: a dataclass becomes flags, and a user's mistake becomes one line.

Every script declares its options once, as a dataclass whose trailing comments are the help texts:

    @dataclass
    class TrainConfig:
        steps: int = 600            # optimizer steps
        out: str = "runs/toy"       # folder for log, checkpoints and plots
        compile: bool = False       # torch.compile the model

    config = parse_config(TrainConfig)          # --steps 600 --out runs/toy --compile / --no-compile

`int`, `float`, `str`, `bool`, `X | None` and `Literal[...]` (choices) are all that is needed. The alternative, one
argparse call per option, says everything twice and lets the help drift away from the default.

`run` also tells the C library to keep freed memory: a training step frees and asks again for the same megabytes some
hundred times, and giving them back to the kernel each time made a toy step several times slower (page faults; LOG.md).

A mistake of the person at the keyboard (path, flag, broken file) is raised as `UserError` with one line that holds the
value, what is wrong and the remedy; `run` prints it to stderr and exits with status 2. A mistake of the programmer is
an `assert`, and keeps its traceback.
"""

import argparse
import ctypes
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing


class UserError(Exception):
    """One line for the user: the offending value, what is wrong with it, what to do."""

    status = 2  # of the process that it ends


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line on stderr and exit status 2, with the nearest flag where one was mistyped."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"{unknown[1]}: no such flag" + (f"; did you mean {near[0]}?" if near else "; --help lists them")
        self.exit(2, f"{self.prog}: error: {message}\n")


def _field_help(config_class) -> dict[str, str]:
    """{field name: the comment behind it in the source}."""
    lines = inspect.getsource(config_class).splitlines()
    found = (re.match(r"\s+(\w+)\s*:[^#]*#\s*(.*)", line) for line in lines)
    return {m[1]: m[2].replace("%", "%%") for m in found if m}


def parse_config(config_class, argv: list[str] | None = None, positional: str | None = None):
    """An instance of the dataclass `config_class`, filled from `argv` (default: sys.argv[1:]).

    Field `a_b` becomes `--a-b`; the field named `positional`, if any, takes the words without a flag, joined by spaces.
    Exits with status 2 and one line on a bad flag or value.
    """
    parser = _Parser(description=(config_class.__doc__ or "").strip(), allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    help_of, hints = _field_help(config_class), typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # "X | None" is read as X
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        options = dict(default=field.default, help=help_of.get(field.name, " "))
        if field.name == positional:
            parser.add_argument(field.name, nargs="*", **options)
        elif kind is bool:
            parser.add_argument("--" + field.name.replace("_", "-"), action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            parser.add_argument("--" + field.name.replace("_", "-"), choices=choices, type=type(choices[0]), **options)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), type=kind, metavar=kind.__name__, **options)
    values = vars(parser.parse_args(argv))
    if positional and isinstance(values[positional], list):
        values[positional] = " ".join(values[positional])
    return config_class(**values)


def run(main) -> None:
    """Call `main()`; a UserError ends the process with its one line and status 2, Ctrl-C with status 130.

    A terminal that cannot show a character (LC_ALL=C) gets its code instead: no caption or "β" may end a run.
    """
    _keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(_print_error(f"error: {error}", error.status))
    except KeyboardInterrupt:
        sys.exit(_print_error("interrupted", 130))


def _keep_freed_memory() -> None:
    """glibc only: serve large blocks from the heap (no mmap), never trim it, grow it by 64 MiB. See mallopt(3)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)


def give_back_memory() -> None:
    """glibc only: return freed memory to the kernel, once, after work that took much more than what follows."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _print_error(line: str, status: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return status


@dataclasses.dataclass
class _Example:
    """The command line of the example above."""

    steps: int = 600      # optimizer steps
    compile: bool = False  # torch.compile the model


if __name__ == "__main__":
    run(lambda: print(parse_config(_Example)))

"""The ground that all stand on: flags, a mistake in one line, files that are whole or not there.

Every script declares its options once, as a dataclass whose trailing comments are the help texts:

    @dataclass
    class TrainConfig:
        steps: int = 600            # optimizer steps
        compile: bool = False       # torch.compile the model

    config = parse_config(TrainConfig)          # --steps 600 --compile / --no-compile

A mistake of the person at the keyboard (path, flag, broken file) is raised as `UserError` with one
line that says the value, what is wrong and the remedy. `run` prints it and exits with status 2. A
mistake of the programmer is an `assert`, and keeps its traceback.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, field, is_dataclass, make_dataclass
from pathlib import Path

import tyro


class UserError(Exception):
    """One line for the user: the offending value, what is wrong with it, what to do."""

    status = 2  # of the process that it ends


def parse_config(config_class, argv: list[str] | None = None):
    """An instance of the dataclass `config_class`, filled from `argv` (default: sys.argv[1:]).

    Field `a_b` becomes `--a-b`; a field of type `tyro.conf.Positional` takes the words without a
    flag. Of a class that inherits its fields, each base is a group of `--help`: `DataFlags` is
    "data options". A bad flag or value ends the process with status 2 and says which, and which
    flag comes near.
    """
    bases = [base for base in config_class.__bases__ if is_dataclass(base)]
    if not bases:
        return tyro.cli(config_class, args=argv)

    # tyro makes a group of each nested dataclass
    groups = []
    for base in bases:
        name = base.__name__.removesuffix("Flags").lower()
        groups.append((name, tyro.conf.OmitArgPrefixes[base], field(default_factory=base)))
    nested = make_dataclass(config_class.__name__, groups)
    nested.__doc__ = config_class.__doc__

    values = {}
    for group in asdict(tyro.cli(nested, args=argv)).values():
        values |= group
    return config_class(**values)


def check_ranges(config, at_least: dict[str, float], at_most: dict[str, float]) -> None:
    """Raise UserError where a field of `config` is out of its range; None never is."""
    for name, least in at_least.items():
        value, most = getattr(config, name), at_most.get(name, 2**63)
        if value is not None and not least <= value <= most:
            flag, up_to = name.replace("_", "-"), f" and at most {most}" if name in at_most else ""
            raise UserError(f"--{flag} {value}: must be at least {least}{up_to}")


def run(main: Callable[[], None]) -> None:
    """Call `main()`.

    A UserError ends the process with its line and its status, Ctrl-C with status 130.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # a terminal that cannot show "β" (LC_ALL=C) gets its code instead: no caption may end a run
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")

    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a closed pipe shows here, not after the end
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; what Python still holds back goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def make_folder(out: Path) -> None:
    """Make a folder for output. Raises UserError where nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(
            f"{out}: cannot write there ({error.strerror}); choose another --out"
        ) from error


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and vanishes otherwise.

    So a reader sees the old file or the new one, never half of one, whenever the process is killed.
    The folder is made if it is not there. Raises UserError where the file cannot be written.
    """
    path = Path(path)
    # in the same folder, since a rename cannot cross disks; with the same suffix, since OpenCV
    # picks a format by it
    unfinished = path.with_name(f".{secrets.token_hex(8)}.unfinished{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be written ({reason}); make room or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep freed memory instead of giving it back to the kernel (Linux
    only).

    A training step frees the same megabytes some hundred times and asks for them again. Each return
    costs page faults, which made a toy step several times slower (docs/LOG.md). See mallopt(3).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)  # serve large blocks from the heap, too
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)  # grow the heap by 64 MiB at a time


def give_back_memory() -> None:
    """Return freed memory to the kernel, once, after work that took much more than what follows
    (Linux only).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)

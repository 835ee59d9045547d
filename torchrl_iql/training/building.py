"""Libraries of C++ in this folder, compiled at first use and kept beside the data.

The compiler is the one that :func:`torch.compile` takes, called without it: importing what calls it there
takes a second, and the headers of PyTorch, which these libraries do not need, ten.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from torchrl_iql.data.cache import folder, unfinished

__all__ = ["compiler", "library"]

FOLDER = "kernels"
"""In the folder of the cache."""

OPTIONS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
# None of them allows a wrong result for NaN or infinity.
OPTIONS += ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX``, else the usual one of the system.

    Raises:
        FileNotFoundError: it is not there.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    command = shlex.split(os.environ.get("CXX", usual))
    if not command or shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no C++ compiler {shlex.join(command)!r}")
    return command


def library(sources: Sequence[Path]) -> ctypes.CDLL:
    """Load what these files compile to, for this processor; compile it if that was not done before.

    Processes that need it at once wait for the first of them. Where the folder can not be written to, it
    is compiled for this process alone, with a warning.

    Raises:
        OSError, RuntimeError: there is no compiler, or it fails.
    """
    command = compiler()
    # Its version, and every instruction set that it makes use of: a folder may belong to several machines.
    about = _output([*command, *OPTIONS, "-dM", "-E", "-x", "c++", os.devnull])
    texts = [source.read_text() for source in sources]
    key = hashlib.sha256(repr((command, OPTIONS, about, texts)).encode()).hexdigest()[:20]
    path = folder() / FOLDER / f"{key}.so"
    command += [*map(str, sources), *OPTIONS, "-o"]
    found = _loaded(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _loaded(path)  # another process may have been first
            if found is not None:
                return found
            with unfinished(path) as made:
                _output([*command, str(made)])
                made.chmod(0o700)
        return ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"could not keep the compiled {path}: {error}", stacklevel=2)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, path.name)
        _output([*command, str(made)])
        return ctypes.CDLL(str(made))


def _loaded(path: Path) -> ctypes.CDLL | None:
    """Load a library that is there. In a folder of several users, only one's own is run."""
    try:
        if path.stat().st_uid != os.getuid():
            return None
        return ctypes.CDLL(str(path))
    except OSError:  # none is there, or it is damaged, or of a system with other libraries
        return None


def _output(command: Sequence[str]) -> str:
    plain = {**os.environ, "LC_ALL": "C"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"it returned {ended.returncode}"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"the compiler {command[0]} fails: {error}")
    return ended.stdout

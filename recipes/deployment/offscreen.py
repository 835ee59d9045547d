"""What MuJoCo renders with where there is no screen."""

from __future__ import annotations

import logging
import os
import sys
from ctypes.util import find_library

__all__ = ["choose"]

BACKENDS = {"egl": "EGL", "osmesa": "OSMesa"}
"""And their libraries. The first takes a GPU, if there is one."""


def choose() -> None:
    """Choose one that is installed, unless there is a screen or somebody has chosen, by ``MUJOCO_GL``.

    Gymnasium would take the one of screens. It has to be done before MuJoCo is imported.
    """
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # of what would make it faster
    has_screen = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not sys.platform.startswith("linux") or has_screen:
        return
    found = next((name for name, library in BACKENDS.items() if find_library(library)), None)
    if found is not None:
        os.environ.setdefault("MUJOCO_GL", found)

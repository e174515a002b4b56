"""Symbols for consistent feedback: `step`, `error`, `warning`, `ok`, `info`.

Read as attributes (`emoji.ok`). Where stdout is no terminal, or cannot encode them, they are plain words.
"""

from __future__ import annotations

import sys

_SYMBOLS = {
    "step": ("🔹", "--"),
    "error": ("❌", "error:"),
    "warning": ("⚠️", "warning:"),
    "ok": ("✅", "ok:"),
    "info": ("ℹ️", "info:"),
}


def __getattr__(name: str) -> str:
    if name not in _SYMBOLS:
        raise AttributeError(f"common.emoji has no {name!r}; it has {', '.join(_SYMBOLS)}")
    fancy, plain = _SYMBOLS[name]
    stdout = sys.stdout  # None where it is closed
    encoding = (getattr(stdout, "encoding", None) or "").lower().replace("-", "")
    return fancy if stdout is not None and stdout.isatty() and encoding == "utf8" else plain

"""A page to play with checkpoints: `python -m common.play`. It has no mathematics of its own.

`runs` finds the checkpoints, `wishes` checks what a browser asks for, `answers` computes it with the project's own
functions, `worker` is the one thread that does so, and `server` speaks with the browsers.
"""

"""Measurement: `python -m bench list | run | compile | campaign | report | scale`; docs/performance.md is its
result.

`registry` says what an entry is; every op or job is one file here that defines `ENTRIES`. `runner` times them
in fresh processes, `compile` reads the kernels' machine code where there is no GPU, `campaign` runs all of it
on a GPU machine, `report` renders the results.
"""

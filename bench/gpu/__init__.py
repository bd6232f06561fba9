"""What a GPU says about this library, in one run that nothing stops.

    python -m bench.gpu                          # all stages, 560 s; results in $OUT, or runs/gpu/<time>
    python -m bench.gpu --resume FOLDER          # goes on with what another run had no time for
    python -m bench.gpu --rehearse               # the same without a GPU, on small shapes, with failures put in
    python -m bench.gpu report FOLDER...         # bench/results/<device>: raw files, tables, plots

Stages, each resting on those before: `environment` (device, tools, the library), `smoke` (every operator and loss on
every backend against float64), `syncs` (nothing waits for the device), `graphs` (capture and replay), `kernels` and
`comparisons` (times, of what agreed with float64 alone), `overhead` (of the host), `tests` (tests/gpu), `sanitizer`
(compute-sanitizer, counters of ncu).

A stage is a list of cases. Cases run in processes that a supervisor watches: an exception, a crash, a hang or a dead
device costs the case alone. Every result is on the disk before the next case starts.
"""

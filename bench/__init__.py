"""Side-by-side measurements: alternatives run in one process, interleaved, and compared as ratios.

    python -m bench decode --quick

A bench is a module here with a docstring and a function `measure(options, progress) -> Findings`; its name stands in
`bench.__main__.BENCHES`.
"""

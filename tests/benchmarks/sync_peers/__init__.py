"""The processes that `tests.benchmarks.sync` measures: two of a kind at a time, each driven by JSON lines on its standard input."""

"""What the benchmarks share: processes, clocks, tables and files."""

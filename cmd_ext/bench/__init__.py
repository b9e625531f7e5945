"""Benchmarks: python -m cmd_ext.bench. Results that were measured are kept in bench/results with their command."""

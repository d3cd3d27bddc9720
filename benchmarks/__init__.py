"""Benchmarks: ours and the peers in turn, in one run, with the limit beside each figure."""

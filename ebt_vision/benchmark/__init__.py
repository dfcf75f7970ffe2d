"""The parts of the benchmark programs in eval/."""

"""Timed benchmarks of the model: workloads, implementations, floors. `benchmarks/` and `bench --gpu` use them."""

"""Parts of the offloading benchmarks: policies, costs, arms, report."""

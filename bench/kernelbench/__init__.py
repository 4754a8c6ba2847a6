"""The benchmark of the attention kernels: `scripts/bench kernels`."""

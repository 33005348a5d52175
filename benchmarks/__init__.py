"""The benchmarks: Fray against the floor it stands on and against its peers. `README.md` says how to read them."""

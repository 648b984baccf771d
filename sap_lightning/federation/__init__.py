"""Who acts: clients that train once, the server that merges and measures, sweeps of it."""

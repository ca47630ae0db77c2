"""The parent's side of a pool: its public face, futures, hooks, and the cluster that it runs."""

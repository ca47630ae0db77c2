"""What runs on a runner: the worker plugin, and the execution of calls."""

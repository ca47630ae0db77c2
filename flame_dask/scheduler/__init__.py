"""The host of the pool core: a scheduler plugin."""

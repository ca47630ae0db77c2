"""Where runners live: one small adapter a family of Dask clusters."""

"""Where runners live: one small adapter a family of Dask clusters."""

from flame_dask.backends.reap import Leftover as Leftover
from flame_dask.backends.reap import reap as reap

"""The parent's code and files, on its way to the runners (J1 to J5).

Both sides are here, and none of it knows Dask: what takes the bytes from one to the other is in
:mod:`flame_dask.scheduler.code`.
"""

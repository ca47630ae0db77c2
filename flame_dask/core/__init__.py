"""The pool core: a pure state machine.

Nothing here reads a clock, touches an event loop, logs, or knows Dask. Time comes in with each
event, effects go out as instructions, so that every rule of growing, shrinking, queueing and
deadlines is a plain synchronous test.

Reading order: :mod:`~flame_dask.core.events`, :mod:`~flame_dask.core.instructions`,
:mod:`~flame_dask.core.transitions`, :mod:`~flame_dask.core.pool` with the layers under it,
:mod:`~flame_dask.core.runner_lives`, :mod:`~flame_dask.core.call_lives` and
:mod:`~flame_dask.core.books`; then what the pool is made of:
:mod:`~flame_dask.core.calls`, :mod:`~flame_dask.core.boots` with
:mod:`~flame_dask.core.backoff`, :mod:`~flame_dask.core.fleet` with
:mod:`~flame_dask.core.policy` and :mod:`~flame_dask.core.affinity`,
:mod:`~flame_dask.core.leaving`, and under all of it
:mod:`~flame_dask.core.waiting`.
:mod:`~flame_dask.core.invariants` says what is always true of it.
"""

"""Calls and results in the form in which they travel (rules B1 and B6).

A ``Payload`` is pickled once, in the process that made it, and unpickled once, in the process that
uses it. Everything between (the scheduler, queues, retries) hands it on unopened. What is large
stays outside the pickle stream (protocol 5, PEP 574), so that 50 MB pass through without a copy.

Which pickler: the plain one is the fastest by far, but writes a class or a function of ``__main__``
as a name that means something else on a runner. So its output counts only if no such name is in
it; otherwise cloudpickle sends these by value. That is the decision that Dask makes too, with two
gaps closed: modules registered with ``cloudpickle.register_pickle_by_value`` count wherever they
occur, not only at the top, and the ``__main__`` of a process that multiprocessing spawned counts.
"""

from __future__ import annotations

import io
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import cloudpickle
from dask.sizeof import sizeof
from distributed.core import clean_exception, error_message
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from flame_dask.diagnose import Finding, diagnose_call, diagnose_value
from flame_dask.errors import FlameError, SerializationError, redact

__all__ = ["OUT_OF_BAND", "Payload", "check_exception", "pack_call", "pack_value"]

OUT_OF_BAND: Final = 64 * 1024
"""Buffers of at least so many bytes stay out of the stream; a frame apiece costs more than a copy
of a smaller one."""

_MAX_TEXT: Final = 10_000


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Payload:
    """A value in pickled form.

    It is made by ``pack_call`` and ``pack_value``, and opened with ``load``. Pickling it does not
    pickle the value again, and copies none of its large parts if the pickler takes buffers out of
    band, as that of distributed's comms does.

    Its buffers are views of the memory of the value it was made from. Whoever lets it wait while
    the owner of that memory goes on uses ``snapshot``.

    Attributes
    ----------
    data
        The pickle stream.
    buffers
        What was kept out of the stream.
    writable
        For each buffer, whether the object that is loaded from it may be written to.

    Examples
    --------
    >>> pack_value([1, 2]).load()
    [1, 2]
    """

    data: bytes | bytearray | memoryview
    buffers: tuple[memoryview, ...] = ()
    writable: tuple[bool, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its size in bytes, buffers included."""
        return len(self.data) + sum(buffer.nbytes for buffer in self.buffers)

    def load(self) -> Any:
        """Make the value.

        Returns
        -------
        Any
            The value; ``(fn, args, kwargs)`` if ``pack_call`` made this. Arrays in it may share
            the memory of the buffers, and so with each other if it is loaded twice.

        Raises
        ------
        SerializationError
            If the value can't be made here, because its module is missing, say. The original
            exception is its ``__cause__``.

        Examples
        --------
        >>> fn, args, kwargs = pack_call(divmod, (7, 2), {}).load()
        >>> fn(*args, **kwargs)
        (3, 1)
        """
        try:
            if not self.buffers:
                return pickle.loads(self.data)
            views = map(_with_access, self.buffers, self.writable)
            return pickle.loads(self.data, buffers=views)
        except (FlameError, MemoryError):
            raise
        except Exception as error:  # what a foreign constructor raises may be anything
            raise _not_loaded(error) from error

    def snapshot(self) -> Payload:
        """Copy the buffers that the owner of their memory could still change.

        Returns
        -------
        Payload
            One that holds the same value whatever happens to the original; itself where there is
            nothing to copy, as with ``bytes``.

        Examples
        --------
        >>> data = bytearray(100_000)
        >>> payload = pack_value(data).snapshot()
        >>> data[0] = 1
        >>> payload.load()[0]
        0
        """
        safe = [type(_owner(buffer)) is bytes for buffer in self.buffers]
        if all(safe):
            return self
        pairs = zip(self.buffers, safe, strict=True)
        copies = tuple([view if same else memoryview(bytearray(view)) for view, same in pairs])
        return Payload(self.data, copies, self.writable)

    def parts(self) -> tuple[bytes, list[bytes], list[bool]]:
        """Take it apart into what msgpack can carry.

        Returns
        -------
        tuple
            What ``from_parts`` takes. Buffers are copied, so this is for small values.

        Examples
        --------
        >>> len(pack_value(1).parts())
        3
        """
        return bytes(self.data), [bytes(view) for view in self.buffers], list(self.writable)

    @classmethod
    def from_parts(cls, parts: Sequence[Any]) -> Payload:
        """Put together what ``parts`` has taken apart.

        Parameters
        ----------
        parts
            What ``parts`` gave, in any kind of sequence.

        Returns
        -------
        Payload
            An equal one.

        Examples
        --------
        >>> Payload.from_parts(pack_value(1).parts()).load()
        1
        """
        data, buffers, writable = parts
        return _rebuild(data, tuple(writable), *buffers)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:  # buffers do not exist there
            return _rebuild, (bytes(self.data), self.writable, *map(bytes, self.buffers))
        # Bytes go into the stream, a buffer may stay out of it: a frame of its own for a small
        # stream would cost more than it saves.
        large = len(self.data) >= OUT_OF_BAND
        data = pickle.PickleBuffer(self.data) if large else bytes(self.data)
        return _rebuild, (data, self.writable, *map(pickle.PickleBuffer, self.buffers))

    def __repr__(self) -> str:
        # No contents: this ends up in logs (rule F4).
        return f"<Payload: {self.nbytes:,} bytes, {len(self.buffers)} out of band>"


def _rebuild(data: Any, writable: tuple[bool, ...], *buffers: Any) -> Payload:
    """Make a payload again from whatever buffers the transport delivers."""
    if type(data) is pickle.PickleBuffer:
        data = _flat(data)
    return Payload(data, tuple(map(_flat, buffers)), writable)


def _flat(buffer: Any) -> memoryview:
    """View a buffer as plain bytes; of a view, make another view of the same memory.

    A view *of a view* would do as well, but CPython before 3.11.8 and 3.12.2 crashes when its
    garbage collector takes the two apart (python/cpython#77894).
    """
    view = pickle.PickleBuffer(buffer).raw()
    owner = view.obj
    if type(owner) is memoryview and owner.c_contiguous:
        with suppress(TypeError, ValueError, NotImplementedError):  # a format that it can't cast
            return owner.cast("B")
    return view


def _with_access(buffer: memoryview, writable: bool) -> memoryview:
    """Give a buffer the access that its object had, for transports deliver what suits them.

    The stream itself says which are read-only.
    """
    # A copy can't be avoided where the transport delivers bytes, after decompression for instance.
    return memoryview(bytearray(buffer)) if writable and buffer.readonly else buffer


@sizeof.register(Payload)  # type: ignore[untyped-decorator]
def _sizeof_payload(payload: Payload) -> int:
    # Dask would count the object alone, and take 50 MB for nothing.
    return sys.getsizeof(payload) + payload.nbytes


def pack_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Payload:
    """Pickle a call (rules B1, B6).

    Parameters
    ----------
    fn
        The function. Functions of ``__main__``, closures and lambdas go by value.
    args, kwargs
        Its arguments. Large ``bytes``, ``bytearray``, ``memoryview`` and arrays are not copied.

    Returns
    -------
    Payload
        Its ``load`` gives ``(fn, args, kwargs)``.

    Raises
    ------
    SerializationError
        If something can't be pickled. It says which variable of the closure, which global, or
        which argument that is; the pickler's exception is its ``__cause__``.

    Examples
    --------
    >>> pack_call(pow, (2, 5), {"mod": 7}).load()
    (<built-in function pow>, (2, 5), {'mod': 7})
    """
    call = (
        fn,
        tuple([_wrapped(arg) if type(arg) in _RAW else arg for arg in args]),
        {name: _wrapped(arg) if type(arg) in _RAW else arg for name, arg in kwargs.items()},
    )
    by_value = type(fn) is types.FunctionType and (
        fn.__module__ in _MAINS or "<" in fn.__qualname__  # <lambda>, f.<locals>.g
    )
    try:
        return _dump(call, plain=not by_value)
    except (FlameError, MemoryError):
        raise
    except Exception as error:
        finding = diagnose_call(fn, args, kwargs, pickler=_DaskPickler)
        raise _not_packed("the call", error, finding) from error


def pack_value(value: Any) -> Payload:
    """Pickle a result (rules B1, B6).

    Parameters
    ----------
    value
        Anything. Large ``bytes``, ``bytearray``, ``memoryview`` and arrays are not copied.

    Returns
    -------
    Payload
        Its ``load`` gives the value.

    Raises
    ------
    SerializationError
        If something in it can't be pickled. It says which part that is, such as
        ``result['a'][1].conn``; the pickler's exception is its ``__cause__``.

    Examples
    --------
    >>> pack_value({"ok": True}).load()
    {'ok': True}
    """
    try:
        item = _wrapped(value) if type(value) in _RAW else value
        return _dump(item, plain=not isinstance(value, BaseException))
    except (FlameError, MemoryError):
        raise
    except Exception as error:
        finding = diagnose_value(value, pickler=_DaskPickler)
        raise _not_packed("the result", error, finding) from error


def check_exception(exc: BaseException) -> BaseException:
    """Give an exception that reaches the parent in place of one that may not (rules B1, F3).

    It is tried out, for nothing else shows whether a class unpickles again: as a ``Payload``, and
    as Dask sends what a task raised.

    Parameters
    ----------
    exc
        What a call raised.

    Returns
    -------
    BaseException
        The exception unchanged, if it survives a round trip with its type. If it does only without
        traceback and causes, these are cut off, and their text is added to it as a note; so is its
        own text if Dask loses that. Otherwise a ``SerializationError`` with its type's name, its
        text and the traceback. To be raised after the ``except`` block: within it, Python would
        make ``exc`` its context, and that is pickled with it.

    Examples
    --------
    >>> check_exception(ValueError("no such page"))
    ValueError('no such page')
    """
    failure = _trip_failure(exc)
    if failure is None:
        return exc
    story = _story(exc)
    # The type matters more than its causes, one of which may be all that hinders it. And a
    # traceback of a thousand frames, that of a RecursionError, is too deep for the pickler.
    exc.__traceback__ = exc.__cause__ = exc.__context__ = None
    failure = _trip_failure(exc)
    if failure is None:
        exc.add_note(story)
        return exc
    name = type(exc).__qualname__
    finding = diagnose_value(exc, name="exception", pickler=_DaskPickler)
    if finding is None:  # it pickles, and does not unpickle
        kind = type(failure.__cause__ or failure).__name__
        finding = Finding("its class", f"unpickling it raised {kind} (give it __reduce__)")
    error = SerializationError(f"the {name} that was raised, for {finding.part}", finding.reason)
    # In the text and not in a note, so that it is in logs too.
    error.args = (f"{error}\n\n{story}",)
    return error


def _trip_failure(exc: BaseException) -> Exception | None:
    """Send an exception to ourselves; give what went wrong."""
    try:
        back = _dump(exc, plain=False).load()
        sent: Any = error_message(exc)["exception"]
        by_dask = clean_exception(sent.data)[1]
        if not type(back) is type(by_dask) is type(exc):
            return TypeError("it comes back as something else")
        if str(by_dask) != str(exc):  # tblib, see _reduced_exception
            exc.add_note(_shortened(redact(str(exc))))
    except Exception as error:
        return error
    return None


def _story(exc: BaseException) -> str:
    """Tell an exception's text and remote traceback, of bounded length, without secrets."""
    try:
        text = "".join(traceback.format_exception(exc))
    except Exception:  # a foreign __str__ may raise anything
        text = f"{type(exc).__qualname__}: <its text can't be shown>"
    return f"Remote traceback:\n{_shortened(redact(text)).rstrip()}"


def _shortened(text: str) -> str:
    # The end of a traceback is nearest to the point where it was raised.
    return text if len(text) <= _MAX_TEXT else f"... {text[-_MAX_TEXT:]}"


_MAINS: Final = ("__main__", "__mp_main__")


def _dump(value: object, *, plain: bool) -> Payload:
    """Pickle with the first of three picklers that can; ``plain`` says whether to try the first."""
    buffers: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        view = _flat(buffer)
        if view.nbytes < OUT_OF_BAND:
            return True
        buffers.append(view)
        return False

    if plain:
        # Whatever it fails with, the next one has the last word.
        with suppress(Exception):
            data = pickle.dumps(value, protocol=5, buffer_callback=in_band)
            if not _needs_care(data):
                return _payload(data, buffers)
        buffers.clear()
    _register_spawned_main()
    try:
        with io.BytesIO() as stream:
            _Pickler(stream, 5, in_band).dump(value)
            return _payload(stream.getvalue(), buffers)
    except (FlameError, MemoryError):
        raise
    except Exception as error:
        failure = error  # raised outside of this block, or it would be in each other's context
    buffers.clear()
    with suppress(Exception), io.BytesIO() as stream:
        _DaskPickler(stream, 5, in_band).dump(value)
        return _payload(stream.getvalue(), buffers)
    raise failure


def _payload(data: bytes, buffers: list[memoryview]) -> Payload:
    return Payload(data, tuple(buffers), tuple([not view.readonly for view in buffers]))


def _needs_care(data: bytes) -> bool:
    """Tell whether plain pickle may have got something wrong; sometimes yes for no reason."""
    # Strings lie in a stream as they are, and never in two pieces. The second one is tblib's, see
    # _reduced_exception.
    if b"_main__" in data or b"unpickle_exception" in data:
        return True
    return any(name.encode() in data for name in cloudpickle.list_registry_pickle_by_value())


def _register_spawned_main() -> None:
    """Have the ``__main__`` of a process that multiprocessing spawned sent by value too.

    There it is called ``__mp_main__``, which cloudpickle takes for a module like any other.
    """
    main = sys.modules.get("__mp_main__")
    if main is not None and main.__name__ == "__mp_main__":
        cloudpickle.register_pickle_by_value(main)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """cloudpickle, with exceptions that come back whole, and code that tells where it stands."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException):
            return _reduced_exception(obj)
        if type(obj) is types.CodeType:
            return _reduced_code(obj)
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and type(reduced) is tuple and len(reduced) == 6:
            return *reduced[:5], partial(_complete_class, reduced[5])
        return reduced


class _DaskPickler(_Pickler):
    """The last resort: what Dask alone can send, such as h5py's files.

    A call that works with ``Client.submit`` works with a pool. Used for diagnosis as well, so that
    nothing is accused that could be sent.
    """

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        # distributed keeps numpy and pandas out of this, for crashes.
        if reduced is not NotImplemented or type(obj).__module__.startswith(("numpy", "pandas")):
            return reduced
        try:
            serialize = dask_serialize.dispatch(type(obj))
            deserialize = dask_deserialize.dispatch(type(obj))
        except TypeError:  # Dask has nothing for this type
            return NotImplemented
        return deserialize, serialize(obj)


def _reduced_code(code: types.CodeType) -> Any:
    """Take code apart, and keep the name of its file.

    cloudpickle 3.1.3 leaves a stand-in for it. Then a traceback has no lines of the source, and
    nothing says which of two functions of one name has failed (rule B1).
    """
    make, args = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return make, tuple([code.co_filename if _is_stand_in(arg) else arg for arg in args])


def _complete_class(complete: Callable[[type, Any], object], cls: type, state: Any) -> None:
    """Give a class that came by value what it has, unless this is where it was defined.

    A result that holds an instance of a class of ``__main__`` brings the class along. cloudpickle
    knows that it is the one which is here, and would give it the methods that have travelled: they
    see the globals of that time, not what a notebook sets later.
    """
    if not _is_at_home(cls):
        complete(cls, state)


def _is_at_home(cls: type) -> bool:
    module = vars(sys.modules.get(cls.__module__, types))
    if module.get(cls.__qualname__) is cls:
        return True
    functions = (each for each in vars(cls).values() if type(each) is types.FunctionType)
    return any(function.__globals__ is module for function in functions)


def _is_stand_in(arg: object) -> bool:
    return type(arg) is str and arg == "<dynamic-code>"


def _reduced_exception(exc: BaseException) -> Any:
    """Take an exception apart, with its chain and traceback (rule B1).

    Python calls ``type(exc)(*exc.args)`` to make it again, which fails for the classic trap: an
    ``__init__`` that takes two arguments and passes on one. tblib, with which distributed pickles
    exceptions, skips ``__init__``, and so loses what built-in ones keep outside of their
    ``__dict__``: ``SystemExit.code``, ``StopIteration.value``, the text of a ``UnicodeDecodeError``
    (its issue 87). So here only what is written in Python is skipped. Tracebacks are left to tblib.
    """
    cls = type(exc)
    reduced = exc.__reduce_ex__(5)
    if isinstance(reduced, str) or len(reduced) > 3:  # its own way, and an unusual one
        return reduced
    make, args, attributes = (*reduced, None)[:3]
    if not _is_python(cls, "__reduce__") and not _is_python(cls, "__reduce_ex__"):
        if _is_python(cls, "__init__") or _is_python(cls, "__new__"):
            make, args = _bare_exception, (cls, *args)
        slots = exc.__getstate__()
        if type(slots) is tuple:
            attributes = {**(attributes or {}), **slots[1]}
    chain = (exc.__cause__, exc.__context__, exc.__suppress_context__, exc.__traceback__)
    # As state and not as arguments: a chain may lead back to this exception.
    return make, args, (attributes, *chain), None, None, _complete_exception


def _is_python(cls: type, method: str) -> bool:
    """Tell whether a method comes from a class that a program made, not from a built-in one."""
    owner = next(base for base in cls.__mro__ if method in vars(base))
    return bool(owner.__flags__ & _HEAP_TYPE)


_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _bare_exception(cls: type[BaseException], *args: Any) -> BaseException:
    """Make an exception by way of the built-in class that it descends from."""
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    exc: BaseException = base.__new__(cls, *args)
    base.__init__(exc, *args)
    return exc


def _complete_exception(exc: Any, state: tuple[Any, ...]) -> None:
    attributes, cause, context, suppress_context, tb = state
    if attributes is not None:
        exc.__setstate__(attributes)
    exc.__cause__, exc.__context__ = cause, context
    exc.__suppress_context__ = suppress_context  # last: setting a cause sets it, too
    exc.__traceback__ = tb


_RAW: Final = frozenset({bytes, bytearray, memoryview})


class _Raw:
    """Stands for bytes in a stream, so that these can stay out of it; loads as what it stands for.

    Left to itself, pickle copies ``bytes`` and ``bytearray`` into the stream, and cloudpickle turns
    a ``memoryview`` into ``bytes``.
    """

    __slots__ = ("_reduced",)

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        self._reduced = make, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def _wrapped(value: bytes | bytearray | memoryview) -> object:
    """Wrap what is large, and each memoryview: its type is not to depend on its size."""
    if type(value) is memoryview:
        try:
            flat = pickle.PickleBuffer(value if value.c_contiguous else _copied(value))
            _as_memoryview(flat, value.format, value.shape or ())
        except (TypeError, ValueError):
            # Released, or of a format that Python can't cast to: what cloudpickle makes of it.
            return value
        return _Raw(_as_memoryview, flat, value.format, value.shape or ())
    if len(value) < OUT_OF_BAND:
        return value
    return _Raw(_as_bytes if type(value) is bytes else bytearray, pickle.PickleBuffer(value))


def _copied(view: memoryview) -> bytes | bytearray:
    """Bring a view with gaps into one piece, no more and no less writable than it is."""
    return view.tobytes() if view.readonly else bytearray(view.tobytes())


def _as_bytes(buffer: Any) -> bytes:
    """Make bytes of a buffer; of one that is the whole of a bytes object, that object."""
    view = memoryview(buffer)
    owner = _owner(view)
    return owner if type(owner) is bytes and len(owner) == view.nbytes else view.tobytes()


def _as_memoryview(buffer: Any, format: Any, shape: tuple[int, ...]) -> memoryview:
    flat = _flat(buffer)
    # An empty one can be cast in one dimension only.
    return flat.cast(format) if len(shape) == 1 else flat.cast(format, shape)


def _owner(view: memoryview) -> object:
    """Give the object whose memory it is, through views of views."""
    owner: object = view.obj
    while isinstance(owner, memoryview):
        owner = owner.obj
    return owner


def _not_packed(what: str, error: Exception, finding: Finding | None) -> SerializationError:
    """Say which part can't be pickled (rule B6), without the pickler's words.

    These hold the value's repr, which may hold a secret (rule F4). They are in the cause.
    """
    if finding is None:
        return SerializationError(
            what, f"the pickler raised {type(error).__name__} (see the cause)"
        )
    return SerializationError(*finding)


def _not_loaded(error: Exception) -> SerializationError:
    reason = f"unpickling it raised {type(error).__name__} (see the cause)"
    if isinstance(error, (ImportError, AttributeError)):
        # The usual one, and its text names just modules and names.
        reason = f"{type(error).__name__}: {error} (code_sync sends the parent's modules)"
    return SerializationError("what arrived", reason)

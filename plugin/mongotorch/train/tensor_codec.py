"""Stores modules and states as a small pickle plus one blob a storage, so that versions share what did not change.

Guarantees: no tensor is inside the pickle. What was one tensor comes back as one (tied weights stay tied), what
only has equal content stays apart, and views of one storage stay views of one storage; a lone slice of a large
storage stores its own bytes only. Blobs know no device: a model of a GPU loads on a CPU.
"""

from __future__ import annotations

import copyreg
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mongotorch.codecs import Codec, Get, Put, check_python, dumps, loads
from mongotorch.errors import CodecError
from mongotorch.tensors import leaves

SMALL_BYTES = 4096
"""Storages below this many bytes share one blob: a blob each would cost more than it could save."""
_KINDS = (Tensor, nn.Parameter)
_READERS = 2
"""Blobs that are read at once: while one is waited for or hashed, the other is transferred. More cost memory."""
_HASHERS = 2
"""Storages that are hashed at once: hashing is the larger part of encoding, and releases the GIL."""


@final
class TorchCodec(Codec):
    """`nn.Module`s, tensors, and lists, tuples and dicts that hold some.

    The record: `skeleton` (blob of the pickle), `python` (of its bytecode, or None), `tensors` (dtype, shape,
    stride, offset in elements, which storage, whether a parameter and whether it wants a gradient, its name in
    the state dict of a module), `storages` (a blob of its own and its size in bytes, or where it is among the
    small ones) and `small` (one blob of all storages below `SMALL_BYTES`).
    """

    name = "torch"

    def handles(self, value: Any) -> bool:
        """Whether it is a module or tensor, or a container that holds one."""
        return any(isinstance(part, (nn.Module, Tensor)) for part in leaves(value))

    def claims(self, part: Any) -> bool:
        """Tensors: a pickle of one holds its address, so that equal ones would differ."""
        return isinstance(part, Tensor)

    def encode(self, value: Any, put: Put, *, where: str) -> dict[str, Any]:
        """Skeleton and storages. Raises: UnsafeClosureError, CodecError; then nothing was put."""
        indices: dict[int, int] = {}
        tensors: list[Tensor] = []
        names = _names(value)

        def external(part: Any) -> int | None:
            if isinstance(part, Tensor) and part.device.type == "meta":
                raise _without_data(names.get(id(part)), where)
            if type(part) is _Bare:
                part = part.tensor
            elif not _is_plain(part) or _attributes(part):
                return None  # sparse, quantised and subclasses: they pickle as torch pickles them
            if id(part) not in indices:
                indices[id(part)] = len(tensors)
                tensors.append(part)  # kept alive, or its id could come back as another's
            return indices[id(part)]

        with torch.no_grad():
            skeleton = dumps(value, where=where, external=external, reduce=_reduce)
            records, storages = _layout(tensors, names)
            return {
                "skeleton": put(skeleton.data),
                "python": skeleton.python,
                "tensors": records,
                **_put_storages(storages, put),
            }

    def decode(self, record: Mapping[str, Any], get: Get) -> Any:
        """The value, on the CPU. Raises: PythonVersionError before reading, CodecError."""
        check_python(record["python"])
        return loads(get(record["skeleton"]), python=record["python"], external=Tensors(record, get))


@final
class Tensors:
    """The tensors of a record, on the CPU, each made once, when it is first asked for.

    Args:
        record: What `TorchCodec.encode` gave.
        get: Reads blobs; all of them are read at construction, from several threads.
    """

    def __init__(self, record: Mapping[str, Any], get: Get) -> None:
        self._record = record
        self._made: dict[int, Tensor] = {}
        self._small = get(record["small"]) if record.get("small") else b""
        kept = record["storages"]
        if sum("blob" in one for one in kept) < 2:  # threads would only be waited for
            self._storages = [self._storage(one, get) for one in kept]
            return
        with ThreadPoolExecutor(_READERS, thread_name_prefix="mongotorch-blobs") as pool:
            try:
                self._storages = list(pool.map(lambda one: self._storage(one, get), kept))
            finally:
                pool.shutdown(cancel_futures=True)  # after an error: nothing more is read

    def __call__(self, index: int) -> Tensor:
        """The tensor of an index."""
        if index not in self._made:
            self._made[index] = _rebuild(self._record["tensors"][index], self._storages)
        return self._made[index]

    def _storage(self, kept: Mapping[str, Any], get: Get) -> Tensor:
        at, small = kept.get("at", 0), self._small
        data = get(kept["blob"]) if "blob" in kept else small[at : at + kept["nbytes"]]
        # The store gives a buffer of the reader's own: the tensor lives in it, without a copy.
        own = data if isinstance(data, bytearray) else bytearray(data)
        if not own:
            return torch.empty(0, dtype=torch.uint8)
        found = torch.frombuffer(own, dtype=torch.uint8)
        # What observers of quantisation resize is small, and only memory that is torch's own can be resized.
        return found.clone() if "blob" not in kept else found


def fill_module(module: nn.Module, record: Mapping[str, Any], get: Get) -> None:
    """Fill a module with the stored parameters and buffers of the same names; nothing is unpickled or imported.

    Args:
        module: Of the same structure as the stored one.
        record: What `TorchCodec.encode` gave for that.
        get: Reads blobs.

    Raises:
        CodecError: A name, shape or dtype differs; the module is unchanged.
    """
    parts = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own, tensors = dict(parts), Tensors(record, get)
    stored = {kept["name"]: tensors(n) for n, kept in enumerate(record["tensors"]) if "name" in kept}
    covered = {id(own[name]) for name in stored if name in own}
    differing = sorted(
        {name for name, tensor in own.items() if id(tensor) not in covered}
        | {name for name, tensor in stored.items() if name not in own or not _alike(own[name], tensor)}
    )
    if differing:
        raise CodecError(f"the module given as code is not of the stored structure: {differing[:5]} differ")
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


def _put_storages(storages: Sequence[memoryview], put: Put) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    small = bytearray()
    for data in storages:
        records.append({"at": len(small), "nbytes": data.nbytes})
        if data.nbytes < SMALL_BYTES:
            small += data
    large = [(n, data) for n, data in enumerate(storages) if data.nbytes >= SMALL_BYTES]
    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="mongotorch-blobs") as pool:
        try:
            names = list(pool.map(lambda one: put(one[1]), large))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error: nothing more is hashed
    for (n, data), name in zip(large, names, strict=True):
        records[n] = {"blob": name, "nbytes": data.nbytes}
    return {"storages": records, "small": put(bytes(small)) if small else None}


class _Bare:
    """Stands for a tensor without the attributes that somebody gave it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _attributes(tensor: Tensor) -> dict[str, Any]:
    """What somebody set on a tensor, such as how a parameter is decayed; not what compiling it left there."""
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_dynamo")}


def with_attributes(tensor: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """A tensor with the attributes that it was stored with."""
    vars(tensor).update(attributes)
    return tensor


def _without_data(name: str | None, where: str) -> CodecError:
    return CodecError(
        f"{where}: {name or 'a tensor'} is on the meta device and has no data; load its weights, or make it with "
        "module.to_empty(device='cpu') and initialise it",
        field=name or where,
    )


def _reduce(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, Tensor):
        attributes = _attributes(value) if _is_plain(value) else {}
        return (with_attributes, (_Bare(value), attributes)) if attributes else None
    return _reduce_parametrized(value)


def _reduce_parametrized(value: Any) -> tuple[Any, ...] | None:
    """How a parametrised module is pickled: by the class that it was before, and its attributes.

    `torch.nn.utils.parametrize` gives such a module a class of its own, which cannot be imported.
    """
    if not isinstance(value, nn.Module) or not parametrize.is_parametrized(value):
        return None
    cls: type = parametrize.type_before_parametrizations(value)
    empty = copyreg._reconstructor  # type: ignore[attr-defined]  # what pickle itself makes empty objects by
    return empty, (cls, object, None), dict(vars(value)), None, None, restore_parametrized


def restore_parametrized(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Make a new, empty module of the unparametrised class the parametrised module that was stored.

    Args:
        module: The module.
        attributes: Of the stored one, `parametrizations` among its modules.
    """
    vars(module).update(attributes)
    parametrize._inject_new_class(module)
    for name in attributes["_modules"]["parametrizations"]:
        parametrize._inject_property(module, name)


def _is_plain(part: Any) -> bool:
    """Whether it is a tensor of strided memory, and of no subclass."""
    return (
        type(part) in _KINDS
        and part.layout is torch.strided
        and not (part.is_quantized or part.is_nested)
        and part.device.type != "meta"
    )


def _names(value: Any) -> dict[int, str]:
    if not isinstance(value, nn.Module):
        return {}
    tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
    return {id(tensor): name for name, tensor in reversed(tensors)}


def _layout(tensors: Sequence[Tensor], names: Mapping[int, str]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel())
    shared: dict[int, int] = {}
    storages: list[memoryview] = []
    records = []
    for tensor in tensors:
        pointer = tensor.untyped_storage().data_ptr()
        lazy = tensor.is_conj() or tensor.is_neg()  # what it shows is not what is in its memory
        if tensor.numel() and users[pointer] > 1 and not lazy:
            if pointer not in shared:
                shared[pointer] = len(storages)
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                storages.append(_bytes(whole))
            index, stride, offset = shared[pointer], list(tensor.stride()), tensor.storage_offset()
        else:
            alone = tensor.detach().resolve_conj().resolve_neg()
            alone = alone if _is_dense(alone) else alone.contiguous()
            index, stride, offset = len(storages), list(alone.stride()), 0
            storages.append(_dense_bytes(alone))
        record = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": stride,
            "offset": offset,
            "storage": index,
            "requires_grad": tensor.requires_grad and tensor.is_leaf,  # what has a graph is stored without it
            "parameter": isinstance(tensor, nn.Parameter),
        }
        records.append(record | ({"name": names[id(tensor)]} if id(tensor) in names else {}))
    return records, storages


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order (channels last does)."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size if size != 1 else 1
    return not (tensor.is_conj() or tensor.is_neg())


def _dense_bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return _bytes(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8))


def _bytes(tensor: Tensor) -> memoryview:
    # On the CPU this is the tensor's own memory; from another device it is the one copy that is needed.
    array: Any = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
    return memoryview(array)


def _rebuild(record: Mapping[str, Any], storages: Sequence[Tensor]) -> Tensor:
    dtype = getattr(torch, record["dtype"])
    whole = storages[record["storage"]] if 0 not in record["shape"] else torch.empty(0, dtype=torch.uint8)
    flat = torch.empty(0, dtype=dtype).set_(whole.untyped_storage())
    tensor = flat.as_strided(record["shape"], record["stride"], record["offset"])
    if record["parameter"]:
        return nn.Parameter(tensor, requires_grad=record["requires_grad"])
    return tensor.requires_grad_(record["requires_grad"])

"""Turns values into what MongoDB holds and back: plain BSON where that can be, else blobs beside the record.

Nothing here knows torch or a database; `put` and `get` are handed in and decide where bytes live.
"""

from mongotorch.codecs.arrays import ArrayParts, decode_document, encode_document, numpy_array, numpy_parts
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.names import current_name, first_names, first_names_given, name_of, resolve, resolve_in
from mongotorch.codecs.pickles import Pickled, check_python, dumps, loads, running_python
from mongotorch.codecs.registry import (
    CODEC,
    FORMAT,
    NEWER,
    PART_BYTES,
    READABLE,
    REFERENCE,
    RESERVED_NAMES,
    WRITTEN,
    Codecs,
    NamedBlob,
    NewBlobs,
    Opaque,
    PowerOfTen,
    check_format,
    codec_of,
    describe,
    reference,
    referenced,
    renamed,
    sequence_record,
)

__all__ = [
    "CODEC",
    "FORMAT",
    "NEWER",
    "PART_BYTES",
    "READABLE",
    "REFERENCE",
    "RESERVED_NAMES",
    "WRITTEN",
    "ArrayParts",
    "Codec",
    "Codecs",
    "Get",
    "NamedBlob",
    "NewBlobs",
    "Opaque",
    "Pickled",
    "PowerOfTen",
    "Put",
    "check_format",
    "check_python",
    "codec_of",
    "current_name",
    "decode_document",
    "describe",
    "dumps",
    "encode_document",
    "first_names",
    "first_names_given",
    "loads",
    "name_of",
    "numpy_array",
    "numpy_parts",
    "reference",
    "referenced",
    "renamed",
    "resolve",
    "resolve_in",
    "running_python",
    "sequence_record",
]

"""From a value to what MongoDB holds and back: plain BSON where it can be, blobs beside it where not.

Always: nothing here knows torch or a database; what is handed in as `put` and `get` decides where bytes live.
"""

from mongotorch.codecs.arrays import ArrayParts, decode_document, encode_document, numpy_array, numpy_parts
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.formats import FORMAT, NEWER, READABLE, WRITTEN, check_format
from mongotorch.codecs.pickles import Pickled, check_python, dumps, loads, running_python
from mongotorch.codecs.public_names import current_name, first_names
from mongotorch.codecs.records import (
    CODEC,
    REFERENCE,
    Opaque,
    codec_of,
    describe,
    reference,
    referenced,
    renamed,
    sequence_record,
)
from mongotorch.codecs.registry import Codecs
from mongotorch.codecs.values import name_of, resolve

__all__ = [
    "CODEC",
    "FORMAT",
    "NEWER",
    "READABLE",
    "REFERENCE",
    "WRITTEN",
    "ArrayParts",
    "Codec",
    "Codecs",
    "Get",
    "Opaque",
    "Pickled",
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
    "loads",
    "name_of",
    "numpy_array",
    "numpy_parts",
    "reference",
    "referenced",
    "renamed",
    "resolve",
    "running_python",
    "sequence_record",
]

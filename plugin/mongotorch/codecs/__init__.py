"""From a value to what MongoDB holds and back: plain BSON where it can be, blobs beside it where not.

Always: nothing here knows torch or a database; what is handed in as `put` and `get` decides where bytes live.
"""

from __future__ import annotations

from mongotorch.codecs.arrays import ArrayParts, decode_document, encode_document, numpy_array, numpy_parts
from mongotorch.codecs.base import Codec, Get, Put
from mongotorch.codecs.names import name_of, resolve
from mongotorch.codecs.pickles import Pickled, check_python, dumps, loads, running_python
from mongotorch.codecs.registry import Codecs

__all__ = [
    "ArrayParts",
    "Codec",
    "Codecs",
    "Get",
    "Pickled",
    "Put",
    "check_python",
    "decode_document",
    "dumps",
    "encode_document",
    "loads",
    "name_of",
    "numpy_array",
    "numpy_parts",
    "resolve",
    "running_python",
]

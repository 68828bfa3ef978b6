"""Decodes BSON replies into columns."""

from mongotorch.data.decode.columns import FLOAT, Column, Columns, build, convert
from mongotorch.data.decode.decoder import decode, without_missing
from mongotorch.data.decode.ids import U64, among, encode, id_keys, mix, pack_ids, salt, same_type, sort_key
from mongotorch.data.decode.raw_bson import Documents, Reply, find_command, found, last_id, offsets

__all__ = [
    "FLOAT",
    "U64",
    "Column",
    "Columns",
    "Documents",
    "Reply",
    "among",
    "build",
    "convert",
    "decode",
    "encode",
    "find_command",
    "found",
    "id_keys",
    "last_id",
    "mix",
    "offsets",
    "pack_ids",
    "salt",
    "same_type",
    "sort_key",
    "without_missing",
]

"""Decodes BSON replies into columns."""

from mongotorch.data.decode.columns import FLOAT, Column, Columns
from mongotorch.data.decode.decoder import decode
from mongotorch.data.decode.ids import U64, among, encode, id_keys, mix, pack_ids, salt, same_type, sort_key
from mongotorch.data.decode.misfits import Form, common_forms, decode_fitting, fits
from mongotorch.data.decode.raw_bson import Reply, find_command, found, last_id, offsets

__all__ = [
    "FLOAT",
    "U64",
    "Column",
    "Columns",
    "Form",
    "Reply",
    "among",
    "common_forms",
    "decode",
    "decode_fitting",
    "encode",
    "find_command",
    "fits",
    "found",
    "id_keys",
    "last_id",
    "mix",
    "offsets",
    "pack_ids",
    "salt",
    "same_type",
    "sort_key",
]

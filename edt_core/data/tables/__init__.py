"""Tables of very many rows: Arrow files that are written as they are made, and mapped when they are read."""

from edt_core.data.tables.arrow_file import ROWS, MappedTable, Pages, mapped
from edt_core.data.tables.digest_rows import DigestRows
from edt_core.data.tables.fixed_bytes import bytes_column, digests_in
from edt_core.data.tables.sorting import Sorter, is_ascending

__all__ = [
    "ROWS",
    "DigestRows",
    "MappedTable",
    "Pages",
    "Sorter",
    "bytes_column",
    "digests_in",
    "is_ascending",
    "mapped",
]

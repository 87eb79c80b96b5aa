"""Walks the files of a source, on a disk or in a store that fsspec opens.

File names are bytes, relative to the folder of the source and with `/`: a Linux name need not be UTF-8.
"""

from edt_core.data.sources.walk.below import Files, entries, files_below, in_threads_if_slow, one_file
from edt_core.data.sources.walk.disk import stat_of
from edt_core.data.sources.walk.entry import STAT, Entry

__all__ = ["STAT", "Entry", "Files", "entries", "files_below", "in_threads_if_slow", "one_file", "stat_of"]

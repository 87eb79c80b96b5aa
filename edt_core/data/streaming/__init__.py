"""Readers for latents that do not fit on a node's disk.

`shards` reads our Arrow shards block by block, exactly: `train.reader: stream`. `tars` reads WebDataset tars in
sequence, with weaker guarantees: `train.reader: webdataset`.
"""

from edt_core.data.streaming.order import StreamOrder
from edt_core.data.streaming.shards import ShardStream, stream_shards
from edt_core.data.streaming.tars import TarShard, TarStream, stream_tars

__all__ = ["ShardStream", "StreamOrder", "TarShard", "TarStream", "stream_shards", "stream_tars"]

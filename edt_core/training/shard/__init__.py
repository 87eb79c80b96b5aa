"""The parts of a training's state that each rank has alone (`train.shard`), and the files that all ranks write."""

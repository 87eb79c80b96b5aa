"""webdataset on image and latent shards: what a training loop of somebody else sees."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from edt_core.data.latents import LatentShard
from tests.clients.conftest import Images
from tests.support.jobs import Chain


def test_its_loader_sees_every_image_with_its_label(images: Images) -> None:
    import webdataset

    dataset = webdataset.WebDataset([str(path) for path in images.shards], shardshuffle=False)
    decoded = dataset.decode("torchrgb8").to_tuple("webp;png;jpg", "cls", "__key__").batched(5)
    batches = list(webdataset.WebLoader(decoded, batch_size=None, num_workers=0))
    pixels, labels = (torch.cat([torch.as_tensor(batch[k]) for batch in batches]) for k in (0, 1))
    assert [key for batch in batches for key in batch[2]] == images.keys
    assert np.array_equal(labels, images.labels)
    assert np.array_equal(pixels.permute(0, 2, 3, 1), images.pixels)


def test_it_takes_shards_by_a_pattern_of_braces(images: Images) -> None:
    """The form that its documentation has."""
    import webdataset

    pattern = str(images.shards[0].parent / "images-{00000..00002}.tar")
    assert sum(1 for _ in webdataset.WebDataset(pattern, shardshuffle=False)) == len(images.labels)


def test_latents_decode_by_their_extension(chain: Chain) -> None:
    import webdataset

    tars = [str(path) for path in chain["latents"].paths("latents-*.tar")]
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("posterior.npy", "json")
    read = list(DataLoader(samples, batch_size=None))
    shards = [LatentShard(path) for path in chain["latents"].paths("latents-*.arrow")]
    assert np.array_equal([about["label"] for _, about in read], np.concatenate([s.labels for s in shards]))
    posterior = np.concatenate([shard.posterior() for shard in shards])
    assert np.array_equal(np.stack([np.asarray(array) for array, _ in read]), posterior)

"""Names and versions of everything that is written to disk, defined only here.

Shapes: C latent channels, h latent height and width (image size / autoencoder factor).
"""

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2

KINDS = (
    "images",
    "autoencoder",
    "latents",
    "classifier",
    "checkpoint",
    "guide",
    "own_images",
    "reference",
    "features",
    "evaluation",
    "validation",
    "along",
    "scaling",
    "report",
)

# Image shards: WebDataset tar. A sample is `<key>.webp` (or .png, .jpg), `<key>.cls` (class index, ASCII) and
# `<key>.json`: {"label", "sha256", "source"}, the digest and the name of the original file.
IMAGE_SHARD = "images-{:05d}.tar"
IMAGE_MEMBERS = {"webp": "webp", "png": "png", "jpeg": "jpg"}  # image_format -> member
CLASS_MEMBER, JSON_MEMBER = "cls", "json"
CLASSES_NAME = "classes.json"  # class names, in order of class index
REPORT_OF_SHARD = "reports/{}.json"  # the outcome for each image of a shard, with the sha256 of its original

# Latent shards: Arrow IPC file format, one row per image, and optionally WebDataset shards with the same rows.
# Mean and std of a side are adjacent, so that a training sample is one contiguous read.
LATENT_SHARD = "latents-{:05d}.arrow"
LATENT_TAR_SHARD = "latents-{:05d}.tar"
LATENT_TOKENS = "tokens-{:05d}.npy"  # of a feature network, on request: see edt_core.data.latents.tokens
LATENT_SCHEMA_VERSION = "2"
# Version of shards with centred latents (shift_factor, latents_mean): a reader of version 2 would scale them wrong.
CENTRED_LATENT_SCHEMA_VERSION = "3"
HALF_LATENT_SCHEMA_VERSION = "4"  # of shards in half precision, centred or not
LATENT_ROWS_PER_BATCH = 256  # rows of an Arrow record batch; the last of a shard may have fewer
KEY, LABEL = "key", "label"
POSTERIOR_COLUMNS = ("posterior", "mirror_posterior")  # float32[2*C*h*w] each: mean, then std; or in half precision
ROUNDING = "rounding"  # float32[2*C], only in half precision: the largest error of a row's means, then stds, by channel
LATENT_TAR_MEMBER = "posterior.npy"  # float32 [2, 2, C, h, w]: side (image, mirror image), then (mean, std)

# Checkpoints: a folder `checkpoints/step-NNNNNNNN` of safetensors and JSON. Its own manifest is written last and holds
# {"version", "step", "regular", "score", "files": {name: sha256}, "seal"}; the seal is the sha256 of the rest.
# Version 2 is that of trainings that drew the random numbers of a step at once: it can be read, but not resumed from.
CHECKPOINT_VERSION, READABLE_CHECKPOINTS = 3, (2, 3)
CHECKPOINTS, STEP_PREFIX = "checkpoints", "step-"
CHECKPOINT_MANIFEST = "checkpoint.json"
MODEL_WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
OTHER_EMA_WEIGHTS = "ema-{!r}.safetensors"  # of the other decays
WIDTH_EMA_WEIGHTS = "ema-width-{!r}.safetensors"  # power-function averages, of the trained parameters alone
OPTIMIZER_STATE, TIMESTEP_STATE = "optimizer.safetensors", "timesteps.safetensors"
ALIGN_HEAD = "align_head.safetensors"  # only of trainings with `train.align`
DEPTH_LOGITS = "depth_logits.safetensors"  # only of trainings with `train.prune`: `logits` float32 [K]
TRAIN_STATE = "state.json"
MODEL_CONFIG = "model_config.json"
HISTORY_NAME = "history.jsonl"
# Beside the checkpoints: `snapshots/step-NNNNNNNN/ema-width-<width>.safetensors`, the power-function averages after so
# many steps, of 16 or 32 bits, with `average` in the metadata of the file: {"step", "width"} as JSON.
SNAPSHOTS = "snapshots"

# Feature units: safetensors with `indices`, `seeds` and `labels` int64 [n]; for each space `<space>.features` float32
# [n, D] and, if its network has them, `<space>.spatial` float32 [n, D'] and `<space>.probabilities` float32 [n, K];
# for the first samples of a repeat, or all, `images` uint8 [m, S, S, 3].
FEATURE_UNIT = "unit-{:05d}.safetensors"
# Reference: safetensors with, for `<space>` and `inception.spatial`, `.mean` [D], `.covariance` [D, D] float64 and
# `.count` int64 [1] (0 if unknown), and `<space>.features` float32 [m, D] of images at even distances.
REFERENCE_NAME = "reference.safetensors"
# Beside it, for each image shard, the features of all its rows: `<space>.features`, `<space>.spatial` float32 [n, D].
IMAGE_FEATURES = "features/images-{:05d}.safetensors"
METRICS_NAME = "metrics.json"
ALONG_NAME = "along.json"  # evaluations along a training: {"points": [{"step", metric: value}], "protocol"}
# Validation: metrics per class, and the confusions of samples and real images as safetensors with `labels`,
# `predictions` and `counts` int64 [m]: the pairs of classes that occur.
VALIDATION_NAME = "validation.json"
SAMPLE_CONFUSION, REAL_CONFUSION = "confusion-samples.safetensors", "confusion-real.safetensors"
# Scaling: a row for each training of a ladder, the laws that were fitted to them, and figures.
SCALING_NAME, SCALING_POINTS = "scaling.json", "points.parquet"
SCALING_FIGURES = ("iso-flop.png", "laws.png", "quality.png", "labels.png")
REPORT_NAME = "report.html"
SAMPLES_NAME = "samples.png"

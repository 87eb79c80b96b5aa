"""A folder in which the commands of the pages run for real: as they stand, with small things in the place of large.

The small things are few and the same on every page, so that what one command made serves the others: a training costs
half a minute whatever its size, and each set of samples some seconds. The folder begins with a copy of a store that
holds one whole run of the quickstart.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.pages import Command, blocks, pages
from tests.support.small import MODEL, SMALL, copy_store, edt

# Large things that the pages name, and what stands for them here.
STANDS_FOR = (
    # The default is for models of factor 8; here they are of factor 4.
    (r"edt import (\S+)(?=\s|$)(?! --autoencoder)", r"edt import \1 --autoencoder {root}/vae"),
    (r"/data/(flowers|imagenet/train|imagenet|cifar10_sample)\b", "{root}/digits"),
    (r"stabilityai/sd-vae-ft-ema|/models/sd-vae-ft-ema", "{root}/vae"),
    (r"--inception-weights \S+", "--classifier classifier"),  # FID's weights are 90 MB that are not ours to ship
    (r"--metric fid\b", "--metric fd_classifier"),
    (r"\b(edt|dit)-(s|xl)-2-256/3\b", f"{MODEL}/2"),
    (r"\b(edt|dit)-(s|xl)-2-256\b", MODEL),
    (r"--classes (otter,207|'golden retriever,360,macaw')", "--classes 3,1"),
    (r"(EDT-XL-2-256|EDT-S)\.pt", "edt.pt"),
    (r"(?<!/)DiT-XL-2-256x256\.pt", "dit.pt"),
    (r"mdt_xl2_v2_ckpt\.pt", "mdt.pt"),
    (r"\b(EDT|DiT|MDTv2)-(S|B|L|XL)/[248]", r"\1-Tiny/2"),
    (r"train\.max_steps=\d+", "train.max_steps=6"),
    (r"cfg=1,1\.5,2 amm=off,paper", "cfg=1 amm=off,1"),  # no placement is published for small models
    (r"--amm-blocks paper", "--amm-blocks 1"),
    (r"\bNAME/VERSION\b", f"{MODEL}/2"),
    (r"\bNAME\b", MODEL),
    (r"\bDIR\b", "./model"),
    (r" --num-gpus-per-worker \d+", ""),
    (r"(?<!-)/shared/", "./"),
    (r"\bSOURCE\b", "{root}/digits"),
    (r"\bIMAGES OUT\b", "./images ./latents"),
    (r"\bIMAGES\b", "./images"),
    (r"\./denoiser\.pt2", "denoiser.pt2"),
    (r"\bLATENTS\b", "./latents"),
    (r"\b(FOLDER|ARTIFACT_DIR)\b", "./images"),
)
_SETS = " ".join(f"--set {text}" for text in SMALL)
# Sizes that stand before a command's own options, so that what it asks for stays; and those that end it.
FIRST = (
    (r"edt (run|plan) \S+", _SETS),
    (r"edt schedule (quickstart|\S+\.yaml)", f"{_SETS} --no-serve"),
    (r"edt doctor \S+", "--quick"),  # Ray runs here already; the probe of it is tested with the doctor
    (r"edt (doctor|plan) imagenet\S+", "--set autoencoder.pretrained={root}/vae --set autoencoder.downsample_factor=4"),
    (r"edt run (imagenet\S+|mine\.yaml)", "--set evaluate.allow_rank_deficient=true"),  # so few samples have no FID
    (
        r"edt run \S+(?=.*along\.every)",
        "--set along.num_samples=20 --set along.num_sampling_steps=2 --set along.unit_size=20",
    ),
    (r"edt plan imagenet\S+", "--set extractors=[classifier] --set promote.metric=fd_classifier"),
)
_CHAIN = "--num-sampling-steps 2"
_SAMPLES = f"--num-samples 20 --unit-size 20 {_CHAIN} --num-workers 1"
LAST = {
    "preprocess": "--image-size 32",
    "encode": "--num-workers 1",
    "train": "--max-steps 2 --global-batch-size 4 --num-workers 1",
    "evaluate": f"{_SAMPLES} --keep-images all",  # so that `edt export` has pixels of whatever was evaluated
    "amm-search": f"{_SAMPLES} --repeats 2 --blocks 0 --radii 1 --top 1",
    "sample": f"--num 1 {_CHAIN}",
}
# What a command needs that another one makes: words of it, and that other command.
PREPROCESS = "edt preprocess /data/imagenet ./images"
ENCODE = "edt encode ./images ./latents --autoencoder stabilityai/sd-vae-ft-ema"
_MEASURED = "--images ./images --inception-weights W"
EVALUATE = f"edt evaluate {MODEL}@champion ./evaluation {_MEASURED}"
AMM_SEARCH = f"edt amm-search {MODEL}@champion ./dit-with-amm {_MEASURED} --cfg-scale 1.5"
NEEDS = (
    (r"\./images", PREPROCESS),
    (r"\./latents", ENCODE),
    (r"\./model\b(?!s)", f"edt models pull {MODEL}@champion ./model"),
    (rf"{MODEL}/2", "edt run edt.yaml"),  # the copied store has version 1
    (rf"models rollback {MODEL}", f"edt models promote {MODEL}/2 --force"),
    (r"\./dit-with-amm(?= \./eval)", AMM_SEARCH),
    (r"<fingerprint>", EVALUATE),
    (r"\bedt\.yaml", "edt init --images /data/flowers --yes"),
    (r"schedule (pause|resume|remove) nightly", 'edt schedule quickstart --cron "0 3 * * *" --name nightly'),
)


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    said: str


@dataclass
class Sandbox:
    """A folder with images, an autoencoder, released files; the same command runs in it once."""

    root: Path
    done: dict[str, Done] = field(default_factory=dict)

    @classmethod
    def made(cls, root: Path, images: Path, store: Path) -> "Sandbox":
        """A new one. `images` is a folder of few labelled images, `store` one with a run of the small quickstart."""
        from edt_core.autoencoders.autoencoder import build_autoencoder
        from edt_core.config import AutoencoderConfig
        from tests.support.acceptance import content
        from tests.support.models import released, sit

        copy_store(store, root / "edt-store")
        (root / "classifier").symlink_to(next((root / "edt-store" / "classifier").iterdir()))
        (root / "digits").symlink_to(images)  # by its name the models of `edt init` are versions of the quickstart's
        (root / "imagenet").mkdir()
        (root / "imagenet" / "train").symlink_to(images)  # where the shipped configurations look
        for name, model in (("edt", "EDT-Tiny/2"), ("dit", "DiT-Tiny/2"), ("mdt", "MDTv2-Tiny/2")):
            released(root, model).rename(root / f"{name}.pt")
        for block in (block for page in pages() for block in blocks(page) if block.language == "yaml"):
            if name := re.fullmatch(r"# (\w+\.yaml)", block.lines[0]):  # a file that the page has the reader write
                (root / name[1]).write_text("\n".join(block.lines).replace("/data/flowers", str(images)))
        sit(root / "dit.pt", root / "SiT-XL-2-256.pt")
        (root / "acceptance.json").write_text(json.dumps(content()))
        build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).save_pretrained(root / "vae")
        return cls(root)

    @property
    def store(self) -> Path:
        return self.root / "edt-store"

    def newest(self, kind: str) -> Path:
        """The newest artifact of a kind in the store."""
        return max((self.root / kind).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime).parent

    def run(self, text: str) -> Done:
        """A command of `edt`, as a page has it, in this process; once, and after what it needs."""
        small = self.small(text)
        if small not in self.done:
            self.need(small)
            self.done[small] = self._run(self._found(small))
        return self.done[small]

    def need(self, small: str) -> None:
        """Run what makes the things that a text names, but for a command that makes them itself."""
        for pattern, other in NEEDS:
            if re.search(pattern, small) and not small.startswith(other) and self.small(other) != small:
                needed = self.run(other)
                assert needed.code == 0, f"{other} ended with {needed.code}:\n{needed.said}"

    def small(self, text: str) -> str:
        """A command with small things in the places of the large ones."""
        if text.startswith("edt cost"):  # it counts large models in a second, but all of them in 20
            return text if text != "edt cost" else "edt cost EDT-S/2"
        for pattern, instead in STANDS_FOR:
            text = re.sub(pattern, instead, text)
        for pattern, sizes in FIRST:
            text = re.sub(pattern, rf"\g<0> {sizes}", text, count=1)
        return f"{text} {LAST.get(text.split()[1], '')}".strip().replace("{root}", str(self.root))

    def _found(self, small: str) -> str:
        """Places that only a run can tell, put into a command."""
        if "<fingerprint>" in small:
            small = small.replace("<fingerprint>", self.newest("evaluation/features").name)
        return re.sub(r"\bOUT\b", f"./out-{len(self.done)}", small)

    def _run(self, text: str) -> Done:
        words = Command("", 0, text).words
        if words[1] == "export":  # several pages name one target, with other options
            there = self.root / words[3]
            shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
        done = edt(*words[1:], cwd=self.root)
        return Done(done.returncode, done.stdout + done.stderr)

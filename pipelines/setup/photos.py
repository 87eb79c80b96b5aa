"""What `edt init` and `edt doctor` say about images that cannot be decoded, and about photos stored sideways."""

from dataclasses import dataclass

from edt_core.config import PreprocessConfig
from edt_core.data.inspection import Inspection
from jobs.stages.preprocess import enough_fraction


@dataclass(frozen=True)
class Remark:
    """A problem with the images and its remedy. `stops`: a run would end because of it."""

    problem: str
    remedy: str
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


def remarks_on(inspection: Inspection, config: PreprocessConfig) -> list[Remark]:
    """The problems of some images with this preprocessing."""
    return [*_unreadable(inspection, config), *_turned(inspection, config)]


def _unreadable(inspection: Inspection, config: PreprocessConfig) -> list[Remark]:
    number, allowed = len(inspection.unreadable), config.allowed_unreadable(inspection.total)
    if not number:
        return []
    problem = inspection.unreadable_text()
    if number == inspection.total:
        return [Remark(problem, "replace the images", stops=True)]
    if number <= allowed:
        return [Remark(problem, f"a run leaves out at most {allowed:,} unreadable and reports the number")]
    fraction = enough_fraction(number / inspection.inspected)
    remedy = (
        f"a run stops at more than {allowed:,} of them; repair or remove them, or leave them out with --set "
        f"preprocess.max_bad_fraction={fraction:g}"
    )
    return [Remark(problem, remedy, stops=True)]


def _turned(inspection: Inspection, config: PreprocessConfig) -> list[Remark]:
    if not inspection.turned or config.rotate_by_exif:
        return []
    problem = f"{inspection.turned:,} of {inspection.inspected:,} images have an EXIF orientation that is ignored"
    remedy = "turn them upright with --set preprocess.rotate_by_exif=true, unless numbers are to match published ones"
    return [Remark(problem, remedy)]

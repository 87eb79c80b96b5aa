"""The figures of a report: what they show of what is known, in both themes, and never a growing page."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.report import figures
from pipelines.report.figures import Picture, champion_trend, distance_histogram, timestep_curves, training_curves
from tests.support.contrast import OTHER, TEXT, contrast
from tests.support.reports import HISTORY, REGISTRY

STYLES = Path(figures.__file__).parents[1] / "templates" / "report.css.j2"


def svg(picture: Picture) -> str:
    return base64.b64decode(picture.light.partition(",")[2]).decode()


def words(picture: Picture) -> list[str]:
    """The texts that are drawn."""
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg(picture))]


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("rgb(0, 0, 0)", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)


def test_text_and_lines_are_seen_on_the_cards_of_both_themes() -> None:
    light, dark = re.findall("--card: (#[0-9a-f]{6})", STYLES.read_text())
    lines = (figures.BLACK, figures.BLUE, figures.ORANGE, figures.TEAL, figures.VIOLET)
    for least, colours in ((TEXT, (figures.INK,)), (OTHER, lines)):
        for colour in colours:
            assert contrast(colour, light) >= least
            assert contrast(figures._ON_DARK[colour], dark) >= least


def test_curves_show_what_was_recorded() -> None:
    losses, rates = training_curves(HISTORY)
    assert "masked pass loss from 2 at step 1 to 0.4 at step 5" in losses.description
    assert "learning rate" in rates.description
    assert losses.light != losses.dark
    assert {"training loss", "full pass", "masked pass"} <= set(words(losses))
    full_only = [{"step": k, "loss": 1.0, "loss_full": 1.0} for k in (1, 2)]
    (figure,) = training_curves(full_only)
    assert "masked" not in figure.description
    assert len(training_curves(HISTORY[:1])) == 2
    assert training_curves([]) == []


def test_a_long_history_does_not_grow_the_page() -> None:
    rng = np.random.default_rng(0)
    short, long = ([{"step": k, "loss": rng.random()} for k in range(n)] for n in (500, 20_000))
    assert len(training_curves(long)[0].light) < 1.2 * len(training_curves(short)[0].light)


def test_losses_by_timestep_are_told_as_finely_as_they_are_known() -> None:
    finely = 1 / np.arange(1.0, 1001.0)
    finely[:20] = np.nan  # never drawn
    final, over_time = timestep_curves(HISTORY, finely, 1000)
    assert final is not None
    assert over_time is not None
    told = f"{finely[20:40].mean():.3g} at timesteps 20 to 39; {finely[980:].mean():.3g} at timesteps 980 to 999"
    assert told in final.description
    assert not any("$" in text for text in words(final))  # powers of ten are set as such
    assert "1st quarter (least noise) loss from 4 at step 1 to 0.8 at step 5" in over_time.description
    by_quarter, _ = timestep_curves(HISTORY, None, 1000)
    assert by_quarter is not None
    assert "0.8 at timesteps 0 to 249; 0.2 at timesteps 750 to 999" in by_quarter.description
    assert timestep_curves([{"step": 1, "loss": 1.0}], None, 1000) == (None, None)


def test_a_quarter_that_no_step_of_a_row_had_leaves_the_others() -> None:
    rows = [{"step": 1, "loss_t0": 1.0}, {"step": 2, "loss_t0": 0.5, "loss_t3": 0.25}]
    final, over_time = timestep_curves(rows, None, 1000)
    assert over_time is not None
    assert "4th (most noise) loss from 0.25 at step 2" in over_time.description
    assert final is not None
    assert "0.25 at timesteps 750 to 999" in final.description


def test_the_trend_tells_champions_apart() -> None:
    trend = champion_trend(REGISTRY.champions, "3", 1.5, None, "fd_classifier", crowned=True)
    told = "version 1 4.5, version 2 3.5 by another protocol, this version 3 1.5"
    assert told in trend.description
    assert {"v1", "v2", "v3", "other protocol, not comparable", "this version"} <= set(words(trend))
    like = champion_trend(REGISTRY.champions[:1], "3", 1.5, None, "fd_classifier", crowned=True)
    assert "other protocol, not comparable" not in words(like)
    candidate = champion_trend(REGISTRY.champions[:1], "3", 1.5, None, "fd_classifier", crowned=False)
    assert svg(like) != svg(candidate)  # no line leads to it


def test_this_version_is_marked_among_many_champions() -> None:
    many = [REGISTRY.champions[0].model_copy(update={"version": str(k)}) for k in range(1, 31)]
    texts = words(champion_trend(many, "31", 1.5, None, "fid", crowned=True))
    assert "v31" in texts
    assert sum(text.startswith("v") for text in texts) <= 10


def test_distances_are_drawn_of_equal_ones_too() -> None:
    picture = distance_histogram(np.zeros(3), np.zeros(5))
    assert "generated to real: half are within 0; real to another real: half are within 0" in picture.description

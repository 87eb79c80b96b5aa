"""Sections as values: what of them makes a fingerprint, and what a record keeps of fields that came later."""

from edt_core.config import Section, added, recorded_fields, result_fields, runtime


class Later(Section):
    """A section that an earlier version did not have."""

    enabled: bool = runtime(False)
    level: float = 0.5


class Inner(Section):
    steps: int = 3
    workers: int = runtime(1)
    objective: str = added("gaussian")


class Outer(Section):
    name: str
    inner: Inner = Inner()
    later: Later = added(Later())


def test_a_record_leaves_out_added_fields_at_their_default_and_nothing_else() -> None:
    assert recorded_fields(Outer(name="a")) == {"name": "a", "inner": {"steps": 3, "workers": 1}}
    flow = Outer(name="a", inner=Inner(objective="flow"))
    assert recorded_fields(flow)["inner"] == {"steps": 3, "workers": 1, "objective": "flow"}
    assert recorded_fields(Outer(name="a", later=Later(enabled=True)))["later"] == {"enabled": True, "level": 0.5}
    assert Outer.model_validate(recorded_fields(flow)) == flow


def test_a_fingerprint_leaves_out_what_does_not_change_the_result_as_well() -> None:
    assert result_fields(Inner(workers=4)) == {"steps": 3}
    assert result_fields(Inner(objective="flow")) == {"steps": 3, "objective": "flow"}
    assert result_fields(Later(enabled=True)) == {"level": 0.5}

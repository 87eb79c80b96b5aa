"""One file a model family, and the registry of them. A family that is named here is known everywhere.

Beside them: what a family states (`family`), where AMM acts (`amm_placements`), the base of three of them (`adaln`).
"""

from edt_core.models.families.dit import DIT_FAMILY
from edt_core.models.families.edt import EDT_FAMILY
from edt_core.models.families.family import Family
from edt_core.models.families.mdtv2 import MDTV2_FAMILY
from edt_core.models.families.uvit import UVIT_FAMILY

FAMILIES: dict[str, Family] = {
    family.config.architecture: family for family in (EDT_FAMILY, DIT_FAMILY, MDTV2_FAMILY, UVIT_FAMILY)
}

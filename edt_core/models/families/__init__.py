"""The model families, one file each, and their registry: a family is available everywhere once it is listed here.

Other modules: the interface of a family (`family`), AMM placements (`amm_placements`), blocks that may be left out
(`depth`), a base of three families (`adaln`), the codes of a family that predicts tokens (`codes`).
"""

from edt_core.models.families.dit import DIT_FAMILY
from edt_core.models.families.edt import EDT_FAMILY
from edt_core.models.families.family import Family
from edt_core.models.families.maskgit import MASKGIT_FAMILY
from edt_core.models.families.mdtv2 import MDTV2_FAMILY
from edt_core.models.families.uvit import UVIT_FAMILY

FAMILIES: dict[str, Family] = {
    family.config.architecture: family for family in (EDT_FAMILY, DIT_FAMILY, MDTV2_FAMILY, UVIT_FAMILY, MASKGIT_FAMILY)
}

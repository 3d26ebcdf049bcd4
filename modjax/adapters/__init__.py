"""Adapters: routers x modules, attached from outside. Start reading at `adapted.py`."""

from modjax.adapters.adapted import Adapted as Adapted
from modjax.adapters.adapted import Mixture as Mixture
from modjax.adapters.adapted import Rule as Rule
from modjax.adapters.adapted import RuleError as RuleError
from modjax.adapters.modules import LowRank as LowRank
from modjax.adapters.routers import Features as Features
from modjax.adapters.routers import Mix as Mix
from modjax.adapters.routers import Single as Single

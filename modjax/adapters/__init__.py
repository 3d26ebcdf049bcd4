"""Adapters: routers x modules, attached from outside. Start reading at `adapted.py`."""

from modjax.adapters.adapted import Adapted as Adapted
from modjax.adapters.bottleneck import Bottleneck as Bottleneck
from modjax.adapters.compose import compose as compose
from modjax.adapters.compose import merge as merge
from modjax.adapters.extend import extend as extend
from modjax.adapters.extend import fill as fill
from modjax.adapters.extend import known_rates as known_rates
from modjax.adapters.low_rank import LowRank as LowRank
from modjax.adapters.method import describe_method as describe_method
from modjax.adapters.method import rules_of as rules_of
from modjax.adapters.routers import Features as Features
from modjax.adapters.routers import Single as Single
from modjax.adapters.routing import Mix as Mix
from modjax.adapters.rules import Mixture as Mixture
from modjax.adapters.rules import Rule as Rule
from modjax.adapters.rules import RuleError as RuleError
from modjax.adapters.scale import Scale as Scale
from modjax.adapters.skills import Skills as Skills
from modjax.adapters.skills import Stochastic as Stochastic
from modjax.adapters.skills import Uniform as Uniform
from modjax.adapters.trees import join as join
from modjax.adapters.trees import lazy_parts as lazy_parts
from modjax.adapters.trees import logical_axes as logical_axes
from modjax.adapters.trees import split as split
from modjax.adapters.trees import table as table
from modjax.adapters.trees import update_rates as update_rates

"""The tables that stages leave in a run's `results/` folder and that the report reads.

A table is one JSON file (`results/<name>.json`), written as a whole.
"""

from allmend.results.audit import (
    AuditTable,
    Cell,
    Discoverable,
    EpsilonBound,
    Exposure,
    Extraction,
    Learnt,
    LikelihoodGap,
    Membership,
    View,
    longest_prefix,
)
from allmend.results.collaborators import TOGETHER, ArmGraph, ArmGroups, CollaboratorsTable, Grouped, Pair
from allmend.results.comparison import ComparedModel, ComparedPair, Comparison
from allmend.results.depth import KINDS_IN_WORDS, SEQUENTIAL, DepthLine, DepthSearch, DepthTable, Frontier
from allmend.results.figures import BASE, MEMBERS, POOLED, Estimate, Spread, Table
from allmend.results.influence import ArmInfluence, InfluenceByMember, LegTraffic, MemberInfluence, in_typical_scores
from allmend.results.own import OwnRecord, OwnRecords, OwnTable
from allmend.results.personal_audit import KeptByMembers, OverMembers, RankTest, Whose, member_of
from allmend.results.personalised import PersonalisedArm, PersonalisedMember, PersonalisedTable
from allmend.results.privacy import Budget, PrivacyTable
from allmend.results.routing import ArmRouting, MemberRouting, RoutingTable
from allmend.results.utility import Difference, Utility, UtilityTable

__all__ = [
    "BASE",
    "KINDS_IN_WORDS",
    "MEMBERS",
    "POOLED",
    "SEQUENTIAL",
    "TOGETHER",
    "ArmGraph",
    "ArmGroups",
    "ArmInfluence",
    "ArmRouting",
    "AuditTable",
    "Budget",
    "Cell",
    "CollaboratorsTable",
    "ComparedModel",
    "ComparedPair",
    "Comparison",
    "DepthLine",
    "DepthSearch",
    "DepthTable",
    "Difference",
    "Discoverable",
    "EpsilonBound",
    "Estimate",
    "Exposure",
    "Extraction",
    "Frontier",
    "Grouped",
    "InfluenceByMember",
    "KeptByMembers",
    "Learnt",
    "LegTraffic",
    "LikelihoodGap",
    "MemberInfluence",
    "MemberRouting",
    "Membership",
    "OverMembers",
    "OwnRecord",
    "OwnRecords",
    "OwnTable",
    "Pair",
    "PersonalisedArm",
    "PersonalisedMember",
    "PersonalisedTable",
    "PrivacyTable",
    "RankTest",
    "RoutingTable",
    "Spread",
    "Table",
    "Utility",
    "UtilityTable",
    "View",
    "Whose",
    "in_typical_scores",
    "longest_prefix",
    "member_of",
]

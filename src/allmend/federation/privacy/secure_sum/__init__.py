"""Sums that nobody sees the parts of: secure aggregation with pairwise masks, and no model in sight.

    terms = Terms(session="survey 7, question 1", members=public_keys, length=1000)
    total = SecureSum(terms)                              # the coordinator: carries messages, learns the sum alone
    member = SecureMember(terms, "north", private_key)    # one at each member

Real numbers go through `FixedPoint` first. What it protects, and from whom, is in `docs/secure-sum.md`.
"""

from allmend.federation.privacy.secure_sum.coordinator import SecureSum
from allmend.federation.privacy.secure_sum.fixed_point import FixedPoint
from allmend.federation.privacy.secure_sum.member import SecureMember
from allmend.federation.privacy.secure_sum.messages import ProtocolError
from allmend.federation.privacy.secure_sum.terms import Terms

__all__ = ["FixedPoint", "ProtocolError", "SecureMember", "SecureSum", "Terms"]

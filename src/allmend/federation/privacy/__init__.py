"""What protects members and their records in training, and what that protection costs."""

from allmend.federation.privacy.secure_sum import FixedPoint, ProtocolError, SecureMember, SecureSum, Terms

__all__ = ["FixedPoint", "ProtocolError", "SecureMember", "SecureSum", "Terms"]

"""Which of two rankers a user meets: a consumer-bucketed A/B test (the paper's Section 4.3.1).

A salted hash puts every user at a fixed place in [0, 1); users below the treatment's share meet the
treatment. So nothing is stored, every process and every release gives the same answer, and raising
the share moves users from control to treatment only. Another salt deals the users anew, which is
what the next test needs: with the same salt it would meet the same two groups.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from features.errors import BadInputError

Bucket = Literal["control", "treatment"]
CONTROL: Bucket = "control"
TREATMENT: Bucket = "treatment"
BUCKETS: tuple[Bucket, Bucket] = (CONTROL, TREATMENT)

_BITS = 53  # of a hash that a float64 holds exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Routes users to ``control`` or ``treatment``.

    Attributes:
        salt: of the hash; the name of the test will do.
        treatment_share: of the users, in [0, 1].

    Raises:
        BadInputError: the share is not in [0, 1], or the salt is empty.
    """

    salt: str
    treatment_share: float

    def __post_init__(self) -> None:
        if not 0 <= self.treatment_share <= 1:  # nor NaN
            raise BadInputError(f"treatment share must be in [0, 1], got {self.treatment_share}")
        if not self.salt:
            raise BadInputError("salt must not be empty: two tests without one share their buckets")

    def bucket(self, user_id: int) -> Bucket:
        """Return the bucket of a user; about 1 µs."""
        return TREATMENT if self.place(user_id) < self.treatment_share else CONTROL

    def place(self, user_id: int) -> float:
        """Return where in [0, 1) the salted hash puts a user."""
        # The number holds no NUL, so that no two pairs of salt and user give the same text.
        salted = f"{self.salt}\0{int(user_id)}".encode()
        digest = hashlib.blake2b(salted, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> (64 - _BITS)) / (1 << _BITS)

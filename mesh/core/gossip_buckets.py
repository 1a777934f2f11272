"""A short summary of who is known in which version: two nodes compare it in 256 bytes, however many members there are.

Members fall into 64 buckets by their key; a bucket's sum is the XOR of a hash per (key, incarnation, version), so that
a change costs one step. A sum of 0 says (nearly always) that a bucket is empty. Hashes of 32 bits may by chance hide a
difference until the next change of anything in the bucket, one time in four thousand million.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from mesh.core.gossip_record import Age
from mesh.core.node_state import PeerKey

BUCKETS = 64
_SUM_BYTES = 4
DIGEST_BYTES = BUCKETS * _SUM_BYTES


class Buckets:
    def __init__(self) -> None:
        self._sums = [0] * BUCKETS
        self._ages: list[dict[PeerKey, tuple[Age, int]]] = [{} for _ in range(BUCKETS)]
        self._digest: bytes | None = None

    def put(self, key: PeerKey, age: Age) -> None:
        """*key* is now known in version *age*."""
        self.drop(key)
        bucket, mark = bucket_of(key), _mark(key, age)
        self._ages[bucket][key] = age, mark
        self._sums[bucket] ^= mark

    def drop(self, key: PeerKey) -> None:
        bucket = bucket_of(key)
        if (held := self._ages[bucket].pop(key, None)) is not None:
            self._sums[bucket] ^= held[1]
        self._digest = None

    def keys(self, bucket: int) -> Iterable[PeerKey]:
        return self._ages[bucket]

    def digest(self) -> bytes:
        if self._digest is None:
            self._digest = b"".join(number.to_bytes(_SUM_BYTES, "big") for number in self._sums)
        return self._digest

    def differing(self, theirs: bytes) -> list[int]:
        """Return the buckets in which somebody with the digest *theirs* knows something else."""
        ours = self.digest()
        if len(theirs) != DIGEST_BYTES or theirs == ours:
            return []
        return [b for b in range(BUCKETS) if ours[b * 4 : b * 4 + 4] != theirs[b * 4 : b * 4 + 4]]


def is_empty(digest: bytes, bucket: int) -> bool:
    """Return whether somebody with this digest knows nobody in *bucket*."""
    return not any(digest[bucket * _SUM_BYTES : (bucket + 1) * _SUM_BYTES])


def bucket_of(key: PeerKey) -> int:
    return key[0] % BUCKETS


def _mark(key: PeerKey, age: Age) -> int:
    return int.from_bytes(blake2b(b"%b%d.%d" % (key, *age), digest_size=_SUM_BYTES).digest(), "big")

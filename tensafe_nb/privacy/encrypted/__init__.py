"""Homomorphic LoRA: a server applies an adapter to activations, and adds up updates, that it cannot read (CKKS).

    client: x ─ pack, encrypt ─▶ bytes ─▶ server: B (A x) on ciphertexts ─▶ bytes ─▶ client: decrypt

`client.py` and `server.py` are the halves, `packing.py` how numbers lie in ciphertexts, `envelope.py` what guards the
bytes between them, `aggregate.py` the encrypted sum of updates, `cost.py` the price beforehand. tenseal loads when the
first key is made. There is no way in here that computes in clear.
"""

from tensafe_nb.privacy.encrypted.aggregate import Aggregator, Cohort, CohortMember, Layout
from tensafe_nb.privacy.encrypted.client import HEClient
from tensafe_nb.privacy.encrypted.cost import HECost, estimate
from tensafe_nb.privacy.encrypted.packing import Shape
from tensafe_nb.privacy.encrypted.server import HEServer

__all__ = [
    "HEClient", "HEServer", "Shape", "HECost", "estimate",
    "Layout", "Cohort", "CohortMember", "Aggregator",
    "THREAT_MODEL",
]  # fmt: skip

THREAT_MODEL = """\
- Protects: your activations x from an honest-but-curious server (RLWE, 128-bit SEAL parameters). The server learns \
shapes, the layer, timing and the number of tokens.
- Does not protect the adapter from the client: B·A is linear, and d basis vectors recover it (576 tokens, 9 calls at \
S = 64). Rate limits only slow this down; there is no circuit privacy and no noise flooding, and slots that are not \
read may hold terms of single ranks.
- Does not protect against a malicious server: it can return wrong results, and nothing verifies them.
- CKKS is not IND-CPA-D (Li-Micciancio 2021): decrypted values are never sent back to the server or published raw; \
keys are fresh for every connection.
- Gives no protection if the client is compromised, and the base model must be on the client."""

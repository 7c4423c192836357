"""A server, a training client of a tenant of its own, and what OpenAI's clients would use of them."""

import uuid
from collections.abc import Iterator

import httpx
import pytest

import tensafe_nb as tn
from tests.parity.serving import Serving


@pytest.fixture
def token(serving: Serving) -> str:
    return str(serving.tokens.mint(f"t{uuid.uuid4().hex[:8]}"))


@pytest.fixture
def service(serving: Serving, token: str) -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient(serving.url, token) as service:
        yield service
    serving.end()


@pytest.fixture
def tc(service: tn.ServiceClient) -> Iterator[tn.TrainingClient]:
    with service.create_training_client(lora_config=tn.LoRAConfig(rank=2)) as tc:
        yield tc


@pytest.fixture
def v1(serving: Serving, token: str) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"{serving.url}/v1", headers=headers, timeout=30, verify=False) as http:
        yield http

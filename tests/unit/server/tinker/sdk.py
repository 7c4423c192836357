"""What the SDK sends and reads, in a few lines of our own: the messages are those of our pool."""

import itertools
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from tensafe_nb.server.tinker.messages import MESSAGES, parsed

TOKENS = (5, 6, 7, 8, 9)


def tensor(values: Any) -> Any:
    """Return a Tensor of whole numbers or of numbers."""
    array = np.asarray(values)
    whole = array.dtype.kind == "i"
    array = array.astype("<i8" if whole else "<f4")
    return MESSAGES["Tensor"](dense=array.tobytes(), dtype=2 if whole else 1, shape=array.shape)


def datum(tokens: Sequence[int] = TOKENS, **inputs: Any) -> Any:
    """Return a Datum; its targets are the next tokens, each of weight 1, unless something else is given."""
    shifted = {"target_tokens": list(tokens[1:])} | inputs
    text = MESSAGES["EncodedText"](tokens=np.array(tokens[:-1], "<i4").tobytes())
    return MESSAGES["Datum"](
        model_input=[MESSAGES["Chunk"](encoded_text=text)],
        loss_fn_inputs={name: tensor(values) for name, values in shifted.items()},
    )


class Sdk:
    """A session, a model in it, and the numbers of its requests."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx.Client(
            base_url=f"{url}/tinker/api/v1", headers={"x-api-key": f"tml-{token}"}, timeout=60, verify=False
        )
        self.session = self.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        self.models, self.number, self.model_id = 0, 0, ""

    def close(self) -> None:
        """End the session."""
        self.http.post(f"/sessions/{self.session}/finish", json={"reason": {"type": "success"}})
        self.http.close()

    def post(self, route: str, **fields: Any) -> Any:
        """Return the JSON of an answer."""
        answer = self.http.post(route, json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, request_id: str) -> Any:
        """Return what a future ended with: JSON, or a message's bytes."""
        while True:
            answer = self.http.post("retrieve_future", json={"request_id": request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                is_json = answer.headers["content-type"] == "application/json"
                return answer.json() if is_json else answer.content

    def make(self, base_model: str = "builtin:tiny", **fields: Any) -> str:
        """Make a model, whose requests come next."""
        self.models, self.number = self.models + 1, 0
        asked = {"lora_config": {"rank": 4, "seed": 1}, "base_model": base_model} | fields
        made = self.post("create_model", session_id=self.session, model_seq_id=self.models, **asked)
        self.model_id = str(self.wait(made["request_id"])["model_id"])
        return self.model_id

    def send(self, data: Sequence[Any], loss: str = "cross_entropy", *, number: int, **fields: Any) -> str:
        """Send a forward_backward under a number, and return the id of its future."""
        request = MESSAGES["ForwardBackwardRequest"](
            model_id=self.model_id, seq_id=number, data=data, loss_fn=loss, **fields
        )
        answer = self.http.post(
            "forward_backward",
            content=request.SerializeToString(),
            headers={"content-type": "application/x-protobuf"},
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def next(self) -> int:
        """Return the number of the next request."""
        self.number += 1
        return self.number

    def forward_backward(self, data: Sequence[Any], loss: str = "cross_entropy", **fields: Any) -> Any:
        """Return (the metrics, the log-probabilities of each datum), or an error."""
        return told(self.wait(self.send(data, loss, number=self.next(), **fields)))

    def ask(self, route: str, **fields: Any) -> Any:
        """Send a request of the model's, and return what its future ended with."""
        made = self.post(route, model_id=self.model_id, seq_id=self.next(), **fields)
        return self.wait(made["request_id"])

    def step(self, **settings: Any) -> Any:
        """Take a step."""
        return self.ask("optim_step", adam_params={"learning_rate": 0.01, **settings})

    def sampler(self, number: int, **source: Any) -> str:
        """Begin a sampling session."""
        made = self.post(
            "create_sampling_session", session_id=self.session, sampling_session_seq_id=number, **source
        )
        return str(made["sampling_session_id"])

    def sample(self, sampler: str, tokens: Sequence[int] = TOKENS, **fields: Any) -> Any:
        """Return a SampleResponse, or an error."""
        prompt = {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}
        asked = {"prompt": prompt, "sampling_params": {"max_tokens": 3, "seed": 1}, "num_samples": 1} | fields
        made = self.post("asample", sampling_session_id=sampler, **asked)
        assert len(made["sample_sequence_ids"]) == asked["num_samples"]
        found = self.wait(made["request_id"])
        return found if isinstance(found, dict) else parsed("SampleResponse", found)


def told(found: Any) -> Any:
    """Return what a ForwardBackwardOutput tells; an error as it is."""
    if isinstance(found, dict):
        return found
    output = parsed("ForwardBackwardOutput", found)
    each = []
    for record in output.loss_fn_outputs:
        tensor = record.fields["logprobs"]
        ends = np.frombuffer(tensor.offsets, "<i8") // 4
        values = np.frombuffer(tensor.data, "<f4")
        for start, end in itertools.pairwise(ends):
            each.append(values[start:end].reshape(-1, *tensor.trailing_shape))
    return dict(output.metrics), each

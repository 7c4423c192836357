"""A server as a managed service of a real JupyterHub: two users train from their own kernels, and see nothing else.

JupyterHub, its proxy and the users' servers are processes of their own, made by `make hub`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tensafe_nb as tn

ROOT = Path(__file__).parents[2]
HUB = ROOT / ".venv-hub"
OPERATOR = "operator-token-of-the-test"
SCOPE = "access:services!service=tensafe"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (HUB / "bin" / "jupyterhub").exists(), reason="run by `make hub`"),
]

CONFIG = """
c = get_config()
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{ports[1]}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.ConfigurableHTTPProxy.command = ["node", "{hub}/node/node_modules/.bin/configurable-http-proxy"]
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/homes/{{username}}"
c.Spawner.cmd = ["{hub}/bin/jupyterhub-singleuser"]
c.Spawner.args = ["--allow-root"]
c.Spawner.environment = {{"PYTHONPATH": "{root}", "OMP_NUM_THREADS": "1"}}
load_subconfig("{root}/docs/deploy/jupyterhub_config.py")
service = c.JupyterHub.services[-1]
service["url"] = "http://127.0.0.1:{ports[3]}"
service["command"][service["command"].index("/srv/tensafe")] = "{folder}/server"
service["command"][service["command"].index("/srv/models")] = "{folder}"
service["environment"] |= {{"PYTHONPATH": "{root}", "OMP_NUM_THREADS": "1"}}
c.JupyterHub.services.append({{"name": "operator", "api_token": "{operator}"}})
operates = {{"name": "operates", "scopes": ["admin:users", "admin:servers", "tokens"], "services": ["operator"]}}
c.JupyterHub.load_roles.append(operates)
"""

TRAIN = """
import os
import tensafe_nb as tn
assert os.environ["JUPYTERHUB_API_TOKEN"] not in str(vars(tn.ServiceClient))
service = tn.ServiceClient({address!r}, api_key=os.environ["JUPYTERHUB_API_TOKEN"])
tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
for _ in range(3):
    tc.forward_backward({{"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}})
    step = tc.optim_step().result().step
saved = tc.save_state(name="mine").result().artifact_id
print("DONE", step, tc.training_client_id, saved, len(service.list_training_clients()))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a hub; give its address."""
    folder = tmp_path_factory.mktemp("hub")
    with contextlib.ExitStack() as sockets:
        found = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        ports = [each.getsockname()[1] for each in found]
    config = folder / "jupyterhub_config.py"
    config.write_text(CONFIG.format(ports=ports, hub=HUB, folder=folder, root=ROOT, operator=OPERATOR))
    address = f"http://127.0.0.1:{ports[0]}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [HUB / "bin" / "jupyterhub", "--config", config],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: answers(f"{address}/services/tensafe/health"), process)
            yield address
        finally:
            process.terminate()
            process.wait(60)
            print((folder / "log").read_text()[-6_000:], file=sys.stderr)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def until(
    so: Callable[[], bool], process: "subprocess.Popen[Any] | None" = None, seconds: float = 120
) -> None:
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.2)


def ask(hub: str, method: str, path: str, **options: Any) -> Any:
    headers = {"authorization": f"token {OPERATOR}"}
    answer = httpx.request(method, f"{hub}/hub/api{path}", headers=headers, timeout=60, **options)
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def token_of(hub: str, user: str, scopes: list[str]) -> str:
    return str(ask(hub, "POST", f"/users/{user}/tokens", json={"scopes": scopes})["token"])


def in_own_kernel(hub: str, user: str, code: str) -> str:
    """Start a user's server and a kernel in it, and run code there, as JupyterLab does; return what it printed."""
    from websockets.sync.client import connect

    ask(hub, "POST", f"/users/{user}/server")
    until(lambda: ask(hub, "GET", f"/users/{user}")["servers"].get("", {}).get("ready", False))
    token = token_of(hub, user, ["access:servers!user"])
    made = httpx.post(
        f"{hub}/user/{user}/api/kernels", headers={"authorization": f"token {token}"}, timeout=60
    )
    assert made.status_code == 201, made.text
    session, message_id = uuid.uuid4().hex, uuid.uuid4().hex
    content = {
        "code": code,
        "silent": False,
        "store_history": False,
        "allow_stdin": False,
        "user_expressions": {},
    }
    header = {
        "msg_id": message_id,
        "msg_type": "execute_request",
        "session": session,
        "username": "",
        "version": "5.3",
    }
    asked = {
        "header": header,
        "parent_header": {},
        "metadata": {},
        "content": content,
        "channel": "shell",
        "buffers": [],
    }
    url = f"{hub}/user/{user}/api/kernels/{made.json()['id']}/channels?session_id={session}".replace(
        "http", "ws", 1
    )
    printed = ""
    with connect(url, additional_headers={"authorization": f"token {token}"}, max_size=None) as line:
        line.send(json.dumps(asked))
        while True:
            told = json.loads(line.recv(timeout=240))
            if told["parent_header"].get("msg_id") != message_id:
                continue
            if told["msg_type"] == "stream":
                printed += told["content"]["text"]
            if told["msg_type"] == "error":
                printed += "\n".join(told["content"]["traceback"])
            if told["msg_type"] == "execute_reply":
                return printed


def test_two_users_of_a_hub_train_on_its_server_and_neither_sees_the_others(hub: str) -> None:
    address = f"{hub}/services/tensafe"
    users = ("ada", "Ben.Müller")
    for user in users:
        ask(hub, "POST", f"/users/{user}")
    told = {user: in_own_kernel(hub, user, TRAIN.format(address=address)) for user in users}
    done = {user: text.rpartition("DONE ")[2].split() for user, text in told.items()}
    for user in users:
        assert done[user][0] == "3" and done[user][3] == "1", told[user]
    for user, other in (users, users[::-1]):
        with tn.ServiceClient(address, token_of(hub, user, [SCOPE])) as service:
            assert [info.training_client_id for info in service.list_training_clients()] == [done[user][1]]
            assert [saved.artifact_id for saved in service.list_artifacts()] == [done[user][2]]
            with pytest.raises(tn.errors.TrainingClientNotFoundError):
                service.get_training_client(done[other][1])
            with pytest.raises(tn.errors.ArtifactNotFoundError):
                service.get_artifact(done[other][2])
            tc = service.get_training_client(done[user][1])  # the kernel's own, from outside
            assert tc.refresh().step == 3


def test_a_token_without_the_scope_a_revoked_one_and_a_services_open_nothing(hub: str) -> None:
    address = f"{hub}/services/tensafe"
    with contextlib.suppress(AssertionError):  # another test has made the user
        ask(hub, "POST", "/users/eve")
    for token in (
        token_of(hub, "eve", ["read:users!user"]),
        OPERATOR,
        "nonsense-token-1234",
        "tsnb_" + "x" * 43,
    ):
        with pytest.raises(tn.errors.AuthenticationError):
            tn.ServiceClient(address, token)
    made = ask(hub, "POST", "/users/eve/tokens", json={"scopes": [SCOPE]})
    ask(hub, "DELETE", f"/users/eve/tokens/{made['id']}")
    with pytest.raises(tn.errors.AuthenticationError):
        tn.ServiceClient(address, made["token"])

"""A server as a managed service of a real JupyterHub: two users train from their own kernels, and see nothing else.

JupyterHub, its proxy and the users' servers are processes of their own, made by `make hub`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

import tensafe_nb as tn
from scripts.hub import HUB, MIB, OPERATOR, SCOPE, Hub
from scripts.hub_of_ten import HEAD, row, teach

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (HUB / "bin" / "jupyterhub").exists(), reason="run by `make hub`"),
]

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
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Run a hub."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
        print(hub.log, file=sys.stderr)


def in_own_kernel(hub: Hub, user: str, code: str) -> str:
    """Start a user's server and a kernel in it, and run code there, as JupyterLab does; return what it printed."""
    hub.start(user)
    with hub.kernel(user) as line:
        return line.run(code)


def test_two_users_of_a_hub_train_on_its_server_and_neither_sees_the_others(hub: Hub) -> None:
    address = hub.service
    users = ("ada", "Ben.Müller")
    for user in users:
        hub.ask("POST", f"/users/{user}")
    told = {user: in_own_kernel(hub, user, TRAIN.format(address=address)) for user in users}
    done = {user: text.rpartition("DONE ")[2].split() for user, text in told.items()}
    for user in users:
        assert done[user][0] == "3" and done[user][3] == "1", told[user]
    for user, other in (users, users[::-1]):
        with tn.ServiceClient(address, hub.token_of(user, [SCOPE])) as service:
            assert [info.training_client_id for info in service.list_training_clients()] == [done[user][1]]
            assert [saved.artifact_id for saved in service.list_artifacts()] == [done[user][2]]
            with pytest.raises(tn.errors.TrainingClientNotFoundError):
                service.get_training_client(done[other][1])
            with pytest.raises(tn.errors.ArtifactNotFoundError):
                service.get_artifact(done[other][2])
            tc = service.get_training_client(done[user][1])  # the kernel's own, from outside
            assert tc.refresh().step == 3


def test_a_token_without_the_scope_a_revoked_one_and_a_services_open_nothing(hub: Hub) -> None:
    address = hub.service
    with contextlib.suppress(AssertionError):  # another test has made the user
        hub.ask("POST", "/users/eve")
    for token in (
        hub.token_of("eve", ["read:users!user"]),
        OPERATOR,
        "nonsense-token-1234",
        "tsnb_" + "x" * 43,
    ):
        with pytest.raises(tn.errors.AuthenticationError):
            tn.ServiceClient(address, token)
    made = hub.ask("POST", "/users/eve/tokens", json={"scopes": [SCOPE]})
    hub.ask("DELETE", f"/users/eve/tokens/{made['id']}")
    with pytest.raises(tn.errors.AuthenticationError):
        tn.ServiceClient(address, made["token"])


def test_a_second_kernel_is_noticed_and_shut_down_under_the_base_path_of_a_hub(hub: Hub) -> None:
    for user in ("mia", "noa"):
        hub.ask("POST", f"/users/{user}")
        hub.start(user)
    code = "import os; os.environ['MEM_LIMIT'] = '1'\nfrom tensafe_nb.widgets.live import neighbours\n"
    with hub.kernel("noa"), hub.kernel("mia") as line:
        assert line.run(f"{code}print(neighbours.crowding())").strip() == "None", "another user's is none"
        with hub.kernel("mia"):
            told = line.run("found = neighbours.crowding(); print(neighbours.shut_down(found['id']))")
            assert "was shut down" in told and line.run("print(neighbours.crowding())").strip() == "None"


@pytest.mark.timeout(7200)
@pytest.mark.skipif(os.geteuid() != 0, reason="memory groups are root's to make")
def test_ten_students_of_a_gigabyte_run_notebook_05_at_once_and_nobody_is_killed() -> None:
    print(f"\n{HEAD}")
    for how in ("embedded", "remote"):
        lesson = teach(how, ["05"], 10, 1024 * MIB)
        print(row(lesson))
        assert not any(student.killed for student in lesson.students)
        assert all(student.right == lesson.exercises for student in lesson.students)
        assert lesson.slowest <= 3 * lesson.median
    assert lesson.bases == 1 and (lesson.references or 0) >= 10, "one base, for all who have an adapter on it"

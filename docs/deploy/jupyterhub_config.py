"""A part of jupyterhub_config.py: a training server as a service of the hub, for the hub's users.

`pip install 'tensafe_nb[hub]'` where the hub runs. `load_subconfig("jupyterhub_config_tensafe.py")` takes it in.
"""

import sys

c = get_config()  # noqa: F821
SCOPE = "access:services!service=tensafe"

c.JupyterHub.services = [
    *c.JupyterHub.get("services", []),
    {
        "name": "tensafe",  # offered at https://hub.example.org/services/tensafe
        "url": "http://127.0.0.1:8001",  # where it listens; nobody but the hub's proxy needs to reach it
        "command": [
            *(sys.executable, "-m", "tensafe_nb.cli", "serve", "--hub"),
            *("--home", "/srv/tensafe", "--models", "/srv/models"),
            *("--max-clients", "4", "--max-stored", "20GB"),
        ],
        "environment": {"OMP_WAIT_POLICY": "PASSIVE"},
    },
]
c.JupyterHub.load_roles = [
    *c.JupyterHub.get("load_roles", []),
    {"name": "user", "scopes": ["self", SCOPE]},  # what users make tokens for, on the hub's page "Token"
    {  # what a user's own notebook server has in JUPYTERHUB_API_TOKEN
        "name": "server",
        "scopes": ["users:activity!user", "access:servers!server", SCOPE],
    },
]

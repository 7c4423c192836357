"""The commands of a server: `serve` runs it, `tokens` says who may use it."""

import argparse
import json
import os
import re
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from tensafe_nb.cluster.clusters import Cluster, LocalCluster, RayCluster
from tensafe_nb.errors import ValidationError
from tensafe_nb.store.home import TENANT, Home

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_server(commands: Any) -> None:
    """Add them to the parser of `tensafe-nb`."""
    serve = commands.add_parser("serve", help="offer this machine's core to notebooks elsewhere")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--home", type=Path, help="where everything is kept, instead of TENSAFE_HOME")
    serve.add_argument(
        "--tokens", type=Path, help="the file of tokens; without one, a token is made for this run"
    )
    serve.add_argument(
        "--print-token", action="store_true", help="make a token for the tenant 'local' and show it"
    )
    serve.add_argument(
        "--models", type=Path, help="the folder whose models are offered, by their names beneath it"
    )
    serve.add_argument(
        "--hub-model", action="append", default=[], help="a hub id that may be loaded; may be repeated"
    )
    serve.add_argument(
        "--host-name", action="append", default=[], help="a name it is called by, besides localhost"
    )
    serve.add_argument(
        "--hub",
        action="store_true",
        help="run as a service of a JupyterHub, whose users it takes; address and path are the hub's to say",
    )
    serve.add_argument("--root-path", default="", help="the path under which a proxy offers it")
    serve.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="PKG.MOD:ATTR",
        help="a loss of this machine's own that tenants may name by its path; may be repeated",
    )
    serve.add_argument(
        "--no-export",
        action="store_true",
        help="let no weights leave in the clear: checkpoints stay sealed, and adapters can be applied, not taken away",
    )
    serve.add_argument(
        "--cluster",
        metavar="WHERE",
        help="compute not in this process, but in replicas: 'processes' of this machine, or actors of Ray: 'auto' is "
        "the cluster that this machine belongs to, HOST:PORT the head of another, 'local' starts one here",
    )
    serve.add_argument(
        "--engines",
        type=int,
        default=2,
        metavar="N",
        help="replicas of each training client on a cluster (default: %(default)s)",
    )
    serve.add_argument(
        "--engine-cpus", type=int, default=None, metavar="N", help="cores for each replica on a cluster"
    )
    serve.add_argument(
        "--engine-gpus",
        type=int,
        default=0,
        metavar="N",
        help="GPUs for each replica on a cluster (default: %(default)s: on the CPU)",
    )
    add_limits(serve, usual=True)
    serve.add_argument(
        "--idle-after",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="put the model of a training client away that nobody has used for so long; the next operation brings it "
        "back (default: %(default)s; 0 never)",
    )
    serve.add_argument(
        "--tinker",
        action="store_true",
        help="also speak the protocol of the public tinker SDK, beneath /tinker",
    )
    serve.add_argument("--json", action="store_true", help='print {"url": …, "token": …} as the first line')
    serve.set_defaults(run=run_server)
    tokens = commands.add_parser("tokens", help="who may use a server")
    actions = tokens.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, words in (
        ("new", "make a token and show it, once"),
        ("list", "list them"),
        ("revoke", "take one back"),
        ("limit", "set what one tenant may have; without a limit, show what is set"),
    ):
        action = actions.add_parser(name, help=words)
        action.add_argument("--tokens", type=Path, required=True, help="the file of tokens")
        action.set_defaults(run=run_tokens)
        if name == "limit":
            action.add_argument("tenant", help="whose")
            add_limits(action, usual=False)
        if name == "new":
            action.add_argument(
                "--tenant", default=TENANT, help="whose clients it opens (default: %(default)s)"
            )
        if name == "list":
            action.add_argument("--home", type=Path, help="of the server, for what each tenant stores there")
        if name == "revoke":
            action.add_argument("token_id", help="its id, from `tensafe-nb tokens list`")


LIMITS = {  # by their names in `server.door.limits.Limits`
    "clients": ("training clients at a time", 32),
    "queued": ("operations that wait, of all its clients together", 4_000),
    "requests": ("requests a minute", 60_000),
    "encrypted": ("connections for encrypted calls at a time", 8),
    "stored_bytes": ("bytes of all that it stores, such as 20GB", None),
}
UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000, "T": 1_000_000_000_000}


def add_limits(parser: argparse.ArgumentParser, *, usual: bool) -> None:
    """Add an option for each limit of a tenant."""
    for name, (words, default) in LIMITS.items():
        parser.add_argument(
            f"--max-{'stored' if name == 'stored_bytes' else name}",
            dest=name,
            type=number if usual else number_or_none,
            default=default if usual else argparse.SUPPRESS,
            metavar="N",
            help=f"{words}; of each tenant that has no limit of its own (default: {default or 'no limit'})"
            if usual
            else f"{words}; 'usual' takes the limit back",
        )


def number(text: str) -> int:
    """Read a whole number, with K, M, G or T behind it if it is large."""
    found = re.fullmatch(r"(\d{1,15})\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 500, 20GB")
    return int(found[1]) * UNITS[found[2].upper()]


def number_or_none(text: str) -> int | None:
    """Read a whole number, or the word that takes a limit back."""
    return None if text == "usual" else number(text)


def run_server(chosen: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C: then what runs is finished, and the logs are written out."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see `service.embedded_transport`
    try:
        from tensafe_nb.server.app import create_app
        from tensafe_nb.server.door.limits import Limits
        from tensafe_nb.server.process import server_of, spare_the_system
    except ImportError as error:
        raise ValidationError(
            f"A server needs more packages ({error}): pip install 'tensafe_nb[server]'"
        ) from error
    from tensafe_nb.server.door.tokens import Tokens

    spare_the_system()
    if chosen.loss:
        from tensafe_nb.losses import resolve_loss

        for name in chosen.loss:  # one that is not there is an error now, not a student's later
            resolve_loss(name)
    tokens, users = Tokens(chosen.tokens), None
    if chosen.hub:
        from tensafe_nb.server.door.hub import HubUsers, address_from_hub, hub_auth

        users = HubUsers(tokens, hub_auth())
        chosen.host, chosen.port, chosen.root_path = address_from_hub()
        chosen.host_name = chosen.host_name or ["*"]  # the hub's, which stands before this and has many
    elif chosen.host not in LOOPBACK and chosen.tokens is None:
        raise ValidationError(
            f"Listening at {chosen.host} lets others reach this server: give --tokens FILE, "
            f"made with tensafe-nb tokens new."
        )
    own = chosen.tokens is None and not chosen.hub
    shown = tokens.mint() if chosen.print_token or own else None
    home = Home.of_environment() if chosen.home is None else Home(chosen.home)
    if chosen.models is not None:
        if not chosen.models.is_dir():
            raise ValidationError(f"--models {chosen.models}: there is no such folder.")
        home = Home(home.root.resolve())
        os.chdir(chosen.models)  # a model is named by its path from here
    app = create_app(
        home,
        tokens,
        models=None if chosen.models is None else Path.cwd(),
        hub_models=chosen.hub_model,
        hosts=chosen.host_name,
        limits=Limits(**{name: getattr(chosen, name) for name in LIMITS}),
        losses=chosen.loss,
        root_path=chosen.root_path,
        identity=users,
        idle_after=60 * chosen.idle_after if chosen.idle_after > 0 else None,
        exports=not chosen.no_export,
        engines=cluster_of(chosen),
        api_keys=chosen.tinker,
    )
    if chosen.tinker:
        offer_tinker(app)
    family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
    listening = socket.create_server((chosen.host, chosen.port), family=family, reuse_port=False)
    host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
    url = f"http://{host}:{listening.getsockname()[1]}{chosen.root_path}"
    announce(url, shown, as_json=chosen.json, tinker=chosen.tinker)
    server_of(app).run(sockets=[listening])
    return 0


def cluster_of(chosen: argparse.Namespace) -> Cluster | None:
    """Return the cluster that was asked for, if any."""
    if chosen.cluster is None:
        return None
    given: dict[str, Any] = {
        "engines": chosen.engines,
        "cpus": chosen.engine_cpus,
        "gpus": chosen.engine_gpus,
    }
    return LocalCluster(**given) if chosen.cluster == "processes" else RayCluster(chosen.cluster, **given)


def offer_tinker(app: Any) -> None:
    """Offer the protocol of the public tinker SDK.

    Raises:
        ValidationError: Its messages cannot be read without a package that is not installed.
    """
    try:
        from tensafe_nb.server.tinker.routes import add_tinker
    except ImportError as error:
        raise ValidationError(
            f"serve --tinker needs one more package ({error}): pip install 'tensafe_nb[tinker]'"
        ) from error
    add_tinker(app)


def announce(url: str, token: str | None, *, as_json: bool, tinker: bool = False) -> None:
    """Say where the server is, and how a notebook reaches it."""
    if as_json:
        print(json.dumps({"url": url, "token": token}), flush=True)
        return
    print(f"tensafe_nb serves at {url} (Ctrl-C ends it)")
    if token is not None:
        print(f'In a notebook:  service = ServiceClient("{url}", api_key="{token}")')
        print(f"OpenAI's clients:  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={token}")
        if tinker:
            print(f"The tinker SDK:  TINKER_BASE_URL={url}/tinker TINKER_API_KEY=tml-{token}")
        print("This token is shown once." if sys.stdout.isatty() else "", flush=True)


def run_tokens(chosen: argparse.Namespace) -> int:
    """Make, list or revoke tokens."""
    from tensafe_nb.server.door.stored import Stored
    from tensafe_nb.server.door.tokens import Tokens

    tokens = Tokens(chosen.tokens)
    if chosen.action == "new":
        print(tokens.mint(chosen.tenant))
    elif chosen.action == "limit":
        given = {name: getattr(chosen, name) for name in LIMITS if hasattr(chosen, name)}
        own = tokens.limit(chosen.tenant, **given) if given else tokens.limits().get(chosen.tenant, {})
        shown = ", ".join(f"{name} {value:,}" for name, value in own.items())
        print(f"{chosen.tenant}: {shown or 'as the server says for every tenant'}")
    elif chosen.action == "revoke":
        tokens.revoke(chosen.token_id)
        print(f"{chosen.token_id} is revoked")
    else:
        root = (Home.of_environment() if chosen.home is None else Home(chosen.home)).root
        stored = {token.tenant: Stored(Home(root, token.tenant)).total() for token in tokens.all()}
        for token in tokens.all():
            made = datetime.fromtimestamp(token.created_at).astimezone().isoformat(" ", "seconds")
            print(f"{token.token_id}  {token.tenant:16}  {made}  {stored[token.tenant]:,} bytes")
    return 0

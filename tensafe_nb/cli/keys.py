"""`tensafe-nb keys`: list, make, rotate or forget the keys that seal checkpoints."""

import argparse
import time
from typing import Any

from tensafe_nb.cli.vault import opened_vault, vault_command


def add_keys(commands: Any) -> None:
    """Add `keys` to the parser of `tensafe-nb`."""
    keys = commands.add_parser(
        "keys",
        help="list, make, rotate or forget the keys that seal checkpoints",
        description="Back up the key file that `list` names: without it your checkpoints cannot be opened.",
    ).add_subparsers(required=True, metavar="list|new|rotate|forget")
    vault_command(keys, "list", list_keys, "show the ids of the keys that are here; never the keys")
    vault_command(
        keys, "new", new_key, "make a new key for what is saved from now on; older ones go on opening"
    )
    vault_command(keys, "rotate", rotate, "make a new key and wrap everything that is stored with it")
    forgets = vault_command(keys, "forget", forget, "erase a key that nothing needs any more, for good")
    forgets.add_argument("key_id", metavar="ID", help="its id, as `list` shows it")


def list_keys(chosen: argparse.Namespace) -> int:
    from tensafe_nb.store.home import Home

    infos = opened_vault(chosen).keys.infos()
    for info in infos:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.created_at)) if info.created_at else "?"
        role = "seals new artifacts" if info.primary else "retired" if info.retired else "opens"
        print(f"{info.key_id}  {info.source}  made {made}  {role}")
    print(
        f"The key file is kept in {Home.of_environment().keys()}."
        if infos
        else "There are no keys yet: the first save makes one."
    )
    return 0


def new_key(chosen: argparse.Namespace) -> int:
    info = opened_vault(chosen).keys.new()
    print(
        f"{info.key_id} seals from now on. What is stored keeps its key: `tensafe-nb keys rotate` changes that."
    )
    return 0


def rotate(chosen: argparse.Namespace) -> int:
    vault = opened_vault(chosen)
    count = vault.rotate()
    print(f"{count} artifacts now open with {vault.keys.primary_id()}. Back up the key again.")
    return 0


def forget(chosen: argparse.Namespace) -> int:
    opened_vault(chosen).forget(chosen.key_id)
    print(
        f"{chosen.key_id} is erased: copies that are still sealed with it open nowhere but with your backup of it."
    )
    return 0

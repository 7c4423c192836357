"""Commands on the vault of the home folder: their `--keys` option, and the vault that it opens."""

import argparse
from typing import Any

KEYS_HELP = (
    "where the key comes from: file (the local key file), env (TENSAFE_KEK) or passphrase (TENSAFE_PASSPHRASE, "
    "else asked for); default: TENSAFE_KEK where it is set, else the file"
)


def vault_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a command that reads or writes the vault, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.add_argument("--keys", choices=("file", "env", "passphrase"), metavar="SOURCE", help=KEYS_HELP)
    parser.set_defaults(run=run)
    return parser


def opened_vault(chosen: argparse.Namespace) -> Any:
    """Return the vault of the home folder; neither torch nor a notebook is needed to open it."""
    from tensafe_nb.store.home import Home
    from tensafe_nb.store.vault import Vault

    return Vault(Home.of_environment(), chosen.keys)

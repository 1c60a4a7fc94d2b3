"""The `loratool` command: one subcommand for each registered step."""

from __future__ import annotations

import ctypes
import errno
import signal
import sys
from contextlib import suppress

import click

from loratool import plugins
from loratool.cli.commands import broken_command, step_command
from loratool.cli.output import print_error, print_plugins
from loratool.errors import LoratoolError, PluginError, UsageError


class Verbs(click.Group):
    """Loads a verb's module only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all steps, and `plugins`."""
        return sorted({*plugins.names("steps"), *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a step; for a step that cannot be had, one that says so."""
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in plugins.names("steps"):
            return own
        try:
            return step_command(cmd_name)
        except PluginError as error:
            return broken_command(cmd_name, error)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loratool")
def cli() -> None:
    """LoRA adapters: extract, check, stack, rescale, merge, take out, export, pull, push."""


@cli.command("plugins")
def list_plugins() -> None:
    """List everything that is registered, and what fails to import."""
    print_plugins()


def main() -> None:
    """Run the command line; expected errors become one message and exit status 1."""
    _keep_freed_memory()
    # A run that is terminated cleans up as one that is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(cli.main(prog_name="loratool", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except UsageError as error:
        print_error(str(error))
        sys.exit(2)
    except LoratoolError as error:
        print_error(str(error))
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        print_error(f"{error.filename or 'standard output'}: {error.strerror}")
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted; nothing was written")
        sys.exit(1)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: every tensor takes buffers of the same few megabytes again.

    It would give them back to the kernel in between, and fresh pages cost as much as the arithmetic
    that is done in them. The limits are those of mallopt(3); other C libraries have none.
    """
    trim_threshold, mmap_threshold = -1, -3
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 128 << 20)

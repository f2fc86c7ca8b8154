"""``serve-ranker``: an exported ranker as an HTTP service."""

from collections.abc import Sequence

from features.console import run_command
from serving.server_config import ServerConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(ServerConfig, _serve, prog="serve-ranker", arguments=arguments)


def _serve(config: ServerConfig) -> None:
    from serving.server import serve

    serve(config)


if __name__ == "__main__":
    raise SystemExit(main())
